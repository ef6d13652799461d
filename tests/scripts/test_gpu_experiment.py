"""The script for ten minutes on a GPU, tiny and on CPU: it writes rows, goes on, and counts misses as such."""

import importlib.util
import math
import time
import types
from pathlib import Path

import pytest

import hardjax as hj
from hardjax.training import lines

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_experiment.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _row(arm, seed, top1):
    seconds = [1.0, 2.0, 3.0]
    return {"kind": "run", "arm": arm, "seed": seed, "seconds": seconds, "test_top1": top1, "train_seconds": 3.0}


def test_a_miss_is_infinitely_late(script):
    assert script.seconds_to(_row("hard 0.5", 0, [90, 94, 95]), 94) == 2
    assert script.seconds_to(_row("hard 0.5", 0, [90, None, 93]), 94) == math.inf
    rows = [_row("ordinary", seed, top1) for seed, top1 in enumerate([[94, 95, 96], [90, 94, 94], [90, 91, 92]])]
    found = script.summary([*rows, _row("trimmed", 0, [1, 2, 3])], 94)
    assert (found["ordinary"]["seconds to 94 %"], found["ordinary"]["missed"], found["ordinary"]["seeds"]) == (2, 1, 3)
    assert (found["trimmed"]["seconds to 94 %"], found["trimmed"]["missed"]) == (None, 1)


def test_what_has_a_row_is_not_done_again_and_nothing_is_begun_that_would_not_fit(script, tmp_path):
    done = []

    def task(name):
        return name, lambda: done.append(name) or {"kind": "throughput", "ms_a_step": 1.0}

    path = tmp_path / "rows.jsonl"
    script.work(iter([task("a"), task("b")]), path, time.monotonic() + 100)
    script.work(iter([task("a"), task("c")]), path, time.monotonic() + 100)
    script.work(iter([task("d")]), path, time.monotonic() - 1)
    assert done == ["a", "b", "c"] == [row["task"] for row in lines.read_lines(path)]


def test_rows_of_another_device_or_of_what_was_missing_are_none(script, tmp_path):
    path, here = tmp_path / "rows.jsonl", script.files.environment()["device"]
    kept = {"task": "a", "device": here}
    for row in (kept, {"task": "b", "device": "gpu: H100"}, {"task": "c", "device": here, "reason": "no torch"}):
        lines.append_line(path, row)
    assert script.rows_of(path) == [kept]


def test_a_population_takes_the_seconds_of_all_its_members(script, monkeypatch):
    def found(**seconds):
        return types.SimpleNamespace(summary={"compile_seconds": 1.0, **seconds})

    monkeypatch.setattr(script.hj, "run", lambda *given, **more: found(train_seconds=3.0))
    monkeypatch.setattr(script.hj, "run_population", lambda configs, **more: [found(train_seconds=0.5)] * len(configs))
    row = script.together(script.SMOKE, hj.data.load("digits"), 8)
    assert (row["seconds_together"], row["times_in_turn"], row["compile_seconds"]) == (4.0, 6.0, 9.0)


@pytest.mark.ci
def test_a_smoke_run(script, tmp_path):
    digits = hj.data.load("digits")
    path = tmp_path / "rows.jsonl"
    script.work(script.tasks(script.SMOKE, digits, 1), path, time.monotonic() + 1000)
    found = script.summary(lines.read_lines(path), 94)
    assert set(found) == {"ms_a_step", "times_in_turn", *script.ARMS}
    assert found["ms_a_step"]["throughput, ours, batch 64"] > 0
    assert found["times_in_turn"]["population, mlp, 2 members"] > 0
