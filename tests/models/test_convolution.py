"""The CPU convolution against the built-in one, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hardjax.models.ops import convolution
from hardjax.models.ops.convolution import _FLAX_NHWC, convolve


# The paddings of a case are one program: compiling each alone takes half as long again.
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3, *(pytest.param(size, marks=pytest.mark.ci) for size in (5, 7))])
@pytest.mark.parametrize("stride", [1, 2])
def test_values_and_gradients_equal_the_built_in_ones(kernel, stride, groups):
    def value(images, weights, conv, padding):
        pads = [(padding, padding)] * 2
        settings = dict(dimension_numbers=_FLAX_NHWC, feature_group_count=groups)
        out = conv(images, weights, (stride, stride), pads, **settings)
        return jnp.sin(out).sum(), out

    @jax.jit
    def both(images, weights):
        found = jax.value_and_grad(value, (0, 1), has_aux=True)
        forms = (convolve, lax.conv_general_dilated)
        return [[found(x, weights, form, padding) for padding, x in images.items()] for form in forms]

    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 2)
        images = {p: jax.random.normal(keys[0], (2, 9, 7 + p, 4), jnp.float64) for p in range(4)}
        weights = jax.random.normal(keys[1], (kernel, kernel, 4 // groups, 4 if groups == 4 else 6), jnp.float64)
        chex.assert_trees_all_close(*both(images, weights), rtol=1e-10, atol=1e-12)


def _compare(images, weights, strides, pads, tolerance=1e-10):
    """Values and both gradients, for one cotangent."""
    settings = dict(window_strides=strides, padding=pads, dimension_numbers=_FLAX_NHWC)

    @jax.jit
    def both(images, weights):
        (y, ours), (expected, theirs) = (
            jax.vjp(lambda *args, conv=conv: conv(*args, **settings), images, weights)
            for conv in (convolve, lax.conv_general_dilated)
        )
        cotangent = jax.random.normal(jax.random.key(2), y.shape, y.dtype)
        return (y, ours(cotangent)), (expected, theirs(cotangent))

    ours, theirs = jax.tree.map(lambda x: np.asarray(x, np.float64), both(images, weights))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0))

    jax.tree.map(close, ours, theirs)


def _normal(index, shape):
    return jax.random.normal(jax.random.key(index), shape, float)


@pytest.mark.parametrize("strides", [(2, 2), *(pytest.param(s, marks=pytest.mark.ci) for s in ((1, 1), (3, 2)))])
@pytest.mark.parametrize(
    "kernel, pads",
    [
        ((2, 5), ((0, 1), (3, 2))),
        pytest.param((3, 3), ((1, 1), (1, 1)), marks=pytest.mark.ci),
        pytest.param((3, 3), ((0, 0), (0, 0)), marks=pytest.mark.ci),
    ],
)
@pytest.mark.parametrize("most", [1 << 21, 1])
def test_kernel_gradients_of_few_channels(monkeypatch, kernel, pads, most, strides):
    """As matrix products, of the whole batch or sample by sample."""
    together = convolution._samples_together
    monkeypatch.setattr(convolution, "_samples_together", lambda batch, entries: together(batch, entries, most))
    with jax.enable_x64():
        images, weights = _normal(0, (4, 7, 6, 8)), _normal(1, (*kernel, 8, 9))
        assert convolution._has_few_channels(images, weights, pads)
        _compare(images, weights, strides, pads)


@pytest.mark.parametrize("sides, strides", [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((2, 5), (2, 3)), ((4, 3), (4, 4))])
@pytest.mark.parametrize("kernel, pads", [((3, 3), ((1, 1), (1, 1))), ((5, 4), ((3, 2), (1, 3)))])
def test_images_smaller_than_the_kernel(kernel, pads, sides, strides):
    """Products by output position, strides above the kernel, and windows that lie on zeros alone."""
    with jax.enable_x64():
        _compare(_normal(0, (2, *sides, 3)), _normal(1, (*kernel, 3, 4)), strides, pads)


@pytest.mark.parametrize(
    "dtype, tolerance", [(jnp.float32, 1e-5), pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.ci)]
)
@pytest.mark.parametrize(
    "sides, kernel, strides, pads, channels",
    [
        ((7, 6), (3, 3), (2, 2), ((1, 1), (1, 1)), (8, 9)),
        ((7, 6), (1, 1), (2, 2), ((1, 1), (1, 1)), (3, 4)),
        ((7, 6), (3, 2), (2, 3), ((1, 0), (1, 1)), (8, 9)),
        ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1)), (20, 24)),
        ((9, 9), (7, 7), (2, 2), ((3, 3), (3, 3)), (3, 24)),
    ],
)
def test_in_the_precision_of_training(dtype, tolerance, sides, kernel, strides, pads, channels):
    """Other kernels of XLA than float64 meets; paddings below zero in the backward pass; strides above the kernel."""
    images, weights = (
        _normal(i, shape).astype(dtype) for i, shape in enumerate([(3, *sides, channels[0]), (*kernel, *channels)])
    )
    _compare(images, weights, strides, pads, tolerance)


def test_nothing_is_left_of_a_small_image():
    images, weights = jnp.ones((2, 2, 8, 3)), jnp.ones((3, 3, 3, 4))
    for strides in ((1, 1), (2, 2)):
        settings = dict(window_strides=strides, padding="VALID", dimension_numbers=_FLAX_NHWC)
        y, pull = jax.vjp(lambda x, w, settings=settings: convolve(x, w, **settings), images, weights)
        assert y.shape == lax.conv_general_dilated(images, weights, **settings).shape
        assert all((gradient == 0).all() for gradient in pull(y))


def test_samples_together_divide_the_batch():
    assert [convolution._samples_together(12, entries, 100) for entries in (1, 20, 30, 101)] == [12, 4, 3, 1]


def test_sums_of_bfloat16_are_taken_in_float32():
    """Kernel 5x5, depthwise, 256 images: as exact as the built-in convolution, to the last digit of the result."""
    keys = jax.random.split(jax.random.key(0), 3)
    images, cotangent = (jax.random.normal(key, (256, 4, 4, 4), jnp.float32) for key in keys[:2])
    weights = jax.random.normal(keys[2], (5, 5, 1, 4), jnp.float32)
    images, cotangent, weights = (x.astype(jnp.bfloat16) for x in (images, cotangent, weights))

    def both(dtype):
        settings = dict(window_strides=(1, 1), padding=[(2, 2)] * 2, dimension_numbers=_FLAX_NHWC)
        args = (images.astype(dtype), weights.astype(dtype))
        y, pull = jax.vjp(lambda *args: convolve(*args, feature_group_count=4, **settings), *args)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (y, *pull(cotangent.astype(dtype))))

    for short, exact in zip(both(jnp.bfloat16), both(jnp.float32), strict=True):
        np.testing.assert_allclose(short, exact, rtol=2**-8, atol=2**-9 * np.abs(exact).max())


def test_strings_for_padding_mean_the_same():
    images, weights = jnp.ones((1, 7, 7, 2)), jnp.ones((3, 3, 2, 3))
    for padding in ("SAME", "VALID"):
        ours = convolve(images, weights, (2, 2), padding, dimension_numbers=_FLAX_NHWC)
        theirs = lax.conv_general_dilated(images, weights, (2, 2), padding, dimension_numbers=_FLAX_NHWC)
        np.testing.assert_allclose(ours, theirs)
