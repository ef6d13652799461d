"""What a run compiles before it trains, and what its later stages will ask for; nothing is called or allocated."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardjax.choose.trimming import Trim
from hardjax.engine import evaluate, memory
from hardjax.engine.memory import Need, Temporary
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch, Position, RunPlan, dispatches, step_inputs
from hardjax.engine.programs import Programs
from hardjax.engine.recipe import table_slots
from hardjax.engine.rounds import Observer
from hardjax.engine.stages import Change
from hardjax.engine.state import Sizes, TrainData, TrainState

_START = Position()


def later_stages(plan: RunPlan, at: Position) -> tuple[tuple[RunPlan, int], ...]:
    """The stages that may come after the one whose shapes the state has there, in order: plan and index of each.

    Under a controller these are its next decision's: the doubled and the halved batch size.
    """
    plan = plan.following(at.decided)
    if plan.ladder:
        return tuple((changed, len(changed.stages) - 1) for changed in _neighbours(plan, at))
    return tuple((plan, index) for index in range(plan.state_stage(at) + 1, len(plan.stages)))


def _neighbours(plan: RunPlan, at: Position) -> Iterator[RunPlan]:
    """The plan with what a controller may change next, the likelier change first: batches seldom shrink."""
    where, size = plan.next_control(at.backprops), plan.stages[-1].sizes.batch_size
    sizes = {stage.sizes.batch_size for stage in plan.ladder}
    if where < plan.steps:
        for found in (2 * size, size // 2):
            if found in sizes:
                yield plan.following((*plan.decided, Change(where, found, plan.share_of_rate)))


class Wanted(NamedTuple):
    """A program that a run will ask for: what `Programs.ahead` and `Programs.begin` take."""

    kind: str
    key: Any
    args: tuple
    donate: bool = False


def stage_programs(
    programs: Programs,
    plan: RunPlan,
    index: int,
    hyper: Hyper,
    train: TrainData,
    *,
    observer: Observer | None,
    donate: bool,
    statistics: int | None = None,
    at: Position | None = None,
) -> Iterator[Wanted]:
    """What a stage asks for, each program once, in the order in which it does: its batches, training, the first look.

    Args:
        statistics: samples at a time where batch statistics are estimated anew for testing, or None.
        at: a position within the stage, whose rest is meant; None: its beginning.
    """
    shapes, sizes = _state_shapes(programs, plan, index, hyper), plan.stages[index].sizes
    if at is None:
        at = plan.position_at(index)
        if index and plan.stages[index].anew:
            before = _state_shapes(programs, plan, index - 1, hyper)
            yield Wanted("restage", sizes, (before, _table(programs, plan, index)))
    known = set()
    for call in itertools.takewhile(lambda call: call.stage == index, dispatches(plan, at)):
        look = call.kind == "look"
        if (name := "look" if look else (call.kind, call.spec)) in known:
            continue
        known.add(name)
        if look:
            if observer is not None:
                yield Wanted("look", (observer, sizes.unit), (shapes, _given(programs, train, sizes)))
            continue
        yield Wanted(call.kind, call.spec, _arguments(programs, plan, call, shapes, hyper, train), donate)
    if statistics is not None:
        yield Wanted("statistics", statistics, (shapes, train))


def compile_run(
    programs: Programs,
    plan: RunPlan,
    hyper: Hyper,
    splits: Mapping[str, TrainData],
    *,
    observer: Observer | None,
    evaluated: Iterable[str],
    eval_batch_size: int,
    donate: bool,
    saved: bool,
    statistics: int | None = None,
    everything: bool = False,
    at: Position = _START,
    state: TrainState | None = None,
) -> Need:
    """Compile what a run begins with: first state, first training, evaluation, look.

    What it compiles the run finds again. Programs that come later are estimated, and looked at again when they are
    compiled.

    Args:
        observer: what measures spectra, or None.
        evaluated: names of the splits that test points evaluate.
        saved: whether checkpoints are written.
        statistics: as in `stage_programs`.
        everything: compile what comes later as well, and estimate nothing.
        at, state: where a run goes on; None: the state is still to be drawn.

    Returns:
        What the whole run needs.

    Raises:
        OutOfMemory: the device has no room for it; after the first program that shows it.
    """
    plan = plan.following(at.decided)
    index = plan.stage_of(at.backprops)
    (device,) = jnp.zeros(()).devices()
    sizes, train, shapes = plan.stages[index].sizes, splits["train"], _state_shapes(programs, plan, index, hyper)
    # A copy for a checkpoint is the host's, which on CPU is the device.
    copies = memory.size_of(shapes) if saved and device.platform == "cpu" else 0
    need = Need(memory.size_of(splits) + _read_ahead(programs, plan, index, train), memory.size_of(shapes), copies)

    def fits(*found: Temporary | None) -> Need:
        more = need.adding(program for program in found if program is not None)
        memory.check(more, splits, state)
        return more

    need = fits()
    if state is None:
        first = jax.ShapeDtypeStruct((), jnp.uint32), hyper, _table(programs, plan, index)
        drawn = programs.ahead("init", sizes, *first)
        # Its results are the state, which is counted; and no checkpoint is written before it has run.
        need = fits(drawn and drawn._replace(size=max(0, drawn.size - need.state - need.copies)))
    for call in dispatches(plan, at):
        if call.kind == "look":
            continue
        arguments = _arguments(programs, plan, call, shapes, hyper, train)
        found = programs.ahead(call.kind, call.spec, *arguments, donate=donate)
        need = fits(found)
        if call.trained:
            if not everything:
                need = fits(*_later(plan, call, found, memory.size_of(shapes.params)))
            break
    due = plan.measured_step(at.measured)
    if observer is not None and due is not None and due < plan.steps:
        need = fits(programs.ahead("look", (observer, sizes.unit), shapes, _given(programs, train, sizes)))
    for name in evaluated:
        kind, given = _evaluation(splits[name], eval_batch_size)
        need = fits(programs.ahead(kind, eval_batch_size, shapes.variables, *given))
    if statistics is not None:
        need = fits(programs.ahead("statistics", statistics, shapes, train))
    for later in range(index, len(plan.stages)) if everything else ():
        where = at if later == index else None
        for kind, key, args, given in stage_programs(
            programs, plan, later, hyper, train, observer=observer, donate=donate, statistics=statistics, at=where
        ):
            need = fits(programs.ahead(kind, key, *args, donate=given))
    return need


def _state_shapes(programs: Programs, plan: RunPlan, index: int, hyper: Hyper) -> TrainState:
    return programs.state_shapes(plan.stages[index].sizes, hyper, _table(programs, plan, index))


def _arguments(
    programs: Programs, plan: RunPlan, call: Dispatch, shapes: TrainState, hyper: Hyper, train: TrainData
) -> tuple:
    """What a dispatch is called with."""
    if call.kind == "plan":
        return (shapes,)
    data = _given(programs, train, plan.stages[call.stage].sizes, call.trained)
    return shapes, data, hyper, step_inputs(plan, call)


def _evaluation(split: TrainData, batch_size: int) -> tuple[str, tuple]:
    """(kind of program, what it is given beside the variables) of an evaluation of a split."""
    if not split.elsewhere:
        return "evaluate", (split,)
    part = evaluate.part_of(split, batch_size)
    if part.labels.shape[0] < split.labels.shape[0]:
        return "evaluate part", (part, jax.ShapeDtypeStruct((), jnp.int32))
    return "evaluate", (part,)


def _given(programs: Programs, train: TrainData, sizes: Sizes, steps: int = 1) -> TrainData:
    """The data that a program of so many steps is given: what is there, or shapes of the images that will be read."""
    return train.of_steps(steps, sizes.batch_size, programs.recipe.mesh) if train.elsewhere else train


def _read_ahead(programs: Programs, plan: RunPlan, index: int, train: TrainData) -> int:
    """Bytes of streamed images on the device: of the dispatch under way, and of the next."""
    given = _given(programs, train, plan.stages[index].sizes, plan.bound_of(index))
    return 2 * memory.size_of(given.images) if train.elsewhere else 0


def _table(programs: Programs, plan: RunPlan, index: int) -> Any:
    """Shape and dtype of a stage's loss table."""
    sizes = plan.stages[index].sizes
    return jax.eval_shape(lambda: plan.selection.init(table_slots(programs.recipe, sizes)))


