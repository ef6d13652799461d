"""Rows of a comparison: paired differences, one threshold a seed, and runs that are left out by name."""

import json
import types

import numpy as np
import pytest
from made_up import EPOCHS, comparison, falling, made_up
from scipy import stats

import hardjax as hj
from hardjax.study import compare as comparing
from hardjax.study import convergence
from hardjax.study.arms import make_arms, make_methods, references
from hardjax.study.compare import check_comparable, summarise


def _by_label(result):
    return {row["label"]: row for row in result.rows}


def test_arms_are_set_against_ordinary_training_and_their_own_controls():
    arms = make_arms((1.0, 0.5, 0.2))
    named = {arm.label: [arms[j].label for j in references(arms, i)] for i, arm in enumerate(arms)}
    assert named == {
        "all-batches": [],
        "hard-batches 0.5": ["all-batches", "random-batches 0.5", "fixed-batches"],
        "hard-batches 0.2": ["all-batches", "random-batches 0.2", "fixed-batches"],
        "random-batches 0.5": ["all-batches"],
        "random-batches 0.2": ["all-batches"],
        "fixed-batches": ["all-batches"],
    }
    few = make_arms((0.5,), controls=())
    assert references(few, 1) == [0]
    methods = make_methods(("trimmed", "random-trimmed"), hj.trimming.Trimming())
    assert [references(methods, i) for i in range(3)] == [[], [0, 2], [0]]


