"""Sweeps in this process: rows are what runs give, cells are added, failures are rows, nothing compiles twice."""

import dataclasses
import json
import math
import os
import signal
import time

import flax.linen as nn
import numpy as np
import pytest
from sweeps import cells as made_up_cells
from sweeps import history_of
from sweeps import row as made_up_row

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.engine import programs
from hardjax.study import sweep as sweeping
from hardjax.study import work
from hardjax.study.cells import Cell, ordered
from hardjax.study.ledger import opened
from hardjax.study.outcomes import row_of
from hardjax.study.sweep_rows import read_rows
from hardjax.training import lines, lock
from hardjax.training.loop import Loop

BASE = hj.TrainConfig(
    model="mlp", model_options={"widths": [4]}, epochs=3, batch_size=10, optimizer="sgd", validation=0.2
)
RATES = (2**-8, 2**-5)


def _sweep(configs, folder, tiny, **more):
    return hj.sweep(configs, output=folder, dataset=tiny, **more)


def test_rows_are_what_runs_give(tiny, tmp_path):
    configs = hj.grid(BASE, base_learning_rate=RATES)
    told = []
    found = _sweep(configs, tmp_path, tiny, on_progress=told.append)
    assert (found.left, found.signal, found.failed, found.diverged) == (0, None, (), ())
    assert [one.rows for one in told] == [1, 2, 2] and told[-1].seconds_left == 0 and told[0].seconds_left > 0
    for config, row in zip(configs, found.rows, strict=True):
        run = hj.run(config, dataset=tiny, progress=False)
        assert row["config"] == json.loads(lines.encode(run.config.to_dict())) and row["status"] == "done"
        for name in ("test_top1", "full_train_loss", "validation_top1", "epoch"):
            assert row["history"][name] == run.history[name].tolist()
        metrics = row["metrics"]
        assert metrics["median_test_top1"] == np.median(run.history["test_top1"])  # of three epochs, all
        assert metrics["final_train_error"] == 100 - run.summary["final_full_train_top1"]
        assert metrics["backprops"] == run.summary["backprops"] == 18
        assert metrics["surplus_percent"] == pytest.approx(100 * (60 / 56 - 1))  # 14 of 70 are held out
    assert list(found.rows) == read_rows(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hardjax.json", "sweep.jsonl"]


@pytest.mark.ci
def test_the_same_call_goes_on_and_other_cells_are_added(tiny, tmp_path, monkeypatch):
    trained = []
    train = work.train
    monkeypatch.setattr(
        work, "train", lambda setting, *a, **k: trained.append(setting.config) or train(setting, *a, **k)
    )
    first = hj.grid(BASE, base_learning_rate=RATES[:1], seed=range(2))
    _sweep(first, tmp_path, tiny)
    before = (tmp_path / "sweep.jsonl").read_bytes()
    _sweep(first, tmp_path, tiny, performance=hj.Performance(eval_batch_size=7))  # no part of a cell
    assert len(trained) == 2 and (tmp_path / "sweep.jsonl").read_bytes() == before
    both = hj.grid(BASE, base_learning_rate=RATES, seed=range(2))
    found = _sweep(both, tmp_path, tiny)
    assert len(trained) == 4 and len(found.rows) == 4 and (tmp_path / "sweep.jsonl").read_bytes().startswith(before)
    assert [row["config"]["seed"] for row in found.rows] == [0, 1, 0, 1]  # in the order asked for
    assert len(_sweep(first, tmp_path, tiny).rows) == 2
    assert len(_sweep(first, tmp_path, tiny, overwrite=True).rows) == 2 and len(read_rows(tmp_path)) == 2


@pytest.mark.ci
def test_shapes_are_compiled_once_whatever_rates_and_seeds(tiny, tmp_path, monkeypatch):
    counted = []
    compiled = programs.Programs._compile

    def watched(self, *given):
        before = sum(self.traces.values())
        program = compiled(self, *given)
        counted.append(sum(self.traces.values()) - before)
        return program

    base = dataclasses.replace(BASE, model_options={"widths": [5]})
    monkeypatch.setattr(programs.Programs, "_compile", watched)
    assert not _sweep(hj.grid(base, batch_size=[10, 20]), tmp_path / "one", tiny).failed
    alone = sum(counted)
    counted.clear()
    base = dataclasses.replace(BASE, model_options={"widths": [6]})
    grid = hj.grid(base, batch_size=[10, 20], base_learning_rate=RATES, seed=range(2), schedule=["constant", "step"])
    assert not _sweep(grid, tmp_path / "many", tiny).failed
    assert alone > 0 and sum(counted) == alone


@pytest.mark.ci
def test_failures_and_divergence_are_rows(tiny, tmp_path, monkeypatch):
    configs = hj.grid(BASE, base_learning_rate=[2**-8, 1e30], seed=range(2))
    evaluate = Loop._test

    def fault(self):
        if self.setting.config.seed == 1 and self.setting.config.base_learning_rate < 1:
            raise ZeroDivisionError("division by zero")
        evaluate(self)

    monkeypatch.setattr(Loop, "_test", fault)
    found = _sweep(configs, tmp_path, tiny)
    assert [row["status"] for row in found.rows] == ["done", "failed", "diverged", "diverged"] and not found.left
    (failed,) = found.failed
    assert failed["reason"] == "ZeroDivisionError: division by zero" and "Loop" not in failed["reason"]
    assert "in fault" in failed["traceback"]
    diverged = found.diverged[0]
    assert diverged["reason"] == "parameters were not finite after epoch 1; first at step 2"
    assert diverged["metrics"]["median_test_top1"] == pytest.approx(100 / 3)  # all are taken for the first class
    assert not (tmp_path / "sweep").exists()
    # A failure stays one, until it is asked to be tried again.
    monkeypatch.setattr(Loop, "_test", evaluate)
    assert len(_sweep(configs, tmp_path, tiny).failed) == 1
    found = _sweep(configs, tmp_path, tiny, retry_failed=True)
    assert [row["status"] for row in found.rows] == ["done", "done", "diverged", "diverged"]
    assert len(read_rows(tmp_path)) == 4


def test_a_cell_that_does_not_fit_is_a_failure_and_a_name_that_is_unknown_is_refused(tiny, tmp_path):
    options = {"widths": [4], "norm": "batch", "norm_batch_size": 4}
    found = _sweep([dataclasses.replace(BASE, model_options=options)], tmp_path / "cell", tiny)
    assert found.rows[0]["reason"].startswith("Expected norm_batch_size=4 to divide") and not found.left
    for wrong in ({"model": "mpl"}, {"model_options": {"width": [4]}}):
        with pytest.raises(Refusal, match="did you mean"):
            _sweep([dataclasses.replace(BASE, **wrong)], tmp_path / "wrong", tiny)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.ci
def test_a_signal_ends_a_sweep_and_the_run_under_way_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    configs = hj.grid(dataclasses.replace(BASE, epochs=6), seed=range(3))
    whole = _sweep(configs, tmp_path / "whole", tiny)
    evaluate, count = Loop._test, []

    def struck(self):
        evaluate(self)
        count.append(self.setting.config.seed)
        if len(count) == 9:  # the third test point of the second cell
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "_test", struck)
    found = _sweep(configs, tmp_path / "run", tiny)
    assert (found.signal, found.left, len(found.rows)) == ("SIGTERM", 2, 1)
    found = _sweep(configs, tmp_path / "run", tiny)
    assert count == [0] * 6 + [1] * 6 + [2] * 6 and found.left == 0
    assert [row["resumed_at"] for row in found.rows] == [[], [18], []]
    for one, other in zip(whole.rows, found.rows, strict=True):
        assert history_of(one) == history_of(other) and one["metrics"] == other["metrics"]


