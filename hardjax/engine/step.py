"""The engine's pure step: the state that decides a run's future, and one back-propagation of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hardjax.choose.trimming import Trim, kept_mask, mean_of_first, take_samples
from hardjax.data.augment import Augmentation, output_shape
from hardjax.engine.optimizers import Hyper, make_optimizer
from hardjax.engine.rates import Schedule, make_schedule

# Every random draw is a function of (state.key, purpose, counter): nothing else decides the future.
PARTITION, PLAN, AUGMENT, DROPOUT, TRIM = range(5)


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
            partition=make_partition(draw(key, PARTITION, 0), recipe.num_samples, recipe.batch_size),
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

    def forward(params: Any, batch: Batch, batch_stats: Any, key: Array) -> tuple[Array, tuple]:
        logits, batch_stats = recipe.apply({"params": params, "batch_stats": batch_stats}, batch.images, True, key)
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, (batch_stats, losses, logits.argmax(-1) == batch.labels)

    gradients = _GRADIENTS["whole" if trim is None else trim.path]

    def step(state: TrainState, batch: Batch, hyper: Hyper, key: Array) -> tuple[TrainState, StepInfo]:
        losses_of = functools.partial(forward, batch_stats=state.batch_stats, key=key)
        chosen = draw(key, TRIM, 0)
        grads, (batch_stats, losses, correct), order = gradients(
            losses_of, state.params, batch, trim, hyper.keep, chosen
        )
        kept = None if order is None else kept_mask(order, hyper.keep, len(losses))
        learning_rate = hyper.learning_rate * factor(state.step / hyper.total_steps)
        optimizer = make_optimizer(recipe.optimizer, hyper, learning_rate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = replace(
            state,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, StepInfo(losses, correct, learning_rate, kept)

    return step


# Each: (losses_of(params, batch) -> (losses, rest), params, batch, trim, count kept, key)
# -> (gradients, rest of the whole batch, positions with the kept samples first, or None for all).


def _whole_gradients(losses_of: Callable, params: Any, batch: Batch, trim: None, keep: Array, key: Array) -> tuple:
    def objective(params: Any) -> tuple[Array, Any]:
        losses, rest = losses_of(params, batch)
        return losses.mean(), rest

    return *jax.grad(objective, has_aux=True)(params), None


def _plain_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    def objective(params: Any) -> tuple[Array, tuple]:
        losses, rest = losses_of(params, batch)
        order = trim.choose(losses, key)
        return mean_of_first(losses[order], keep), (rest, order)

    grads, (rest, order) = jax.grad(objective, has_aux=True)(params)
    return grads, rest, order


def _gathered_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    losses, rest = losses_of(params, batch)
    order = trim.choose(losses, key)
    part = jax.tree.map(lambda leaf: leaf[order], batch)
    return jax.grad(lambda params: mean_of_first(losses_of(params, part)[0], keep))(params), rest, order


def _reused_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    losses, pullback, rest = jax.vjp(lambda params: losses_of(params, batch), params, has_aux=True)
    order = trim.choose(losses, key)
    part = jax.tree.map(lambda leaf: leaf[: len(order)], batch)
    _, like, _ = jax.vjp(lambda params: losses_of(params, part), params, has_aux=True)
    pullback = take_samples(pullback, like, order, len(losses))
    (grads,) = pullback(jnp.where(jnp.arange(len(order)) < keep, 1 / keep, 0).astype(losses.dtype))
    return grads, rest, order


_GRADIENTS = {
    "whole": _whole_gradients,
    "plain": _plain_gradients,
    "gather": _gathered_gradients,
    "reuse": _reused_gradients,
}


def draw(key: Array, purpose: int, counter: Array | int) -> Array:
    """The key of one draw, by its purpose and counter."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), counter)


def replace(state: TrainState, **changes: Any) -> TrainState:
    """The state with these fields changed."""
    return TrainState(**{**state.__dict__, **changes})
