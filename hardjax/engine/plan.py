"""The one function that decides what comes next in a run, and what follows from it for a whole plan.

`next_dispatch(plan, position, facts)` is pure: test points, kept shares, measuring, cut rounds and the end of the run
are decided here and nowhere else. A whole run is this function iterated from `Position()`; going on with a run is
calling it with a restored position.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from hardjax.engine import lengths
from hardjax.engine.rates import factors
from hardjax.engine.rounds import RoundSpec
from hardjax.engine.stages import Position, RunPlan
from hardjax.engine.state import StepInputs


class Facts(NamedTuple):
    """What a decision may know of the run beside its position; it changes at decision points alone.

    Attributes:
        stop: why the run should end now, or None.
    """

    stop: str | None = None


_NO_FACTS = Facts()


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
        control: a decision of the controller follows, after the test.
    """

    kind: str
    spec: RoundSpec
    before: Position
    after: Position
    stage: int
    keep: int
    share: float
    test: bool = False
    control: bool = False

    @property
    def trained(self) -> int:
        """Back-propagations made."""
        return self.after.backprops - self.before.backprops


def next_dispatch(plan: RunPlan, at: Position, facts: Facts = _NO_FACTS) -> Dispatch | None:
    """What comes next; None at the end of the run.

    Rounds go on until exactly the steps of the stage are done: its last round is cut short. A test point comes at the
    first round boundary at or after every `test_every` epochs (or after every round), and at the end. The share that
    trimming keeps is that of the epoch in which a round begins.

    Args:
        plan: of the run; what was decided in it is the position's.
    """
    plan = plan.following(at.decided)
    if at.backprops >= plan.steps or facts.stop is not None:
        return None
    began = at.backprops - at.cursor
    index = plan.stage_of(began)
    length = at.round_steps or _round_length(plan, index, began)
    keep, share, trim = _kept(plan, index, began)
    # A stage trains all its batches first: its partition is new, and so no loss in its table is known.
    first = began == plan.start_of(index)[0] and plan.stages[index].anew
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
        if free == length <= bound and not plan.streamed:
            alone = first and (selection != plan.selection or length != plan.stages[index].round_steps)
            rounds = 1 if alone else _rounds_together(plan, index, began, length, due)
            spec = dataclasses.replace(spec, rounds=rounds)
            after = dataclasses.replace(at, backprops=began + rounds * length)
            ends = {"test": _tested(plan, after.backprops - length, after), "control": plan.controls(after.backprops)}
            return Dispatch("rounds", spec, after=after, **ends, **common)
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
    whole = after.cursor == 0
    ends = {"test": whole and _tested(plan, began, after), "control": whole and plan.controls(after.backprops)}
    return Dispatch("segment", dataclasses.replace(spec, steps=steps), after=after, **ends, **common)


def dispatches(plan: RunPlan, at: Position | None = None) -> Iterator[Dispatch]:
    """The rest of a run from a position on, or all of it, if nothing stops it and no controller changes anything."""
    at = plan.position_at(0) if at is None else at
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


def never_chooses(plan: RunPlan) -> bool:
    """Whether a strategy that chooses has nothing to choose: every stage ends with its first round, of all batches."""
    whole = all(stage.anew and stage.steps <= stage.sizes.num_batches for stage in plan.stages)
    return whole and plan.selection.first_round() != plan.selection


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
        full = Fraction(stage.steps, sizes.num_batches) if stage.round_steps == sizes.num_batches else int(stage.anew)
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


def ladder_table(plan: RunPlan) -> list[dict[str, Any]]:
    """A row for each batch size that a controller may choose, for people: its steps an epoch, its peak rate, and the
    programs of training that it takes, which those but the first may never be compiled for."""
    rows = []
    for stage in plan.ladder:
        alone = dataclasses.replace(plan, stages=(stage,), decided=())
        chosen = stage.sizes == plan.stages[0].sizes
        rows.append(
            {
                "batch size": stage.sizes.batch_size,
                "needed": "from the start" if chosen else "if chosen",
                "steps an epoch": stage.sizes.num_batches,
                "peak rate": stage.learning_rate,
                "programs": len(programs(alone)),
            }
        )
    return rows


def _round_length(plan: RunPlan, index: int, began: int) -> int:
    """Steps of the round that begins here: N in the first one of a size; what is left of the stage, or before a
    controller decides, in the last one."""
    stage, start = plan.stages[index], plan.start_of(index)[0]
    # The budget is exact: the last round of a stage is cut short rather than run over.
    wanted = stage.sizes.num_batches if began == start and stage.anew else stage.round_steps
    return min(wanted, start + stage.steps - began, plan.next_control(began) - began)


def _kept(plan: RunPlan, index: int, began: int) -> tuple[int, float, Any]:
    """(samples kept, share, program) of a round that begins here."""
    stage = plan.stages[index]
    if plan.trimming is None or stage.trims is None:
        return stage.sizes.batch_size, 1.0, None
    # By the epoch in which the round begins: one count for a whole round, which is one trace.
    epoch, epochs = plan.whole_epochs(began), math.ceil(plan.epochs)
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
    return plan.whole_epochs(backprops) // plan.test_every


def _rounds_together(plan: RunPlan, index: int, began: int, length: int, due: int | None) -> int:
    """Whole rounds in one call: a `lengths.power`, none past a test point, a measured step, the bound or the stage."""
    stage, start = plan.stages[index], plan.start_of(index)[0]
    most = min(plan.bound_of(index), start + stage.steps - began, plan.next_control(began) - began) // length
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
