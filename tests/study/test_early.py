"""Early model selection, on beacons whose ranking is known by hand."""

import numpy as np
import pytest
from scipy import stats

from hardjax.study import early
from hardjax.study.beacons import Configuration
from hardjax.study.early import DISTANCE, distances, rank_early
from hardjax.study.statistics import spearman

COUNT, POINTS = 9, 4


def configuration(condition, energy, error, **more):
    """The same at every epoch, unless given for each."""
    columns = {
        name: np.broadcast_to(value, POINTS).astype(float)
        for name, value in (("condition", condition), ("energy", energy))
    }
    nothing = np.full(POINTS, np.nan)
    given = dict(
        batches=32,
        learning_rate=0.1,
        seeds=3,
        diverged=0,
        error={"test": error, "train": error},
        epoch=np.arange(1.0, POINTS + 1),
        c=columns["condition"],
        errors={"test": nothing, "train": nothing, "validation": nothing},
    )
    return Configuration(**given | columns | more)


def ranked(found, epochs=(1, 2)):
    return {(one.known, one.epoch): one for one in rank_early(found, epochs)}


def test_an_error_that_grows_along_the_plane_is_known_at_once():
    """On a line: the rank by C_K is the final one, by L_K its reverse."""
    found = ranked([configuration(10.0**i, 10.0**-i, float(i)) for i in range(COUNT)])
    for epoch in (1, 2):
        assert found["C_K", epoch].value == pytest.approx(1) and found["C_K", epoch].low == pytest.approx(1)
        assert found["L_K", epoch].value == pytest.approx(-1) and found["L_K", epoch].differs
        # The best has the second for its beacon, as far away as the best is from the second: they share a rank.
        expected = stats.spearmanr([1, 1, *range(2, COUNT)], range(COUNT)).statistic
        assert found[DISTANCE, epoch].value == pytest.approx(expected) and found[DISTANCE, epoch].count == COUNT


def test_an_error_with_its_minimum_inside_is_known_by_distance_alone():
    places = np.arange(COUNT) - COUNT // 2
    found = ranked([configuration(10.0**x, 10.0**x, float(abs(x))) for x in places])
    assert found["C_K", 1].value == pytest.approx(0) and not found["C_K", 1].differs
    assert found[DISTANCE, 1].value > 0.9 and found[DISTANCE, 1].differs


def test_errors_dealt_at_random_are_known_by_nothing():
    rng = np.random.default_rng(2)
    found = ranked(
        [configuration(10.0**i, 10.0 ** (i % 4), error) for i, error in enumerate(rng.permutation(np.arange(12.0)))]
    )
    for known in (DISTANCE, "C_K", "L_K", "c, mean of the epoch"):
        assert found[known, 1].low < 0 < found[known, 1].high


def test_what_is_known_is_that_of_the_epoch():
    """Places that are the ranking in the second epoch and its reverse in the first."""
    found = ranked([configuration([10.0 ** (9 - i), 10.0**i, 1, 1], 1.0, float(i)) for i in range(COUNT)])
    assert found["C_K", 1].value == pytest.approx(-1) and found["C_K", 2].value == pytest.approx(1)
    assert np.isnan(found["L_K", 1].value) and not found["L_K", 1].differs  # alike for all: it ranks nothing
    assert ("C_K", 3) not in found and len(rank_early([configuration(1, 1, 1.0)], (4, 5))) == 6


def test_rivals_are_the_errors_of_that_epoch_and_those_not_tested_then_are_left_out():
    def errors(i, name):
        nothing = np.full(POINTS, np.nan)
        rows = {"test": nothing, "train": [100 - i, i, 0, 0], "validation": nothing, name: [np.nan if i < 2 else i] * 4}
        return {name: np.asarray(row, float) for name, row in rows.items()}

    for name, other in (("test", "validation"), ("validation", "test")):
        found = ranked([configuration(1, 1, float(i), errors=errors(i, name)) for i in range(COUNT)])
        assert found["train error at that epoch", 1].value == pytest.approx(-1)
        assert found["train error at that epoch", 2].value == pytest.approx(1)
        assert found[f"{name} error at that epoch", 1].count == COUNT - 2
        assert (f"{other} error at that epoch", 1) not in found


def test_distances_leave_each_configuration_itself_out():
    rng = np.random.default_rng(1)
    places, errors = rng.normal(size=(8, 2)) * [1, 50], rng.permutation(np.arange(8.0))
    places[3], errors[int(np.argmin(errors))] = np.nan, np.nan
    known = [i for i in range(8) if i != 3 and np.isfinite(errors[i])]
    width = np.ptp(places[known], axis=0)
    found = distances(places, errors)
    for i in range(8):
        if i not in known:
            assert np.isnan(found[i])
            continue
        beacon = min((j for j in known if j != i), key=lambda j: errors[j])
        assert found[i] == pytest.approx(np.hypot(*((places[i] - places[beacon]) / width))) and found[i] > 0
    assert np.isnan(distances(places[:1], errors[:1])).all()


def test_rank_correlation_is_that_of_scipy_ties_included():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (6, 11)), rng.normal(size=(6, 11))
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_the_interval_is_that_of_a_loop_over_resamples(monkeypatch):
    monkeypatch.setattr(early, "_RESAMPLES", 150)
    rng = np.random.default_rng(5)
    condition, final = 10 ** rng.normal(size=10), rng.normal(size=10) + 5
    found = ranked([configuration(a, 1.0, b) for a, b in zip(condition, final, strict=True)])["C_K", 1]
    drawn = np.random.default_rng(0).integers(0, 10, (150, 10))
    again = [stats.spearmanr(condition[rows], final[rows]).statistic for rows in drawn]
    np.testing.assert_allclose([found.low, found.high], np.quantile(again, [0.025, 0.975]))
    assert found.value == pytest.approx(stats.spearmanr(condition, final).statistic)


def test_two_configurations_have_no_correlation():
    found = ranked([configuration(1, 1, 1.0), configuration(2, 2, 2.0)])
    assert np.isnan(found["C_K", 1].value) and found["C_K", 1].count == 2 and not found["C_K", 1].differs
