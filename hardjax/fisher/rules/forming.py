"""Rows and their products, from what multiplies them at each position."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.definition import outer
from hardjax.fisher.rules import rule
from hardjax.fisher.rules.rule import Cost, Form

# TF32 or bfloat16 products would decide which eigenvalues count as zero.
HIGHEST = lax.Precision.HIGHEST
# 6.3 million entries are 24 MiB in float32.
# What is cut out and used in one go: the fastest of several sizes on a CPU, or enough to fill an accelerator.
TOGETHER, TOGETHER_ON_ACCELERATOR = 3 << 21, 1 << 25
# Of rows: what a CPU multiplies before it leaves the caches, in strips no narrower than needed for fast products.
STRIP_ENTRIES, STRIP_WIDTH = 1 << 20, 16


class Former(NamedTuple):
    """How rows are formed of inputs (b, ...) and cotangents (b, ..., channels) of some samples.

    Attributes:
        left, right: what is cut out of the inputs, and of the cotangents of any of the channels.
        join: (left, right) -> rows (b, entries).
        entries: that are cut out for one sample.
        axis: of right, along which rows may be cut into parts.
    """

    left: Callable[[Array], Array]
    right: Callable[[Array], Array]
    join: Callable[[Array, Array], Array]
    entries: int
    axis: int

    def rows(self, a: Array, d: Array) -> Array:
        return self.join(self.left(a), self.right(d))


def form_rows(former: Former, a: Array, d: Array) -> Array:
    """(B, entries of a row), as many samples at a time as `TOGETHER` allows.

    The barrier keeps XLA from cutting the patches of all layers at once, during the forward pass.
    """
    a, d = lax.optimization_barrier((a, d))
    batch, together = len(a), _together(former, len(a))
    if together == batch:
        return former.rows(a, d)
    # Every entry is overwritten. Zeros would be constants, which XLA lays out for all layers before the first is done.
    start = jnp.broadcast_to(d.ravel()[0], jax.eval_shape(former.rows, a, d).shape)

    def some_samples(index: Array, rows: Array) -> Array:
        some_a, some_d = (lax.dynamic_slice_in_dim(array, index * together, together) for array in (a, d))
        return lax.dynamic_update_slice_in_dim(rows, former.rows(some_a, some_d), index * together, 0)

    return lax.fori_loop(0, batch // together, some_samples, start)


def rows_gram(former: Former, a: Array, d: Array) -> Array:
    """(B, B) products of rows. On CPU those of many entries are formed and multiplied strip by strip, in the cache."""
    batch, most = len(a), STRIP_ENTRIES
    size = jax.eval_shape(former.rows, a, d).size
    if not rule.on_cpu() or size <= most or _together(former, batch) < batch:
        return outer(form_rows(former, a, d))
    a, d = lax.optimization_barrier((a, d))
    left, right = former.left(a), former.right(d)
    length = right.shape[former.axis]
    widths = [width for width in range(length, 0, -1) if length % width == 0]
    width = next(width for width in widths if size * width <= most * length or width <= STRIP_WIDTH)
    right = right.reshape(*right.shape[: former.axis], -1, width, *right.shape[former.axis + 1 :])
    strips = jnp.moveaxis(right, former.axis, 0)

    def add_strip(index: Array, total: Array) -> Array:
        return total + outer(former.join(left, strips[index]))

    return lax.fori_loop(0, len(strips), add_strip, jnp.zeros((batch, batch), d.dtype))


def _together(former: Former, batch: int) -> int:
    entries = TOGETHER if rule.on_cpu() else TOGETHER_ON_ACCELERATOR
    most = max(1, entries // former.entries)
    # A divisor of the batch: a remainder would be a second shape, and a second program.
    return next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)


def pairs_gram(a: Array, d: Array, limit: int) -> Array:
    """Sum over groups and pairs of positions of (a_is . a_jt) (d_is . d_jt), about `limit` products at a time."""
    batch, positions, groups, _ = d.shape

    def one_sample(sample: tuple[Array, Array]) -> Array:
        a_i, d_i = sample
        inputs = jnp.einsum("sgk,jtgk->jgst", a_i, a, precision=HIGHEST)
        cotangents = jnp.einsum("sgc,jtgc->jgst", d_i, d, precision=HIGHEST)
        return jnp.sum(inputs * cotangents, (1, 2, 3))

    # The usual last layer: two matrix products of the batch, no loop.
    if positions == 1 and groups == 1:
        return outer(a[:, 0, 0]) * outer(d[:, 0, 0])
    # Two products of T x T for every pair of samples and group are alive at once.
    samples = max(1, limit // (2 * batch * groups * positions**2))
    return lax.map(one_sample, (a, d), batch_size=min(samples, batch))


def former_of(patches: Callable[[Array], Array], flat: Callable[[Array], Array], groups: int, entries: int) -> Former:
    """Rows (b, groups * channels * k) of patches (b, T, groups, k) and flat cotangents (b, T, groups, channels)."""

    def right(d: Array) -> Array:
        d = flat(d)
        if groups > 1:
            return d
        d = d[:, :, 0].transpose(0, 2, 1)
        # On CPU products of explicit transposes are faster.
        return lax.optimization_barrier(d) if rule.on_cpu() else d

    def join(a: Array, d: Array) -> Array:
        if groups == 1:
            return jnp.einsum("bct,btk->bck", d, a[:, :, 0], precision=HIGHEST).reshape(len(a), -1)
        if a.shape[3] == 1 or d.shape[3] == 1:  # depthwise: a matrix product one number wide is slow
            return jnp.sum(d[..., :, None] * a[..., None, :], 1).reshape(len(a), -1)
        return jnp.einsum("btgk,btgc->bgck", a, d, precision=HIGHEST).reshape(len(a), -1)

    return Former(patches, right, join, entries, 1 if groups == 1 else 3)


def cost_of(batch: int, positions: int, offsets: int, columns: int, channels: int, groups: int) -> Cost:
    row_size = offsets * columns * channels * groups
    rows = 2 * batch * (positions + batch) * row_size
    pairs = 2 * batch**2 * positions**2 * groups * (offsets * columns + channels + 1)
    # T^2 pairs of positions beat rows where a kernel is large and positions are few: last layers, 1x1 maps.
    form: Form = "pairs" if pairs < rows else "rows"
    return Cost(form, min(rows, pairs), row_size)
