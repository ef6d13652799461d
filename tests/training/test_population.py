"""Populations: each member is the run that it is alone, whatever the others do and however it is cut."""

import dataclasses
import re

import chex
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import HardBatches
from hardjax.engine.population import split
from hardjax.testing import assert_member_equals_solo
from hardjax.training import checkpoint, population_loop
from hardjax.training.population_loop import PopulationLoop

BASE = hj.TrainConfig(model_options={"widths": [6]}, epochs=3, batch_size=16, learning_rate=0.05)
OWN = (
    {"seed": 3, "learning_rate": 0.1},
    {"seed": 4, "weight_decay": 1e-3, "momentum": 0.5},
    {"seed": 3, "schedule": hj.Schedule("step", warmup=0.3)},
)
STAGED = {"batch_size": 128, "batch_plan": hj.batch_plan.BatchPlan("s8-to-32-MS")}
MAP, VMAP = hj.Performance(population="map"), hj.Performance(population="vmap")
REPLAYED = {"selection": HardBatches(0.4), "augmentation": "standard", "batch_size": 8}


def _members(**settings):
    return [dataclasses.replace(BASE, **(settings | own)) for own in OWN]


def _reported(result):
    kept = ("diverged", "bad_steps", "first_bad_step", "backprops", "final_test_top1", "end")
    return {
        "history": {name: column for name, column in result.history.items() if name != "seconds"},
        "summary": {name: result.summary[name] for name in kept},
        "state": checkpoint.on_host(result.state),
        "replays": result.replays,
        "drops": result.drop_counts,
        "measured": result.measurements,
    }


def _together(configs, tiny, performance=MAP, **more):
    return hj.run_population(configs, dataset=tiny, performance=performance, progress=False, **more)


def test_a_member_is_its_run(tiny):
    configs = _members()
    for config, result in zip(configs, _together(configs, tiny), strict=True):
        alone = hj.run(config, dataset=tiny, progress=False)
        assert result.config == alone.config and result.summary["population"] == {"mode": "map", "members": 3}
        chex.assert_trees_all_equal(_reported(result), _reported(alone))


@pytest.mark.parametrize(
    "settings",
    [
        REPLAYED,
        {"trimming": hj.trimming.Trimming(1.0, 0.4)},
        {"measure": hj.fisher.FisherMeasure(every=4), "batch_size": 8, "validation": 0.2},
        {"batch_plan": hj.batch_plan.BatchPlan("8-16"), "batch_size": 128, "optimizer": "adam"},
        {"on_nan": "skip-step", "selection": hj.selection.HardSamples(0.5)},
    ],
    ids=("replay", "trimmed", "measured", "staged", "samples"),
)
@pytest.mark.ci
def test_members_of_every_kind_equal_their_runs(tiny, settings):
    assert_member_equals_solo(_members(**settings), tiny)


@pytest.mark.ci
def test_all_at_once_equals_runs_to_rounding(tiny):
    assert_member_equals_solo(_members(batch_size=8), tiny, performance=VMAP)


@pytest.mark.parametrize("performance", [MAP, pytest.param(VMAP, marks=pytest.mark.slow)], ids=("map", "vmap"))
@pytest.mark.parametrize(
    "model, options, settings",
    [
        ("resnet8", {}, {}),
        ("resnet8", {"norm": "none"}, {"trimming": hj.trimming.Trimming(0.75, 0.5)}),
        ("alexnet_reduced", {}, {"selection": HardBatches(0.5)}),
        ("alexnet_reduced", {"norm": "batch"}, {}),
    ],
    ids=str,
)
@pytest.mark.ci
def test_convolutional_networks(model, options, settings, performance):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8) for count in (24, 8)]
    labels = [np.arange(len(part)) % 4 for part in images]
    data = hj.data.Dataset.from_arrays(images[0], labels[0], images[1], labels[1], num_classes=4, name="small")
    base = hj.TrainConfig(model=model, model_options=options, epochs=2, batch_size=8, **settings)
    configs = [dataclasses.replace(base, seed=seed, learning_rate=rate) for seed, rate in enumerate((0.01, 0.05))]
    assert_member_equals_solo(configs, data, performance=performance)