def _later(plan: RunPlan, call: Dispatch, found: Temporary | None, gradient: int) -> Iterator[Temporary]:
    """Estimates of the training programs that may come after the first, where they take more: larger batches, or more
    of them kept."""

    def differentiated(trim: Trim | None, batch_size: int) -> int:
        # The other paths run a whole batch through both passes.
        return trim.capacity if trim is not None and trim.path == "gather" else batch_size

    if found is None:
        return
    now = differentiated(call.spec.trim, plan.stages[call.stage].sizes.batch_size)
    coming = [(plan.stages[index], plan.start_of(index)[1]) for index in range(call.stage, len(plan.stages))]
    # A size that a controller may choose and that has no room would end the run after hours.
    for stage, began in (*coming, *((stage, Fraction(0)) for stage in plan.ladder)):
        size, trims = stage.sizes.batch_size, {None}
        if plan.trimming is not None and stage.trims is not None:
            epochs = range(math.floor(began), math.ceil(began + stage.epochs))
            keeps = {plan.trimming.keep_count(epoch, math.ceil(plan.epochs), size) for epoch in epochs}
            trims = {stage.trims.trim(keep) for keep in keeps}
        most = max(differentiated(trim, size) for trim in trims)
        if most > now:
            yield memory.scaled(found, gradient, most / now, f"later training, of {most} samples at a time,")
