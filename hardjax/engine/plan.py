"""The plan of a run, and the one function that decides what comes next.

`next_dispatch(plan, position, facts)` is pure: test points, kept shares, measuring, cut rounds and the end of the run
are decided here and nowhere else. A whole run is this function iterated from `Position()`; going on with a run is
calling it with a restored position.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from hardjax.choose.trimming import Trimming, TrimPlan
from hardjax.engine import lengths
from hardjax.engine.rates import Schedule, factors
from hardjax.engine.rounds import RoundSpec
from hardjax.engine.state import Sizes, StepInputs

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
    """

    sizes: Sizes
    epochs: Fraction
    steps: int
    round_steps: int
    learning_rate: float
    trims: TrimPlan | None = None


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

    @property
    def epochs(self) -> Fraction:
        return sum((stage.epochs for stage in self.stages), Fraction(0))

    @property
    def steps(self) -> int:
        """Back-propagations of the whole run."""
        return sum(stage.steps for stage in self.stages)

    def start_of(self, stage: int) -> tuple[int, Fraction]:
        """(back-propagations, epochs) before this stage."""
        before = self.stages[:stage]
        return sum(s.steps for s in before), sum((s.epochs for s in before), Fraction(0))

    def stage_of(self, backprops: int) -> int:
        """The stage that the next step belongs to; the last one at the end."""
        for index in range(len(self.stages)):
            if backprops < sum(self.start_of(index)[:1]) + self.stages[index].steps:
                return index
        return len(self.stages) - 1

    def epoch(self, backprops: int) -> Fraction:
        """Epochs done, exactly; each stage's steps share its epochs evenly."""
        # Fractions: the floor of an epoch decides test points and kept shares, and a quotient rounded down just below a
        # whole number would move them by a round.
        index = self.stage_of(backprops)
        stage, (steps, epochs) = self.stages[index], self.start_of(index)
        return epochs + (backprops - steps) * stage.epochs / stage.steps

    def backprops(self, epoch: Fraction) -> int:
        """The fewest back-propagations after which so many epochs are done: the inverse of `epoch`."""
        for index, stage in enumerate(self.stages):
            steps, epochs = self.start_of(index)
            if epoch <= epochs + stage.epochs:
                return steps + max(0, math.ceil((epoch - epochs) * stage.steps / stage.epochs))
        return self.steps

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
        return Position(backprops=first, measured=measured)


@dataclass(frozen=True)
class Position:
    """Where a run stands; whole numbers, so that JSON keeps it. Beside the state it is all that a run goes on from.

    Attributes:
        backprops: done.
        round_steps: length of the round under way; 0 between rounds.
        cursor: steps done of it.
        measured: measurements taken.
    """

    backprops: int = 0
    round_steps: int = 0
    cursor: int = 0
    measured: int = 0


class Facts(NamedTuple):
    """What a decision may know of the run beside its position; it changes at decision points alone.

    Attributes:
        stop: why the run should end now, or None.
    """

    stop: str | None = None


_START, _NO_FACTS = Position(), Facts()


@dataclass(frozen=True)
class Dispatch:
    """One call of a compiled program.

    Attributes:
        kind: "rounds" (whole ones, planning included), "plan" (of a round to be trained in segments), "segment" or
            "look" (a measurement).
        spec: its trace; of a look, that of the round under way.
        before, after: positions.
        stage: index of the stage.
        keep: samples of each batch that are trained.
        share: of each batch.
        test: a test point follows.
    """

    kind: str
    spec: RoundSpec
    before: Position
    after: Position
    stage: int
    keep: int
    share: float
    test: bool = False

    @property
    def trained(self) -> int:
        """Back-propagations made."""
        return self.after.backprops - self.before.backprops


