"""Sweeps whose cells share programs: rows are those of runs alone, chunks are leases, faults cost their own cell."""

import dataclasses
import json

import jax
import pytest
from sweeps import history_of

import hardjax as hj
from hardjax._validate import OutOfMemory, Refusal
from hardjax.engine.programs import Programs, programs_for
from hardjax.study import chunks, work
from hardjax.study.cells import Cell
from hardjax.study.estimate import estimate
from hardjax.study.ledger import Ledger, opened
from hardjax.study.sweep import _check_population
from hardjax.study.sweep_rows import read_rows
from hardjax.training.checkpoint import RunWarning
from hardjax.training.population_loop import PopulationLoop

BASE = hj.TrainConfig(model_options={"widths": [4]}, epochs=3, batch_size=10, optimizer="sgd", validation=0.2)
MAP = hj.Performance(population="map", population_chunk=3)
# Of times and of who worked there is no second time the same.
CLOCKS = ("seconds", "train_seconds", "compile_seconds", "worker", "population", "history", "metrics", "reason")


def _sweep(configs, folder, tiny, performance=MAP, **more):
    return hj.sweep(configs, output=folder, dataset=tiny, performance=performance, **more)


@pytest.mark.ci
def test_rows_of_chunks_are_those_of_runs_alone(tiny, tmp_path, monkeypatch):
    configs = hj.grid(BASE, base_learning_rate=[2**-8, 2**-5, 1e30], seed=range(2))
    held, claim = [], Ledger.claim

    def noting(self, *given):
        found = claim(self, *given)
        if found:
            held.append((len(found), len(self.leases.held_by(self.owner))))
        return found

    monkeypatch.setattr(Ledger, "claim", noting)
    found = _sweep(configs, tmp_path / "chunks", tiny)
    assert held == [(1, 1), (3, 3), (3, 3)]  # the first one tells which shape it is
    monkeypatch.undo()
    alone = _sweep(configs, tmp_path / "alone", tiny, hj.Performance(population="workers"))
    assert [row["population"] for row in found.rows] == [{"mode": "map", "members": 3}] * 6
    assert [row["population"] for row in alone.rows] == [{"mode": "workers", "members": 1}] * 6
    for one, other in zip(found.rows, alone.rows, strict=True):
        assert {k: v for k, v in one.items() if k not in CLOCKS} == {k: v for k, v in other.items() if k not in CLOCKS}
        for name in ("median_test_top1", "median_validation_top1"):
            assert one["metrics"][name] == other["metrics"][name]
        if one["status"] == "done":
            assert (one["metrics"], history_of(one)) == (other["metrics"], history_of(other))
        else:
            assert one["reason"].startswith("parameters were not finite after epoch 1; first at step ")
            assert one["metrics"]["first_bad_step"] == other["metrics"]["first_bad_step"]
    assert len(found.diverged) == 2 and not (tmp_path / "chunks" / "sweep").exists()
    assert len(_sweep(configs, tmp_path / "chunks", tiny).rows) == len(read_rows(tmp_path / "chunks")) == 6


def _failing(error):
    def fail(*given, **more):
        raise error

    return fail


@pytest.mark.ci
def test_what_does_not_fit_together_costs_its_own_cell(tiny, tmp_path, monkeypatch):
    configs = hj.grid(BASE, seed=range(3))
    train = work.train

    def faulty(setting, *given, **more):
        if setting.config.seed == 1:
            raise ZeroDivisionError("division by zero")
        return train(setting, *given, **more)

    monkeypatch.setattr(PopulationLoop, "_test", _failing(OutOfMemory("Out of memory in training.")))
    monkeypatch.setattr(work, "train", faulty)
    said = (
        r"^3 cells of mlp widths=\[4\] on tiny, batch 10, are trained one by one instead of together: Out of memory in"
    )
    with pytest.warns(RunWarning, match=said):
        found = _sweep(configs, tmp_path, tiny)
    assert [row["status"] for row in found.rows] == ["done", "failed", "done"]
    assert found.rows[0]["population"] == {"mode": "workers", "members": 1}


@pytest.mark.ci
def test_a_fault_in_what_cells_share_is_not_taken_for_slowness(tiny, tmp_path, monkeypatch):
    configs = hj.grid(BASE, seed=range(4))
    with monkeypatch.context() as patch:
        patch.setattr(PopulationLoop, "_test", _failing(ZeroDivisionError("division by zero")))
        found = _sweep(configs, tmp_path, tiny)
    assert [row["status"] for row in found.rows] == ["failed"] * 4
    assert all("ZeroDivisionError: division by zero" in row["traceback"] for row in found.rows)
    again = _sweep(configs, tmp_path, tiny, hj.Performance(population="workers"), retry_failed=True)
    assert [row["status"] for row in again.rows] == ["done"] * 4


class _Made:
    """A trainer whose settings are the ways in which they are trained."""

    def __init__(self, **errors):
        self.errors = errors

    def setting(self, config):
        return self.population((config,), "workers", 1)

    def population(self, configs, mode, places):
        if mode in self.errors:
            raise self.errors[mode]
        return mode


