"""Batch sizes that change while training, by a plan fixed beforehand (P3, dynamic sampling) or by a controller."""

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax._validate import Refusal, shown
from hardjax.choose.controller import PREFIX, Controller

STAGES = 5  # of P3's plans, equally long
SCALINGS = ("none", "linear", "sqrt")
_PUBLISHED = re.compile(r"s(\d{1,18})-to-(\d{1,18})", re.ASCII)
_NUMBER = r"\d{1,18}(?:\.\d{1,18})?|\.\d{1,18}"
_STAGE = re.compile(
    rf"(?:(\d{{1,18}}/\d{{1,18}}|{_NUMBER})\*)?(\d{{1,18}})(?:@(\d(?:\.\d{{1,60}})?|\.\d{{1,60}}))?", re.ASCII
)
_MULTI_STEP = "-MS"
_EVERY = re.compile(r"(.*);every=([1-9]\d{0,17})", re.ASCII)
_LEAST_SHARE = Fraction(1, 10**9)  # what is written of a share has three digits more
_WORDS = "such as s32-to-512, s512-to-32-MS, 32-64-128, 0.25*32-0.75*128 or controlled:start=32,least=16,most=256"


class Span(NamedTuple):
    """A stretch of training: epochs that it lasts, its batch size, and what multiplies the peak rate."""

    epochs: Fraction
    size: int
    rate: float = 1.0


@dataclass(frozen=True)
class BatchPlan:
    """Stages of training, each at one batch size.

    Attributes:
        text: the sizes in order, "32-64-128-256-512", each stage equally long; "0.25*32-0.75*128" with their shares of
            the epochs; or the paper's "s32-to-512" (P3, section 4.3): five stages over the powers of two from one size
            to the other, the first ones twice where they are too few ("s16-to-64": 16, 16, 32, 32, 64); a final "-MS"
            repeats the sequence inside every phase of a "step" schedule; or
            "controlled:start=32,least=16,most=256,every=2": every 2 epochs a controller doubles, keeps or halves the
            size or lowers the rate, by its rule (rule=noise-scale, trajectory with target=EPOCH:C_K:L_K;..., or growth)
            from what is measured. Its other settings are those of `controller.Controller`. What one did is a plan too:
            shares as fractions, a rate after "@", and the epochs between two decisions, at each of which a round ends,
            "1/4*32-1/4*64-1/2*64@0.5;every=2". A text is kept in its first form: plans are equal where they mean the
            same.

    Raises:
        ValueError: text of another form, sizes that are no powers of two apart in the paper's, shares that do not add
            up to 1, what a controller refuses.
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
    def growing(cls, size: int, decay_at: Sequence[float] = (0.5, 0.75), factor: float = 10.0) -> "BatchPlan":
        """The size multiplied by `factor` where a "step" schedule would divide the rate by it, for a constant schedule.

        A step of SGD moves by rate / m times a sum of gradients: it falls alike in both (P4, section 2; P3 cites it).
        """
        ends = [Fraction(0), *(Fraction(_settings.plain("decay_at", at, float)) for at in decay_at), Fraction(1)]
        shares = [end - start for start, end in itertools.pairwise(ends)]
        sizes = [round(size * factor**index) for index in range(len(shares))]
        return cls("-".join(f"{share}*{size}" for share, size in zip(shares, sizes, strict=True)))

    @classmethod
    def controlled(
        cls, start: int, least: int, most: int, *, trajectory: Sequence[Sequence[float]] | None = None, **settings: Any
    ) -> "BatchPlan":
        """Sizes that a controller decides in training, see `controller.Controller`, whose other settings are taken too.

        Args:
            trajectory: (epochs, C_K, L_K), three sequences of one length, such as a beacon's; its rule is "trajectory".
        """
        if trajectory is not None:
            columns = [_settings.plain("trajectory", column, tuple[float, ...]) for column in trajectory]
            if len(columns) != 3 or len({len(column) for column in columns}) != 1:
                lengths = [len(column) for column in columns]
                raise Refusal(f"Expected a trajectory of epochs, C_K and L_K, as many of each, got {lengths}.")
            settings = {"rule": "trajectory", "target": tuple(zip(*columns, strict=True)), **settings}
        unknown = [name for name in settings if name not in _settings.hints(Controller)]
        for name in unknown:
            _validate.one_of(_settings.hints(Controller), setting=name)
        return cls(Controller(start, least, most, **settings).text)

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
    def controller(self) -> Controller | None:
        """What decides the sizes in training; None where they are fixed beforehand."""
        return _controller(self.text)

    @property
    def every(self) -> int | None:
        """Epochs after each of which the round under way ends, because a controller decides there or did; or None."""
        if self.controller is not None:
            return self.controller.every
        found = _EVERY.fullmatch(self.text)
        return int(found[2]) if found else None

    @property
    def title(self) -> str:
        """Its text, without the points of a long target."""
        return re.sub(r"target=[^,]*", "target", self.text)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the stages, in order; under a controller the first one, then the others that may come."""
        if (found := self.controller) is not None:
            return (found.start, *(size for size in found.sizes if size != found.start))
        return tuple(size for _, size, _ in _stages(self.text))

    def spans(self, epochs: int, decay_at: Sequence[float] = ()) -> tuple[Span, ...]:
        """The stages of a training of so many epochs; neighbours of one size and rate are one. Under a controller the
        whole training at its first size, if nothing is changed.

        Args:
            decay_at: shares of training at which the learning rate falls, of which `multi_step` makes phases.
        """
        if self.controller is not None:
            return (Span(Fraction(epochs), self.controller.start),)
        # The very numbers that the schedule compares progress with: a phase begins with the step of the new rate.
        ends = [Fraction(0), *map(Fraction, decay_at), Fraction(1)] if self.multi_step else [Fraction(0), Fraction(1)]
        found: list[Span] = []
        for start, end in itertools.pairwise(ends):
            for share, size, rate in _stages(self.text):
                length = (end - start) * share * epochs
                if found and found[-1][1:] == (size, rate):
                    found[-1] = Span(found[-1].epochs + length, size, rate)
                else:
                    found.append(Span(length, size, rate))
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


