"""Pooling: the mean over 2x2, and the maximum over 3x3 with a backward pass that is fast on CPU."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax


class TooSmall(ValueError):
    """Nothing is left of an image on its way through a network."""


def max_pool(x: Array, padding: int = 0) -> Array:
    """The largest of every 3x3 window at stride 2, (B, H, W, C) -> (B, H', W', C).

    The gradient goes to the first of equal ones. (A NaN's goes to the first NaN on CPU; elsewhere XLA decides.)

    Raises:
        TooSmall: no window fits.
    """
    _fits(x, 3 - 2 * padding)
    # The gradient was 40 % of AlexNet's step on CPU before it had a form of its own (2 cores).
    builtin = partial(_builtin, padding=padding)
    return lax.platform_dependent(x, cpu=lambda x: _on_cpu(x, padding), default=builtin)


def mean_pool(x: Array) -> Array:
    """The mean of every 2x2 window at stride 2; an odd last row or column is left out.

    Raises:
        TooSmall: below 2x2.
    """
    _fits(x, 2)
    # A reshape and a mean instead of `nn.avg_pool`: its gradient is a broadcast, with no reduce-window to transpose.
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


def _forward(x: Array, padding: int) -> tuple[Array, Array]:
    return _on_cpu(x, padding), x


def _backward(padding: int, x: Array, cotangent: Array) -> tuple[Array]:
    # XLA's own scatters element by element. Here the maximum over columns, then over rows, is traced back axis by axis:
    # the first of equal rows, and in it the first of equal columns, is the first of the window, which XLA and PyTorch
    # take as well. Six to ten times the speed of a loop over samples.
    height, width = cotangent.shape[1:3]
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    # Padding never wins: with zeros it would, before a ReLU, over negative pixels.
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    across, columns = _first_of_three(padded, 2, width)
    _, rows = _first_of_three(across, 1, height)
    cotangent = _give_back(cotangent, rows, 1, padded.shape[1])
    cotangent = _give_back(cotangent, columns, 2, padded.shape[2])
    return (cotangent[:, padding : padding + x.shape[1], padding : padding + x.shape[2]],)


_on_cpu.defvjp(_forward, _backward)


def _first_of_three(x: Array, axis: int, count: int) -> tuple[Array, Array]:
    """The largest of every three entries at stride 2 along an axis, and which it is: the first of equal, or NaN."""
    first, *others = (lax.slice_in_dim(x, k, k + 2 * count - 1, 2, axis) for k in range(3))
    # One byte an entry: the residuals of a pool are as large as its input.
    largest, which = first, jnp.zeros(first.shape, jnp.int8)
    for k, entry in enumerate(others, 1):
        # NaN compares false with everything: without the second term a diverged run's gradient would look finite.
        better = (entry > largest) | (jnp.isnan(entry) & ~jnp.isnan(largest))
        largest, which = jnp.where(better, entry, largest), jnp.where(better, jnp.int8(k), which)
    return largest, which


def _give_back(cotangent: Array, which: Array, axis: int, size: int) -> Array:
    """The cotangent of `_first_of_three`'s x, of `size` entries along the axis."""
    given = [jnp.where(which == k, cotangent, 0) for k in range(3)]
    # Windows overlap in every second pixel, the last of one and the first of the next: two terms there, one between.
    even = _room(given[0], axis, 0, 1) + _room(given[2], axis, 1, 0)
    whole = jnp.stack([even, _room(given[1], axis, 0, 1)], axis + 1)
    whole = whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])
    return lax.slice_in_dim(whole, 0, size, axis=axis)


def _room(x: Array, axis: int, low: int, high: int) -> Array:
    return jnp.pad(x, [(low, high) if at == axis else (0, 0) for at in range(x.ndim)])
