"""The plan of a run, stage by stage, and a position in it: frozen, exact, read by `plan.next_dispatch`."""

import bisect
import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from hardjax.choose.trimming import Trimming, TrimPlan
from hardjax.engine.rates import Schedule
from hardjax.engine.state import Sizes

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Stage:
    """A part of the training at one batch size.

    Attributes:
        sizes: shapes.
        epochs: that it lasts.
        steps: back-propagations: round(epochs * N).
        round_steps: of every round after the first, which trains all N batches and fills the loss table.
        learning_rate: peak rate of a batch's mean loss.
        trims: programs of a trimmed run, or None.
        anew: batches are drawn anew and the loss table begins again; not where the rate alone changes.
    """

    sizes: Sizes
    epochs: Fraction
    steps: int
    round_steps: int
    learning_rate: float
    trims: TrimPlan | None = None
    anew: bool = True


class Change(NamedTuple):
    """What a controller changed: back-propagations done by then; batch size and share of the peak rate from there."""

    backprops: int
    size: int
    rate: float


@dataclass(frozen=True)
class RunPlan:
    """Everything that `next_dispatch` reads of a configuration.

    Attributes:
        stages: in order.
        selection: which batches.
        schedule: of the learning rate, over the share of all epochs done.
        trimming: its shares, or None.
        measure_every: steps that each measurement stands for; None measures nothing.
        measure_spread: measure somewhere in each interval instead of at its first step, see `measured_step`.
        test_every: a number of epochs, or "round".
        bound: most steps in one dispatch of the first stage; it changes no result.
        bound_by_time: of the other stages as many as take as long, by their batch size; else as many.
        streamed: images are read when a round's samples are known: it is planned by a program of its own.
        control_every: epochs after each of which the round under way ends, because a controller decides there, or did
            in the run of which this is the open loop; None: no such places.
        ladder: under a controller a stage of every size that may come, its length and rate those of the whole run.
        decided: what it changed so far; the last stage then lasts to the end, unless something is changed again.
    """

    stages: tuple[Stage, ...]
    selection: Any
    schedule: Schedule = field(default_factory=Schedule)
    trimming: Trimming | None = None
    measure_every: int | None = None
    measure_spread: bool = False
    test_every: int | str = 1
    bound: int = 64
    bound_by_time: bool = False
    streamed: bool = False
    control_every: int | None = None
    ladder: tuple[Stage, ...] = ()
    decided: tuple[Change, ...] = ()

    @functools.cached_property
    def _starts(self) -> tuple[tuple[int, Fraction], ...]:
        """(back-propagations, epochs) before each stage, and at the end."""
        lengths = ((stage.steps, stage.epochs) for stage in self.stages)
        begin = (0, Fraction(0))
        return tuple(itertools.accumulate(lengths, lambda a, b: (a[0] + b[0], a[1] + b[1]), initial=begin))

    @functools.cached_property
    def _trained(self) -> tuple[Fraction, ...]:
        """Epochs before each stage by the batches that were trained: rounding gives a stage more of them, or less."""
        parts = (Fraction(stage.steps, stage.sizes.num_batches) for stage in self.stages)
        return tuple(itertools.accumulate(parts, initial=Fraction(0)))

    @property
    def epochs(self) -> Fraction:
        return self._starts[-1][1]

    @property
    def steps(self) -> int:
        """Back-propagations of the whole run."""
        return self._starts[-1][0]

    def start_of(self, stage: int) -> tuple[int, Fraction]:
        """(back-propagations, epochs) before this stage."""
        return self._starts[stage]

    def stage_of(self, backprops: int) -> int:
        """The stage that the next step belongs to; the last one at the end."""
        index = bisect.bisect_right(self._starts, backprops, key=lambda start: start[0]) - 1
        return min(index, len(self.stages) - 1)

    def epoch(self, backprops: int) -> Fraction:
        """Epochs done, exactly; each stage's steps share its epochs evenly."""
        index = self.stage_of(backprops)
        stage, (steps, epochs) = self.stages[index], self.start_of(index)
        return epochs + (backprops - steps) * stage.epochs / stage.steps

    def whole_epochs(self, backprops: int) -> int:
        """Whole epochs done, each of all N batches, or all that come before the stage.

        Where a stage of 2.5 epochs of 3 batches is 8 steps, one after 3 of them, though `epoch`, which spreads what was
        rounded over the stage, is 0.94: by that clock every round of N batches would end just before its epoch, and
        what comes with a whole epoch (a test, a smaller share) would come a round late.
        """
        index = self.stage_of(backprops)
        steps, epochs = self.start_of(index)
        trained = self._trained[index] + Fraction(backprops - steps, self.stages[index].sizes.num_batches)
        # Neither of them ever falls, so that nothing comes twice.
        return max(math.floor(epochs), math.floor(trained))

    def backprops(self, epoch: Fraction) -> int:
        """The fewest back-propagations after which so many epochs are done: the inverse of `epoch`."""
        index = bisect.bisect_left(self._starts, epoch, lo=1, key=lambda start: start[1]) - 1
        if index == len(self.stages):
            return self.steps
        stage, (steps, epochs) = self.stages[index], self.start_of(index)
        return steps + max(0, math.ceil((epoch - epochs) * stage.steps / stage.epochs))

    def next_control(self, backprops: int) -> int:
        """Back-propagations at the next place where a controller decides, or did; the end where there is none."""
        if self.control_every is None:
            return self.steps
        epoch = self.control_every * (math.floor(self.epoch(backprops) / self.control_every) + 1)
        return self.backprops(Fraction(epoch)) if epoch < self.epochs else self.steps

    def controls(self, backprops: int) -> bool:
        """Whether a controller decides there."""
        if not self.ladder or not 0 < backprops < self.steps:
            return False
        epoch = self.epoch(backprops)
        return epoch.denominator == 1 and epoch.numerator % self.control_every == 0

    def following(self, decided: tuple[Change, ...]) -> "RunPlan":
        """The plan with these changes made, of which those that it has are the first."""
        assert decided[: len(self.decided)] == self.decided, "a plan of another run"
        plan = self
        for change in decided[len(self.decided) :]:
            plan = _changed(plan, change)
        return plan

    @property
    def share_of_rate(self) -> float:
        """What the controller left of the peak rate."""
        return self.decided[-1].rate if self.decided else 1.0

    def batch_size(self, backprops: int) -> int:
        """Of the step that was trained last; of the first one before it."""
        return self.stages[self.stage_of(max(0, backprops - 1))].sizes.batch_size

    def state_stage(self, at: "Position") -> int:
        """The stage whose shapes the state has there: at a change that of the stage before, until the next round is
        planned."""
        return self.stage_of(at.backprops if at.round_steps else max(0, at.backprops - 1))

    def bound_of(self, index: int) -> int:
        """Most steps in one dispatch of a stage."""
        if not self.bound_by_time:
            return self.bound
        first, own = self.stages[0].sizes.batch_size, self.stages[index].sizes.batch_size
        return max(1, self.bound * first // own)

    def measured_step(self, index: int) -> int | None:
        """The step before which measurement `index` is taken: interval j of `every` steps has one, and it stands for
        exactly `every` steps (of the last interval, which the end of the run may cut short, as well: it is P3's
        division by the sampling ratio). None where nothing is measured.

        Where every epoch draws its batches anew it is the interval's first step (as published). Under replay the first
        batch of a round is always the hardest, and with fixed batches an interval of N steps would meet one batch for
        ever: there the place in the interval is a fixed sequence of j alone (multiples of the golden ratio, which fill
        the interval evenly), the same for every seed.
        """
        if self.measure_every is None:
            return None
        place = int(self.measure_every * (index * _GOLDEN % 1)) if self.measure_spread else 0
        return index * self.measure_every + place

    def position_at(self, index: int) -> "Position":
        """Where a run stands as a stage begins."""
        first, measured = self.start_of(index)[0], 0
        if self.measure_every is not None:
            # Of the interval that the stage begins in, the measurement may be taken already.
            measured = first // self.measure_every
            due = self.measured_step(measured)
            measured += due is not None and due < first
        return Position(backprops=first, measured=measured, decided=self.decided)


@dataclass(frozen=True)
class Position:
    """Where a run stands; whole numbers, so that JSON keeps it. Beside the state it is all that a run goes on from.

    Attributes:
        backprops: done.
        round_steps: length of the round under way; 0 between rounds.
        cursor: steps done of it.
        measured: measurements taken.
        decided: what a controller changed so far.
    """

    backprops: int = 0
    round_steps: int = 0
    cursor: int = 0
    measured: int = 0
    decided: tuple["Change", ...] = ()

    def __post_init__(self) -> None:
        # JSON has lists alone.
        object.__setattr__(self, "decided", tuple(Change(*change) for change in self.decided))


def _changed(plan: RunPlan, change: Change) -> RunPlan:
    """The plan whose last stage ends at a change, and the stage after it."""
    index = len(plan.stages) - 1
    last, (first, epochs), done = plan.stages[index], plan.start_of(index), plan.epoch(change.backprops)
    (template,) = (stage for stage in plan.ladder if stage.sizes.batch_size == change.size)
    left = plan.epochs - done
    after = dataclasses.replace(
        template,
        epochs=left,
        # Whole: controllers decide after whole epochs.
        steps=int(left * template.sizes.num_batches),
        learning_rate=template.learning_rate * change.rate,
        anew=template.sizes != last.sizes,
    )
    ended = dataclasses.replace(last, epochs=done - epochs, steps=change.backprops - first)
    stages = (*plan.stages[:index], ended, after)
    return dataclasses.replace(plan, stages=stages, decided=(*plan.decided, change))
