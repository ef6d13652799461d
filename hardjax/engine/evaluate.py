"""Loss and accuracy over a whole split, exact: the last batch is padded and masked."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax.data.augment import preprocess
from hardjax.engine.devices import spread, whole
from hardjax.engine.state import Recipe, TrainData

_PART_BYTES = 1 << 27  # of streamed images that are evaluated in one call


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
    sums = _make_sums(recipe)

    def evaluate(variables: Any, split: TrainData) -> Evaluation:
        num_samples = split.labels.shape[0]
        size = min(batch_size, num_samples)

        def add_batch(totals: tuple[Array, Array | None], start: Array) -> tuple[tuple[Array, Array | None], None]:
            found, number = sums(variables, split, start + jnp.arange(size), num_samples)
            loss, count = totals
            if number is not None:
                count = (0 if count is None else count) + number
            return (loss + found, count), None

        starts = jnp.arange(0, num_samples, size)
        nothing = (jnp.zeros(()), None)
        kinds = jax.eval_shape(lambda: add_batch(nothing, starts[0])[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kinds)
        (loss, correct), _ = lax.scan(add_batch, zeros, starts)
        return Evaluation(loss / num_samples, correct)

    return evaluate


def make_evaluate_part(recipe: Recipe, batch_size: int) -> Callable[[Any, TrainData, Array], Evaluation]:
    """`evaluate_part(variables, part, real) -> Evaluation` with leaves (batches,), the sums of each batch of a part of
    a split, pure; samples from `real` on count nothing. `mean_of_parts` adds them up."""
    sums = _make_sums(recipe)

    def evaluate_part(variables: Any, part: TrainData, real: Array) -> Evaluation:
        held = part.labels.shape[0]
        size = min(batch_size, held)
        starts = jnp.arange(0, held, size)
        return Evaluation(*lax.map(lambda start: sums(variables, part, start + jnp.arange(size), real), starts))

    return evaluate_part


def part_of(split: TrainData, batch_size: int) -> TrainData:
    """Shapes of the parts that a split is read and evaluated in: all of it where it is small, else whole batches, two
    at least (a loop of one batch would be another program, which rounds otherwise)."""
    num_samples, (_, *sides) = split.labels.shape[0], split.images.shape
    size = min(batch_size, num_samples)
    batches, of_batch = -(-num_samples // size), size * math.prod(sides) * split.images.dtype.itemsize
    together = max(2, _PART_BYTES // of_batch)
    held = num_samples if batches <= together else size * together
    images = jax.ShapeDtypeStruct((held, *sides), split.images.dtype)
    labels = jax.ShapeDtypeStruct((held, *split.labels.shape[1:]), split.labels.dtype)
    return split._replace(images=images, labels=labels, rows=None)


def mean_of_parts(parts: Iterable[Evaluation], num_samples: int) -> Evaluation:
    """The evaluation of a whole split from the sums of its batches in order, to the bits of `make_evaluate`."""
    loss, correct = np.zeros((), jnp.zeros(()).dtype), None
    for part in parts:
        for found in np.asarray(part.loss):
            loss = loss + found
        if part.correct is not None:
            for number in np.asarray(part.correct):
                correct = number + (0 if correct is None else correct)
    return Evaluation(_quotient(loss, num_samples), None if correct is None else jnp.asarray(correct))


# Compiled, as there: XLA multiplies by the reciprocal of a number that it knows.
_quotient = jax.jit(lambda total, count: total / count, static_argnums=1)


def _make_sums(recipe: Recipe) -> Callable[[Any, TrainData, Array, Any], tuple[Array, Array | None]]:
    """(variables, split, indices (B,), number of samples) -> (sum of the losses, number correct) of a batch."""
    predict = make_predict(recipe)

    def sums(variables: Any, split: TrainData, indices: Array, num_samples: Any) -> tuple[Array, Array | None]:
        real = indices < num_samples
        # The last batch is filled up with copies of the last sample, which then count nothing: one shape, one program.
        indices = spread(jnp.minimum(indices, num_samples - 1), recipe.mesh)
        logits = predict(variables, split.take(indices), split.mean, split.std)
        with jax.named_scope("loss"):
            losses = recipe.loss(logits, split.labels[indices]).astype(jnp.float32)
            correct = recipe.loss.correct(logits, split.labels[indices], losses)
            losses, correct = whole((losses, correct), recipe.mesh)
        if correct is not None:
            # Whole numbers are counted as such: float32 would lose them beyond 2^24.
            kind = jnp.int32 if correct.dtype == bool else jnp.float32
            correct = jnp.where(real, correct, 0).sum(dtype=kind)
        return jnp.where(real, losses, 0).sum(), correct

    return sums