def next_dispatch(plan: RunPlan, at: Position, facts: Facts = _NO_FACTS) -> Dispatch | None:
    """What comes next; None at the end of the run.

    Rounds go on until exactly the steps of the stage are done: its last round is cut short. A test point comes at the
    first round boundary at or after every `test_every` epochs (or after every round), and at the end. The share that
    trimming keeps is that of the epoch in which a round begins.
    """
    if at.backprops >= plan.steps or facts.stop is not None:
        return None
    began = at.backprops - at.cursor
    index = plan.stage_of(began)
    length = at.round_steps or _round_length(plan, index, began)
    keep, share, trim = _kept(plan, index, began)
    # A stage trains all its batches first: its partition is new, and so no loss in its table is known.
    first = began == plan.start_of(index)[0]
    selection = plan.selection.first_round() if first else plan.selection
    spec = RoundSpec(selection, length, 1, trim)
    common = {"before": at, "stage": index, "keep": keep, "share": share}
    due = plan.measured_step(at.measured)
    if at.round_steps and due == at.backprops:
        return Dispatch("look", spec, after=dataclasses.replace(at, measured=at.measured + 1), **common)
    free = length - at.cursor if due is None else min(length - at.cursor, due - at.backprops)
    bound = plan.bound_of(index)
    if not at.round_steps:
        # Neither cut nor looked into: planned and trained in one program, since a round may be two steps (P1 on
        # STL-10).
        if free == length <= bound:
            alone = first and (selection != plan.selection or length != plan.stages[index].round_steps)
            rounds = 1 if alone else _rounds_together(plan, index, began, length, due)
            spec = dataclasses.replace(spec, rounds=rounds)
            after = dataclasses.replace(at, backprops=began + rounds * length)
            return Dispatch("rounds", spec, after=after, test=_tested(plan, after.backprops - length, after), **common)
        return Dispatch("plan", spec, after=dataclasses.replace(at, round_steps=length), **common)
    # Nothing is measured inside this round: segments of equal length. Otherwise they end where the next measurement is
    # due, and come from a ladder of few lengths, or every interval would bring new programs.
    if due is None or (due >= began + length and (plan.measured_step(at.measured - 1) or 0) <= began):
        steps = lengths.even(length, at.cursor, bound)
    else:
        assert plan.measure_every is not None
        steps = lengths.rung(free, bound, plan.measure_every)
    after = dataclasses.replace(at, backprops=at.backprops + steps, cursor=at.cursor + steps)
    if after.cursor == length:
        after = dataclasses.replace(after, round_steps=0, cursor=0)
    test = after.cursor == 0 and _tested(plan, began, after)
    return Dispatch("segment", dataclasses.replace(spec, steps=steps), after=after, test=test, **common)


def dispatches(plan: RunPlan, at: Position = _START) -> Iterator[Dispatch]:
    """The rest of a run from a position on, if nothing stops it."""
    while (dispatch := next_dispatch(plan, at)) is not None:
        yield dispatch
        at = dispatch.after


def step_inputs(plan: RunPlan, dispatch: Dispatch) -> StepInputs:
    """The numbers of a dispatch's steps, on the host: leaves (steps,) NumPy."""
    stage = plan.stages[dispatch.stage]
    steps = np.arange(dispatch.before.backprops, dispatch.after.backprops)
    rates = np.float32(stage.learning_rate) * learning_rate_factors(plan, steps).astype(np.float32)
    return StepInputs(rates.astype(np.float32), np.full(len(steps), dispatch.keep, np.int32))


def learning_rate_factors(plan: RunPlan, steps: np.ndarray) -> np.ndarray:
    """The schedule's factor, float64, of steps that all belong to one stage: (steps,) back-propagations done before."""
    index = plan.stage_of(int(steps[0]))
    stage, (first, epochs) = plan.stages[index], plan.start_of(index)
    # epochs + (step - first) * stage.epochs / stage.steps over all epochs, as one division of whole numbers.
    a, b = epochs / plan.epochs, stage.epochs / stage.steps / plan.epochs
    c = math.lcm(a.denominator, b.denominator)
    start, slope, places = int(a * c), int(b * c), np.asarray(steps, np.int64) - first
    if max(c, start + slope * stage.steps) < 2**53:
        # Both are exact in float64, so that the quotient is rounded once.
        return factors(plan.schedule, (start + places * slope) / c)
    # Shares that are no short fractions (a third of the training): Python's whole numbers, which it divides exactly.
    return factors(plan.schedule, np.array([(start + int(place) * slope) / c for place in places]))


