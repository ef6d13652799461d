"""`hardjax show`: what a reader learns of folders that nobody trained for the test."""

import fcntl
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up import comparison, falling, made_up

import hardjax as hj
from hardjax.choose.selection import AllBatches
from hardjax.choose.trimming import Trimming
from hardjax.cli import curves, folders, main
from hardjax.study.compare import Comparison
from hardjax.training import files, lines

MARKER = {"format": "results of hardjax", "version": 1}


def shown(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["show", *map(str, arguments)])
    return stop.value.code, *capsys.readouterr()


def entry(epoch, loss, test=None, **more):
    fields = {"epoch": float(epoch), "backprops": 10 * epoch, "full_train_loss": loss, "train_loss": loss}
    fields |= {"test_loss": loss, "test_top1": 90.0 + epoch if test is None else test, "seconds": 30.0 * epoch}
    return {"validation_top1": None, "validation_loss": None} | fields | more


def write(folder: Path, entries, summary=None, torn="", **settings) -> Path:
    """A run's folder, as training writes it."""
    folder.mkdir(parents=True)
    files.write_json(folder / "hardjax.json", MARKER)
    files.write_json(folder / "config.json", hj.TrainConfig(**({"epochs": 8} | settings)).to_dict())
    for line in entries:
        lines.append_line(folder / "history.jsonl", line)
    if torn:
        with (folder / "history.jsonl").open("a") as history:
            history.write(torn)
    if summary is not None:
        files.write_json(
            folder / "summary.json", {"end": "budget spent", "diverged": False, "interrupted": False} | summary
        )
    return folder


def write_comparison(folder: Path, found: Comparison, summary=True) -> Path:
    """A comparison's folder; its runs in the order of training, the last one left out without a summary."""
    folder.mkdir(parents=True)
    arms, seeds = [arm.label for arm in found.arms], len(found.results[0])
    files.write_json(folder / "hardjax.json", MARKER)
    files.write_json(folder / "config.json", found.config.to_dict() | {"arms": arms, "seeds": seeds})
    runs = [(arm, rows[seed]) for seed in range(seeds) for arm, rows in zip(found.arms, found.results, strict=True)]
    for arm, run in runs if summary else runs[:-1]:
        line = {"selection": arm.name, "delta": arm.delta, "seed": run.config.seed}
        more = {"history": run.history, "summary": run.summary | {"train_seconds": 2.0}}
        lines.append_line(folder / "history.jsonl", line | more)
    if summary:
        files.write_json(folder / "summary.json", {"rows": found.rows, "interrupted": found.interrupted})
    return folder


FALLING = [entry(epoch, 2.0 * 0.5**epoch) for epoch in range(1, 9)]


def test_a_finished_run(tmp_path, capsys):
    code, out, err = shown(capsys, write(tmp_path / "run", FALLING, {}))
    assert code == 0 and err == ""
    assert "mlp on digits, all-batches" in out and "8/8" in out and "0:04:00" in out and "98.00" in out
    assert f"{tmp_path}/run: finished: 98.00 % test after 8 epochs; training loss settled in epoch 6 (within 5 %" in out
    assert "min 0.007812 (epoch 8)  max 1 (epoch 1)  last 0.007812" in out and "best by validation" not in out
    # Halved each epoch: by the logarithm, equal steps down.
    assert "  █▇▆▅▄▃▂▁  " in out and "  ▁▂▃▄▅▆▇█  " in out


def test_what_tells_runs_from_one_another(tmp_path, capsys):
    first = write(tmp_path / "a", FALLING, {})
    second = write(tmp_path / "b", FALLING, {}, batch_size=8, schedule=hj.Schedule("step"), data_dir="elsewhere")
    _, alone, _ = shown(capsys, first)
    assert f"{tmp_path}/a: finished" in alone
    _, out, _ = shown(capsys, first, second)
    assert f"{tmp_path}/a (batch_size 128, schedule.kind constant): finished" in out
    assert f"{tmp_path}/b (batch_size 8, schedule.kind step): finished" in out


def test_settings_within_settings_are_told_where_a_run_has_them(tmp_path, capsys):
    first = write(tmp_path / "a", FALLING, {})
    second = write(tmp_path / "b", FALLING, {}, selection=AllBatches(fixed=True), trimming=Trimming(end=0.5))
    _, out, _ = shown(capsys, first, second)
    assert f"{tmp_path}/a (selection.fixed false): finished" in out
    assert "/b (selection.fixed true, trimming.start 1.0, trimming.end 0.5, trimming.schedule linear, ...): fin" in out


def test_a_loss_that_rises_at_the_end_is_not_said_to_fall(tmp_path, capsys):
    folder = write(tmp_path / "run", [entry(epoch, loss) for epoch, loss in enumerate((2.0, 0.5, 0.1, 0.9), 1)], {})
    assert "; training loss did not settle" in shown(capsys, folder)[1]


