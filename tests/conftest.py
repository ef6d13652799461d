"""Test-wide settings: compiled programs are kept between runs, and between the workers of one."""

import collections
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("HARDJAX_TEST_PLATFORM", ""))
os.environ.setdefault("MPLBACKEND", "agg")

import platforms

os.environ.update(platforms.settings(os.environ))

import jax
import pytest
import tiers

# JAX_COMPILATION_CACHE_DIR names another folder: an empty one shows what a newcomer waits for.
if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
# Below that a program is compiled as fast as it is read.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `tiers` names, skip what `platforms` does."""
    met = collections.Counter()
    for item in items:
        name = getattr(item, "originalname", item.name)
        met[name] += 1
        if met[name] > tiers.CASES_KEPT.get(name, met[name]):
            item.add_marker(pytest.mark.ci)
        if reason := platforms.not_here(name):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tiny():
    """See `short_runs.tiny`."""
    import short_runs

    return short_runs.tiny()
