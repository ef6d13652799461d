"""Test-wide settings: compiled programs are kept between runs, and between the workers of one."""

import collections
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", os.environ.get("HARDJAX_TEST_PLATFORM", ""))
os.environ.setdefault("MPLBACKEND", "agg")

import platforms

os.environ.update(platforms.settings(os.environ))

import jax
import numpy as np
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
    """70 easily separated 6x6 images of 3 classes, 21 for testing."""
    import hardjax as hj

    rng = np.random.default_rng(0)

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        images = rng.integers(0, 120, (count, 6, 6, 1))
        images[np.arange(count), labels] += 100
        return images.astype(np.uint8), labels

    return hj.data.Dataset.from_arrays(*split(70), *split(21), num_classes=3, name="tiny")