def test_a_signal_that_comes_while_a_cell_is_prepared_is_heard(tiny, tmp_path, monkeypatch):
    prepare, train = work.prepare, []

    def struck(*given):
        signal.raise_signal(signal.SIGTERM)
        return prepare(*given)

    monkeypatch.setattr(work, "prepare", struck)
    monkeypatch.setattr(work, "train", lambda *given, **more: train.append(given))
    found = _sweep(hj.grid(BASE, seed=range(2)), tmp_path, tiny)
    assert (found.signal, found.left, train) == ("SIGTERM", 2, [])


def test_the_run_under_way_ends_when_the_time_is_up(tiny, tmp_path, monkeypatch):
    now, evaluate = [0.0], Loop._test

    def later(self):
        evaluate(self)
        now[0] += 1800.0  # half an hour an epoch

    monkeypatch.setattr(Loop, "_test", later)
    monkeypatch.setattr("hardjax.training.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("hardjax.study.sweep.time.monotonic", lambda: now[0])
    found = _sweep([BASE], tmp_path, tiny, max_hours=1)
    assert (found.left, found.signal) == (1, None)
    found = _sweep([BASE], tmp_path, tiny, max_hours=1)
    assert found.left == 0 and found.rows[0]["resumed_at"] == [12]  # of 18 steps, two epochs


@pytest.mark.ci
def test_no_cell_is_begun_after_the_time_is_up(tiny, tmp_path):
    configs = hj.grid(BASE, seed=range(3))
    found = _sweep(configs, tmp_path, tiny, max_hours=1e-6)
    assert found.left == 3 and found.signal is None
    assert _sweep(configs, tmp_path, tiny).left == 0
    # Workers, too, end without a word: what is left is for the next call.
    configs = hj.grid(dataclasses.replace(BASE, epochs=10_000), seed=range(2))
    found = hj.sweep(configs, output=tmp_path / "workers", workers=1, max_hours=1e-6)
    assert found.left == 2 and found.signal is None


@pytest.mark.ci
def test_a_cell_that_cannot_go_on_begins_anew(tiny, tmp_path):
    """Its folder holds another run, or one whose checkpoints are damaged."""
    trainer = work.Trainer(tiny)
    cell = trainer.cell(BASE)
    other = dataclasses.replace(BASE, batch_size=20)
    with opened(tmp_path, "killed") as held:
        folder, there = held.place(cell.key)
        assert not there
        hj.run(other, dataset=tiny, output=folder, progress=False)
        assert held.place(cell.key) == (folder, True)
    found = _sweep([BASE], tmp_path, tiny)
    assert [row["status"] for row in found.rows] == ["done"] and found.rows[0]["metrics"]["backprops"] == 18
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def cut_short(tiny, tmp_path, monkeypatch):
    """A cell whose run was interrupted, and the folder that it is in, of an open ledger."""
    trainer = work.Trainer(tiny)
    cell = trainer.cell(BASE)
    evaluate = Loop._test

    def struck(self):
        evaluate(self)
        signal.raise_signal(signal.SIGTERM)

    with opened(tmp_path, "worker") as held:
        folder, _ = held.place(cell.key)
        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_test", struck)
            hj.run(BASE, dataset=tiny, output=folder, progress=False)
        held.claim([cell])
        yield held, cell, trainer, folder


@pytest.mark.ci
def test_a_run_that_another_process_took_up_first_is_left_to_it(cut_short, monkeypatch):
    held, cell, trainer, folder = cut_short
    place, taken = held.place, []

    def overtaken(key):
        found = place(key)
        if not taken:
            taken.append(os.open(found[0] / "hardjax.json", os.O_RDWR))
            assert lock.hold(taken[0])
        return found

    monkeypatch.setattr(held, "place", overtaken)
    row = work._row(held, cell, trainer, lambda: False)
    assert row["status"] == "done" and row["resumed_at"] == []  # beside it, from the beginning
    assert (folder / "checkpoint").exists() and lock.is_being_written(folder)
    os.close(taken[0])


@pytest.mark.ci
def test_a_full_disk_costs_no_checkpoint(cut_short, monkeypatch):
    held, cell, trainer, _ = cut_short

    def full(*given, **more):
        raise Refusal("No space left on device")

    monkeypatch.setattr(work, "train", full)
    with pytest.raises(Refusal, match="No space left"):
        work._row(held, cell, trainer, lambda: False)
    monkeypatch.undo()
    assert work._row(held, cell, trainer, lambda: False)["resumed_at"] == [6]


class Net(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train: bool):
        return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1))))


