"""The engine: a pure step, and rounds of it compiled as one scan over a schedule made on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from hardjax.data.augment import Augmentation, output_shape, preprocess
from hardjax.optimizers import Hyper, make_optimizer
from hardjax.schedules import Schedule, make_schedule
from hardjax.selection import Selection
from hardjax.trimming import Trim, kept_mask, mean_of_first

# Every random draw is a function of (state.key, purpose, counter): nothing else decides the future.
_PARTITION, _PLAN, _AUGMENT, _DROPOUT, _TRIM = range(5)


@dataclass(frozen=True)
class Recipe:
    """What shapes the trace of a run; equal recipes share compiled programs.

    Attributes:
        init_variables: (key, image shape) -> {"params", "batch_stats"}.
        apply: (variables, images, train, key) -> (logits, new batch_stats).
        optimizer: name for `make_optimizer`.
        schedule, augmentation: as in `TrainConfig`, resolved.
        precision: of matrix products and convolutions.
        batch_size: B.
        num_samples: n of the training split.
        image_shape: (H, W, C) as stored.
    """

    init_variables: Callable
    apply: Callable
    optimizer: str
    schedule: Schedule
    augmentation: Augmentation
    precision: str
    batch_size: int
    num_samples: int
    image_shape: tuple[int, int, int]

    @property
    def num_batches(self) -> int:
        """N = ceil(n / B)."""
        return -(-self.num_samples // self.batch_size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that decides the future of a run; shapes and dtypes never change.

    Attributes:
        params, batch_stats: the model's variables.
        opt_state: optax state.
        table: (N,) or (n,) nats, the loss of each slot as last seen in training.
        partition: (N, B) int32 sample indices.
        key: base key of the run, never advanced.
        step: () int32, back-propagations done.
        round: () int32, rounds done.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    table: Array
    partition: Array
    key: Array
    step: Array
    round: Array

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


class Batch(NamedTuple):
    """images (B, H, W, C) float32 as the model takes them, labels (B,) int32."""

    images: Array
    labels: Array


class TrainData(NamedTuple):
    """The training split on the device: images (n, H, W, C), labels (n,), mean and std (C,) of pixels in 0..1."""

    images: Array
    labels: Array
    mean: Array
    std: Array


class StepInfo(NamedTuple):
    """Of one back-propagation: losses (B,) nats and correct (B,) bool, both before the update; learning_rate ().

    kept (B,) bool: the samples that were trained; None where all were.
    """

    losses: Array
    correct: Array
    learning_rate: Array
    kept: Array | None = None


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
            round; of shorter ones the first step of every `stride`-th round.
    """

    selection: Selection
    steps: int
    max_rounds: int = 1
    trim: Trim | None = None
    observer: Observer | None = None

    @property
    def stride(self) -> int:
        """Rounds from one observed one to the next."""
        return max(1, round(self.observer.every / self.steps)) if self.observer else 1

    @property
    def observed_steps(self) -> range:
        """Steps of an observed round that are observed."""
        return range(0, self.steps, self.observer.every) if self.observer else range(0)


def make_partition(key: Array, num_samples: int, batch_size: int) -> Array:
    """(N, B) int32 sample indices: a permutation, wrapped round to fill the last batch."""
    num_batches = -(-num_samples // batch_size)
    order = jax.random.permutation(key, num_samples).astype(jnp.int32)
    return order[jnp.arange(num_batches * batch_size) % num_samples].reshape(num_batches, batch_size)


def make_init(recipe: Recipe) -> Callable[[Array, Hyper, Array], TrainState]:
    """`init(seed, hyper, table) -> TrainState`, pure; `table` is the strategy's empty one, the seed is traced."""
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)

    def init(seed: Array, hyper: Hyper, table: Array) -> TrainState:
        init_key, key = jax.random.split(jax.random.key(seed))
        variables = recipe.init_variables(init_key, model_shape)
        return TrainState(
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=make_optimizer(recipe.optimizer, hyper, hyper.learning_rate).init(variables["params"]),
            table=table,
            partition=make_partition(_draw(key, _PARTITION, 0), recipe.num_samples, recipe.batch_size),
            key=key,
            step=jnp.zeros((), jnp.int32),
            round=jnp.zeros((), jnp.int32),
        )

    return init


