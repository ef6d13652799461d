"""The three tiers share the tests out: every one of them runs somewhere, and the fast tier names what exists."""

import re
from pathlib import Path

import tiers

ROOT = Path(__file__).parents[1]


def test_tests_that_wait_for_the_second_tier_exist():
    """A renamed test would slip back into the fast tier unseen."""
    sources = (file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    names = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert not set(tiers.CASES_KEPT) - names


def test_every_tier_is_a_command():
    """Fast is what neither mark has, the second what `ci` has, the third everything: nothing falls between."""
    script = (ROOT / "scripts/test.sh").read_text()
    assert '-m "not ci and not slow"' in script and '-m "ci and not slow"' in script and "--slow) marks=()" in script
    pipeline = (ROOT / ".ci/run").read_text()
    for command in ("scripts/test.sh\n", "scripts/test.sh --ci", "ruff check", "lint-imports", "mkdocs build --strict"):
        assert command in pipeline, command