@pytest.mark.ci
def test_a_network_of_ones_own_is_told_from_another_by_its_program(tiny, tmp_path):
    configs = hj.grid(BASE, seed=range(2))
    first = _sweep(configs, tmp_path, tiny, model=Net())
    again = _sweep(configs, tmp_path, tiny, model=Net())
    assert first.rows == again.rows and first.rows[0]["network"] and first.rows[0]["config"]["model"] == "Net"
    other = _sweep(configs, tmp_path, tiny, model=Net(width=5))
    assert len(read_rows(tmp_path)) == 4 and other.rows[0]["key"] != first.rows[0]["key"]


def test_what_a_sweep_refuses(tiny, tmp_path):
    configs = hj.grid(BASE)
    for more, said in (
        ({"workers": "many"}, "auto or a number"),
        ({"workers": 0}, "at least 1"),
        ({"workers": 10_000}, "at most the"),
        ({"workers": 1}, "Give dataset= and model= with workers=None"),
        ({"max_hours": 0}, "max_hours=0"),
        ({"expiry": -1.0}, "expiry=-1.0"),
    ):
        with pytest.raises(Refusal, match=said):
            _sweep(configs, tmp_path / "sweep", tiny, **more)
    with pytest.raises(Refusal, match="is there twice"):
        _sweep(configs * 2, tmp_path / "sweep", tiny)
    with pytest.raises(Refusal, match="Expected configs of TrainConfig"):
        _sweep([None], tmp_path / "sweep", tiny)
    with pytest.raises(Refusal, match="the names in them are not read"):
        _sweep(
            hj.grid(dataclasses.replace(BASE, model_options={}), model=["mlp", "resnet8"]),
            tmp_path / "sweep",
            tiny,
            model=Net(),
        )
    with pytest.raises(Refusal, match="the names in them are not read"):
        _sweep(hj.grid(BASE, dataset=["digits", "mnist"]), tmp_path / "sweep", tiny)
    assert not (tmp_path / "sweep").exists()


