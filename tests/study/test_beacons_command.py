"""`hardjax measure` with --write-beacons and --beacons, on folders of runs that nobody trained."""

import json
import shutil

import numpy as np
import pytest
from made_up_runs import write_run

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan
from hardjax.cli import main, prepare


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Six configurations of two seeds, a plan of two; small ones."""
    root = tmp_path_factory.mktemp("runs")
    for size in (32, 64, 128):
        for rate in (0.1, 0.2):
            for seed in (0, 1):
                place = dict(batch_size=size, learning_rate=rate, seed=seed)
                write_run(
                    root / f"s{size}-lr{rate}-{seed}",
                    c=size / 8,
                    energy=rate / size,
                    error=size / 32 + rate + seed / 10,
                    **place,
                )
    for plan, seed in (("s16-to-64", 0), ("s16-to-64", 1), ("0.5*32-0.25*64-0.25*32", 0)):
        write_run(
            root / f"plan-{plan[0]}-{seed}",
            c=lambda epoch, batch: batch / 8,
            energy=lambda epoch, batch: 0.1 / batch,
            error=1.5,
            batch_plan=BatchPlan(plan),
            learning_rate=0.1,
            seed=seed,
        )
    return root


@pytest.fixture
def runs(kept, tmp_path, monkeypatch):
    shutil.copytree(kept, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def command(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def fixed():
    return [f"runs/s{size}-lr{rate}-{seed}" for size in (32, 64, 128) for rate in (0.1, 0.2) for seed in (0, 1)]


def test_from_runs_to_beacons_to_the_plane(runs, tmp_path, capsys):
    assert command("measure", *fixed(), "--write-beacons", "kept/beacons.json") == 0
    shown = capsys.readouterr().out
    assert "12 beacons" in shown and "C_K at 0" in shown and "C_K at 1e-06" in shown
    content = json.loads((tmp_path / "kept/beacons.json").read_text())
    assert content["format"] == "beacons of hardjax" and content["version"] == 1 and len(content["beacons"]) == 12
    first = content["beacons"][0]
    assert (first["run"], first["batches"], first["learning_rate"], first["seed"]) == (fixed()[0], 32, 0.1, 0)
    assert first["test_error"] == pytest.approx(1.1) and first["train_error"] == 1 and first["diverged"] is False
    np.testing.assert_allclose(first["measures"]["1e-06"]["L_K"][-1], 0.1 / 32 * 32 * 20, rtol=1e-6)
    # The runs are no longer needed.
    for folder in fixed():
        shutil.rmtree(folder)
    plans = sorted(str(path) for path in runs.glob("plan-*"))
    assert command("measure", *plans, "--beacons", "kept/beacons.json", "--early", 1, 4, "--output", "out") == 0
    shown = capsys.readouterr().out
    assert "rank correlation with the final test error over 6 configurations" in shown and "epoch 4" in shown
    assert "s16-to-64" in shown and "0.5*32-0.25*64-0.25*32" in shown and "plane.png" in shown
    assert (tmp_path / "out/plane.png").stat().st_size > 20_000
    told = json.loads((tmp_path / "out/measure.json").read_text())
    assert len(told["beacons"]) == 6 and told["beacons"][0]["error"]["test"] == pytest.approx(1.15)
    assert told["runs"]["s16-to-64"]["seeds"] == 2 and len(told["runs"]["s16-to-64"]["condition"]) == 6
    (ranked,) = [one for one in told["early"] if one["known"] == "test error at that epoch" and one["epoch"] == 4]
    assert ranked["value"] == pytest.approx(1) and ranked["count"] == 6
    # What is there is drawn over where that is asked for.
    again = ("measure", "--beacons", "kept/beacons.json", "--output", "out")
    assert command(*again) == 2 and "already holds a run (measure.json, plane.png)" in capsys.readouterr().err
    more = ("--overwrite", "--linear-axes", "--error", "train", "--reading", "epoch", "--tolerance", "0")
    assert command(*again, *more) == 0
    assert "tolerance 0, each epoch alike" in capsys.readouterr().out


def test_runs_of_one_size_are_not_drawn_but_counted(runs, capsys):
    assert command("measure", *fixed(), "--write-beacons", "beacons.json") == 0
    assert command("measure", *fixed()[:3], "runs/plan-s-0", "--beacons", "beacons.json") == 0
    assert "3 of the runs keep one batch size and are not drawn" in capsys.readouterr().out


def test_a_picture_that_fails_costs_no_table(runs, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no font")

    assert command("measure", *fixed(), "--write-beacons", "beacons.json") == 0
    monkeypatch.setattr("hardjax.cli.beacons.plane", fails)
    assert command("measure", "--beacons", "beacons.json", "--output", "out") == 0
    shown, told = capsys.readouterr()
    assert "plane.png could not be drawn (RuntimeError: no font)" in told and "the best first" in shown
    assert shown.strip().endswith("written to out: measure.json")


WRITE = ("--write-beacons", "beacons.json")
REFUSED = {
    "a plan": (("runs/plan-s-0", *WRITE), "batch_plan='16-16-32-32-64'; beacons keep one batch size"),
    "not finished": (("runs/s32-lr0.1-0", "runs/unfinished", *WRITE), "'runs/unfinished' is not finished"),
    "no spectra": (("runs/unmeasured", *WRITE), "No spectra in 'runs/unmeasured'"),
    "one run twice": (("runs/s32-lr0.1-0", "runs/again", *WRITE), "are one configuration with one seed"),
    "the same folder twice": (("runs/s32-lr0.1-0", "runs/s32-lr0.1-0/", *WRITE), "are one configuration with one seed"),
    "another length": (("runs/s32-lr0.1-0", "runs/longer", *WRITE), "'runs/longer' has epochs=30"),
    "a folder for the file": (("runs/s32-lr0.1-0", "--write-beacons", "runs"), "it is a folder"),
    "a file that is there": (("runs/s32-lr0.1-0", "--write-beacons", "strange.json"), "is there already"),
    "a file of others": (
        ("runs/s32-lr0.1-0", "--write-beacons", "strange.json", "--overwrite"),
        "Cannot take beacons='strange.json'",
    ),
    "no run": (WRITE, "Name at least one folder"),
    "both": (("runs/s32-lr0.1-0", *WRITE, "--beacons", "few.json"), "--write-beacons or --beacons, not both"),
    "a tolerance": (("runs/s32-lr0.1-0", *WRITE, "--tolerance", "0"), "--tolerance goes with what is drawn"),
    "an output": (("runs/s32-lr0.1-0", *WRITE, "--output", "out"), "--output goes with what is drawn"),
    "final states": (("--beacons", "few.json", "--batches", "4"), "--batches goes with final states, which --beacons"),
    "float64": (("runs/s32-lr0.1-0", *WRITE, "--float64"), "--float64 goes with final states, which --write-beacons"),
    "early without beacons": (("runs/s32-lr0.1-0", "--early", "1"), "--early goes with --beacons"),
    "a map without beacons": (("runs/s32-lr0.1-0", "--error", "train"), "--error goes with --beacons"),
    "axes without beacons": (("runs/s32-lr0.1-0", "--linear-axes"), "--linear-axes goes with --beacons"),
    "an unknown reading": (("--beacons", "few.json", "--reading", "epochs"), "did you mean 'epoch'?"),
    "an unknown error": (("--beacons", "few.json", "--error", "tests"), "did you mean 'test'?"),
    "another tolerance": (
        ("--beacons", "few.json", "--tolerance", "1e-5"),
        "tolerance=1e-05 to be one that beacons hold",
    ),
    "too few": (("--beacons", "few.json"), "at least 5 configurations with finite measures and errors, got 1"),
    "an epoch beyond": (("--beacons", "few.json", "--early", "20"), "--early 20 to be an epoch from 1 to 19"),
    "no file": (("--beacons", "nowhere.json"), "beacons='nowhere.json' to be readable: No such file"),
    "no name": (("--beacons", ""), "beacons='' to be"),
    "no name to write": (("runs/s32-lr0.1-0", "--write-beacons", ""), "write_beacons='' to be"),
    "no JSON": (("--beacons", "junk.json"), "beacons='junk.json' to be JSON"),
    "another plane": (("runs/longer-plan", "--beacons", "few.json"), "'runs/longer-plan' has epochs=30"),
    "one plan twice": (("runs/plan-s-0", "runs/plan-s-0/", "--beacons", "few.json"), "are one configuration with one"),
    "a result over a run": (
        ("runs/plan-s-0", "--beacons", "few.json", "--output", "runs/plan-s-0"),
        "already holds a run",
    ),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_one_line_and_nothing_is_written(runs, tmp_path, capsys, arguments, message):
    shutil.copytree(runs / "s32-lr0.1-0", runs / "again")
    shutil.copytree(runs / "s32-lr0.1-1", runs / "unfinished")
    (runs / "unfinished/summary.json").unlink()
    plain = dict(c=2.0, energy=0.1, error=1.0, epochs=30)
    write_run(runs / "longer", **plain, batch_size=64)
    write_run(runs / "longer-plan", **plain, batch_plan=BatchPlan("16-64"))
    shutil.copytree(runs / "s64-lr0.1-0", runs / "unmeasured")
    (runs / "unmeasured/config.json").write_text(json.dumps(hj.TrainConfig(epochs=20).to_dict()))
    (runs / "unmeasured/spectra.jsonl").unlink()
    (tmp_path / "strange.json").write_text('{"mine": 1}')
    (tmp_path / "junk.json").write_text("{")
    assert command("measure", "runs/s32-lr0.1-0", "--write-beacons", "few.json") == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert command("measure", *arguments) == 2
    shown, told = capsys.readouterr()
    assert message in told and told.count("\n") == 1 and told.startswith("hardjax: ") and not shown
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "strange.json").read_text() == '{"mine": 1}'