def test_a_way_that_is_refused_is_none_and_a_fault_is_told(monkeypatch):
    alike = [Cell(dataclasses.replace(BASE, seed=seed), "data") for seed in range(4)]
    seconds = {"workers": 1.0, "vmap": 2.0}
    monkeypatch.setattr(chunks, "seconds_a_step", seconds.__getitem__)
    monkeypatch.setattr(chunks.jax, "default_backend", lambda: "cpu")
    assert chunks.fastest_mode(_Made(), alike, 4) == "vmap"  # half a second a member
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")
    for error in (Refusal("Expected less."), OutOfMemory("Out of memory."), full):
        with pytest.warns(RunWarning, match=r"^No population by vmap of 4 cells of mlp .*, batch 10: .*(less|memory)"):
            assert chunks.fastest_mode(_Made(vmap=error), alike, 4) == "workers"
    for error in (ZeroDivisionError("division by zero"), jax.errors.JaxRuntimeError("INTERNAL: made up")):
        with pytest.raises(type(error)):
            chunks.fastest_mode(_Made(vmap=error), alike, 4)
    # What a cell alone raises is told by its row.
    assert chunks.fastest_mode(_Made(workers=ZeroDivisionError("division by zero")), alike, 4) == "workers"


@pytest.mark.ci
def test_a_chunk_that_was_cut_short_goes_on(tiny, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    configs = hj.grid(BASE, seed=range(3))
    performance = dataclasses.replace(MAP, save_every=1)
    whole = _sweep(configs, tmp_path / "whole", tiny)
    test, calls = PopulationLoop._test, []

    def dying(self):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        test(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PopulationLoop, "_test", dying)
        _sweep(configs, tmp_path / "cut", tiny, performance)
    found = _sweep(configs, tmp_path / "cut", tiny, performance)
    assert list(map(history_of, found.rows)) == list(map(history_of, whole.rows))
    assert [row["resumed_at"] for row in found.rows] == [[12]] * 3


def test_what_was_tried_out_is_settled_for_all_and_kept_by_rows(tiny, tmp_path, monkeypatch):
    auto = hj.Performance(population="auto")
    tried, times = [], {"vmap": 1.0, None: 0.5}

    def timed(setting):
        mode = getattr(setting, "mode", None)
        tried.append(mode)
        return times[mode]

    monkeypatch.setattr(chunks, "seconds_a_step", timed)
    configs = hj.grid(dataclasses.replace(BASE, epochs=1), seed=range(3))
    found = _sweep(configs, tmp_path, tiny, auto)
    # A step of all three took twice that of one.
    assert tried == [None, "vmap"] and {row["population"]["mode"] for row in found.rows} == {"vmap"}
    times["vmap"] = 9.0
    more = hj.grid(dataclasses.replace(BASE, epochs=1), seed=range(5))
    found = _sweep(more, tmp_path, tiny, auto)
    assert len(tried) == 2 and {row["population"]["mode"] for row in found.rows} == {"vmap"}
    # As many workers as cells leave each of them one: it is trained as the others were.
    cells = [work.Trainer(tiny, None, auto).cell(one) for one in more]
    with opened(tmp_path, "me") as held:
        modes = chunks.Modes(held, cells, work.Trainer(tiny, None, auto), workers=5)
        modes.find(cells[0])
        assert (modes.places(cells[0].shape), modes[cells[0].shape]) == (1, "vmap") and modes.together(cells[0].shape)


@pytest.mark.ci
def test_each_shape_is_compiled_once_as_is_told_before(tiny, tmp_path, monkeypatch):
    base = dataclasses.replace(BASE, model_options={"widths": [5]})
    configs = hj.grid(base, batch_size=[10, 14], base_learning_rate=[2**-8, 2**-5], seed=range(2))
    trainer = work.Trainer(tiny, None, MAP)
    programs_for.cache_clear()  # whatever other tests put in the place of programs
    told = [estimate(trainer, trainer.cell(config), 2, seconds=600.0) for config in configs[::4]]
    assert [one.members for one in told] == [2, 2] and all(one.programs and one.seconds > 0 for one in told)
    programs_for.cache_clear()
    counted, compiled = [], Programs._compile

    def watched(self, signature, args):
        counted.append(signature.kind)
        return compiled(self, signature, args)

    monkeypatch.setattr(Programs, "_compile", watched)
    rows = _sweep(configs, tmp_path, tiny).rows
    assert {row["population"]["members"] for row in rows} == {2}
    assert len(counted) == sum(one.programs for one in told)


def test_what_no_population_or_process_trains_is_refused():
    stop = dataclasses.replace(BASE, on_nan="stop")
    with pytest.raises(Refusal, match=r"got 'stop'.* Give population='auto' or 'workers'"):
        _check_population([BASE, stop], MAP, None)
    _check_population([stop], hj.Performance(population="auto"), None)
    own = dataclasses.replace(BASE, model="__main__:Net", model_options={})
    with pytest.raises(Refusal, match="model='__main__:Net' from a module: other processes have another __main__"):
        _check_population([own], None, 2)
    _check_population([own], None, None)


def test_places_leave_no_worker_without_cells():
    assert [chunks.places_of(count, 2, None) for count in (1, 2, 3, 64, 100)] == [1, 1, 2, 32, 25]
    assert chunks.places_of(36, 1, MAP) == 3


def test_settled_modes_are_plain_json(tmp_path):
    path = tmp_path / "modes.json"
    assert chunks._read(path) == {}
    path.write_text(json.dumps({"a": "map"}))
    assert chunks._read(path) == {"a": "map"}
