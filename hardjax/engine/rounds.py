"""Rounds and parts of rounds: scans of the step over a schedule made on the device, each compiled as one program.

A round is planned (which slots, in which order) and then trained. Whole rounds do both in one program, several short
ones in one call. A round that is longer than a dispatch may last, or that something is measured in, is planned by a
program of its own and trained in segments: cut anywhere, the bits are the same on CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.choose.losses import Loss
from hardjax.choose.selection import Planner, writes_at_once
from hardjax.choose.trimming import Trim
from hardjax.data.augment import Moves, draw_moves, fetch, prepare
from hardjax.engine.devices import spread, whole
from hardjax.engine.optimizers import Hyper
from hardjax.engine.state import (
    AUGMENT,
    DROPOUT,
    PARTITION,
    PLAN,
    Batch,
    Recipe,
    StepInputs,
    TrainData,
    TrainState,
    draw,
    hash_samples,
    make_partition,
    replace,
)
from hardjax.engine.step import StepInfo, make_step


class RoundInfo(NamedTuple):
    """What a segment reports, a row a step; of several rounds with a leading axis.

    Attributes:
        loss: (steps,) nats, mean over the batch.
        top1: (steps,) share of correct predictions; None where nothing is predicted that is right or wrong.
        slots: (steps,) int32, or (steps, B) where slots are samples.
        kept_loss, dropped_loss: (steps,) nats, under trimming.
        bad: (steps,) bool, see `StepInfo`; None under `on_nan="record"`.
    """

    loss: Array
    top1: Array | None
    slots: Array
    kept_loss: Array | None = None
    dropped_loss: Array | None = None
    bad: Array | None = None


class Observer(Protocol):
    """Looks at a batch just before it is trained and changes nothing; frozen and hashable."""

    def make(self, apply: Callable, loss: Loss) -> Callable[[Any, Array, Array, Array], Any]:
        """`observe(variables, images, labels, key) -> pytree of arrays`, pure."""
        ...

    def advice(self, batch: int) -> str:
        """What to set where looking at batches of this size takes more memory than there is."""
        ...


@dataclass(frozen=True)
class RoundSpec:
    """What shapes the trace of a dispatch, beside the recipe and the shapes of the state.

    Attributes:
        selection: which batches.
        steps: back-propagations of the round, or of the segment.
        rounds: whole rounds in one call.
        trim: how each batch is trimmed; None trains all of it.
    """

    selection: Planner
    steps: int
    rounds: int = 1
    trim: Trim | None = None


def make_plan(recipe: Recipe, spec: RoundSpec) -> Callable[[TrainState], TrainState]:
    """`plan(state) -> state`: begins a round of `spec.steps`, pure; draws a fresh partition where there is one."""
    selection, steps = spec.selection, spec.steps

    @jax.named_scope("selection")
    def plan(state: TrainState) -> TrainState:
        batch_size = state.partition.shape[1]
        # Drawn by the round's number: a run that goes on from here draws what it would have drawn.
        if selection.redraws:
            key = draw(state.key, PARTITION, state.round)
            state = replace(state, partition=make_partition(key, recipe.num_samples, batch_size))
        key = draw(state.key, PLAN, state.round)
        if selection.unit == "batch":
            slots = selection.plan(state.table, key, steps)
        else:
            slots = selection.plan(state.table, key, steps * batch_size).reshape(steps, -1)
        slots = state.slots.at[:steps].set(slots.astype(jnp.int32))
        return replace(state, slots=slots, cursor=jnp.zeros_like(state.cursor), round=state.round + 1)

    return plan


def make_segment(
    recipe: Recipe, spec: RoundSpec
) -> Callable[[TrainState, TrainData, Hyper, StepInputs], tuple[TrainState, RoundInfo]]:
    """`segment(state, data, hyper, inputs) -> (state, RoundInfo)`: the next `spec.steps` of the round under way, pure.

    The scan has a static length: on a GPU a loop of unknown length reads its predicate back at every iteration.
    """
    selection, run_step = spec.selection, make_step(recipe, spec.trim)
    at_once = writes_at_once(selection)

    def train_batch(state: TrainState, data: TrainData, hyper: Hyper, row: tuple) -> tuple[TrainState, tuple]:
        indices, slots, inputs, moves, images = row
        batch = _load(recipe, data, indices, moves, images)
        state, info = run_step(state, batch, hyper, inputs, draw(state.key, DROPOUT, state.step))
        # Over the whole batch under trimming too: the table says how hard a batch is, not what of it was trained.
        with jax.named_scope("loss"):
            loss = info.losses.mean()
            top1 = None if info.correct is None else info.correct.mean()
        if not at_once:
            state = write(state, slots, loss if selection.unit == "batch" else info.losses)
        kept_loss, dropped_loss, kept = _trim_row(info, inputs.keep)
        return state, (_as_row(loss, top1, kept_loss, dropped_loss), kept, info.bad)

    @jax.named_scope("selection")
    def write(state: TrainState, slots: Array, losses: Array) -> TrainState:
        return replace(state, table=selection.update(state.table, slots, losses))

    def segment(state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs) -> tuple[TrainState, RoundInfo]:
        with jax.default_matmul_precision(recipe.precision):
            # Indices alone: images are gathered inside the step, or a segment would hold all its batches at once.
            with jax.named_scope("selection"):
                slots = lax.dynamic_slice_in_dim(state.slots, state.cursor, spec.steps)
                schedule = whole(state.partition[slots] if selection.unit == "batch" else slots, recipe.mesh)

            def scan(state: TrainState, rows: tuple) -> tuple:
                # XLA on CPU runs convolution gradients in a loop's body naively (one kernel gradient 771 ms, outside
                # 20): that is why the zoo brings convolutions of its own (`models.ops`).
                return lax.scan(lambda state, row: train_batch(state, data, hyper, row), state, rows)

            streamed = data.images if data.images.ndim == 5 else None
            rows = schedule, slots, inputs, _draw_moves(recipe, state, schedule), streamed
            trained = _kept_as_loop(scan, state, rows) if spec.steps == 1 else scan(state, rows)
        state, (figures, kept, bad) = trained
        loss, *rest = jnp.unstack(figures, axis=1)
        kept_loss, dropped_loss = (None, None) if spec.trim is None else rest[-2:]
        top1 = rest[0] if len(rest) % 2 else None
        # Nothing reads the table before the next round is planned; in every step it would be a launch.
        if at_once:
            state = write(state, slots, loss)
        info = RoundInfo(loss, top1, slots, kept_loss, dropped_loss, bad)
        return _counted(state, spec.steps, slots, schedule, kept), info

    return segment


def make_rounds(
    recipe: Recipe, spec: RoundSpec
) -> Callable[[TrainState, TrainData, Hyper, StepInputs], tuple[TrainState, RoundInfo]]:
    """`rounds(state, data, hyper, inputs) -> (state, RoundInfo)`: `spec.rounds` whole rounds in one call, pure.

    Planning included, so that short rounds (two steps in P1's STL-10 case) do not cost a dispatch each.

    Args of `rounds`:
        inputs: leaves (rounds * steps,).
    """
    plan, segment = make_plan(recipe, spec), make_segment(recipe, spec)

    def rounds(state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs) -> tuple[TrainState, RoundInfo]:
        if spec.rounds == 1:
            return segment(plan(state), data, hyper, inputs)
        rows = jax.tree.map(lambda leaf: leaf.reshape(spec.rounds, spec.steps), inputs)
        # A static count of rounds: a loop until the budget is spent would be one of unknown length.
        return lax.scan(lambda state, row: segment(plan(state), data, hyper, row), state, rows)

    return rounds


def make_look(recipe: Recipe, observer: Observer, unit: str) -> Callable[[TrainState, TrainData], tuple[Any, Array]]:
    """`look(state, data) -> (what the observer returns, slot () int32)` of the very batch that the next step will
    train, pure; the slot is -1 where batches are dealt from samples.

    A program of its own between two segments: it cannot change the training's arithmetic, costs no memory in the
    training's program, and any step of any round can be looked at without another trace.
    """
    observe = observer.make(recipe.apply, recipe.loss)

    def look(state: TrainState, data: TrainData) -> tuple[Any, Array]:
        with jax.default_matmul_precision(recipe.precision):
            slot = state.slots[state.cursor]
            indices = state.partition[slot] if unit == "batch" else slot
            moves = jax.tree.map(lambda leaf: leaf[0], _draw_moves(recipe, state, indices[None]))
            batch = _load(recipe, data, indices, moves, data.images[0] if data.images.ndim == 5 else None)
            with jax.named_scope("measure"):
                key = draw(state.key, DROPOUT, state.step)
                seen = observe(state.variables, batch.images, batch.labels, key)
            return seen, slot if unit == "batch" else jnp.int32(-1)

    return look


@jax.named_scope("data")
def _load(recipe: Recipe, data: TrainData, indices: Array, moves: Moves, streamed: Array | None) -> Batch:
    """The batch as the model takes it; `streamed` are its stored images (B, H, W, C), in the order of the indices."""
    # Each device looks up its own samples.
    indices, moves = spread((indices, moves), recipe.mesh)
    if streamed is None:
        pixels = fetch(data.images, data.where(indices), recipe.augmentation, moves)
    else:
        pixels = fetch(streamed, spread(jnp.arange(len(indices)), recipe.mesh), recipe.augmentation, moves)
    # Closed off, so that it rounds alike in every program: fused with its surroundings, or with its constants moved
    # out of the loop, it would not.
    pixels, mean, std, moves = _closed_off((pixels, data.mean, data.std, moves))
    images = _closed_off(prepare(pixels, mean, std, recipe.augmentation, moves))
    return Batch(images, data.labels[indices])


@jax.named_scope("data")
def _draw_moves(recipe: Recipe, state: TrainState, schedule: Array) -> Moves:
    """What is drawn for the images of the next steps, leaves (steps, B, ...): from the key of each step, so that a cut
    round draws what the whole one does."""
    steps, batch_size = schedule.shape

    def of_step(step: Array) -> Moves:
        return draw_moves(recipe.augmentation, recipe.image_shape, batch_size, draw(state.key, AUGMENT, step))

    # Generators other than threefry ("rbg") draw otherwise for many keys at once, and then a cut round would differ.
    alike = "threefry" in str(jax.random.key_impl(state.key))
    each = jax.vmap(of_step) if alike else lambda numbers: lax.map(of_step, numbers)
    return each(state.step + jnp.arange(steps))


@jax.named_scope("loss")
def _as_row(*figures: Array | None) -> Array:
    """The figures that there are, float32: what a step reports is one launch, not one a figure."""
    return jnp.stack([figure.astype(jnp.float32) for figure in figures if figure is not None])


@jax.named_scope("counts")
def _counted(state: TrainState, steps: int, slots: Array, schedule: Array, kept: Array | None) -> TrainState:
    """The state with this segment's visits counted: once a segment, not once a step, where each would be a launch."""
    counts = {
        "visits": state.visits.at[slots].add(1),
        "seen": state.seen.at[schedule].add(1),
        "samples_hash": hash_samples(state.samples_hash, schedule),
    }
    if kept is not None:
        counts["drops"] = state.drops.at[schedule].add(1 - kept)
    return replace(state, cursor=state.cursor + steps, **counts)


@jax.named_scope("trimming")
def _trim_row(info: StepInfo, keep: Array) -> tuple:
    """(mean loss of the kept, of the dropped, kept (B,) int32) of one step; None each without trimming."""
    if info.kept is None:
        return None, None, None
    kept = jnp.where(info.kept, info.losses, 0).sum() / keep
    dropped = jnp.where(info.kept, 0, info.losses).sum() / (len(info.kept) - keep)
    return kept, dropped, info.kept.astype(jnp.int32)


def _closed_off(values: Any) -> Any:
    """The same values, of which the compiler for CPU knows nothing: there equal bits are promised, elsewhere it would
    be a launch of every step."""
    # By the platform that a program is lowered for, not the one that traces.
    return lax.platform_dependent(values, cpu=lax.optimization_barrier, default=lambda values: values)


def _kept_as_loop(scan: Callable, state: TrainState, rows: tuple) -> tuple:
    """`scan(state, rows)` of one row in a loop that the compiler does not dissolve.

    XLA turns a loop of one iteration into straight code: convolutions then take another path, the step is fused with
    its surroundings, and it rounds otherwise than as a part of a longer segment. On CPU alone: there the bits of a cut
    run are promised, and elsewhere the host would read the loop's predicate back.
    """
    shapes = jax.eval_shape(scan, state, rows)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    once = _closed_off(jnp.int32(1))

    def body(i: Array, carry: tuple) -> tuple:
        return scan(carry[0], jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i, 1), rows))

    return lax.fori_loop(0, once, body, (state, nothing))