def replayed(log: Sequence[Mapping[str, Any]]) -> BatchPlan:
    """The open-loop plan of what a controller did: trained with it, and the same seed, a run comes to the same bits.

    Args:
        log: the lines of a run's decisions.jsonl, all of them.

    Raises:
        ValueError: no decisions.
    """
    if not log:
        raise Refusal("Expected a log of decisions with a line at least.")
    epochs, seen = log[0]["epochs"], log[0]["seen"]
    stages = [[0, seen["size"], float(seen["rate"])]]  # first epoch, size, rate
    for line in log:
        size, rate = line["size"], line["seen"]["rate"] * line["rate_factor"]
        if [size, rate] != stages[-1][1:]:
            stages.append([line["seen"]["epoch"], size, rate])
    ends = [*(first for first, _, _ in stages[1:]), epochs]
    parts = [
        f"{Fraction(end - first, epochs)}*{size}{_at(rate)}"
        for (first, size, rate), end in zip(stages, ends, strict=True)
    ]
    # A whole number is a fraction without its line: written so, no share is taken for a decimal one.
    parts = [part if "/" in part else f"1/1*{part.partition('*')[2]}" for part in parts]
    return BatchPlan(f"{'-'.join(parts)};every={log[0]['every']}")


def _normal(text: str) -> str:
    if text.startswith(PREFIX):
        return Controller.parse(text).text
    end = _MULTI_STEP if text.endswith(_MULTI_STEP) else ""
    body = text.removesuffix(_MULTI_STEP)
    if every := _EVERY.fullmatch(body):
        body, end = every[1], f";every={every[2]}{end}"
    if published := _PUBLISHED.fullmatch(body):
        first, last = (int(size) for size in published.groups())
        return "-".join(map(str, _published(text, first, last))) + end
    stages = [_STAGE.fullmatch(part) for part in body.split("-")]
    if not body or None in stages or (end.startswith(";") and end.endswith(_MULTI_STEP)):
        raise Refusal(f"Expected batch_plan={shown(text)} {_WORDS}.")
    parts = [(stage[1], int(stage[2]), stage[3]) for stage in stages if stage is not None]
    for _, size, _ in parts:
        if not 1 <= size < 2**31:
            raise Refusal(f"Expected batch_plan={shown(text)} with sizes of at least 1, got {size}.")
    sizes = [f"{size}{_at(_rate(text, rate))}" for _, size, rate in parts]
    given = [share for share, _, _ in parts if share is not None]
    if not given:
        return "-".join(sizes) + end
    shares = _shares(text, given)
    if len(given) < len(parts) or min(shares) < _LEAST_SHARE:
        raise Refusal(f"Expected batch_plan={shown(text)} with a share of at least 1e-9 for every stage, or for none.")
    # Thirds are written with as many digits as one likes.
    if abs(sum(shares) - 1) > Fraction(1, 1000):
        raise Refusal(f"Expected batch_plan={shown(text)} with shares that add up to 1, got {float(sum(shares)):g}.")
    if len(set(shares)) == 1:
        return "-".join(sizes) + end
    exact = any("/" in share for share in given)
    written = [f"{share.numerator}/{share.denominator}" if exact else _decimal(share) for share in shares]
    return "-".join(f"{share}*{size}" for share, size in zip(written, sizes, strict=True)) + end


