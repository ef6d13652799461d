"""Batch sizes that change while training, by a plan fixed beforehand (P3, dynamic sampling)."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from hardjax import _settings
from hardjax._axis import Axis
from hardjax._validate import Refusal, shown

STAGES = 5  # of P3's plans, equally long
SCALINGS = ("none", "linear", "sqrt")
_PUBLISHED = re.compile(r"s(\d{1,18})-to-(\d{1,18})", re.ASCII)
_STAGE = re.compile(r"(?:(\d{1,18}(?:\.\d{1,18})?|\.\d{1,18})\*)?(\d{1,18})", re.ASCII)
_MULTI_STEP = "-MS"
_LEAST_SHARE = Fraction(1, 10**9)  # what is written of a share has three digits more
_WORDS = "such as s32-to-512, s512-to-32-MS, 32-64-128 or 0.25*32-0.75*128"


class Span(NamedTuple):
    """A stretch of training at one batch size: epochs that it lasts, and the size."""

    epochs: Fraction
    size: int


@dataclass(frozen=True)
class BatchPlan:
    """Stages of training, each at one batch size.

    Attributes:
        text: the sizes in order, "32-64-128-256-512", each stage equally long; "0.25*32-0.75*128" with their shares of
            the epochs; or the paper's "s32-to-512" (P3, section 4.3): five stages over the powers of two from one size
            to the other, the first ones twice where they are too few ("s16-to-64": 16, 16, 32, 32, 64). A final
            "-MS" repeats the sequence inside every phase of a "step" schedule. It is kept in its first form: plans are
            equal where they mean the same.

    Raises:
        ValueError: text of another form, sizes that are no powers of two apart in the paper's, shares that do not add
            up to 1.
    """

    text: str

    def __post_init__(self) -> None:
        _settings.settle(self)
        object.__setattr__(self, "text", _normal(self.text))

    @classmethod
    def constant(cls, size: int) -> "BatchPlan":
        """One size all along: the same as no plan."""
        return cls.stages([size])

    @classmethod
    def stages(
        cls, sizes: Sequence[int], shares: Sequence[float] | None = None, *, multi_step: bool = False
    ) -> "BatchPlan":
        """Stages of these sizes, equally long or with these shares of the epochs."""
        sizes = [_settings.plain("sizes", size, int) for size in sizes]
        shares = None if shares is None else [_settings.plain("shares", share, float) for share in shares]
        if not sizes or (shares is not None and len(shares) != len(sizes)):
            raise Refusal(f"Expected a share for each of the sizes {sizes}, got {shares}.")
        weights = [""] * len(sizes) if shares is None else [f"{_decimal(share)}*" for share in shares]
        text = "-".join(f"{weight}{size}" for weight, size in zip(weights, sizes, strict=True))
        return cls(text + (_MULTI_STEP if multi_step else ""))

    @classmethod
    def parse(cls, text: str, multi_step: bool = False) -> "BatchPlan":
        """A plan in any notation; `multi_step` stands for a final "-MS"."""
        text = _settings.plain("text", text, str)
        return cls(text if text.endswith(_MULTI_STEP) or not multi_step else text + _MULTI_STEP)

    @property
    def multi_step(self) -> bool:
        """Whether the sequence is repeated inside every phase of the learning rate."""
        return self.text.endswith(_MULTI_STEP)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the stages, in order."""
        return tuple(size for _, size in _stages(self.text))

    def spans(self, epochs: int, decay_at: Sequence[float] = ()) -> tuple[Span, ...]:
        """The stages of a training of so many epochs; neighbours of one size are one.

        Args:
            decay_at: shares of training at which the learning rate falls, of which `multi_step` makes phases.
        """
        # The very numbers that the schedule compares progress with: a phase begins with the step of the new rate.
        ends = [Fraction(0), *map(Fraction, decay_at), Fraction(1)] if self.multi_step else [Fraction(0), Fraction(1)]
        found: list[Span] = []
        for start, end in itertools.pairwise(ends):
            for share, size in _stages(self.text):
                length = (end - start) * share * epochs
                if found and found[-1].size == size:
                    found[-1] = Span(found[-1].epochs + length, size)
                else:
                    found.append(Span(length, size))
        return tuple(found)