def test_a_loss_that_falls_to_the_end_has_not_settled(tmp_path, capsys):
    folder = write(tmp_path / "run", [entry(epoch, 9.0 - epoch) for epoch in range(1, 9)], {})
    assert "training loss still falling at the end" in shown(capsys, folder)[1]


def test_a_sweep_is_drawn_by_another_command(tmp_path, capsys):
    (tmp_path / "sweep.jsonl").touch()
    code, _, err = shown(capsys, tmp_path)
    assert code == 2 and "got a sweep: `hardjax sweep --plot` draws those" in err


@pytest.mark.parametrize("end", ["none", "resumed"])
def test_one_that_is_written_runs_whatever_its_summary_says(tmp_path, capsys, end):
    folder = write(tmp_path / "run", FALLING[:3], {"interrupted": True} if end == "resumed" else None)
    with (folder / "hardjax.json").open() as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        out = shown(capsys, folder)[1]
    assert "running: epoch 3 of 8, 93.00 % test, about 0:02:30 of training left" in out
    after = shown(capsys, folder)[1]
    assert ("interrupted: epoch 3 of 8" if end == "resumed" else "cut short: epoch 3 of 8, 93.00 % test\n") in after


def test_readers_are_no_writers(tmp_path):
    folder = write(tmp_path / "run", FALLING)
    with (folder / "hardjax.json").open() as marker:
        fcntl.flock(marker, fcntl.LOCK_SH)
        assert not folders.read(folder).written


@pytest.mark.parametrize("torn", ['{"epoch": 4.0, "ba', "\x00\x00", '{"epoch": 4.0}'])
def test_a_last_line_under_way_is_left_out(tmp_path, torn):
    found = folders.read(write(tmp_path / "run", FALLING[:3], torn=torn))
    # A line without its newline counts where it is whole.
    assert len(found.history) == (4 if torn.endswith("}") else 3)


def test_never_tested(tmp_path, capsys):
    folder = write(tmp_path / "run", [])
    assert "cut short: never tested" in shown(capsys, folder)[1]
    with (folder / "hardjax.json").open() as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        code, out, _ = shown(capsys, folder)
    assert code == 0 and "running: not tested yet" in out and "0/8" in out


def test_diverged(tmp_path, capsys):
    lines = [*FALLING[:2], entry(3, math.nan, 10.0), entry(4, math.nan, 10.0)]
    # Infinities are kept as a number beyond float64.
    folder = write(tmp_path / "run", lines, {"diverged": True}, torn='{"epoch": 5.0, "full_train_loss": 1e999}\n')
    out = shown(capsys, folder)[1]
    assert "diverged in epoch 3" in out and "█▁xxx" in out
    stopped = write(tmp_path / "stopped", FALLING[:2], {"end": "spectrum not finite"})
    assert "diverged by epoch 2: spectrum not finite" in shown(capsys, stopped)[1]


def test_resumed_and_validated(tmp_path, capsys):
    lines = [entry(epoch, 1.0 / epoch, validation_top1=50.0 - (epoch - 3) ** 2) for epoch in range(1, 6)]
    out = shown(capsys, write(tmp_path / "run", lines, {"resumed_at": [10, 20]}, validation=0.1))[1]
    assert "93.00 (epoch 3)" in out and "; resumed 2 times" in out


def test_without_the_whole_training_split(tmp_path, capsys):
    lines = [entry(epoch, 1.0 / epoch) | {"full_train_loss": None} for epoch in range(1, 6)]
    out = shown(capsys, write(tmp_path / "run", lines, {}))[1]
    assert "loss in training (log)" in out and "settle" not in out


def test_a_folder_of_folders(tmp_path, capsys):
    for name in ("b", "a", "c"):
        write(tmp_path / "runs" / name, FALLING, {})
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.json").write_text("[]")  # of another tool
    (tmp_path / "runs" / "a" / "checkpoint").mkdir()
    code, out, _ = shown(capsys, tmp_path / "runs", "--curves", 2)
    names = [line.split(": ")[0] for line in out.splitlines() if ": finished" in line]
    assert code == 0 and names == [f"{tmp_path}/runs/{name}" for name in "abc"]
    assert out.count("test top-1 (%)  ") == 2 and "curves of the first 2 of 3; --curves draws more" in out
    assert folders.find(str(tmp_path / "runs" / "a" / "checkpoint")) == [tmp_path / "runs" / "a"]


