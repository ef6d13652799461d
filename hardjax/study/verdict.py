"""What runs say about a published claim, by the rule that `experiments/README.md` fixed before they were made."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hardjax.study import statistics

HOLDS, CONTRADICTS, DOES_NOT_HOLD, TOO_FEW = VERDICTS = ("holds", "contradicts", "does not hold", "too few")
LEAST_PAIRS = 3

Values = Mapping[int, float]  # seed -> one metric


@dataclass(frozen=True)
class Difference:
    """Paired differences, above 0 where they are as claimed.

    Attributes:
        middle: their mean, or their median where a target may be missed; NaN without any.
        low, high: 95 % interval of it, of Student's t or of order statistics; NaN where none is determined.
        pairs: seeds that it rests on.
        p_value: two-sided, of the test that goes with the interval; NaN without one.
        by_sign: it is a median, whose ends may be infinite.
    """

    middle: float
    low: float
    high: float
    pairs: int
    p_value: float
    by_sign: bool = False

    @property
    def determined(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))


def difference(arm: Values, against: Values, higher: bool, may_miss: bool = False) -> Difference:
    """An arm and what it is set against, seed by seed; seeds that one of them lacks (or has as NaN) are left out.

    Args:
        higher: the claim is that the arm's values are the higher ones.
        may_miss: the values are how long it took to a target, infinity where it was missed. Elsewhere pairs that are
            not finite are left out.
    """
    seeds = sorted(arm.keys() & against.keys())
    first, second = (np.array([one[seed] for seed in seeds], np.float64) for one in (arm, against))
    if not higher:
        first, second = second, first
    if may_miss:
        return _by_sign(first, second)
    found = statistics.paired(first, second)
    return Difference(found.mean, found.low, found.high, found.count, found.p_value)


def _by_sign(first: np.ndarray, second: np.ndarray) -> Difference:
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    alike = first == second  # two misses are no difference, though infinity less itself is no number
    gaps = np.where(alike, 0.0, np.where(alike, 0.0, first) - np.where(alike, 0.0, second))
    low, high = median_interval(gaps)
    return Difference(median(gaps), low, high, len(gaps), sign_test(gaps), by_sign=True)


def median(values: Sequence[float] | np.ndarray) -> float:
    """The middle value, or the mean of the two in the middle; the lower one where that mean is no number.

    Args:
        values: (n,), infinite ones among them.
    """
    values = np.sort(np.asarray(values, np.float64))
    if len(values) == 0:
        return math.nan
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return float(low) if low == -high and math.isinf(low) else float(low + high) / 2


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Order statistics that hold the median in at least 95 % of cases, whatever the distribution.

    The k-th lowest and the k-th highest hold it in all but 2 P(Binomial(n, 1/2) < k) of them: the lowest and the
    highest of 6 to 8 values, the second ones of 9 to 11.

    Args:
        values: (n,), infinite ones among them.

    Returns:
        Ends; NaN for fewer than six values, of which not even the lowest and the highest do.
    """
    values = np.sort(np.asarray(values, np.float64))
    # The most that may lie outside on one side.
    outside = int(stats.binom.ppf((1 - statistics.LEVEL) / 2, len(values), 0.5)) if len(values) else 0
    if len(values) == 0 or stats.binom.cdf(outside, len(values), 0.5) > (1 - statistics.LEVEL) / 2:
        outside -= 1
    if outside < 0:
        return math.nan, math.nan
    return float(values[outside]), float(values[-1 - outside])


def sign_test(values: Sequence[float] | np.ndarray) -> float:
    """Two-sided p value of a median of 0, below 0.05 exactly where `median_interval` excludes it; NaN without values.

    Values of 0 count against a difference of either sign.
    """
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        return math.nan
    fewer = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return min(1.0, 2 * float(stats.binom.cdf(fewer, len(values), 0.5)))


def judge(found: Sequence[Difference], smallest: Sequence[float]) -> list[str]:
    """A verdict for each of the differences that one statement is about, judged together (Holm).

    Args:
        smallest: the smallest difference of interest of each, above 0, stated before the runs.
    """
    held = statistics.holm([one.p_value for one in found])
    return [_verdict(one, least, bool(kept)) for one, least, kept in zip(found, smallest, held, strict=True)]


def _verdict(found: Difference, smallest: float, held: bool) -> str:
    if found.pairs < LEAST_PAIRS or not found.determined:
        return TOO_FEW
    if held and found.low > 0:
        return HOLDS
    if held and found.high < 0:
        return CONTRADICTS
    if found.low <= 0 <= found.high < smallest:
        return DOES_NOT_HOLD
    return TOO_FEW


def best_by_others(arms: Mapping[str, Values], higher: bool, may_miss: bool = False) -> Values:
    """Seed -> value of the arm that is best by the means of the other seeds: no seed chooses what it is judged by.

    Args:
        arms: several; seeds that not all of them have are left out. A single one is handed back as it is.
        higher: the highest mean is the best one.
        may_miss: the lowest median is the best one, of equal ones the one with fewer misses, then the one with the
            lower mean of what was reached: one miss makes a mean infinite, and all arms alike.

    Returns:
        Empty for fewer than three seeds: two would each be chosen by the other alone.
    """
    if len(arms) == 1:
        return dict(next(iter(arms.values())))
    seeds = sorted(set.intersection(*(set(values) for values in arms.values()))) if arms else []
    if len(seeds) < LEAST_PAIRS:
        return {}
    table = np.array([[values[seed] for seed in seeds] for values in arms.values()], np.float64)
    found = {}
    for place, seed in enumerate(seeds):
        others = np.delete(table, place, axis=1)
        if may_miss:
            best = min(range(len(table)), key=lambda arm: _lateness(others[arm]))
        else:
            means = others.mean(1)
            # What diverged is never the best.
            means = np.where(np.isfinite(means), means, -math.inf if higher else math.inf)
            best = int(means.argmax() if higher else means.argmin())
        found[seed] = float(table[best, place])
    return found


def _lateness(values: np.ndarray) -> tuple[float, int, float]:
    """(median, misses, mean of what was reached): the lower, the sooner. An arm that lacks a value is the last."""
    if np.isnan(values).any():
        return math.inf, len(values), math.inf
    reached = values[np.isfinite(values)]
    return median(values), len(values) - len(reached), float(reached.mean()) if len(reached) else math.inf


def mean_of(arms: Mapping[str, Values]) -> Values:
    """Seed -> mean over several arms; of the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(values) for values in arms.values()))) if arms else []
    return {seed: float(np.mean([values[seed] for values in arms.values()])) for seed in seeds}


def two_samples(arm: Values, against: Values) -> float:
    """P3's own test: p value of two samples with unequal variances (Welch); NaN where either has fewer than two.

    It leaves unused that seeds are shared, and says what the paper would have said of our runs.
    """
    first, second = ([value for value in one.values() if math.isfinite(value)] for one in (arm, against))
    if min(len(first), len(second)) < 2 or np.ptp(first) + np.ptp(second) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal runs have a variance of 0
        return float(stats.ttest_ind(first, second, equal_var=False).pvalue)
