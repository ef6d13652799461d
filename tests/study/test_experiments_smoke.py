"""Every experiment of the repository at its smoke scale, in one process and one folder, so that cells are shared."""

from pathlib import Path

import pytest

from hardjax.plots.published import LAYOUTS
from hardjax.study import experiments
from hardjax.study.experiments import SMOKE
from hardjax.study.experiments_markdown import results
from hardjax.study.experiments_report import report
from hardjax.study.experiments_rows import Results
from hardjax.study.experiments_run import run

FOLDER = Path(__file__).parents[2] / "experiments"
PLANES = ("plane", "linear", "travels")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results with a row for each smoke run of each experiment, and what each run of them said."""
    place = tmp_path_factory.mktemp("smoke")
    found = Results(experiments.load(FOLDER), place / "results")
    outcomes = {
        one.name: run(one, SMOKE, results=found, folder=place / "sweep")
        for one in found.experiments.values()
        if SMOKE in one.scales
    }
    found.refresh()
    return found, outcomes


@pytest.mark.ci
def test_every_experiment_runs(trained):
    found, outcomes = trained
    own = [one for one in found.experiments.values() if one.scales]
    without = [one.name for one in own if SMOKE not in one.scales]
    assert without == ["p4-figure-12", "p4-figure-14"]  # ImageNet: configurations alone
    for name, outcome in outcomes.items():
        size = found.experiments[name].scales[SMOKE]
        assert (outcome.written, outcome.left, outcome.failed) == (size.count, 0, ()), name
    # Nothing is trained twice, and nothing is written twice.
    assert run(own[0], SMOKE, results=found, folder=found.folder.parent / "sweep").written == 0


@pytest.mark.ci
def test_every_experiment_is_shown_and_drawn(trained, tmp_path):
    found, _ = trained
    shown = 0
    for one in found.experiments.values():
        rows = found.found(one, SMOKE)
        if not rows.rows or one.computed is not None:
            continue
        said = report(rows)
        assert said.arms and all(line["runs"] for line in said.arms), one.name
        assert one.name in results([said], {one.name[:3]: "paper"})
        LAYOUTS[one.layout](rows).savefig(tmp_path / "drawn.png", dpi=20)
        shown += 1
    assert shown > 90