def _shares(text: str, given: Sequence[str]) -> list[Fraction]:
    try:
        return [Fraction(share) for share in given]
    except ZeroDivisionError:
        raise Refusal(f"Expected batch_plan={shown(text)} with shares that are numbers.") from None


def _rate(text: str, given: str | None) -> float:
    rate = 1.0 if given is None else float(given)
    if not 0 < rate <= 1:
        raise Refusal(f"Expected batch_plan={shown(text)} with rates above 0 and up to 1 after '@', got {rate:g}.")
    return rate


def _at(rate: float) -> str:
    """A stage's rate as it is written: to the bit, without an exponent, which the notation has not."""
    return "" if rate == 1 else f"@{np.format_float_positional(rate, trim='-')}"


def _published(text: str, first: int, last: int) -> list[int]:
    low, high = sorted((first, last))
    ratio = high // max(low, 1)
    if low < 1 or low * ratio != high or ratio & (ratio - 1) or high >= 2**31:
        raise Refusal(f"Expected batch_plan={shown(text)} to go from one size to another by powers of two.")
    ladder = [low << power for power in range(ratio.bit_length())]
    ladder = ladder if first == low else ladder[::-1]
    count = max(STAGES, len(ladder))
    return [ladder[place * len(ladder) // count] for place in range(count)]


def _stages(text: str) -> list[tuple[Fraction, int, float]]:
    """(share, size, rate) of each stage; shares add up to 1 exactly."""
    every = _EVERY.fullmatch(text)
    stages = [_STAGE.fullmatch(part) for part in (every[1] if every else text.removesuffix(_MULTI_STEP)).split("-")]
    parts = [(Fraction(stage[1] or 1), int(stage[2]), float(stage[3] or 1)) for stage in stages if stage is not None]
    total = sum(share for share, _, _ in parts)
    return [(share / total, size, rate) for share, size, rate in parts]


@functools.lru_cache(maxsize=64)
def _controller(text: str) -> Controller | None:
    return Controller.parse(text) if text.startswith(PREFIX) else None


def _decimal(share: Any) -> str:
    return f"{float(share):.12f}".rstrip("0").rstrip(".")


AXIS = Axis(BatchPlan, flags={"batch_plan": "text"}, switch="batch_plan")
