"""One back-propagation: the engine's pure step, and the ways in which its gradient is taken."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from hardjax.choose.trimming import Trim, first_or_copies, kept_mask, mean_of_first, take_samples
from hardjax.engine import micro
from hardjax.engine.devices import spread, whole
from hardjax.engine.optimizers import Hyper, make_optimizer
from hardjax.engine.state import TRIM, Batch, Recipe, StepInputs, TrainState, draw, replace


class StepInfo(NamedTuple):
    """Diagnostics of one step.

    Attributes:
        losses: (B,) in nats, or the unit of the loss, from the very forward pass that trained (P1: no extra pass fills
            the loss table).
        correct: (B,) bool, or the share of each sample's positions, or None: see `Loss.correct`.
        kept: (B,) bool, the samples that trimming trained; None without trimming.
        bad: () bool, the mean loss of the samples trained or any gradient is not finite; None under "record".
    """

    losses: Array
    correct: Array | None
    kept: Array | None
    bad: Array | None


def make_step(
    recipe: Recipe, trim: Trim | None = None
) -> Callable[[TrainState, Batch, Hyper, StepInputs, Array], tuple[TrainState, StepInfo]]:
    """`step(state, batch, hyper, inputs, key) -> (state, info)`: one back-propagation of the mean loss, pure.

    `inputs` holds this step's scalars. Under trimming it is the mean over the `inputs.keep` samples that `trim`
    chooses. A bad step under "skip-step" changes the counter alone. The step leaves the loss table alone: which slot a
    batch fills is the round's business.
    """

    def forward(params: Any, batch: Batch, batch_stats: Any, key: Array) -> tuple[Array, tuple]:
        batch = spread(batch, recipe.mesh)
        logits, batch_stats = recipe.apply({"params": params, "batch_stats": batch_stats}, batch.images, True, key)
        with jax.named_scope("loss"):
            logits = logits.astype(jnp.float32)
            losses = recipe.loss(logits, batch.labels).astype(jnp.float32)
            correct = recipe.loss.correct(logits, batch.labels, losses)
            # On every device, B numbers: their mean is then summed as on one, and trimming compares the whole batch.
            losses, correct = whole((losses, correct), recipe.mesh)
        return losses, (batch_stats, losses, correct)

    size = recipe.micro_batch
    at_once = _GRADIENTS["whole" if trim is None else trim.path]
    in_parts = at_once if size is None else micro.make_gradients(size, recipe.mesh)

    def step(
        state: TrainState, batch: Batch, hyper: Hyper, inputs: StepInputs, key: Array
    ) -> tuple[TrainState, StepInfo]:
        losses_of = functools.partial(forward, batch_stats=state.batch_stats, key=key)
        # From the key of the step: a random choice is the same however the run is cut.
        chosen = draw(key, TRIM, 0)
        gradients = in_parts if size is not None and size < len(batch.labels) else at_once
        with jax.named_scope("gradient"):
            grads, (batch_stats, losses, correct), order = gradients(
                losses_of, state.params, batch, trim, inputs.keep, chosen
            )
        kept = None if order is None else kept_mask(order, inputs.keep, len(losses))
        with jax.named_scope("optimiser"):
            optimizer = make_optimizer(recipe.optimizer, hyper, inputs.learning_rate)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        trained = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        bad = None if recipe.on_nan == "record" else _is_bad(losses, kept, inputs.keep, grads)
        if recipe.on_nan == "skip-step":
            assert bad is not None
            before = {name: getattr(state, name) for name in trained}
            # A choice, not a product with zero: 0 * inf is NaN.
            trained = jax.tree.map(functools.partial(jnp.where, bad), before, trained)
        return replace(state, **trained, step=state.step + 1), StepInfo(losses, correct, kept, bad)

    return step


def _is_bad(losses: Array, kept: Array | None, keep: Array, grads: Any) -> Array:
    # Of the samples trained: one that random trimming drops may overflow without harm.
    loss = losses.mean() if kept is None else jnp.where(kept, losses, 0).sum() / keep
    # The gradients too: that of sqrt at 0 is not finite where the loss is.
    return ~jnp.stack([jnp.isfinite(leaf).all() for leaf in (loss, *jax.tree.leaves(grads))]).all()


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
        # The dropped samples have cotangent zero but are part of the pass: exact for every network, and no faster.
        order = trim.choose(losses, key)
        return mean_of_first(losses[order], keep), (rest, order)

    grads, (rest, order) = jax.grad(objective, has_aux=True)(params)
    return grads, rest, order


def _masked_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    losses, rest = losses_of(params, batch)
    order = trim.choose(losses, key)
    kept = kept_mask(order, keep, len(losses))
    # In their own places, so that a dropout mask meets the sample that it met in the pass above.
    alike = jax.tree.map(lambda leaf: leaf[jnp.where(kept, jnp.arange(len(kept)), order[0])], batch)

    def objective(params: Any) -> Array:
        return jnp.where(kept, losses_of(params, alike)[0], 0).sum() / keep

    return jax.grad(objective)(params), rest, order


def _gathered_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    losses, rest = losses_of(params, batch)
    order = trim.choose(losses, key)
    # A pass of its own over the kept samples: cotangents of zero in a pass over all save nothing (measured), and the
    # kept ones alone take 0.2 to 0.4 of a step at a share of 0.2.
    part = jax.tree.map(lambda leaf: leaf[first_or_copies(order, keep)], batch)
    return jax.grad(lambda params: mean_of_first(losses_of(params, part)[0], keep))(params), rest, order


def _reused_gradients(losses_of: Callable, params: Any, batch: Batch, trim: Trim, keep: Array, key: Array) -> tuple:
    losses, pullback, rest = jax.vjp(lambda params: losses_of(params, batch), params, has_aux=True)
    order = trim.choose(losses, key)
    part = jax.tree.map(lambda leaf: leaf[: len(order)], batch)
    # Read for its structure and shapes alone: the compiler throws this forward pass away.
    _, like, _ = jax.vjp(lambda params: losses_of(params, part), params, has_aux=True)
    pullback = take_samples(pullback, like, first_or_copies(order, keep), len(losses))
    (grads,) = pullback(jnp.where(jnp.arange(len(order)) < keep, 1 / keep, 0).astype(losses.dtype))
    return grads, rest, order


_GRADIENTS = {
    "whole": _whole_gradients,
    "plain": _plain_gradients,
    "masked": _masked_gradients,
    "gather": _gathered_gradients,
    "reuse": _reused_gradients,
}
