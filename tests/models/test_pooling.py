"""The CPU form of the maximum against the built-in one, in float64, ties and odd sides included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from platforms import near

from hardjax.models.ops import pooling


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("sides", [(7, 8), (8, 9), (3, 3), (15, 4)])
def test_maxima_and_their_gradients_equal_the_built_in_ones(sides, padding):
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.enable_x64():
        # Of few values: the maximum of most windows stands in them several times.
        images = jax.random.randint(keys[0], (3, *sides, 4), 0, 4).astype(jnp.float64)

        @jax.jit  # one program a case: operation by operation each would be compiled alone
        def both(images):
            forms = (pooling._on_cpu, pooling._builtin)
            (y, pull), (expected, expected_pull) = (jax.vjp(lambda x, f=f: f(x, padding), images) for f in forms)
            cotangent = jax.random.normal(keys[1], y.shape, jnp.float64)
            return (y, pull(cotangent)), (expected, expected_pull(cotangent))

        (y, gradient), (expected, expected_gradient) = both(images)
    chex.assert_trees_all_equal(y, expected)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_it_maps_over_copies():
    images = jax.random.normal(jax.random.key(0), (3, 2, 7, 7, 4))
    grad = jax.jit(jax.grad(lambda x: jnp.sin(pooling.max_pool(x, 1)).sum()))
    np.testing.assert_allclose(jax.jit(jax.vmap(grad))(images), [grad(one) for one in images], **near(rtol=1e-6))


def test_a_nan_keeps_its_gradient():
    """The first of two, though a larger number stands before them."""
    images = jnp.zeros((1, 3, 3, 1)).at[0, 0, 1, 0].set(5).at[0, 1, 1:, 0].set(jnp.nan)
    gradient = jax.grad(lambda x: pooling._on_cpu(x, 0).sum())(images)
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1))


def test_mean_pool_leaves_an_odd_row_out():
    images = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_allclose(pooling.mean_pool(images)[0, :, :, 0], [[3, 5]])
    with pytest.raises(pooling.TooSmall):
        pooling.mean_pool(images[:, :1])
