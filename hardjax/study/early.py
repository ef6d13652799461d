"""Early model selection (P3, section 3.1): how well what is known after few epochs ranks what training comes to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hardjax.study.beacons import Configuration, positions, spread
from hardjax.study.statistics import LEVEL, spearman

EPOCHS = (1, 2, 4, 10)
DISTANCE = "distance to the best beacon"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of something known at an epoch with the final test error, over configurations.

    Attributes:
        known: what.
        epoch: when.
        value: in [-1, 1]; NaN where it is not determined: for fewer than three configurations, or all alike.
        low, high: 95 % interval by bootstrap over configurations; NaN as above.
        count: configurations that it rests on; those where it is not finite are left out.
    """

    known: str
    epoch: int
    value: float
    low: float
    high: float
    count: int

    @property
    def differs(self) -> bool:
        """The interval excludes 0."""
        return bool(self.low > 0 or self.high < 0)


def rank_early(found: Sequence[Configuration], epochs: Sequence[int] = EPOCHS) -> list[Correlation]:
    """The correlation of each measure, of the distance and of the errors so far with the final test error.

    Args:
        found: configurations with one point an epoch.
        epochs: to rank at, from 1 on; those beyond the last point are left out.
    """
    final = np.array([one.error["test"] for one in found])
    rows = []
    for epoch in epochs:
        if epoch <= min(len(one.epoch) for one in found):
            for known, values in _known(found, final, epoch - 1):
                both = np.isfinite(values) & np.isfinite(final)
                value, low, high = _interval(values[both], final[both])
                rows.append(Correlation(known, epoch, value, low, high, int(both.sum())))
    return rows


def distances(places: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(n,) how far each configuration is from the best of the others, in the plane of one moment.

    The others, so that a configuration is never its own beacon: that it will be the best would be known at distance 0.

    Args:
        places: (n, 2) log10 C_K and log10 L_K; distances are in units of `beacons.spread`. NaN has no place, gets NaN
            and is nobody's beacon.
        errors: (n,) at the end of training; the lowest is the best.
    """
    known = np.isfinite(places).all(1) & np.isfinite(errors)
    found = np.full(len(places), np.nan)
    if known.sum() < 2:
        return found
    unit = spread(places[known])
    for i in np.flatnonzero(known):
        others = np.where(known, errors, np.inf)
        others[i] = np.inf
        found[i] = np.linalg.norm((places[i] - places[np.argmin(others)]) / unit)
    return found


def _known(found: Sequence[Configuration], final: np.ndarray, point: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (n,) values) of what is known at a point of the training, the rivals last."""
    yield DISTANCE, distances(positions(found, point), final)
    for name, field in (("C_K", "condition"), ("L_K", "energy"), ("c, mean of the epoch", "c")):
        yield name, np.array([getattr(one, field)[point] for one in found])
    validated = any(np.isfinite(one.errors["validation"]).any() for one in found)
    for split in ("train", "validation" if validated else "test"):
        yield f"{split} error at that epoch", np.array([one.errors[split][point] for one in found])


def _interval(known: np.ndarray, final: np.ndarray) -> tuple[float, float, float]:
    """The correlation and the ends of its percentile interval, configurations drawn with replacement."""
    count = len(known)
    if count < 3 or np.isnan(value := float(spearman(known, final))):
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    # What is known of a configuration stays as it is, the distance to its beacon included: drawn twice it is no
    # beacon of itself. Samples that are all alike have no correlation.
    again = spearman(known[drawn], final[drawn])
    low, high = np.nanquantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)
