"""Rounds: scans of the step over a schedule made on the device, compiled as one program."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.choose.selection import Planner
from hardjax.choose.trimming import Trim
from hardjax.data.augment import preprocess
from hardjax.engine.optimizers import Hyper
from hardjax.engine.step import (
    AUGMENT,
    DROPOUT,
    PARTITION,
    PLAN,
    Batch,
    Recipe,
    StepInfo,
    TrainData,
    TrainState,
    draw,
    make_partition,
    make_step,
    replace,
)


class TrimInfo(NamedTuple):
    """Mean losses (rounds, steps) nats of the kept and of the dropped samples; dropped (rounds, n) int32 times."""

    kept_loss: Array
    dropped_loss: Array
    dropped: Array


class RoundInfo(NamedTuple):
    """Of the rounds of one dispatch, row by row; rows at and after the number of rounds asked for are zeros.

    Attributes:
        loss: (rounds, steps) nats, mean over the batch.
        top1: (rounds, steps) share of correct predictions.
        slots: (rounds, steps) int32, or (rounds, steps, B) where slots are samples.
        trim: under trimming.
        observed: (rounds, observations, ...) what the observer returned, if there is one.
    """

    loss: Array
    top1: Array
    slots: Array
    trim: TrimInfo | None = None
    observed: Any = None


class Observer(Protocol):
    """Looks at every `every`-th batch just before it is trained and changes nothing; frozen and hashable."""

    every: int

    def make(self, apply: Callable) -> Callable[[Any, Array, Array, Array], Any]:
        """`observe(variables, images, labels, key) -> pytree of arrays`, pure."""
        ...


@dataclass(frozen=True)
class RoundSpec:
    """What shapes the trace of a round, beside the recipe.

    Attributes:
        selection: which batches.
        steps: back-propagations a round.
        max_rounds: most rounds in one call.
        trim: how each batch is trimmed; None trains all of it.
        observer: see `Observer`. In rounds of at least `every` steps it sees the steps 0, every, 2 * every ... of each
            round; of shorter ones one step of every `stride`-th round.
        position: that step.
    """

    selection: Planner
    steps: int
    max_rounds: int = 1
    trim: Trim | None = None
    observer: Observer | None = None
    position: int = 0

    @property
    def stride(self) -> int:
        """Rounds from one observed one to the next."""
        return max(1, round(self.observer.every / self.steps)) if self.observer else 1

    @property
    def observed_steps(self) -> range:
        """Steps of an observed round that are observed."""
        if self.observer is None:
            return range(0)
        if self.steps < self.observer.every:
            return range(self.position, self.position + 1)
        return range(0, self.steps, self.observer.every)


def make_rounds(recipe: Recipe, spec: RoundSpec) -> Callable:
    """`rounds(state, data, hyper, count, phase=0) -> (state, RoundInfo)`: `count` rounds of `spec`, pure.

    The scan over a round's schedule has a static length. Several rounds run in one call, planning included, so that
    short ones (two steps in P1's STL-10 case) do not cost a dispatch each; `count` is traced, at most
    `spec.max_rounds`, and so is `phase`: round i is observed where (phase + i) % spec.stride is 0.
    """
    one_round = _make_round(recipe, spec)

    def rounds(
        state: TrainState, data: TrainData, hyper: Hyper, count: Array, phase: Array | int = 0
    ) -> tuple[TrainState, RoundInfo]:
        with jax.default_matmul_precision(recipe.precision):
            if spec.max_rounds == 1:
                state, info = one_round(state, data, hyper, phase)
                return state, jax.tree.map(lambda leaf: leaf[None], info)
            shapes = jax.eval_shape(one_round, state, data, hyper, phase)[1]
            log = jax.tree.map(lambda leaf: jnp.zeros((spec.max_rounds, *leaf.shape), leaf.dtype), shapes)

            def body(i: Array, carry: tuple) -> tuple:
                state, log = carry
                state, info = one_round(state, data, hyper, phase + i)
                return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), log, info)

            # The one loop of unknown length: its predicate is read once a round, of short rounds alone.
            return lax.fori_loop(0, count, body, (state, log))

    return rounds


def _make_round(recipe: Recipe, spec: RoundSpec) -> Callable:
    """`one_round(state, data, hyper, phase) -> (state, RoundInfo of this round)`."""
    selection, run_step = spec.selection, make_step(recipe, spec.trim)
    observe = spec.observer.make(recipe.apply) if spec.observer else None

    def load(state: TrainState, data: TrainData, indices: Array) -> tuple[Batch, Array]:
        key = draw(state.key, AUGMENT, state.step)
        # Closed off, so that it rounds alike in every program: fused with its surroundings, or with its constants moved
        # out of the loop, it would not.
        pixels, mean, std, key = lax.optimization_barrier((data.images[indices], data.mean, data.std, key))
        images = lax.optimization_barrier(preprocess(pixels, mean, std, recipe.augmentation, key))
        return Batch(images, data.labels[indices]), draw(state.key, DROPOUT, state.step)

    def train_batch(state: TrainState, data: TrainData, hyper: Hyper, indices: Array, slots: Array) -> tuple:
        batch, key = load(state, data, indices)
        state, info = run_step(state, batch, hyper, key)
        loss = info.losses.mean()
        table = selection.update(state.table, slots, loss if selection.unit == "batch" else info.losses)
        return replace(state, table=table), (loss, info.correct.mean(), _trim_row(info, hyper.keep))

    def plan(state: TrainState) -> tuple[TrainState, Array, Array]:
        if selection.redraws:
            key = draw(state.key, PARTITION, state.round)
            state = replace(state, partition=make_partition(key, recipe.num_samples, recipe.batch_size))
        plan_key = draw(state.key, PLAN, state.round)
        if selection.unit == "batch":
            slots = selection.plan(state.table, plan_key, spec.steps)
            return state, state.partition[slots], slots
        slots = selection.plan(state.table, plan_key, spec.steps * recipe.batch_size).reshape(spec.steps, -1)
        return state, slots, slots

    def one_round(state: TrainState, data: TrainData, hyper: Hyper, phase: Array | int) -> tuple[TrainState, RoundInfo]:
        state, schedule, slots = plan(state)

        def scan(state: TrainState, rows: tuple) -> tuple:
            return lax.scan(lambda state, row: train_batch(state, data, hyper, *row), state, rows)

        def look(state: TrainState, rows: tuple) -> Any:
            batch, key = load(state, data, rows[0][0])
            return observe(state.variables, batch.images, batch.labels, key)

        if observe is None:
            state, trained = scan(state, (schedule, slots))
            observed = None
        elif spec.steps < spec.observer.every:
            state, trained, observed = _scan_observed_once(
                scan, look, spec.position, phase % spec.stride == 0, state, (schedule, slots)
            )
        else:
            state, trained, observed = _observed_scan(scan, look, spec.observer.every, state, (schedule, slots))
        loss, top1, trim = trained
        if spec.trim is not None:
            *losses, kept = trim
            dropped = jnp.zeros(recipe.num_samples, jnp.int32).at[schedule].add(jnp.int32(1) - kept)
            trim = TrimInfo(*losses, dropped)
        return replace(state, round=state.round + 1), RoundInfo(loss, top1, slots, trim, observed)

    return one_round


def _scan_observed_once(
    scan: Callable, look: Callable, position: int, wanted: Array, state: TrainState, rows: tuple
) -> tuple:
    """(state, trained, observed): `scan` over all rows, with a look before row `position`, if wanted."""
    before, after = jax.tree.map(lambda leaf: leaf[:position], rows), jax.tree.map(lambda leaf: leaf[position:], rows)
    state, first = _scan_part(scan, state, before) if position else (state, None)
    shapes = jax.eval_shape(look, state, after)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    observed = lax.cond(wanted, lambda: look(state, after), lambda: nothing)
    state, trained = _scan_part(scan, state, after) if position else scan(state, after)
    if position:
        trained = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, trained)
    return state, trained, jax.tree.map(lambda leaf: leaf[None], observed)


def _scan_part(scan: Callable, state: TrainState, rows: tuple) -> tuple:
    return scan(state, rows) if len(rows[0]) > 1 else _kept_as_loop(scan, state, rows)


def _observed_scan(scan: Callable, look: Callable, every: int, state: TrainState, rows: tuple) -> tuple:
    """(state, trained, observed): `scan` over all rows, with a look before the rows 0, every, 2 * every ..."""

    def block(state: TrainState, rows: tuple) -> tuple:
        seen = look(state, rows)
        state, trained = _scan_part(scan, state, rows)
        return state, (trained, seen)

    def merge(leaf: Array) -> Array:
        return leaf.reshape(-1, *leaf.shape[2:])

    whole = len(rows[0]) // every * every
    blocks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, every, *leaf.shape[1:]), rows)
    state, (trained, observed) = lax.scan(block, state, blocks)
    trained = jax.tree.map(merge, trained)
    if whole < len(rows[0]):
        state, (last, seen) = block(state, jax.tree.map(lambda leaf: leaf[whole:], rows))
        trained = jax.tree.map(lambda *parts: jnp.concatenate(parts), trained, last)
        observed = jax.tree.map(lambda leaf, one: jnp.concatenate([leaf, one[None]]), observed, seen)
    return state, trained, observed


def _kept_as_loop(scan: Callable, state: TrainState, rows: tuple) -> tuple:
    """`scan(state, rows)` of one row in a loop that the compiler does not dissolve.

    Dissolved, the step would be fused with its surroundings and round otherwise than in a run without an observer.
    """
    shapes = jax.eval_shape(scan, state, rows)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    once = lax.optimization_barrier(jnp.int32(1))

    def body(i: Array, carry: tuple) -> tuple:
        return scan(carry[0], jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, i, 1), rows))

    return lax.fori_loop(0, once, body, (state, nothing))


def _trim_row(info: StepInfo, keep: Array) -> tuple | None:
    """(mean loss of the kept, of the dropped, kept (B,) int32) of one step; None without trimming."""
    if info.kept is None:
        return None
    kept = jnp.where(info.kept, info.losses, 0).sum() / keep
    dropped = jnp.where(info.kept, 0, info.losses).sum() / (len(info.kept) - keep)
    return kept, dropped, info.kept.astype(jnp.int32)
