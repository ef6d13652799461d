"""Honest figures from few paired seeds: means with two-sided 95 % intervals, and when a difference is claimed.

The rule is fixed beforehand: two arms "differ" only where the interval of their paired difference excludes "no
difference". Arms share seeds (initial weights, order of samples), so differences are taken seed by seed: what the seeds
have in common cancels, which is what lets ten of them show what separate means do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95

# A spread below this share of the values is the rounding of equal values (97.5 % computed twice), not a spread. What
# is compared is an epoch, a count out of n or a float64 mean of float32 figures, all coarser than that.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its two-sided 95 % interval (Student's t).

    Attributes:
        mean: NaN where there is no value.
        low, high: ends of the interval; NaN where it is not determined: for fewer than two values, and for equal ones.
            Accuracies are counts out of the test samples and epochs are counts of test points, so that equal values at
            three seeds show the grid they lie on and no certainty: Student's t would print a width of zero.
        count: values (pairs) that it rests on; those that are not finite are left out.
        above, below: how many of them lie above and below "no difference", for those who trust signs alone.
        p_value: two-sided, of Student's t test, below 0.05 exactly where the interval excludes "no difference"; NaN
            where the interval is not determined.
        neutral: what "no difference" is: 0, or 1 for a ratio.
    """

    mean: float
    low: float
    high: float
    count: int
    above: int
    below: int
    p_value: float
    neutral: float = 0.0

    @property
    def determined(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def half_width(self) -> float:
        """Half the length of the interval; NaN where it is not determined."""
        return (self.high - self.low) / 2

    @property
    def differs(self) -> bool:
        """The interval excludes "no difference"; never where it is not determined."""
        return self.determined and not self.low <= self.neutral <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        names = ("mean", "low", "high", "count", "above", "below", "p_value", "neutral")
        return {name: getattr(self, name) for name in names} | {"differs": self.differs}


def interval(values: Sequence[float] | np.ndarray, scale: float | None = None) -> Interval:
    """The mean of independent values with its interval; those that are not finite are left out and not counted.

    Args:
        values: (seeds,).
        scale: size of the figures that the values are differences of: equal means equal to 1e-9 of it. The largest
            absolute value if not given.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    count = len(values)
    mean = float(values.mean()) if count else float("nan")
    size = float(np.abs(values).max(initial=0.0)) if scale is None else scale
    zero = np.abs(values) <= _ROUNDING * size
    signs = int(((values > 0) & ~zero).sum()), int(((values < 0) & ~zero).sum())
    nothing = float("nan")
    if count < 2 or np.ptp(values) <= _ROUNDING * size:
        return Interval(mean, nothing, nothing, count, *signs, nothing)
    error = float(values.std(ddof=1) / np.sqrt(count))
    width = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return Interval(mean, mean - width, mean + width, count, *signs, p_value)


def paired(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Interval:
    """first - second, seed by seed; a seed where either is not finite is left out.

    Args:
        first, second: (seeds,) in the same order.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = np.isfinite(first) & np.isfinite(second)
    first, second = first[both], second[both]
    return interval(first - second, scale=float(np.abs([first, second]).max(initial=0.0)))


def paired_ratio(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> Interval:
    """first / second, seed by seed: the geometric mean, with an interval taken of the logarithms.

    Times multiply: a machine that is busy doubles both. Values that are not positive and finite are left out.

    Args:
        first, second: (seeds,) in the same order.
    """
    first, second = (np.asarray(values, np.float64) for values in (first, second))
    both = (first > 0) & (second > 0) & np.isfinite(first) & np.isfinite(second)
    found = interval(np.log(first[both] / second[both]), scale=1.0)
    mean, low, high = (float(np.exp(value)) for value in (found.mean, found.low, found.high))
    return Interval(mean, low, high, found.count, found.above, found.below, found.p_value, neutral=1.0)


def half_width_95(values: Sequence[float] | np.ndarray) -> float:
    """Half width of the 95 % interval of the mean; NaN where it is not determined, see `Interval`."""
    return interval(values).half_width


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Which of m tests hold at 5 % when all are judged together (Holm, 1979): 5 % of such tables claim one wrongly.

    Args:
        p_values: (m,); NaN is no test and never holds.

    Returns:
        (m,) bool.
    """
    p_values = np.asarray(p_values, np.float64)
    tests = int(np.isfinite(p_values).sum())
    order = np.argsort(p_values, kind="stable")[:tests]  # NaN is sorted last
    held = np.zeros(len(p_values), bool)
    # Step down: the k-th smallest is held against 5 % over the tests that are left, and the first failure ends it.
    passed = p_values[order] <= (1 - LEVEL) / (tests - np.arange(tests))
    held[order] = np.logical_and.accumulate(passed)
    return held


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(...) rank correlation of two (..., n) arrays, equal values sharing their mean rank; NaN where all are alike."""
    ranks = [stats.rankdata(values, axis=-1) for values in (first, second)]
    first, second = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    scale = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return np.where(scale > 0, (first * second).sum(-1) / np.where(scale > 0, scale, 1.0), np.nan)
