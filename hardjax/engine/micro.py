"""The gradient of a batch, accumulated over parts of it: what a backward pass keeps is then that of one part.

Exact where a part of the batch is trained as if it were alone, but for the order of sums: without batch statistics, or
with those of sub-batches (P4, section 3.6) that parts are a multiple of. `trials.exact_in_parts` tries a network out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from hardjax.choose.trimming import Trim, first_or_copies, kept_mask
from hardjax.engine import devices


def make_gradients(size: int, mesh: Mesh | None) -> Callable:
    """What `step` takes a batch's gradient by, `size` samples at a time.

    Under trimming a pass over all parts gives the losses, of which the whole batch's largest are kept, and another one
    the gradient: of the kept samples alone where that is exact (`trim.path` "gather"), else of all of them.

    Returns:
        (losses_of, params, batch, trim, count kept, key) -> (gradients, rest of the whole batch, positions with the
        kept samples first, or None for all).
    """

    def gradients(
        losses_of: Callable, params: Any, batch: Any, trim: Trim | None, keep: Array, key: Array
    ) -> tuple[Any, tuple, Array | None]:
        parts = _cut(batch, size, mesh)
        if trim is None:
            count = len(batch.labels)
            grads, rest = _accumulated(losses_of, params, parts, jnp.full((count // size, size), 1 / count))
            return grads, _joined(rest), None
        rest = _joined(lax.map(lambda part: losses_of(params, part)[1], parts))
        order = trim.choose(rest[1], key)
        chosen, weights = _kept(trim, order, keep, len(batch.labels), size)
        parts = _cut(jax.tree.map(lambda leaf: leaf[chosen], batch), size, mesh)
        grads, _ = _accumulated(losses_of, params, parts, weights.reshape(-1, size))
        return grads, rest, order

    return gradients


def _kept(trim: Trim, order: Array, keep: Array, count: int, size: int) -> tuple[Array, Array]:
    """(positions to differentiate on, a multiple of `size`; what the loss of each weighs), 1-dimensional."""
    if trim.path in ("plain", "masked"):
        kept, places = kept_mask(order, keep, count), jnp.arange(count)
        # In the places of samples dropped at random stand copies of a kept one, see `step`.
        return jnp.where(kept, places, order[0]) if trim.path == "masked" else places, kept / keep
    # Full parts alone: what fills the last one weighs nothing.
    filled = jnp.pad(order, (0, -len(order) % size))
    return first_or_copies(filled, keep), jnp.where(jnp.arange(len(filled)) < keep, 1 / keep, 0)


def _cut(batch: Any, size: int, mesh: Mesh | None) -> Any:
    """Leaves (parts, size, ...), of each part of which every device has its share."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batch)
    return devices.spread(parts, mesh, axis=1)


def _accumulated(losses_of: Callable, params: Any, parts: Any, weights: Array) -> tuple[Any, Any]:
    """(gradient of the weighted sum of all losses, rest of each part)."""

    def objective(params: Any, part: Any, weights: Array) -> tuple[Array, Any]:
        losses, rest = losses_of(params, part)
        # A choice, not a product alone: the loss of a dropped sample may be infinite.
        return jnp.where(weights > 0, losses, 0) @ weights.astype(losses.dtype), rest

    def add(total: Any, row: tuple) -> tuple[Any, Any]:
        grads, rest = jax.grad(objective, has_aux=True)(params, *row)
        return jax.tree.map(jnp.add, total, grads), rest

    return lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, weights))


def _joined(rest: tuple) -> tuple:
    """(statistics, losses, correct) of the whole batch from those of its parts."""
    batch_stats, losses, correct = rest

    def moved(parts: Array) -> Array:
        # Each part moved the running statistics from where they were; together they move to the average, as those of
        # sub-batches do.
        return parts.mean(0) if jnp.issubdtype(parts.dtype, jnp.inexact) else parts[-1]

    flat = jax.tree.map(lambda parts: parts.reshape(-1, *parts.shape[2:]), (losses, correct))
    return jax.tree.map(moved, batch_stats), *flat