@pytest.mark.ci
def test_the_check_notices_a_member_that_differs(tiny, monkeypatch):
    inputs = population_loop.population_inputs

    def mixed_up(plans, dispatch):
        return inputs([*plans[1:], plans[0]], dispatch)

    monkeypatch.setattr(population_loop, "population_inputs", mixed_up)
    with pytest.raises(AssertionError, match=r"^member: member 0: history\.full_train_loss differs"):
        assert_member_equals_solo(_members(), tiny)
    with pytest.raises(AssertionError, match=r"^member: member 0: .* differs by "):
        assert_member_equals_solo(_members(), tiny, performance=VMAP)


@pytest.mark.parametrize("performance", [MAP, pytest.param(VMAP, marks=pytest.mark.ci)], ids=("map", "vmap"))
def test_a_member_that_diverges_is_kept_and_changes_nothing(tiny, tmp_path, performance):
    configs = _members()
    configs[1] = dataclasses.replace(configs[1], learning_rate=1e30)
    first, lost, last = _together(configs, tiny, performance, output=tmp_path)
    healthy = _together([configs[0], configs[0], configs[2]], tiny, performance)
    for found, expected in ((first, healthy[0]), (last, healthy[2])):
        chex.assert_trees_all_equal(_reported(found), _reported(expected))
    alone = hj.run(configs[1], dataset=tiny, progress=False)
    assert (lost.summary["end"], lost.summary["diverged"], lost.history["epoch"].tolist()) == ("diverged", True, [1.0])
    assert lost.summary["backprops"] == int(lost.state.step) == lost.state.visits.sum() == 5
    assert lost.summary["first_bad_step"] == alone.summary["first_bad_step"]
    np.testing.assert_array_equal(lost.history["samples_hash"], alone.history["samples_hash"][:1])
    # Read again, it is what it was.
    again = _together(configs, tiny, performance, output=tmp_path, resume=True)
    for found, expected in zip(again, (first, lost, last), strict=True):
        chex.assert_trees_all_equal(_reported(found), _reported(expected))
        assert found.summary["seconds_per_step"] == expected.summary["seconds_per_step"]


class Killed(Exception):
    """As the end of a process."""


@pytest.mark.ci
@pytest.mark.parametrize("lacking", ["nothing", "a save", "a file's bytes"])
@pytest.mark.filterwarnings("ignore::hardjax.training.checkpoint.RunWarning")
def test_what_was_cut_short_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch, lacking):
    configs = _members(**REPLAYED | {"epochs": 4})
    configs[0] = dataclasses.replace(configs[0], learning_rate=1e30)
    performance = dataclasses.replace(MAP, save_every=1)
    whole = _together(configs, tiny)
    test, calls = PopulationLoop._test, []

    def dying(self):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        test(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PopulationLoop, "_test", dying)
        _together(configs, tiny, performance, output=tmp_path)
    kept = [[one.step for one in checkpoint.kept(tmp_path / "members" / f"{place:04}")] for place in range(3)]
    assert kept[0] == [9] and len(kept[1]) == 2 and kept[1] == kept[2]
    if lacking == "a save":
        checkpoint.forget(tmp_path / "members" / "0002", kept[2][0])
    elif lacking != "nothing":
        newest = checkpoint.kept(tmp_path / "members" / "0002")[-1].path
        largest = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    again = _together(configs, tiny, performance, output=tmp_path, resume=True)
    for found, expected in zip(again, whole, strict=True):
        chex.assert_trees_all_equal(_reported(found), _reported(expected))
    assert again[1].summary["resumed_at"] == [kept[1][1 if lacking == "nothing" else 0]]
    # Each member's folder is a run's.
    alone = hj.run(configs[1], dataset=tiny, output=tmp_path / "members" / "0001", resume=True, progress=False)
    chex.assert_trees_all_equal(_reported(alone), _reported(whole[1]))


@pytest.mark.ci
def test_chunks_share_their_programs(tiny, monkeypatch):
    configs = [dataclasses.replace(BASE, seed=seed, model_options={"widths": [7]}) for seed in range(5)]
    found = _together(configs, tiny, dataclasses.replace(MAP, population_chunk=3))
    assert [one.summary["population"]["members"] for one in found] == [3] * 5
    assert found[0].summary["compile_seconds"] > 0 == found[-1].summary["compile_seconds"]
    for config, result in zip(configs[1:3], found[1:3], strict=True):  # the first chunk has two members
        alone = hj.run(config, dataset=tiny, progress=False)
        chex.assert_trees_all_equal(_reported(result), _reported(alone))