def learning_rate(plan: RunPlan, step: int) -> float:
    """The rate of the step taken after `step` back-propagations."""
    return plan.stages[plan.stage_of(step)].learning_rate * float(learning_rate_factors(plan, np.array([step]))[0])


def programs(plan: RunPlan) -> set[tuple[str, RoundSpec, int]]:
    """The programs that a whole run compiles for training: (kind, spec, stage); looks share one a stage."""
    return {(call.kind, call.spec, call.stage) for call in dispatches(plan) if call.kind != "look"}


def stage_table(plan: RunPlan, samples: int) -> list[dict[str, Any]]:
    """A row a stage, for people: its epochs, size, steps, peak rate, the programs that it is the first to need, and the
    samples that are trained once more because a last batch is filled up.

    Args:
        samples: n of the training split.
    """
    rows, known = [], set()
    for index, stage in enumerate(plan.stages):
        sizes = stage.sizes
        needed = {(kind, spec, sizes) for kind, spec, of in programs(plan) if of == index}
        # Of strategies that choose, the first epoch alone has every batch once.
        full = Fraction(stage.steps, sizes.num_batches) if stage.round_steps == sizes.num_batches else 1
        surplus = math.floor(full) * (sizes.num_batches * sizes.batch_size - samples)
        rows.append(
            {
                "stage": index + 1,
                "epochs": float(stage.epochs),
                "batch size": sizes.batch_size,
                "steps": stage.steps,
                "peak rate": stage.learning_rate,
                "programs": len(needed - known),
                "surplus samples": surplus,
            }
        )
        known |= needed
    return rows


def _round_length(plan: RunPlan, index: int, began: int) -> int:
    """Steps of the round that begins here: N in a stage's first one; what is left of the stage in its last one."""
    stage, start = plan.stages[index], plan.start_of(index)[0]
    # The budget is exact: the last round of a stage is cut short rather than run over.
    wanted = stage.sizes.num_batches if began == start else stage.round_steps
    return min(wanted, start + stage.steps - began)


def _kept(plan: RunPlan, index: int, began: int) -> tuple[int, float, Any]:
    """(samples kept, share, program) of a round that begins here."""
    stage = plan.stages[index]
    if plan.trimming is None or stage.trims is None:
        return stage.sizes.batch_size, 1.0, None
    # By the epoch in which the round begins: one count for a whole round, which is one trace.
    epoch, epochs = math.floor(plan.epoch(began)), math.ceil(plan.epochs)
    keep = plan.trimming.keep_count(epoch, epochs, stage.sizes.batch_size)
    return keep, plan.trimming.share(epoch, epochs), stage.trims.trim(keep)


def _tested(plan: RunPlan, began: int, after: Position) -> bool:
    """Whether a test point follows the round that began there and ends here."""
    if plan.test_every == "round" or after.backprops == plan.steps:
        return True
    return _tests(plan, after.backprops) > _tests(plan, began)


def _tests(plan: RunPlan, backprops: int) -> int:
    """Test points that are due by then, where they go by epochs."""
    assert isinstance(plan.test_every, int)
    return math.floor(plan.epoch(backprops) / plan.test_every)


def _rounds_together(plan: RunPlan, index: int, began: int, length: int, due: int | None) -> int:
    """Whole rounds in one call: a `lengths.power`, none past a test point, a measured step, the bound or the stage."""
    stage, start = plan.stages[index], plan.start_of(index)[0]
    most = min(plan.bound_of(index), start + stage.steps - began) // length
    if due is not None:
        most = min(most, (due - began) // length)
    if plan.test_every == "round":
        most = 1

    def alike(rounds: int) -> bool:
        """Whether the round after so many is neither after a test point nor trimmed otherwise."""
        later = began + rounds * length
        if plan.test_every != "round" and _tests(plan, later) > _tests(plan, began):
            return False
        return plan.trimming is None or _kept(plan, index, later) == _kept(plan, index, began)

    return lengths.power(max(1, next((n for n in range(1, most) if not alike(n)), most)))