def test_time_left_goes_by_the_shape_and_else_by_steps():
    small, large = made_up_cells(3, batch_size=10), made_up_cells(2, batch_size=40)
    cells = small + large
    rows = {
        cell.key: made_up_row(cell) | {"seconds": seconds} for cell, seconds in zip(small, (5.0, 7.0), strict=False)
    }
    assert sweeping.seconds_for(small[2:], cells, rows) == 6.0
    # A fourth of the steps.
    assert sweeping.seconds_for(small[2:] + large, cells, rows) == 6.0 + 2 * 1.5
    assert math.isnan(sweeping.seconds_for(cells, cells, {})) and sweeping.seconds_for([], cells, {}) == 0
    rows[large[0].key] = made_up_row(large[0]) | {"seconds": 12.0}
    assert sweeping.seconds_for(large[1:], cells, rows) == 12.0 and sweeping.seconds_for(small[2:], cells, rows) == 6.0
    del rows[large[0].key]
    rows[small[1].key] |= {"status": "failed", "seconds": 0.0}
    assert sweeping.seconds_for(small[2:], cells, rows) == 5.0


def test_a_row_that_somebody_else_wrote_meanwhile_is_not_written_again(tiny, tmp_path, monkeypatch):
    """A worker that was stopped for longer than its lease: when it is woken, its cell has a row."""
    trainer = work.Trainer(tiny)
    (cell,) = ordered([trainer.cell(BASE)])
    train, told = work.train, []

    def overtaken(setting, *given, **more):
        result = train(setting, *given, **more)
        with opened(tmp_path, "other") as other:
            assert other.add(made_up_row(cell, worker="other"))
        return result

    monkeypatch.setattr(work, "train", overtaken)
    with opened(tmp_path, "late") as held:
        assert work.work(held, [cell], trainer, lambda: False, told.append) is None
    assert told == [] and [row["worker"] for row in read_rows(tmp_path)] == ["other"]
    assert not (tmp_path / "sweep").exists()


