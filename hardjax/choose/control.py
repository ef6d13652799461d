"""A controller of the batch size (beyond the papers): pure functions from what was measured to a decision.

P3 finds that the batch size m is proportional to C_K and inversely proportional to L_K, and the learning rate
proportional to both (section 4.1). A controller acts on that: L_K too high asks for a larger m, C_K too high for a
smaller one, both too high for a lower rate. Or it follows the noise scale (McCandlish et al., 2018).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hardjax.choose.controller import Controller

ACTIONS = ("keep", "double", "halve", "lower-rate")


class Measured(NamedTuple):
    """One measurement, as a controller reads it.

    Attributes:
        condition: c, NaN of a spectrum that is not finite.
        energy: l, likewise.
        steps: that it stands for.
        share: of an epoch that it stands for: steps over the N of its batch size.
        covariance, signal: unbiased, see `fisher.Measures`.
    """

    condition: float
    energy: float
    steps: float
    share: float
    covariance: float
    signal: float


class Seen(NamedTuple):
    """The facts of a decision; JSON numbers, so that a log can be decided again.

    Attributes:
        epoch: whole epochs done.
        size: batch size so far.
        rate: share of the configured learning rate so far.
        condition, energy: C_K and L_K in the controller's reading; NaN where nothing was measured.
        interval_condition, interval_energy: mean c since the last decision, and what L_K grew by in an epoch of these;
            NaN where nothing was measured.
        interval_condition_before, interval_energy_before: the same of the interval before; NaN at the first decision.
        covariance, signal: sums over the batches measured since the last decision where both are finite.
        batches: how many these are.
    """

    epoch: int
    size: int
    rate: float
    condition: float
    energy: float
    interval_condition: float
    interval_energy: float
    interval_condition_before: float
    interval_energy_before: float
    covariance: float
    signal: float
    batches: int


class Decision(NamedTuple):
    """What becomes of the batch size and the rate.

    Attributes:
        action: one of `ACTIONS`.
        size: batch size from here on.
        rate_factor: what the learning rate is multiplied by from here on.
        reason: in words, with the numbers.
    """

    action: str
    size: int
    rate_factor: float
    reason: str


def read(measured: Sequence[Measured], reading: str, start: int = 0, end: int | None = None) -> tuple[float, float]:
    """(C_K, L_K) of a run so far, in one of two readings that differ where the batch size changes; or the mean c, and
    what L_K grew by, of the measurements from `start` to `end` alone.

    "measurements": C_K is the mean of c, L_K the sum of l times the steps that each stands for (P3's code).
    "epochs": every epoch counts alike: c is weighted with the share of an epoch that it stands for, and l with that
    share times the N steps that an epoch had at the first measurement. What is not finite is left out.
    """
    part = measured[start:end]
    if not part:
        return math.nan, math.nan
    rows, first = np.array(part, np.float64), measured[0]
    condition, energy, steps, share = rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3]
    weights = np.ones(len(rows)) if reading == "measurements" else share
    stood = steps if reading == "measurements" else share * (first.steps / first.share)
    known = np.isfinite(condition)
    # One after the other, not by blocks: the sum of a prefix is then the same however long the record is.
    total = float(np.add.accumulate(np.where(known, condition * weights, 0.0))[-1])
    weight = float(np.add.accumulate(np.where(known, weights, 0.0))[-1])
    grown = float(np.add.accumulate(np.nan_to_num(energy, nan=0.0) * stood)[-1])
    return total / weight if weight else math.nan, grown if np.isfinite(energy).any() else math.nan


def see(
    controller: Controller,
    measured: Sequence[Measured],
    decided: Sequence[int],
    epoch: int,
    size: int,
    rate: float,
) -> Seen:
    """The facts of a decision.

    Args:
        measured: all measurements so far, in order.
        decided: how many of them there were at each of the decisions so far, or at the last two.
    """
    earlier, since = (0, 0, *decided)[-2:]
    now = read(measured, controller.reading)
    paces = (_pace(measured, controller.reading, *part) for part in ((since, len(measured)), (earlier, since)))
    pairs = [(one.covariance, one.signal) for one in measured[since:]]
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    sums = [math.fsum(column) for column in zip(*known, strict=True)] or [0.0, 0.0]
    return Seen(epoch, size, rate, *now, *itertools.chain(*paces), *sums, len(known))


def _pace(measured: Sequence[Measured], reading: str, start: int, end: int) -> tuple[float, float]:
    """(mean c, what L_K grew by in an epoch) over these measurements."""
    condition, energy = read(measured, reading, start, end)
    # Of the epochs that they stand for, not of those between the decisions: intervals of as many epochs have a
    # measurement more or less, and a sum would grow where nothing does.
    epochs = math.fsum(one.share for one in measured[start:end] if math.isfinite(one.energy))
    return condition, energy / epochs if epochs else math.nan


def decide(controller: Controller, seen: Seen) -> Decision:
    """What the facts ask for, with its reason; pure, so that a log can be decided again."""
    wanted, why = _RULES[controller.rule](controller, seen)
    rate = seen.rate * controller.rate_factor
    if wanted == "double" and 2 * seen.size > controller.most:
        if controller.rule == "noise-scale":
            return Decision("keep", seen.size, 1.0, f"{why}; {seen.size} is the most")
        wanted, why = "lower-rate", f"{why}; {seen.size} is the most"  # P3: L_K is proportional to the rate as well
    if wanted == "halve" and seen.size // 2 < controller.least:
        return Decision("keep", seen.size, 1.0, f"{why}; {seen.size} is the least")
    if wanted == "lower-rate" and rate < controller.lowest_rate:
        return Decision("keep", seen.size, 1.0, f"{why}; the rate is as low as it may be")
    size = {"double": 2 * seen.size, "halve": seen.size // 2}.get(wanted, seen.size)
    return Decision(wanted, size, controller.rate_factor if wanted == "lower-rate" else 1.0, why)


def _by_noise_scale(controller: Controller, seen: Seen) -> tuple[str, str]:
    if not seen.batches:
        return "keep", "no noise scale was measured"
    # The ratio of the means, as `fisher.noise_scale`: ratios of single batches are mostly noise.
    scale = seen.covariance / seen.signal if seen.signal > 0 else math.inf
    aim = controller.share * scale
    why = f"a batch of {aim:.4g} is asked for by the noise scale of {seen.batches} batches"
    if aim >= 2 * seen.size:
        return "double", why
    return ("halve", why) if aim <= seen.size / 2 else ("keep", why)


def _by_trajectory(controller: Controller, seen: Seen) -> tuple[str, str]:
    epochs, conditions, energies = zip(*controller.target, strict=True)
    targets = [float(np.interp(seen.epoch, epochs, column)) for column in (conditions, energies)]
    found = seen.condition, seen.energy
    signs = [_sign(value, aim, controller.tolerance) for value, aim in zip(found, targets, strict=True)]
    why = ", ".join(
        f"{name} {value:.4g} of {aim:.4g}" for name, value, aim in zip(("C_K", "L_K"), found, targets, strict=True)
    )
    return _towards(*signs), why


def _by_growth(controller: Controller, seen: Seen) -> tuple[str, str]:
    limits = controller.condition_growth, controller.energy_growth
    pairs = (
        (seen.interval_condition, seen.interval_condition_before),
        (seen.interval_energy, seen.interval_energy_before),
    )
    grown = [now / before if before > 0 else math.nan for now, before in pairs]
    why = ", ".join(
        f"{name} grew {value:.4g} times of {limit:.4g}"
        for name, value, limit in zip(("c", "L_K an epoch"), grown, limits, strict=True)
    )
    # A comparison with NaN is False: before the second decision nothing has grown.
    signs = [int(value > limit) for value, limit in zip(grown, limits, strict=True)]
    return _towards(*signs), why


_RULES = {"noise-scale": _by_noise_scale, "trajectory": _by_trajectory, "growth": _by_growth}


def _towards(condition: int, energy: int) -> str:
    """What brings C_K and L_K back, by the signs of how they are off (P3, section 4.1)."""
    if condition > 0 and energy > 0:
        return "lower-rate"  # the one thing that both fall with
    if condition < 0 and energy < 0:
        return "keep"  # a higher rate alone would raise both, and rates are never raised
    return {1: "double", 0: "keep", -1: "halve"}[energy or -condition]


def _sign(value: float, aim: float, tolerance: float) -> int:
    """Above the aim 1, below it -1, near it or unknown 0."""
    return int(value > aim * (1 + tolerance)) - int(value < aim * (1 - tolerance))


def entry(controller: Controller, seen: Seen, decision: Decision, backprops: int, epochs: int) -> dict[str, Any]:
    """A decision's line of the log: its facts, what was decided and why, where, and of how long a run."""
    place = {"backprops": backprops, "epochs": epochs, "every": controller.every, "reading": controller.reading}
    return {**place, "seen": seen._asdict(), **decision._asdict()}


def seen_in(line: Mapping[str, Any]) -> Seen:
    """The facts of a line of the log; JSON has no NaN."""
    found = (line["seen"].get(name) for name in Seen._fields)
    return Seen(*(math.nan if value is None else value for value in found))
