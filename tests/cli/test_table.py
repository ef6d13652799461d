"""`hardjax table` from its words to its exit code, over a folder of one small experiment."""

import pytest

from hardjax.cli.main import main
from hardjax.study import experiments_rows
from hardjax.study.experiments import load

MODULE = """
import hardjax as hj
from hardjax.study.experiments import Experiment, Scale

BASE = hj.TrainConfig(model_options={"widths": [4]}, epochs=1, test_every=1)
EXPERIMENTS = (
    Experiment(name="p1-table-9", title="two rates", source="nowhere", layout="curves",
               scales={"smoke": Scale(BASE, {"slow": {"learning_rate": 0.01}, "fast": {"learning_rate": 0.1}}, 1)}),
    Experiment(name="p1-claim-9", title="of them", source="nowhere", reads=("p1-table-9",)),
)
"""


def _called(*words):
    with pytest.raises(SystemExit) as stop:
        main(["table", *words])
    return stop.value.code


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "small.py").write_text(MODULE)
    return tmp_path


def test_without_experiments_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _called() == 2
    assert capsys.readouterr().err == (
        "hardjax: No experiments in 'experiments'; name a folder of them with --experiments DIR.\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "p1-tabel-9"), "Unknown experiment 'p1-tabel-9'; did you mean 'p1-table-9'?"),
        (("show",), "Name at least one experiment"),
        (("run", "p1-table-9", "--scale", "huge"), "Unknown scale 'huge'"),
        (("run", "p1-table-9"), "p1-table-9 has no scale 'reduced'; it has smoke."),
        (("plot", "p1-table-9"), "no row to draw"),
        (("show", "p1-table-9", "--results", "nowhere"), "results='nowhere' to be a folder of rows"),
        (("--results", "nowhere"), "results='nowhere' to be a folder of rows"),
        (("copy", "p1-claim-9"), "copy those"),
        (("copy", "p1-table-9", "--scale", "smoke", "--output", "no/such/folder/x.py"), "to be writable"),
        (("plot", "p1-table-9", "p1-claim-9", "--output", "x.png"), "with one experiment, got 2"),
    ],
)
def test_what_is_refused(place, words, said, capsys):
    assert _called(*words) == 2
    assert said in capsys.readouterr().err


def test_list_and_copy(place, capsys):
    assert _called() == 0
    said = capsys.readouterr().out
    assert "p1-table-9" in said and "reads p1-table-9" in said
    assert _called("copy", "p1-table-9", "--scale", "smoke") == 0
    assert "'fast': {'learning_rate': 0.1}" in (place / "p1_table_9.py").read_text()


def test_of_several_those_that_cannot_be_run_or_drawn_are_named(place, capsys):
    (place / "experiments" / "other.py").write_text(MODULE.replace("-9", "-8").replace('"smoke"', '"paper"'))
    assert _called("plot", "all") == 0
    assert "p1-table-9: no row to draw" in capsys.readouterr().out
    assert _called("run", "all") == 0
    assert "p1-table-9: no scale 'reduced', it has smoke" in capsys.readouterr().out


def test_a_picture_lies_where_it_is_said_to(place, capsys):
    experiment = load(place / "experiments")["p1-table-9"]
    config = experiment.scales["smoke"].config("slow", 0).to_dict()
    row = {"config": config, "data": "d", "row_version": 1, "status": "done", "metrics": {"backprops": 2}}
    row["history"] = {"epoch": [1], "full_train_loss": [1.0], "test_top1": [50.0]}
    kept = experiments_rows.kept(row, "p1-table-9", "smoke", "slow")
    experiments_rows.write(experiment, place / "experiments" / "results", kept)
    where = ("--results", "experiments/results")
    for asked, there in (("shown", "shown.png"), ("shown.svg", "shown.svg")):
        assert _called("plot", "p1-table-9", "--scale", "smoke", *where, "--output", asked) == 0
        assert f"written to {there}" in capsys.readouterr().out and (place / there).stat().st_size > 1000


@pytest.mark.ci
def test_a_dry_run_says_what_is_left(place, capsys):
    assert _called("run", "p1-table-9", "--scale", "smoke", "--dry-run") == 0
    assert "2 cells left, 1 shape" in capsys.readouterr().out
