"""Batch normalisation in its closed form beside its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from platforms import near

from hardjax.models.ops.batch_norm import batch_norm

EPSILON = 1e-5


def defined(x, scale, bias, axes):
    mean = x.mean(axes, keepdims=True)
    var = jnp.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias, mean, var


@pytest.mark.parametrize(
    "shape, axes", [((6, 3, 2, 4), (0, 1, 2)), ((3, 2, 3, 2, 4), (1, 2, 3)), ((7, 4), (0,))], ids=["all", "parts", "1d"]
)
def test_values_and_derivatives_are_those_of_the_definition(shape, axes):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weights = rng.standard_normal(shape) * 3 + 20, rng.standard_normal(shape)
        scale, bias = rng.standard_normal(4), rng.standard_normal(4)

        def of(fn):
            def weighted(x, scale, bias):
                y, *statistics = fn(x, scale, bias)
                return (weights * jnp.sin(y)).sum(), (y, statistics)

            return jax.grad(weighted, (0, 1, 2), has_aux=True)(x, scale, bias)

        found = of(lambda *args: batch_norm(*args, axes, EPSILON))
        expected = of(lambda *args: defined(*args, axes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)
        # One cotangent a sample at a time, as coupled rows take them.
        pull = jax.vjp(lambda x: batch_norm(x, scale, bias, axes, EPSILON)[0], x)[1]
        one = jnp.zeros((2, *shape)).at[0, 0].set(1.0).at[1, -1].set(1.0)
        rows = jax.vmap(pull)(one)[0]
        for cotangent, row in zip(one, rows, strict=True):
            (alone,) = jax.vjp(lambda x: defined(x, scale, bias, axes)[0], x)[1](cotangent)
            np.testing.assert_allclose(row, alone, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 10.0, 1e4])
def test_no_digits_are_lost_far_from_zero(mean):
    x = np.float32(np.random.default_rng(1).standard_normal((64, 5, 5, 3)) + mean)
    _, found, var = batch_norm(jnp.asarray(x), jnp.ones(3), jnp.zeros(3), (0, 1, 2), EPSILON)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(np.ravel(found), wide.mean((0, 1, 2)), **near(rtol=1e-6, atol=1e-6))
    np.testing.assert_allclose(np.ravel(var), wide.var((0, 1, 2)), **near(rtol=5e-6))


def test_a_constant_channel_has_no_variance():
    x = jnp.full((8, 3, 3, 2), 1e4)
    y, mean, var = batch_norm(x, jnp.ones(2), jnp.full(2, 0.5), (0, 1, 2), EPSILON)
    assert (np.asarray(var) == 0).all() and (np.asarray(y) == 0.5).all() and (np.asarray(mean) == 1e4).all()