def test_epochs_are_paired_with_one_threshold_a_seed():
    # Seeds of very different speed. Lowest losses a seed: the slower arm sets the level, and reaches it at the end.
    curves = [[falling(0.9), falling(0.5), falling(0.7)], [falling(0.8), falling(0.4), falling(0.5)]]
    result = comparison(curves, controls=())
    assert result.thresholds == tuple(min(curve) for curve in curves[0])
    sooner = _by_label(result)["hard-batches 0.5"]["differences"]["all-batches"]["common_threshold_epochs_sooner"]
    epochs = [[1 + int(np.argmax(curve <= level)) for curve, level in zip(row, result.thresholds, strict=True)]
              for row in curves]  # fmt: skip
    expected = stats.ttest_rel(*epochs).confidence_interval(0.95)
    assert (sooner["low"], sooner["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert sooner["mean"] == np.mean(np.subtract(*epochs)) and sooner["above"] == 3
    change = _by_label(result)["hard-batches 0.5"]["differences"]["all-batches"]["common_threshold_change_percent"]
    assert change["mean"] == pytest.approx(np.mean([100 * (a - b) / b for a, b in zip(*epochs, strict=True)]))
    assert _by_label(result)["hard-batches 0.5"]["common_threshold_change_percent"] == change["mean"]


def test_a_run_that_diverges_late_sets_no_level_and_is_named():
    """[2.0, 1.9, nan, ...] used to set a threshold of 1.9, which all others reached in their first epoch."""
    late = np.array([2.0, 1.9] + [np.nan] * (EPOCHS - 2))
    baseline = [falling(0.5), falling(0.5), falling(0.45)]
    result = comparison([baseline, [falling(0.4), late, falling(0.4)]], controls=())
    assert result.thresholds == tuple(min(curve) for curve in baseline)
    assert result.left_out == ("hard-batches 0.5, seed 1: not finite from epoch 3 on",)
    row = _by_label(result)["hard-batches 0.5"]
    against = row["differences"]["all-batches"]
    assert against["common_threshold_epochs_sooner"]["count"] == 2 == row["common_threshold_runs"]
    assert against["test_top1"]["count"] == 3  # diverging is a result: its accuracy stays in
    assert row["diverged"] == 1
    assert _by_label(result)["all-batches"]["common_threshold_runs"] == 3


@pytest.mark.parametrize(
    "losses, reason",
    [
        ([2.0, 1.9, np.nan, 1.0, np.nan], "not finite from epoch 5 on"),
        ([np.nan] * EPOCHS, "not finite from epoch 1 on"),
        ([*falling()[:-1], np.inf], "not finite from epoch 8 on"),
        ([2.0, 1.9], "ended after 2 of 8 epochs"),  # cut short where a spectrum was not finite
        ([], "never tested"),
    ],
)
def test_every_way_of_not_getting_to_the_end(losses, reason):
    result = comparison([[falling(0.5), falling(0.6)], [falling(0.4), losses]], controls=())
    assert result.left_out == (f"hard-batches 0.5, seed 1: {reason}",)
    assert result.thresholds == (min(falling(0.5)), min(falling(0.6)))
    own, common = (
        _by_label(result)["hard-batches 0.5"][f"{name}_runs"] for name in ("convergence", "common_threshold")
    )
    assert own == common == 1
    json.dumps(result.rows)


def test_nothing_left_to_compare_claims_nothing():
    result = comparison([[[np.nan] * EPOCHS] * 2, [[2.0]] * 2], controls=())
    assert np.isnan(result.thresholds).all() and len(result.left_out) == 4
    found = result.rows[1]["differences"]["all-batches"]
    assert not any(one["differs"] or one["holds_corrected"] for one in found.values())
    assert found["common_threshold_epochs_sooner"]["count"] == 0


def test_spectra_and_times_are_paired_too():
    seeds = range(5)
    first = [made_up(falling(), seed, seconds=1e-3 * (1 + seed), C_K=100 + seed, L_K=5) for seed in seeds]
    second = [
        made_up(falling(), seed, seconds=2e-3 * (1 + seed) * 1.01**seed, C_K=110 + 1.1 * seed, L_K=5) for seed in seeds
    ]
    found = comparison([first, second], controls=()).rows[1]["differences"]["all-batches"]
    assert found["C_K"]["differs"] and found["C_K"]["mean"] == pytest.approx(10.2)
    assert not found["L_K"]["differs"] and np.isnan(found["L_K"]["low"])
    assert found["time_ratio"]["differs"] and found["time_ratio"]["mean"] == pytest.approx(2 * 1.01**2)
    assert found["time_ratio"]["holds_corrected"]
    assert "C_K" not in comparison([[falling()], [falling()]], controls=()).rows[1]["differences"]["all-batches"]


def test_arms_without_the_same_seeds_are_refused():
    runs = ((made_up(falling(), 0),), (made_up(falling(), 1),))
    with pytest.raises(
        hj._validate.Refusal, match=r"the same seeds for every arm, in the same order, got \[\(0,\), \(1"
    ):
        summarise(hj.TrainConfig(epochs=EPOCHS), make_arms((0.5,), ()), runs)


def test_a_last_seed_that_no_run_may_have_is_refused_at_once():
    check_comparable(hj.TrainConfig(seed=2**32 - 3), 3, make_arms((0.5,)))
    with pytest.raises(hj._validate.Refusal, match="seed=4294967296"):
        check_comparable(hj.TrainConfig(seed=2**32 - 2), 3, make_arms((0.5,)))


def test_what_any_arm_refuses_is_refused_before_the_first_is_trained():
    with pytest.raises(ValueError, match="batch_size=1 to be at least 2 with trimming"):
        check_comparable(hj.TrainConfig(batch_size=1), 3, make_methods(("trimmed",), hj.trimming.Trimming()))


@pytest.mark.parametrize(
    "interrupted, arms, seeds",
    [
        (3, 3, 1),  # the fourth arm's first run: three arms are complete with the first seed
        (4, 4, 1),  # the second seed's first run
        (7, 4, 1),  # the second seed's last run
        (None, 4, 2),
    ],
)
def test_ctrl_c_leaves_whole_pairs(monkeypatch, interrupted, arms, seeds):
    made = []

    def train(setting, *rest, **more):
        result = made_up(falling(), setting.config.seed)
        if len(made) == interrupted:
            result.summary |= {"signal": "SIGINT", "end": "interrupted"}
        made.append((setting.config.seed, setting.config.selection))
        return result

    monkeypatch.setattr(comparing, "prepare", lambda config, *rest: types.SimpleNamespace(config=config))
    monkeypatch.setattr(comparing, "train", train)
    result = comparing.compare(hj.TrainConfig(epochs=EPOCHS), make_arms((0.5,)), seeds=2, progress=False)
    assert (len(result.arms), len(result.results[0])) == (arms, seeds)
    assert result.interrupted == (interrupted is not None)
    assert [seed for seed, _ in made] == sorted(seed for seed, _ in made)  # all arms of a seed are neighbours in time


def test_ctrl_c_in_the_first_run_leaves_nothing(monkeypatch):
    result = made_up(falling())
    result.summary |= {"signal": "SIGTERM", "end": "interrupted"}
    monkeypatch.setattr(comparing, "prepare", lambda config, *rest: types.SimpleNamespace(config=config))
    monkeypatch.setattr(comparing, "train", lambda *rest, **more: result)
    with pytest.raises(comparing.Interrupted) as caught:
        comparing.compare(hj.TrainConfig(epochs=EPOCHS), make_arms((0.5,)), seeds=2, progress=False)
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.signal == "SIGTERM"


def test_a_curve_that_ends_finite_counts_whatever_lay_between():
    losses = np.array([2.0, np.nan, 0.5, 0.4])
    assert convergence.common_threshold([losses, np.array([2.0, 0.3])]) == 0.4
    assert convergence.threshold_epoch(np.arange(1.0, 5), losses, 0.6) == 3.0
    assert np.isnan(convergence.threshold_epoch(np.arange(1.0, 4), np.array([2.0, 0.5, np.nan]), 0.6))
    assert np.isnan(convergence.common_threshold([np.array([2.0, np.nan]), np.array([])]))