def rate_scale(scaling: str, size: int, first: int) -> float:
    """What the peak rate is multiplied by in a stage, relative to the first one."""
    return {"none": 1.0, "linear": size / first, "sqrt": math.sqrt(size / first)}[scaling]


def steps_of(spans: Sequence[Span], samples: int) -> list[int]:
    """Back-propagations of each stage: its epochs times its number of batches, N = ceil(samples / size), rounded.

    What rounding adds or takes is given to the stage that follows, so that the whole is never off by more than half a
    step.
    """
    found, left = [], Fraction(0)
    for span in spans:
        batches = -(-samples // span.size)
        left += span.epochs
        found.append(math.floor(left * batches + Fraction(1, 2)))
        left -= Fraction(found[-1], batches)
    return found


def _normal(text: str) -> str:
    end = _MULTI_STEP if text.endswith(_MULTI_STEP) else ""
    body = text.removesuffix(_MULTI_STEP)
    if published := _PUBLISHED.fullmatch(body):
        first, last = (int(size) for size in published.groups())
        return "-".join(map(str, _published(text, first, last))) + end
    stages = [_STAGE.fullmatch(part) for part in body.split("-")]
    if not body or None in stages:
        raise Refusal(f"Expected batch_plan={shown(text)} {_WORDS}.")
    pairs = [(stage[1], int(stage[2])) for stage in stages if stage is not None]
    for _, size in pairs:
        if not 1 <= size < 2**31:
            raise Refusal(f"Expected batch_plan={shown(text)} with sizes of at least 1, got {size}.")
    given = [share for share, _ in pairs if share is not None]
    if not given:
        return "-".join(str(size) for _, size in pairs) + end
    shares = [Fraction(share) for share in given]
    if len(given) < len(pairs) or min(shares) < _LEAST_SHARE:
        raise Refusal(f"Expected batch_plan={shown(text)} with a share of at least 1e-9 for every stage, or for none.")
    # Thirds are written with as many digits as one likes.
    if abs(sum(shares) - 1) > Fraction(1, 1000):
        raise Refusal(f"Expected batch_plan={shown(text)} with shares that add up to 1, got {float(sum(shares)):g}.")
    if len(set(shares)) == 1:
        return "-".join(str(size) for _, size in pairs) + end
    return "-".join(f"{_decimal(share)}*{size}" for share, (_, size) in zip(shares, pairs, strict=True)) + end


def _published(text: str, first: int, last: int) -> list[int]:
    low, high = sorted((first, last))
    ratio = high // max(low, 1)
    if low < 1 or low * ratio != high or ratio & (ratio - 1) or high >= 2**31:
        raise Refusal(f"Expected batch_plan={shown(text)} to go from one size to another by powers of two.")
    ladder = [low << power for power in range(ratio.bit_length())]
    ladder = ladder if first == low else ladder[::-1]
    count = max(STAGES, len(ladder))
    return [ladder[place * len(ladder) // count] for place in range(count)]


def _stages(text: str) -> list[tuple[Fraction, int]]:
    """(share, size) of each stage; shares add up to 1 exactly."""
    stages = [_STAGE.fullmatch(part) for part in text.removesuffix(_MULTI_STEP).split("-")]
    pairs = [(Fraction(stage[1] or 1), int(stage[2])) for stage in stages if stage is not None]
    total = sum(share for share, _ in pairs)
    return [(share / total, size) for share, size in pairs]


def _decimal(share: Any) -> str:
    return f"{float(share):.12f}".rstrip("0").rstrip(".")


AXIS = Axis(BatchPlan, flags={"batch_plan": "text"}, switch="batch_plan")