def test_a_network_that_ends_the_process_is_a_failure(tiny, tmp_path, monkeypatch):
    def leaves(*given, **more):
        raise SystemExit(0)

    configs = hj.grid(BASE, seed=range(2))
    monkeypatch.setattr(work, "train", leaves)
    assert [row["reason"] for row in _sweep(configs, tmp_path / "train", tiny).rows] == ["SystemExit: 0"] * 2
    monkeypatch.setattr(work, "prepare", leaves)
    assert len(_sweep(configs, tmp_path / "prepare", tiny).failed) == 2


@pytest.mark.parametrize("error, kept", [(KeyboardInterrupt(), True), (Refusal("the disk is full"), False)])
def test_a_lease_says_which_cell_ended_a_process(tiny, tmp_path, monkeypatch, error, kept):
    trainer = work.Trainer(tiny)
    cell = trainer.cell(BASE)

    def fails(*given, **more):
        raise error

    monkeypatch.setattr(work, "train", fails)
    with opened(tmp_path, "worker") as held:
        with pytest.raises(type(error)):
            work.work(held, [cell], trainer, lambda: False)
        assert held.leases.held_by("worker") == ((cell.key,) if kept else ())


def test_a_lease_is_renewed_while_a_cell_is_trained(tiny, tmp_path, monkeypatch):
    trainer = work.Trainer(tiny)
    cell = trainer.cell(BASE)
    beats = []

    def slowly(*given, **more):
        lease = tmp_path / "sweep" / "leases" / "worker.json"
        until = time.monotonic() + 30
        while len(set(beats)) < 4 and time.monotonic() < until:
            beats.append(json.loads(lease.read_text())["beat"])
            time.sleep(0.01)
        raise MemoryError("enough")

    monkeypatch.setattr(work, "train", slowly)
    with opened(tmp_path, "worker", expiry=0.2) as held:
        work.work(held, [cell], trainer, lambda: False)
        assert not held.leases.knows("worker")  # given back
    assert len(set(beats)) == 4 and [row["status"] for row in read_rows(tmp_path)] == ["failed"]


@pytest.mark.parametrize("rounds", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_a_cell_that_ends_where_its_parameters_are_no_numbers_has_the_row_of_a_run_that_is_trained_on(
    tiny, tmp_path, rounds
):
    measure = hj.fisher.FisherMeasure(every=4)
    config = dataclasses.replace(BASE, base_learning_rate=1e30, measure=measure, epochs=5, test_every=2)
    if rounds:
        config = dataclasses.replace(config, selection=hj.selection.HardBatches(0.5), test_every="round")
    (row,) = _sweep([config], tmp_path, tiny).rows
    whole = hj.run(config, dataset=tiny, progress=False)
    assert row["trained_epochs"] < 5 and row["metrics"]["backprops"] == whole.summary["backprops"] == 30
    alone = json.loads(lines.encode(row_of(Cell(config, "data"), whole, tiny.with_validation(0.2), 1.0, "me")))
    own = "reason", "seconds", "train_seconds", "compile_seconds", "worker", "key", "data", "config", "trained_epochs"
    columns = {"seconds": [None] * len(whole.history["epoch"])}
    left, right = (one | {"history": one["history"] | columns} | dict.fromkeys(own) for one in (row, alone))
    for name in left.keys() | right.keys():
        assert left[name] == right[name], name
    assert row["metrics"]["final_test_top1"] == 0  # none of its samples has a loss that is a number
    assert row["trail"]["test_error"] == pytest.approx(100 * 2 / 3)  # as published: all are taken for the first class
    assert row["trail"]["errors"]["test"][-1] == row["trail"]["test_error"]
