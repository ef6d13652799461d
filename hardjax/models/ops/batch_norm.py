"""Batch normalisation in its closed form: one pass over the input for both statistics, one for its derivative."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], epsilon: float
) -> tuple[Array, Array, Array]:
    """Normalises by the mean and the biased variance over `axes`.

    Differentiated, it takes two sums (those that scale and bias need anyway) and one elementwise pass, where autodiff
    goes back through both statistics one after the other (docs/gpu.md counts the kernels).

    Reverse mode alone, mapped or not: jax.jvp of it raises a TypeError, as of every `custom_vjp`.

    Args:
        x: (..., C) float32 or wider; `axes` leave out the last one.
        scale, bias: (C,).
        epsilon: added to the variance.

    Returns:
        (x - mean) / sqrt(var + epsilon) * scale + bias, like x; mean and var, with axes of length 1. Nothing is
        differentiated through these two.
    """
    # Of two means, which rows of per-sample gradients are read from; differentiated it is `_forward`.
    mean, var = _statistics(x, axes, _apart)
    # The statistics meet in one factor for each channel, so that x is read and written once.
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias, lax.stop_gradient(mean), lax.stop_gradient(var)


Sums = Callable[[Array, Array, tuple[int, ...]], tuple[Array, Array]]


def _apart(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Sums of two arrays, with axes of length 1."""
    return a.sum(axes, keepdims=True), b.sum(axes, keepdims=True)


def _together(a: Array, b: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The same: on a GPU in one reduction, which is two kernels whatever it sums; XLA on a CPU computes it slowly."""

    def at_once(a: Array, b: Array) -> tuple[Array, Array]:
        zeros = (jnp.zeros((), a.dtype), jnp.zeros((), b.dtype))
        sums = lax.reduce((a, b), zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), axes)
        first, second = (jnp.expand_dims(found, axes) for found in sums)
        return first, second

    return lax.platform_dependent(a, b, cpu=lambda a, b: _apart(a, b, axes), default=at_once)


def _statistics(x: Array, axes: tuple[int, ...], sums: Sums) -> tuple[Array, Array]:
    # Around one of its own values, which lies among the others however far they are from 0: E[x^2] - E[x]^2 lost two
    # digits at a mean of 10. A second pass around the mean would read x again.
    first = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(x.ndim))
    shift = lax.stop_gradient(x[first])
    moved = x - shift
    count = math.prod(x.shape[axis] for axis in axes)
    mean, square = (found / count for found in sums(moved, jnp.square(moved), axes))
    # Rounding may leave a constant channel a variance of -1e-15.
    return shift + mean, jnp.maximum(square - jnp.square(mean), 0)


def _forward(x: Array, scale: Array, bias: Array, axes: tuple[int, ...], epsilon: float) -> tuple:
    mean, var = _statistics(x, axes, _together)
    inverse = lax.rsqrt(var + epsilon)
    return ((x - mean) * (inverse * scale) + bias, mean, var), (x, mean, inverse, scale)


def _backward(axes: tuple[int, ...], epsilon: float, kept: tuple, cotangents: tuple) -> tuple:
    x, mean, inverse, scale = kept
    dy = cotangents[0]
    normal = (x - mean) * inverse
    count = math.prod(x.shape[axis] for axis in axes)
    of_bias, of_scale = _together(dy, dy * normal, axes)
    dx = (inverse * scale) * (dy - of_bias / count - normal * (of_scale / count))
    rest = tuple(range(x.ndim - 1))  # of several parts, all
    return dx, of_scale.sum(rest).astype(scale.dtype), of_bias.sum(rest).astype(scale.dtype)


batch_norm.defvjp(_forward, _backward)
