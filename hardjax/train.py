"""The engine: a pure step, and rounds of it compiled as one scan over a schedule made on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from hardjax.data.augment import Augmentation, output_shape, preprocess
from hardjax.optimizers import Hyper, make_optimizer
from hardjax.schedules import Schedule, make_schedule
from hardjax.selection import Selection

# Every random draw is a function of (state.key, purpose, counter): nothing else decides the future.
_PARTITION, _PLAN, _AUGMENT, _DROPOUT = range(4)


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
    """Of one back-propagation: losses (B,) nats and correct (B,) bool, both before the update; learning_rate ()."""

    losses: Array
    correct: Array
    learning_rate: Array


class RoundInfo(NamedTuple):
    """Of the rounds of one dispatch, row by row; rows at and after the number of rounds asked for are zeros.

    Attributes:
        loss: (rounds, steps) nats, mean over the batch.
        top1: (rounds, steps) share of correct predictions.
        slots: (rounds, steps) int32, or (rounds, steps, B) where slots are samples.
    """

    loss: Array
    top1: Array
    slots: Array


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


def make_step(recipe: Recipe) -> Callable[[TrainState, Batch, Hyper, Array], tuple[TrainState, StepInfo]]:
    """`step(state, batch, hyper, key) -> (state, info)`: one back-propagation of the mean loss, pure.

    It leaves the loss table alone: which slot a batch fills is the round's business.
    """
    factor = make_schedule(recipe.schedule)

    def step(state: TrainState, batch: Batch, hyper: Hyper, key: Array) -> tuple[TrainState, StepInfo]:
        def objective(params: Any) -> tuple[Array, tuple]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, batch_stats = recipe.apply(variables, batch.images, True, key)
            logits = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), (batch_stats, losses, logits.argmax(-1) == batch.labels)

        grads, (batch_stats, losses, correct) = jax.grad(objective, has_aux=True)(state.params)
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
        return state, StepInfo(losses, correct, learning_rate)

    return step


def make_rounds(recipe: Recipe, selection: Selection, steps: int, max_rounds: int = 1) -> Callable:
    """`rounds(state, data, hyper, count) -> (state, RoundInfo)`: `count` rounds of `steps` back-propagations, pure.

    The scan over a round's schedule has a static length. Several rounds run in one call, planning included, so that
    short ones (two steps in P1's STL-10 case) do not cost a dispatch each; `count` is traced, at most `max_rounds`.
    """
    run_step = make_step(recipe)

    def train_batch(state: TrainState, data: TrainData, hyper: Hyper, indices: Array, slots: Array) -> tuple:
        images = preprocess(
            data.images[indices], data.mean, data.std, recipe.augmentation, _draw(state.key, _AUGMENT, state.step)
        )
        batch = Batch(images, data.labels[indices])
        state, info = run_step(state, batch, hyper, _draw(state.key, _DROPOUT, state.step))
        loss = info.losses.mean()
        table = selection.update(state.table, slots, loss if selection.unit == "batch" else info.losses)
        return _replace(state, table=table), (loss, info.correct.mean())

    def one_round(state: TrainState, data: TrainData, hyper: Hyper) -> tuple[TrainState, RoundInfo]:
        if selection.redraws:
            key = _draw(state.key, _PARTITION, state.round)
            state = _replace(state, partition=make_partition(key, recipe.num_samples, recipe.batch_size))
        plan_key = _draw(state.key, _PLAN, state.round)
        if selection.unit == "batch":
            slots = selection.plan(state.table, plan_key, steps)
            schedule = state.partition[slots]
        else:
            slots = selection.plan(state.table, plan_key, steps * recipe.batch_size).reshape(steps, -1)
            schedule = slots
        state, (loss, top1) = lax.scan(
            lambda state, row: train_batch(state, data, hyper, *row), state, (schedule, slots)
        )
        return _replace(state, round=state.round + 1), RoundInfo(loss, top1, slots)

    def rounds(state: TrainState, data: TrainData, hyper: Hyper, count: Array) -> tuple[TrainState, RoundInfo]:
        with jax.default_matmul_precision(recipe.precision):
            if max_rounds == 1:
                state, info = one_round(state, data, hyper)
                return state, jax.tree.map(lambda leaf: leaf[None], info)
            shapes = jax.eval_shape(one_round, state, data, hyper)[1]
            log = jax.tree.map(lambda leaf: jnp.zeros((max_rounds, *leaf.shape), leaf.dtype), shapes)

            def body(i: Array, carry: tuple) -> tuple:
                state, log = carry
                state, info = one_round(state, data, hyper)
                return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), log, info)

            return lax.fori_loop(0, count, body, (state, log))

    return rounds


def _draw(key: Array, purpose: int, counter: Array | int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), counter)


def _replace(state: TrainState, **changes: Any) -> TrainState:
    return TrainState(**{**state.__dict__, **changes})
