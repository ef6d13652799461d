"""Settings of speed and memory: exact ones change no bit of what a run reports, the others stay within rounding."""

import chex
import pytest
from platforms import near

import hardjax as hj
from hardjax.choose.selection import HardBatches
from hardjax.training import loop

EXACT = [
    {"steps_per_dispatch": 4},
    {"steps_per_dispatch": 1},
    {"steps_per_dispatch": 100},
    {"donate": False},
    {"save_every": 1},
    {"checkpoint_gigabytes": 1.0},
    {"compile_ahead": "off"},
    {"compile_ahead": "first"},
    {"stream": True},
    {"stream": False},
    {"shard_data": True},  # test_devices.py has several devices
]
ROUNDING = [
    {"eval_batch_size": 3},
    {"trim_path": "plain"},
    {"trim_programs": 1},
    {"gram_chunk": 3},
    {"population": "vmap"},  # of one run nothing: tests/training/test_population.py
    {"population_chunk": 3},
    {"devices": 1},
    {"micro_batch": 4},
]
CLOCKS = {"compile_seconds", "compile_wait_seconds", "input_wait_seconds"}
TIMES = CLOCKS | {"seconds", "seconds_per_step", "train_seconds"}


def test_every_performance_setting_is_marked_and_tried():
    effects = hj.Performance.effects()
    assert set(effects.values()) == {"exact", "rounding"}
    assert {name for change in EXACT for name in change} == {name for name in effects if effects[name] == "exact"}
    assert {name for change in ROUNDING for name in change} == {n for n in effects if effects[n] == "rounding"}


@pytest.fixture(scope="module")
def everything():
    """A configuration that every setting bears on, and its run with the settings as they are."""
    return hj.TrainConfig(
        model="mlp",
        model_options={"widths": [8]},
        epochs=3,
        batch_size=8,
        learning_rate=0.05,
        selection=HardBatches(0.35),
        trimming=hj.trimming.Trimming(1.0, 0.4),
        augmentation="standard",
        schedule="cosine",
        measure=hj.fisher.FisherMeasure(every=4),
    )


def _reported(result) -> dict:
    history = {name: column for name, column in result.history.items() if name not in TIMES}
    summary = {name: value for name, value in result.summary.items() if name not in TIMES}
    return {"history": history, "summary": summary, "params": result.state.params, "measured": result.measurements,
            "replays": result.replays, "drops": result.drop_counts}  # fmt: skip


@pytest.mark.parametrize("change", EXACT, ids=str)
def test_exact_settings_change_no_bit_of_what_a_run_reports(tiny, everything, change):
    plain, other = (
        _reported(hj.run(everything, dataset=tiny, performance=performance, progress=False))
        for performance in (None, hj.Performance(**change))
    )
    assert plain.pop("summary") == other.pop("summary")
    chex.assert_trees_all_equal(plain, other)


@pytest.mark.parametrize("change", ROUNDING, ids=str)
def test_rounding_settings_stay_within_rounding(tiny, everything, change):
    """A thousandth of each figure, a hundred times what one step in float32 rounds: differences grow over 27 steps."""
    plain, other = (
        _reported(hj.run(everything, dataset=tiny, performance=performance, progress=False))
        for performance in (None, hj.Performance(**change))
    )
    chex.assert_trees_all_equal(plain["replays"], other["replays"])
    chex.assert_trees_all_close(plain["params"], other["params"], **near(rtol=1e-3, atol=1e-5))
    for name in ("train_loss", "test_loss", "full_train_loss", "L_K", "kept_loss"):
        chex.assert_trees_all_close(plain["history"][name], other["history"][name], **near(rtol=1e-3))


def test_a_slow_network_gets_shorter_dispatches(tiny, monkeypatch):
    """The first dispatch is timed; one that would take far longer than a second is not made again."""
    monkeypatch.setattr(loop, "DISPATCH_SECONDS", 1e-9)
    bounds, original = [], loop.next_dispatch

    def noting(plan, *rest):
        bounds.append(plan.bound)
        return original(plan, *rest)

    monkeypatch.setattr(loop, "next_dispatch", noting)
    settings = hj.TrainConfig(model_options={"widths": [8]}, batch_size=8, epochs=2, selection=HardBatches(0.9))
    result = hj.run(settings, dataset=tiny, progress=False)
    assert bounds[0] > 9 and bounds[-1] == 4
    assert result.summary["backprops"] == 18
