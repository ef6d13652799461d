"""Intervals against scipy and numbers worked by hand; what is never claimed."""

import numpy as np
import pytest
from scipy import stats

from hardjax.study import statistics


@pytest.mark.parametrize("count", [2, 3, 10])
def test_paired_intervals_are_those_of_the_paired_t_test(count):
    rng = np.random.default_rng(count)
    common = rng.normal(0, 5, count)  # what a seed does to both arms
    first, second = (common + rng.normal(mean, 0.3, count) for mean in (1.0, 0.5))
    found = statistics.paired(first, second)
    expected = stats.ttest_rel(first, second)
    ends = expected.confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high, found.p_value), (*ends, expected.pvalue), rtol=1e-10)
    np.testing.assert_allclose(found.mean, (first - second).mean(), rtol=1e-10)
    assert found.differs == (expected.pvalue < 0.05) and found.count == count
    assert found.above + found.below == count and found.above == (first > second).sum()


def test_an_interval_by_hand():
    # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.303: 2 +- 4.303 / sqrt(3) = 2 +- 2.484.
    found = statistics.paired([11.0, 22, 33], [10.0, 20, 30])
    assert found.mean == 2 and found.half_width == pytest.approx(2.484, abs=1e-3) and not found.differs
    assert statistics.half_width_95(np.array([1.0, 2, 3])) == pytest.approx(2.484, abs=1e-3)
    assert statistics.paired([11.0, 22, 33, 44], [10.0, 20, 30, 41]).differs


def test_pairing_shows_what_separate_means_do_not():
    rng = np.random.default_rng(0)
    first = rng.normal(30, 5, 10)
    second = first - rng.normal(2, 1, 10)
    assert statistics.paired(first, second).differs and stats.ttest_ind(first, second).pvalue > 0.3


@pytest.mark.parametrize(
    "first, second",
    [
        ([97.5] * 3, [97.5] * 3),
        ([97.5] * 3, [97.2] * 3),  # the same difference three times, which Student's t would give a width of zero
        ([100 * 351 / 360, 97.5, 97.5], [97.5, 97.5 + 1e-12, 97.5]),  # equal but for rounding
        ([0.1 + 0.2, 0.3, 0.3], [0.2, 0.2, 0.2]),
        ([97.5], [97.2]),
        ([], []),
        ([np.nan, 97.5], [97.0, np.inf]),
    ],
)
def test_equal_values_and_single_ones_have_no_interval_and_claim_nothing(first, second):
    found = statistics.paired(first, second)
    assert np.isnan(found.low) and np.isnan(found.high) and np.isnan(found.half_width) and np.isnan(found.p_value)
    assert not found.differs and not found.determined


def test_signs_are_counted_where_no_interval_is_determined():
    found = statistics.paired([20.0] * 10, [19.0] * 10)
    assert (found.mean, found.above, found.below, found.count) == (1.0, 10, 0, 10)
    assert (statistics.paired([97.5, 97.5 + 1e-12], [97.5, 97.5]).above) == 0


def test_pairs_that_are_not_finite_are_left_out_together():
    found = statistics.paired([1.0, np.nan, 3, 4, 9], [0.0, 0, np.inf, 1, 5])
    expected = stats.ttest_rel([1.0, 4, 9], [0.0, 1, 5]).confidence_interval(0.95)
    assert found.count == 3 and found.low == pytest.approx(expected.low) and found.high == pytest.approx(expected.high)


def test_a_ratio_is_of_logarithms_and_one_is_no_difference():
    first, second = np.array([1.1, 2.4, 3.0]), np.array([1.0, 2.0, 3.1])
    found = statistics.paired_ratio(first, second)
    ends = stats.ttest_rel(np.log(first), np.log(second)).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), np.exp(ends), rtol=1e-10)
    assert found.mean == pytest.approx(stats.gmean(first / second)) and found.neutral == 1 and not found.differs
    assert statistics.paired_ratio([1.1, 1.11, 1.12], [1.0, 1.0, 1.0]).differs
    assert not statistics.paired_ratio([0.0, 1.0], [1.0, np.nan]).count


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.2 against 0.05 / 4, / 3, / 2, / 1: the second fails, so that no later one holds.
    assert statistics.holm([0.2, 0.01, 0.03, 0.02, np.nan]).tolist() == [False, True, False, False, False]
    assert statistics.holm([0.01, 0.02, np.nan]).tolist() == [True, True, False]
    assert statistics.holm([np.nan, np.nan]).tolist() == [False, False] and statistics.holm([]).tolist() == []


def test_plain_content_holds_the_claim():
    plain = statistics.paired([1.0, 2, 3], [0.0, 0, 0]).to_dict()
    assert plain["differs"] is False and plain["count"] == 3 and isinstance(plain["p_value"], float)