def test_chunks_are_few_and_even():
    assert split(3, 32) == (3, [range(0, 3)])
    assert split(5, 3) == (3, [range(0, 2), range(2, 5)])
    assert split(64, None) == (32, [range(0, 32), range(32, 64)])
    for count in range(1, 40):
        places, chunks = split(count, 7)
        assert [index for chunk in chunks for index in chunk] == list(range(count)) and len(chunks) == -(-count // 7)
        assert max(map(len, chunks)) == places and min(map(len, chunks)) >= places - 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ([], "a population of one member at least, got none"),
        ([{}, {"batch_size": 8}], "share batch_size, got 16 and 8; they may differ in seed, learning_rate"),
        ([{}, {"model_options": {"widths": [7]}}], "share model_options, got"),
        ([{}, {"optimizer": "adam"}], "share optimizer, got 'momentum' and 'adam'"),
        (
            [{"on_nan": "stop"}] * 2,
            "on_nan='record' or 'skip-step' in a population, got 'stop': its members end together",
        ),
        (
            [{**STAGED, "schedule": "step"}, {**STAGED, "schedule": hj.Schedule("step", (0.25, 0.5))}],
            "share schedule, got",
        ),
    ],
    ids=("none", "batch", "options", "optimiser", "stop", "plan"),
)
def test_what_no_program_shares_is_refused_by_its_name(tiny, changes, message):
    with pytest.raises(Refusal, match=re.escape(message)):
        _together([dataclasses.replace(BASE, **change) for change in changes], tiny)


def test_what_no_population_does_is_refused(tiny, tmp_path):
    plan = hj.batch_plan.BatchPlan.controlled(16, 8, 16)
    controlled = {"batch_size": 128, "batch_plan": plan, "measure": hj.fisher.FisherMeasure(every=2)}
    with pytest.raises(Refusal, match=r"Expected no controlled batch_plan=.* would decide on different batch sizes"):
        _together([dataclasses.replace(BASE, **controlled)] * 2, tiny)
    with pytest.raises(Refusal, match=r"got 'workers': `hj.sweep` and `hardjax sweep` train a member a process"):
        _together([BASE], tiny, hj.Performance(population="workers"))
    (tmp_path / "run").mkdir()
    hj.run(dataclasses.replace(BASE, epochs=1), dataset=tiny, output=tmp_path / "run", progress=False)
    with pytest.raises(Refusal, match="holds no population"):
        _together([BASE], tiny, output=tmp_path / "run", resume=True)


def test_streamed_data_are_refused_before_they_are_read(monkeypatch):
    from hardjax.study import population as running

    def load(*given, **more):
        raise AssertionError("read into memory")

    monkeypatch.setattr(running, "load", load)
    said = "Expected resident data in a population, got digits streamed"
    with pytest.raises(Refusal, match=said):
        hj.run_population([BASE] * 2, performance=hj.Performance(stream=True), progress=False)
    monkeypatch.setattr(running, "must_stream", lambda config, performance: True)  # as of what no memory holds
    with pytest.raises(Refusal, match=said):
        hj.run_population([BASE] * 2, progress=False)


def test_auto_takes_what_was_faster_and_keeps_it(tiny, tmp_path, monkeypatch):
    from hardjax.study import population as running

    times = {"vmap": 1.0, "map": 2.0}
    monkeypatch.setattr(running, "seconds_a_step", lambda population: times[population.mode])
    auto = hj.Performance(population="auto")
    configs = [dataclasses.replace(one, epochs=1) for one in _members()]
    first = _together(configs, tiny, auto, output=tmp_path)
    assert {one.summary["population"]["mode"] for one in first} == {"vmap"}
    times["map"] = 0.5
    again = _together(configs, tiny, auto, output=tmp_path, resume=True)
    assert {one.summary["population"]["mode"] for one in again} == {"vmap"}
    assert {one.summary["population"]["mode"] for one in _together(configs, tiny, auto)} == {"map"}
