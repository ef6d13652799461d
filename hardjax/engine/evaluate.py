"""Loss and accuracy over a whole split, exact: the last batch is padded and masked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.data.augment import preprocess
from hardjax.engine.devices import spread, whole
from hardjax.engine.state import Recipe, TrainData


class Evaluation(NamedTuple):
    """Over every sample of a split once.

    Attributes:
        loss: () mean, in nats or the unit of the loss.
        correct: () int32, how many samples; float32, the sum of their shares, where a sample has many positions; None
            where nothing is right or wrong.
    """

    loss: Array
    correct: Array | None


def make_predict(recipe: Recipe) -> Callable[[Any, Array, Array, Array], Array]:
    """`predict(variables, images, mean, std) -> logits (B, ...)` float32, with running statistics."""

    def predict(variables: Any, images: Array, mean: Array, std: Array) -> Array:
        with jax.default_matmul_precision(recipe.precision):
            inputs = preprocess(images, mean, std, recipe.augmentation)
            return recipe.apply(variables, inputs, False)[0].astype(jnp.float32)

    return predict


def make_evaluate(recipe: Recipe, batch_size: int) -> Callable[[Any, TrainData], Evaluation]:
    """`evaluate(variables, split) -> Evaluation`, pure, in batches of `batch_size` samples."""
    predict = make_predict(recipe)

    def evaluate(variables: Any, split: TrainData) -> Evaluation:
        num_samples = split.labels.shape[0]
        size = min(batch_size, num_samples)

        def add_batch(totals: tuple[Array, Array | None], start: Array) -> tuple[tuple[Array, Array | None], None]:
            indices = start + jnp.arange(size)
            real = indices < num_samples
            # The last batch is filled up with copies of the last sample, which then count nothing: one shape, one
            # program.
            indices = jnp.minimum(indices, num_samples - 1)
            indices = spread(indices, recipe.mesh)
            logits = predict(variables, split.take(indices), split.mean, split.std)
            with jax.named_scope("loss"):
                losses = recipe.loss(logits, split.labels[indices]).astype(jnp.float32)
                correct = recipe.loss.correct(logits, split.labels[indices], losses)
                losses, correct = whole((losses, correct), recipe.mesh)
            loss, count = totals
            if correct is not None:
                # Whole numbers are counted as such: float32 would lose them beyond 2^24.
                kind = jnp.int32 if correct.dtype == bool else jnp.float32
                count = (0 if count is None else count) + jnp.where(real, correct, 0).sum(dtype=kind)
            return (loss + jnp.where(real, losses, 0).sum(), count), None

        starts = jnp.arange(0, num_samples, size)
        nothing = (jnp.zeros(()), None)
        kinds = jax.eval_shape(lambda: add_batch(nothing, starts[0])[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kinds)
        (loss, correct), _ = lax.scan(add_batch, zeros, starts)
        return Evaluation(loss / num_samples, correct)

    return evaluate
