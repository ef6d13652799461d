"""Pooling: the mean over 2x2, and the maximum over 3x3 with a backward pass that is fast on CPU."""

from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


class TooSmall(ValueError):
    """Nothing is left of an image on its way through a network."""


def max_pool(x: Array, padding: int = 0) -> Array:
    """The largest of every 3x3 window at stride 2, (B, H, W, C) -> (B, H', W', C); of equal ones the first is meant.

    Raises:
        TooSmall: no window fits.
    """
    _fits(x, 3 - 2 * padding)
    builtin = partial(_builtin, padding=padding)
    return lax.platform_dependent(x, cpu=lambda x: _on_cpu(x, padding), default=builtin)


def mean_pool(x: Array) -> Array:
    """The mean of every 2x2 window at stride 2; an odd last row or column is left out.

    Raises:
        TooSmall: below 2x2.
    """
    _fits(x, 2)
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _fits(x: Array, side: int) -> None:
    if min(x.shape[1:3]) < side:
        raise TooSmall


def _builtin(x: Array, padding: int) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2), padding=((padding, padding),) * 2)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _on_cpu(x: Array, padding: int) -> Array:
    return _builtin(x, padding)


def _forward(x: Array, padding: int) -> tuple[Array, tuple[Array, Array]]:
    y = _on_cpu(x, padding)
    return y, (x, y)


def _backward(padding: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    x, y = saved

    # XLA's own scatters element by element. One sample at a time stays in the cache (of the whole batch at once, the
    # nine windows are laid out in memory: slower than the scatter).
    def add_sample(index: Array, total: Array) -> Array:
        one = (lax.dynamic_slice_in_dim(array, index, 1) for array in (x, y, cotangent))
        return lax.dynamic_update_slice_in_dim(total, _unpool(*one, padding), index, 0)

    return (lax.fori_loop(0, len(x), add_sample, jnp.zeros(x.shape, cotangent.dtype)),)


_on_cpu.defvjp(_forward, _backward)


def _unpool(x: Array, y: Array, cotangent: Array, padding: int) -> Array:
    """The cotangent of x: each entry of y's goes to the first pixel of its window that is y (or NaN)."""
    batch, height, width, channels = y.shape
    taken = jnp.zeros(y.shape, bool)
    # Pixels by the parity of their row and column: those of one parity lie like the windows, and need no dilation.
    parts = {(row, column): [] for row in (0, 1) for column in (0, 1)}
    for (i, j), pixels in _windows(x, padding, height, width):
        here = ((pixels == y) | jnp.isnan(pixels)) & ~taken
        taken |= here
        room = ((0, 0), (i // 2, 1 - i // 2), (j // 2, 1 - j // 2), (0, 0))
        parts[i % 2, j % 2].append(jnp.pad(jnp.where(here, cotangent, 0), room))
    rows = [jnp.stack([sum(parts[row, column]) for column in (0, 1)], 3) for row in (0, 1)]
    whole = jnp.stack(rows, 2).reshape(batch, 2 * height + 2, 2 * width + 2, channels)
    edges = [(0, max(0, side + 2 * padding - have)) for side, have in zip(x.shape[1:3], whole.shape[1:3], strict=True)]
    whole = jnp.pad(whole, ((0, 0), *edges, (0, 0)))
    return whole[:, padding : padding + x.shape[1], padding : padding + x.shape[2]]


def _windows(x: Array, padding: int, height: int, width: int) -> Iterator[tuple[tuple[int, int], Array]]:
    """((i, j), pixel (i, j) of every window), row by row."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    for i in range(3):
        for j in range(3):
            yield (i, j), padded[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
