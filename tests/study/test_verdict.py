"""Verdicts against cases worked by hand."""

import math

import numpy as np
import pytest

from hardjax.study import verdict
from hardjax.study.verdict import CONTRADICTS, DOES_NOT_HOLD, HOLDS, TOO_FEW, Difference, difference, judge

INF, NAN = math.inf, math.nan


def _seeds(*values):
    return dict(enumerate(values))


def test_a_difference_is_turned_so_that_the_claim_is_above_zero():
    # Errors fell by 1, 2, 3: mean 2, deviation 1, error of the mean 1 / sqrt(3), t(0.975, 2) = 4.3027.
    found = difference(_seeds(9, 8, 7), _seeds(10, 10, 10), higher=False)
    assert found.middle == 2
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert difference(_seeds(9, 8, 7), _seeds(10, 10, 10), higher=True).middle == -2


def test_pairs_are_seeds_that_both_have():
    found = difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 1.0, 2: 7.0, 5: NAN}, higher=True)
    assert (found.pairs, found.middle) == (2, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "p_value", "pairs", "verdict"),
    [
        (0.1, 0.9, 0.01, 5, HOLDS),
        (-0.9, -0.1, 0.01, 5, CONTRADICTS),
        (-0.3, 0.4, 0.6, 5, DOES_NOT_HOLD),  # whatever it is, it is smaller than what would matter
        (-0.3, 0.6, 0.6, 5, TOO_FEW),  # 0.5 may be or not
        (0.1, 0.9, 0.01, 2, TOO_FEW),
        (-0.3, 0.4, 0.6, 2, TOO_FEW),
        (NAN, NAN, NAN, 5, TOO_FEW),  # five equal pairs show the grid they lie on
        (-0.4, -0.1, 0.2, 5, TOO_FEW),
    ],
)
def test_the_rule(low, high, p_value, pairs, verdict):
    assert judge([Difference(0.0, low, high, pairs, p_value)], [0.5]) == [verdict]


def test_arms_of_one_statement_are_judged_together():
    # 0.03 holds alone; of two it is held against 0.025, and what the correction takes away is no verdict at all.
    alone, other = Difference(0.5, 0.1, 0.9, 5, 0.03), Difference(0.3, -0.1, 0.7, 5, 0.2)
    assert judge([alone], [0.5]) == [HOLDS]
    assert judge([alone, other], [0.5, 0.5]) == [TOO_FEW, TOO_FEW]
    assert judge([alone, Difference(0.5, 0.2, 0.8, 5, 0.001)], [0.5, 0.5]) == [HOLDS, HOLDS]


def test_a_median_lies_between_order_statistics():
    # 2 / 2^5 = 0.0625 is too much for five values; 2 / 2^6 = 0.03125 is not; 2 * (1 + 9) / 2^9 = 0.039 of nine.
    assert np.isnan(verdict.median_interval([1, 2, 3, 4, 5])).all()
    assert verdict.median_interval([6, 1, 2, 3, 4, 5]) == (1, 6)
    assert verdict.median_interval(range(8)) == (0, 7)
    assert verdict.median_interval(range(9)) == (1, 7)
    assert np.isnan(verdict.median_interval([])).all()


def test_a_miss_is_infinitely_late():
    arm, against = _seeds(3, 4, 5, 6, 7, INF), _seeds(5, INF, 9, 9, INF, INF)
    found = difference(arm, against, higher=False, may_miss=True)
    # 2, inf, 4, 3, inf, 0 sooner
    assert (found.middle, found.low, found.high, found.pairs, found.by_sign) == (3.5, 0, INF, 6, True)
    assert judge([found], [1.0]) == [TOO_FEW]
    sooner = difference(_seeds(*range(6)), _seeds(*range(10, 16)), higher=False, may_miss=True)
    assert (sooner.low, sooner.p_value) == (10, 2 / 64)
    assert judge([sooner], [1.0]) == [HOLDS]


def test_the_middle_of_a_miss_on_either_side_is_a_number():
    assert verdict.median([-INF, INF]) == -INF
    assert verdict.median([1, 2, INF]) == 2
    assert math.isnan(verdict.median([]))


@pytest.mark.parametrize("count", [3, 6, 7, 9, 20])
def test_sign_test_and_interval_agree(count):
    rng = np.random.default_rng(count)
    for shift in np.linspace(-1, 1, 21):
        values = np.round(rng.normal(shift, 0.5, count), 1)
        low, high = verdict.median_interval(values)
        assert (verdict.sign_test(values) < 0.05) == bool(low > 0 or high < 0)


def test_no_seed_chooses_what_it_is_judged_by():
    arms = {"a": _seeds(1, 5, 5), "b": _seeds(4, 4, 4)}
    # For seed 0 the others prefer a (5 to 4); for seeds 1 and 2 b (4 to 3).
    assert verdict.best_by_others(arms, higher=True) == {0: 1, 1: 4, 2: 4}
    assert verdict.best_by_others({"a": _seeds(1, 2)}, higher=True) == _seeds(1, 2)
    assert verdict.best_by_others({"a": _seeds(1, 2), "b": _seeds(2, 1)}, higher=True) == {}
    assert verdict.best_by_others({"a": _seeds(0, 0, INF), "b": _seeds(1, 1, 1)}, higher=False)[0] == 1


def test_of_arms_that_miss_the_one_with_the_lowest_median_is_chosen_whatever_comes_first():
    never, late = _seeds(*[INF] * 10), _seeds(*[38 if seed not in (1, 5) else INF for seed in range(10)])
    soon = _seeds(*[10 if seed not in (3, 7) else INF for seed in range(10)])
    for arms in ({"never": never, "soon": soon}, {"soon": soon, "never": never}, {"late": late, "soon": soon}):
        assert verdict.best_by_others(arms, higher=False, may_miss=True) == soon
    # Equal medians: fewer misses, then what was reached sooner.
    steady, lucky = _seeds(5, 5, 5, 5, 9), _seeds(5, 5, 5, 5, INF)
    found = verdict.best_by_others({"lucky": lucky, "steady": steady}, higher=False, may_miss=True)
    assert found == {0: 5, 1: 5, 2: 5, 3: 5, 4: INF}  # without the last seed they are alike, and the first is taken
    found = verdict.best_by_others({"9": steady, "6": _seeds(5, 5, 5, 5, 6)}, higher=False, may_miss=True)
    assert found == {0: 5, 1: 5, 2: 5, 3: 5, 4: 9}
    # One that lacks a value is never the best.
    lacking = verdict.best_by_others({"a": _seeds(1, 1, math.nan), "b": _seeds(2, 2, 2)}, higher=False, may_miss=True)
    assert lacking[0] == lacking[1] == 2


def test_the_papers_own_test():
    # P3 prints p = 0.0037 for 5.07 +- 0.21 against 5.56 +- 0.09; five runs with just these give 0.0040.
    shape = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    shape /= shape.std(ddof=1)
    first, second = 5.07 + 0.21 * shape, 5.56 + 0.09 * shape
    assert verdict.two_samples(_seeds(*first), _seeds(*second)) == pytest.approx(0.0040, abs=5e-5)
    assert math.isnan(verdict.two_samples({0: 1.0}, _seeds(1, 2)))
