"""The arms of a comparison: ways of choosing, each with the controls that tell its effect from another's."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardjax import _validate
from hardjax.choose.selection import AllBatches, HardBatches, RandomBatches
from hardjax.choose.trimming import Trimming

CONTROLS = ("random", "fixed")


@dataclass(frozen=True)
class Arm:
    """One way of choosing.

    Attributes:
        name: of the strategy or method.
        delta: share of the mini-batches in a round.
        settings: fields of `TrainConfig` that it sets.
        controls: labels of arms that it is set against besides the first one of a comparison, where they are there.
    """

    name: str
    delta: float
    settings: Mapping[str, Any]
    controls: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} {self.delta:g}" if self.delta < 1 else self.name


def make_arms(deltas: Sequence[float], controls: Sequence[str] = CONTROLS) -> tuple[Arm, ...]:
    """The baseline (delta 1: ordinary training, reshuffled each epoch), then hard replay, then the controls.

    The baseline is always among them: every change is measured from it. Replay keeps its batches for the whole run and
    picks the hardest of them, so it departs from ordinary training in two ways: the fixed batches alone, and random
    replay of as many, tell them apart.

    Args:
        deltas: shares in (0, 1].
        controls: "random" (replay picked at random, for every delta below 1) and "fixed" (the baseline with the very
            batches that the others keep).

    Raises:
        ValueError: a share outside (0, 1], an unknown control.
    """
    for delta in deltas:
        _validate.in_half_open_unit(delta=delta)
    for control in controls:
        _validate.one_of(CONTROLS, control=control)
    # The whole of the batches is the baseline, which is there anyway; hard replay of all of them would be the fixed
    # batches in another order.
    shares = sorted({float(delta) for delta in deltas} - {1.0}, reverse=True)
    arms = [Arm("all-batches", 1.0, {"selection": AllBatches()})]
    random = [Arm("random-batches", delta, {"selection": RandomBatches(delta)}) for delta in shares]
    fixed = Arm("fixed-batches", 1.0, {"selection": AllBatches(fixed=True)})
    # Against random replay of the same share: does the ranking matter; against the fixed batches: does replay.
    arms += [
        Arm("hard-batches", share, {"selection": HardBatches(share)}, (fixed.label, twin.label))
        for share, twin in zip(shares, random, strict=True)
    ]
    if "random" in controls:
        arms += random
    if "fixed" in controls:
        arms.append(fixed)
    return tuple(arms)


def make_methods(methods: Sequence[str], trimming: Trimming) -> tuple[Arm, ...]:
    """Ordinary training, trimmed training (P2), and the control that keeps the same share at random.

    Ordinary training is always among them.

    Args:
        methods: of "standard", "trimmed", "random-trimmed".
        trimming: its shares.

    Raises:
        ValueError: an unknown method.
    """
    settings = {
        "standard": None,
        "trimmed": dataclasses.replace(trimming, keep="hardest"),
        "random-trimmed": dataclasses.replace(trimming, keep="random"),
    }
    for method in methods:
        _validate.one_of(settings, method=method)
    return tuple(
        Arm(name, 1.0, {"trimming": value}, ("random-trimmed",) if name == "trimmed" else ())
        for name, value in settings.items()
        if name in {"standard", *methods}
    )


def references(arms: Sequence[Arm], index: int) -> list[int]:
    """Places of the arms that the one at `index` is set against: the first one, then its controls."""
    if index == 0:
        return []
    return [0] + [i for i, arm in enumerate(arms) if i not in (0, index) and arm.label in arms[index].controls]