@pytest.mark.ci
def test_a_comparison_with_differences(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rates = [(0.7, 0.5, 0.7, 0.7)] * 4
    noise = rng.normal(0, 0.2, (4, 4))
    found = comparison(
        [
            [made_up(falling(rates[seed][arm]), seed, top1=97 + noise[arm][seed] + 2 * (arm == 1)) for seed in range(4)]
            for arm in range(4)
        ]
    )
    code, out, _ = shown(capsys, write_comparison(tmp_path / "run", found))
    assert code == 0 and "mlp on digits, 4 arms by 4 seeds" in out and "16/16 runs" in out and "32.0 s" in out
    assert "finished: 16 of 16 runs; intervals that exclude 'no difference'" in out
    those = found.rows[1]["differences"]["all-batches"]["test_top1"]
    assert those["differs"] and f"hard-batches 0.5 against all-batches: test top-1 (points) {those['mean']:+.2f}" in out
    assert "mean over the runs of an arm" in out and "  random-batches 0.5  █▇▆▅▄▃▂▁" in out


def test_a_comparison_that_says_nothing(tmp_path, capsys):
    found = comparison([[made_up(falling(), seed) for seed in range(2)] for _ in range(4)])
    code, out, _ = shown(capsys, write_comparison(tmp_path / "run", found))
    assert code == 0 and "finished: 8 of 8 runs; no interval excludes 'no difference'" in out


def test_a_comparison_under_way(tmp_path, capsys):
    found = comparison([[made_up(falling(), seed) for seed in range(2)] for _ in range(4)])
    folder = write_comparison(tmp_path / "run", found, summary=False)
    with (folder / "hardjax.json").open() as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        out = shown(capsys, folder)[1]
    assert "running: 7 of 8 runs done, the last one random-batches 0.5, seed 1, 97.50 % test" in out
    assert "cut short: 7 of 8 runs done" in shown(capsys, folder)[1]


def test_bad_folders_are_a_line_each_and_nothing_is_shown(tmp_path, capsys):
    good = write(tmp_path / "good", FALLING, {})
    code, out, err = shown(capsys, good, tmp_path / "none", "gs://bucket/run")
    assert code == 2 and out == "" and [line[:9] for line in err.splitlines()] == ["hardjax: "] * 2
    assert "No run or comparison in" in err and "not an address" in err


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", b"{", "Damaged config.json in"),
        ("config.json", b"[1]", "Damaged config.json in"),
        ("config.json", bytes(range(256)), "Damaged config.json in"),
        ("config.json", b"[" * 100_000, "Damaged config.json in"),
        ("config.json", b'{"epochs": 3}', "KeyError: 'selection'"),
        ("history.jsonl", b"{}\n{\n{}\n", "line 2 is no JSON object"),
        ("history.jsonl", b"[1]\n{}\n", "line 1 is no JSON object"),
        ("summary.json", b"null", "Damaged summary.json in"),
        ("summary.json", b'{"resumed_at": 3}', "not as `hardjax train` writes them"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, capsys, name, content, words):
    folder = write(tmp_path / "run", FALLING, {})
    (folder / name).write_bytes(content)
    code, out, err = shown(capsys, folder)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err


def test_a_number_beyond_floats_is_damage_or_infinite(tmp_path, capsys):
    line = entry(1, math.nan) | {"epoch": 10**400}
    folder = write(tmp_path / "run", [line], {"diverged": True})
    code, _, err = shown(capsys, folder)
    assert code == 2 and err.count("\n") == 1 and "OverflowError" in err
    assert folders.number(10**400) == math.inf and math.isnan(folders.number(True))


def test_no_folder_and_a_bad_number_of_curves(tmp_path, capsys):
    assert "Name at least one folder" in shown(capsys)[2]
    assert "curves=-1 to be a whole number" in shown(capsys, write(tmp_path / "run", []), "--curves", -1)[2]


def test_ascii(tmp_path, monkeypatch):
    folder = write(tmp_path / "run", FALLING, {})
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit):
        main(["show", str(folder)])
    stream.flush()
    written = stream.buffer.getvalue().decode("ascii")
    assert "  #*+=~-._  " in written and "?" not in written


def test_jax_is_not_needed(tmp_path):
    folder = write(tmp_path / "run", FALLING, {})
    code = "import sys; from hardjax.cli import main\ntry: main(['show', sys.argv[1]])\nfinally: "
    code += "assert 'jax' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_curves():
    assert curves.curve([0, 1, 2, 3, 4, 5, 6, 7]) == curves.BLOCKS
    assert curves.curve([]) == "" and curves.curve([2.0]) == "▅" and curves.curve([math.nan, math.inf]) == "xx"
    assert curves.curve([1, 10, 100], log=True) == curves.curve([0, 1, 2]) == "▁▅█"
    assert curves.curve([-1, 1], log=True) == "▁█"  # no logarithm to take
    assert curves.curve([-1.7e308, 1.7e308]) == "▁█"
    # Means of neighbours where there are more points than letters; as many points as letters stay as they are.
    assert curves.curve([0, 0, 7, 7, 0, 0], width=3) == "▁█▁" and curves.curve([0, 7, 0], width=3) == "▁█▁"
    assert len(curves.curve(list(range(1000)))) == 48 and curves.curve([0, math.nan, 1, 1], width=2) == "x▅"