def make_step(
    recipe: Recipe, trim: Trim | None = None
) -> Callable[[TrainState, Batch, Hyper, Array], tuple[TrainState, StepInfo]]:
    """`step(state, batch, hyper, key) -> (state, info)`: one back-propagation of the mean loss, pure.

    Under trimming it is the mean over the `hyper.keep` samples that `trim` chooses. The step leaves the loss table
    alone: which slot a batch fills is the round's business.
    """
    factor = make_schedule(recipe.schedule)

    def forward(params: Any, batch_stats: Any, batch: Batch, key: Array) -> tuple[Array, tuple]:
        logits, batch_stats = recipe.apply({"params": params, "batch_stats": batch_stats}, batch.images, True, key)
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, (batch_stats, losses, logits.argmax(-1) == batch.labels)

    def differentiate(state: TrainState, batch: Batch, hyper: Hyper, key: Array) -> tuple:
        """(gradients, (batch_stats, losses, correct), kept or None)"""
        chosen = _draw(key, _TRIM, 0)

        def objective(params: Any) -> tuple[Array, tuple]:
            losses, rest = forward(params, state.batch_stats, batch, key)
            if trim is None:
                return losses.mean(), (rest, None)
            order = trim.choose(losses, chosen)
            return mean_of_first(losses[order], hyper.keep), (rest, kept_mask(order, hyper.keep, len(losses)))

        grads, (rest, kept) = jax.grad(objective, has_aux=True)(state.params)
        return grads, rest, kept

    def differentiate_kept(state: TrainState, batch: Batch, hyper: Hyper, key: Array) -> tuple:
        losses, rest = forward(state.params, state.batch_stats, batch, key)
        order = trim.choose(losses, _draw(key, _TRIM, 0))
        part = Batch(batch.images[order], batch.labels[order])

        def objective(params: Any) -> Array:
            return mean_of_first(forward(params, state.batch_stats, part, key)[0], hyper.keep)

        return jax.grad(objective)(state.params), rest, kept_mask(order, hyper.keep, len(losses))

    gradients = differentiate_kept if trim is not None and trim.path == "gather" else differentiate

    def step(state: TrainState, batch: Batch, hyper: Hyper, key: Array) -> tuple[TrainState, StepInfo]:
        grads, (batch_stats, losses, correct), kept = gradients(state, batch, hyper, key)
        learning_rate = hyper.learning_rate * factor(state.step / hyper.total_steps)
        optimizer = make_optimizer(recipe.optimizer, hyper, learning_rate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = _replace(
            state,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, StepInfo(losses, correct, learning_rate, kept)

    return step


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

            return lax.fori_loop(0, count, body, (state, log))

    return rounds


def _make_round(recipe: Recipe, spec: RoundSpec) -> Callable:
    """`one_round(state, data, hyper, phase) -> (state, RoundInfo of this round)`."""
    selection, run_step = spec.selection, make_step(recipe, spec.trim)
    observe = spec.observer.make(recipe.apply) if spec.observer else None

    def load(state: TrainState, data: TrainData, indices: Array) -> tuple[Batch, Array]:
        key = _draw(state.key, _AUGMENT, state.step)
        images = preprocess(data.images[indices], data.mean, data.std, recipe.augmentation, key)
        return Batch(images, data.labels[indices]), _draw(state.key, _DROPOUT, state.step)

    def train_batch(state: TrainState, data: TrainData, hyper: Hyper, indices: Array, slots: Array) -> tuple:
        batch, key = load(state, data, indices)
        state, info = run_step(state, batch, hyper, key)
        loss = info.losses.mean()
        table = selection.update(state.table, slots, loss if selection.unit == "batch" else info.losses)
        return _replace(state, table=table), (loss, info.correct.mean(), _trim_row(info, hyper.keep))

    def plan(state: TrainState) -> tuple[TrainState, Array, Array]:
        if selection.redraws:
            key = _draw(state.key, _PARTITION, state.round)
            state = _replace(state, partition=make_partition(key, recipe.num_samples, recipe.batch_size))
        plan_key = _draw(state.key, _PLAN, state.round)
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
            rows = (schedule, slots)
            shapes = jax.eval_shape(look, state, rows)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            observed = lax.cond(phase % spec.stride == 0, lambda: look(state, rows), lambda: nothing)
            observed = jax.tree.map(lambda leaf: leaf[None], observed)
            state, trained = scan(state, rows)
        else:
            state, trained, observed = _observed_scan(scan, look, spec.observer.every, state, (schedule, slots))
        loss, top1, trim = trained
        if spec.trim is not None:
            *losses, kept = trim
            dropped = jnp.zeros(recipe.num_samples, jnp.int32).at[schedule].add(jnp.int32(1) - kept)
            trim = TrimInfo(*losses, dropped)
        return _replace(state, round=state.round + 1), RoundInfo(loss, top1, slots, trim, observed)

    return one_round


def _observed_scan(scan: Callable, look: Callable, every: int, state: TrainState, rows: tuple) -> tuple:
    """(state, trained, observed): `scan` over all rows, with a look before the rows 0, every, 2 * every ..."""

    def block(state: TrainState, rows: tuple) -> tuple:
        seen = look(state, rows)
        state, trained = scan(state, rows)
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


def _trim_row(info: StepInfo, keep: Array) -> tuple | None:
    """(mean loss of the kept, of the dropped, kept (B,) int32) of one step; None without trimming."""
    if info.kept is None:
        return None
    kept = jnp.where(info.kept, info.losses, 0).sum() / keep
    dropped = jnp.where(info.kept, 0, info.losses).sum() / (len(info.kept) - keep)
    return kept, dropped, info.kept.astype(jnp.int32)


def _draw(key: Array, purpose: int, counter: Array | int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), counter)


def _replace(state: TrainState, **changes: Any) -> TrainState:
    return TrainState(**{**state.__dict__, **changes})
