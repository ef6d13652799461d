"""Loss and accuracy over a whole split, exact: the last batch is padded and masked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from hardjax.data.augment import preprocess
from hardjax.engine.state import Recipe, TrainData


class Evaluation(NamedTuple):
    """Over every sample of a split once: loss () nats, the mean; correct () int32, the count."""

    loss: Array
    correct: Array


def make_predict(recipe: Recipe) -> Callable[[Any, Array, Array, Array], Array]:
    """`predict(variables, images, mean, std) -> logits (B, classes)` float32, with running statistics."""

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

        def add_batch(totals: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            indices = start + jnp.arange(size)
            real = indices < num_samples
            # The last batch is filled up with copies of the last sample, which then count nothing: one shape, one
            # program.
            indices = jnp.minimum(indices, num_samples - 1)
            logits = predict(variables, split.take(indices), split.mean, split.std)
            with jax.named_scope("loss"):
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels[indices])
                # The largest of logits that are no numbers is the first of them: class 0, right for a tenth of the
                # samples.
                correct = (logits.argmax(-1) == split.labels[indices]) & real & ~jnp.isnan(losses)
            return (totals[0] + jnp.where(real, losses, 0).sum(), totals[1] + correct.sum(dtype=jnp.int32)), None

        starts = jnp.arange(0, num_samples, size)
        (loss, correct), _ = lax.scan(add_batch, (jnp.zeros(()), jnp.zeros((), jnp.int32)), starts)
        return Evaluation(loss / num_samples, correct)

    return evaluate
