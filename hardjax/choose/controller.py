"""The settings of a controller of the batch size, and the text that they are written as; `control` decides by them."""

import itertools
import math
from dataclasses import dataclass, fields
from typing import Any

from hardjax import _settings, _validate
from hardjax._validate import Refusal, shown

RULES = ("noise-scale", "trajectory", "growth")
READINGS = ("measurements", "epochs")
PREFIX = "controlled:"


@dataclass(frozen=True)
class Controller:
    """When the batch size is decided anew, between which bounds, and by what.

    Attributes:
        start: batch size that the run begins with.
        least, most: bounds; start, least and most are powers of two apart, and every size between them may come.
        every: epochs between two decisions; the round under way ends there.
        rule: "noise-scale" (double where `share` times the noise scale of the batches measured since the last decision
            is at least 2 m, halve where it is at most m / 2), "trajectory" (C_K and L_K against `target`) or "growth"
            (mean c and L_K an epoch since the last decision against those of the interval before it).
        reading: which C_K and L_K: every measurement counts alike ("measurements", P3's code) or every epoch ("epochs",
            P3's text), see `read`.
        share: of the noise scale that the batch size is to be; read by "noise-scale".
        target: (epoch, C_K, L_K) with rising epochs, such as a beacon's, straight lines between; read by "trajectory".
        tolerance: share by which C_K and L_K may be off the target; read by "trajectory".
        condition_growth, energy_growth: what the mean c, and what L_K grows by in an epoch, may be multiplied by from
            one interval to the next; read by "growth".
        rate_factor: what a decision to lower the learning rate multiplies it by; read by "trajectory" and "growth".
        lowest_rate: share of the configured rate below which it is not lowered; likewise.

    Raises:
        ValueError: bounds that exclude the start or are no powers of two apart, an unknown word, a value that the rule
            does not read or lacks, a number out of range.
    """

    start: int
    least: int
    most: int
    every: int = 1
    rule: str = "noise-scale"
    reading: str = "measurements"
    share: float = 1.0
    target: tuple[tuple[float, ...], ...] = ()
    tolerance: float = 0.1
    condition_growth: float = 1.5
    energy_growth: float = 1.5
    rate_factor: float = 0.5
    lowest_rate: float = 2.0**-6

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.at_least(1, start=self.start, every=self.every)
        if self.least < 1:
            raise Refusal(f"Expected least={self.least} to be at least 1.")
        if not self.least <= self.start <= self.most < 2**31:
            raise Refusal(f"Expected start={self.start} between least={self.least} and most={self.most}.")
        if not (_powers_apart(self.least, self.start) and _powers_apart(self.start, self.most)):
            raise Refusal(
                f"Expected least={self.least}, start={self.start} and most={self.most} to be powers of two apart."
            )
        _validate.one_of(RULES, rule=self.rule)
        _validate.one_of(READINGS, reading=self.reading)
        _validate.positive(share=self.share, condition_growth=self.condition_growth, energy_growth=self.energy_growth)
        _validate.not_negative(tolerance=self.tolerance)
        if not 0 < self.rate_factor < 1:
            raise Refusal(f"Expected rate_factor={self.rate_factor} between 0 and 1.")
        _validate.in_half_open_unit(lowest_rate=self.lowest_rate)
        self._check_target()
        self._check_read()

    def _check_target(self) -> None:
        if (self.rule == "trajectory") != bool(self.target):
            raise Refusal(
                f"Expected a target with rule 'trajectory' and no other, got {len(self.target)} points of it."
            )
        if any(len(point) != 3 for point in self.target):
            raise Refusal("Expected a target of points (epoch, C_K, L_K).")
        if any(not (math.isfinite(value) and value >= 0) for point in self.target for value in point):
            raise Refusal("Expected a target of finite numbers of at least 0.")
        epochs = [point[0] for point in self.target]
        if any(a >= b for a, b in itertools.pairwise(epochs)):
            raise Refusal(f"Expected a target with rising epochs, got {shown(epochs)}.")

    def _check_read(self) -> None:
        """A setting that nothing would read is a mistake of the caller's."""
        readers = {
            "share": ("noise-scale",),
            "tolerance": ("trajectory",),
            "condition_growth": ("growth",),
            "energy_growth": ("growth",),
            **dict.fromkeys(("reading", "rate_factor", "lowest_rate"), ("trajectory", "growth")),
        }
        for field in fields(self):
            rules = readers.get(field.name, RULES)
            if self.rule not in rules and getattr(self, field.name) != field.default:
                raise Refusal(f"Expected {field.name} with rule {' or '.join(rules)}, not with {self.rule}.")

    def check_epochs(self, epochs: int) -> None:
        """That there is something to decide in a training of so many epochs.

        Raises:
            ValueError: the first decision would come at its end.
        """
        if self.every >= epochs:
            raise Refusal(f"Expected a controller with every={self.every} below epochs={epochs}, or it never decides.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every batch size that may come, from the least to the most."""
        return tuple(self.least << power for power in range((self.most // self.least).bit_length()))

    @property
    def text(self) -> str:
        """In the notation of a batch plan; what holds its default is left out."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "target":
                value = ";".join(":".join(map(_written, point)) for point in value)
            if value not in (field.default, ""):
                parts.append(f"{field.name}={_written(value)}")
        return PREFIX + ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> "Controller":
        """The controller that `text` describes: "controlled:start=32,least=16,most=256,rule=noise-scale"; a target as
        "target=0:3.1:0;10:4.5:20" (epoch:C_K:L_K). Underscores and hyphens in names are alike.

        Raises:
            ValueError: another form, an unknown name, one that is given twice, a value refused.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        found: dict[str, Any] = {}
        for part in text.removeprefix(PREFIX).split(","):
            name, equals, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if not equals:
                raise Refusal(f"Expected {shown(part)} of batch_plan={shown(text)} as name=value.")
            _validate.one_of(kinds, **{"setting of a controlled batch_plan": name})
            if name in found:
                raise Refusal(f"Expected {name} once in batch_plan={shown(text)}.")
            found[name] = _read(name, value.strip(), kinds[name])
        if lacking := [name for name in ("start", "least", "most") if name not in found]:
            raise Refusal(f"Expected batch_plan={shown(text)} with {', '.join(lacking)}.")
        return cls(**found)


def _powers_apart(low: int, high: int) -> bool:
    ratio = high // low
    return low * ratio == high and ratio & (ratio - 1) == 0


def _written(value: Any) -> str:
    """A number or word, to the bit."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _read(name: str, text: str, kind: Any) -> Any:
    """The value of a setting in a plan's text."""
    if name == "target":
        return tuple(tuple(_number(name, part) for part in point.split(":")) for point in text.split(";"))
    if kind is str:
        return text
    number = _number(name, text)
    return int(number) if kind is int and number == int(number) else number


def _number(name: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Refusal(f"Expected {name}={shown(text)} of a controlled batch_plan to be a number.")
    return found
