"""When training had converged: named, tested readings of `full_train_loss` (P1 prints an epoch e and no criterion).

They read the loss of the whole training split, not the mean of what was trained: replay of hard batches biases the
latter upwards, so that arms would differ by what they looked at.
"""

from collections.abc import Sequence

import numpy as np


def own_level_epoch(epochs: np.ndarray, losses: np.ndarray, tolerance: float = 0.05) -> float:
    """First test point from which the loss stays within a tolerance of its own final level.

    The final level is the mean of the last tenth of the test points (at least one); the tolerance is a share of the
    fall from the first test point to that level. A level of its own rewards an arm that stalls high: read it next to
    `threshold_epoch`.

    Args:
        epochs: (points,) rising, in units of N back-propagations.
        losses: (points,) nats.
        tolerance: share of the fall, above 0.

    Returns:
        The epoch; NaN where a loss is not finite, the loss did not fall, or it has not settled at the end.
    """
    # One loss that is not finite is a run that blew up: what it did before is no convergence, and what a level or a
    # fall would be is not defined.
    if len(losses) == 0 or not np.all(np.isfinite(losses)):
        return float("nan")
    # P1 prints no criterion. The last tenth, because a single last point carries the noise of its batches.
    level = losses[-max(1, len(losses) // 10) :].mean()
    fall = losses[0] - level
    if fall < 0 or (fall == 0 and len(losses) > 1):
        return float("nan")
    outside = np.flatnonzero(np.abs(losses - level) > tolerance * fall)
    first = 0 if len(outside) == 0 else outside[-1] + 1
    return float(epochs[first]) if first < len(epochs) else float("nan")


def common_threshold(curves: Sequence[np.ndarray]) -> float:
    """The lowest loss that every curve reached: the highest of their lowest losses, of curves that end finite.

    A run that diverges late was never as low as the others: `[2.0, 1.9, nan]` would set a level of 1.9, which every
    other run passes in its first epoch. It is left out, as is an empty one.

    Args:
        curves: one a run, (points,) nats; their lengths may differ. Give runs of one seed that spent their budget: a
            run that was cut short sets a level that it would have passed.

    Returns:
        Nats; NaN where no curve ends finite.
    """
    lowest = [np.min(curve[np.isfinite(curve)]) for curve in curves if ends_finite(curve)]
    return float(max(lowest)) if lowest else float("nan")


def threshold_epoch(epochs: np.ndarray, losses: np.ndarray, threshold: float) -> float:
    """First test point whose loss is at most the threshold; NaN where there is none, or where the run ends not finite.

    Args:
        epochs: (points,) rising.
        losses: (points,) nats.
        threshold: nats.
    """
    if not ends_finite(losses):
        return float("nan")
    # The first time, not for good: a common level is set by the lowest point of the slowest run, which it may leave
    # again.
    reached = np.flatnonzero(losses <= threshold)
    return float(epochs[reached[0]]) if len(reached) else float("nan")


def ends_finite(losses: np.ndarray) -> bool:
    """The run was tested, and its last loss is a finite number."""
    return len(losses) > 0 and bool(np.isfinite(losses[-1]))


def change_percent(baseline_epoch: np.ndarray | float, epoch: np.ndarray | float) -> np.ndarray | float:
    """P1's change of the convergence epoch, 100 * (e1 - e) / e, with its sign: positive is sooner than the baseline.

    The paper divides by its own epoch e, not by the baseline's e1: its 26.47 % is 20.93 % fewer epochs.

    Args:
        baseline_epoch, epoch: e1 and e, numbers or (seeds,).
    """
    return 100 * (baseline_epoch - epoch) / epoch
