"""Rows and their products, from what multiplies them at each position."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.definition import outer
from hardjax.fisher.rules.rule import Cost, Form

# TF32 or bfloat16 products would decide which eigenvalues count as zero.
HIGHEST = lax.Precision.HIGHEST
# 6.3 million entries are 24 MiB in float32.
# What is cut out and used in one go: the fastest of several sizes on a CPU, or enough to fill an accelerator.
TOGETHER = {"cpu": 3 << 21}

# Inputs and cotangents of some samples -> (samples, entries of their rows)
RowsOf = Callable[[Array, Array], Array]


def form_rows(rows_of: RowsOf, entries: int, a: Array, d: Array) -> Array:
    """(B, entries of a row) by `rows_of`, as many samples at a time as `TOGETHER` allows.

    The barrier keeps XLA from cutting the patches of all layers at once, during the forward pass.

    Args:
        entries: of what `rows_of` cuts out for one sample.
    """
    a, d = lax.optimization_barrier((a, d))
    batch = len(a)
    most = max(1, TOGETHER.get(jax.default_backend(), 1 << 25) // entries)
    # A divisor of the batch: a remainder would be a second shape, and a second program.
    together = next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)
    if together == batch:
        return rows_of(a, d)
    # Every entry is overwritten. Zeros would be constants, which XLA lays out for all layers before the first is done.
    start = jnp.broadcast_to(d.ravel()[0], jax.eval_shape(rows_of, a, d).shape)

    def some_samples(index: Array, rows: Array) -> Array:
        some_a, some_d = (lax.dynamic_slice_in_dim(array, index * together, together) for array in (a, d))
        return lax.dynamic_update_slice_in_dim(rows, rows_of(some_a, some_d), index * together, 0)

    return lax.fori_loop(0, batch // together, some_samples, start)


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


def block(a: Array, d: Array) -> Array:
    """(B, T, g, k), (B, T, g, c) -> (B, g, c, k), summed over positions."""
    if a.shape[2] == 1:
        turned = d[:, :, 0].transpose(0, 2, 1)
        if jax.default_backend() == "cpu":  # whose products of explicit transposes are faster
            turned = lax.optimization_barrier(turned)
        return jnp.einsum("bct,btk->bck", turned, a[:, :, 0], precision=HIGHEST)[:, None]
    if a.shape[3] == 1 or d.shape[3] == 1:  # depthwise: a matrix product one number wide is slow
        return jnp.sum(d[..., :, None] * a[..., None, :], 1)
    return jnp.einsum("btgk,btgc->bgck", a, d, precision=HIGHEST)


def as_it_is(a: Array) -> Array:
    return a


def cost_of(batch: int, positions: int, offsets: int, columns: int, channels: int, groups: int) -> Cost:
    row_size = offsets * columns * channels * groups
    rows = 2 * batch * (positions + batch) * row_size
    pairs = 2 * batch**2 * positions**2 * groups * (offsets * columns + channels + 1)
    # T^2 pairs of positions beat rows where a kernel is large and positions are few: last layers, 1x1 maps.
    form: Form = "pairs" if pairs < rows else "rows"
    return Cost(form, min(rows, pairs), row_size)
