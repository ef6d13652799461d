"""Gram matrices by layers equal the definition for every network of the zoo."""

import goldens
import jax
import numpy as np
import pytest
import zoo

from hardjax import fisher, models
from hardjax.fisher.unchecked import make_unchecked
from hardjax.models.apply import init_variables


def _compare(module, side, channels, batch):
    with jax.enable_x64(True):
        variables = jax.jit(lambda key: init_variables(module, key, (side, side, channels)))(jax.random.key(0))
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        images = goldens.images(batch, channels, side).astype(np.float64)
        labels = np.arange(batch) % 10
        fast, slow = (
            jax.jit(make_unchecked(module, "contribution", method, None, False))(variables, images, labels)
            for method in fisher.METHODS
        )
    np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-9 * np.abs(slow).max())
    assert np.linalg.matrix_rank(fast) > 1


# One of each kind of layer; the others are slow.
QUICK = ["mlp", "inverted"]
SMALL = [name for name in [*zoo.ZOO, *zoo.SMALL_VERSIONS] if name not in zoo.LARGE]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_by_layers_equals_the_definition(name):
    _compare(zoo.maker(name)(norm="batch"), 16, zoo.channels(name), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name in zoo.LARGE])
def test_by_layers_equals_the_definition_for_large_networks(name):
    # At 32x32 the last maps of the EfficientNets are one pixel: statistics of 3 numbers, rows of length 1e10, and
    # images changed by 1e-15 move the matrix by up to 4e-6. At 64x64 they move it by 1e-14.
    side, batch = (64, 4) if name.startswith("efficientnet") else (32, 3)
    _compare(models.create(name), side, 3, batch)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"norm_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"norm": "group"}, marks=pytest.mark.slow),
        pytest.param({"norm": "none"}, marks=pytest.mark.slow),
    ],
)
def test_by_layers_equals_the_definition_for_other_norms(options):
    _compare(models.create("cbrcb_resnet8", **options), 8, 3, 4)


@pytest.mark.parametrize("options", [{"norm_batch_size": 2}, {"norm": "group"}, {"norm": "none"}], ids=str)
def test_by_layers_equals_the_definition_for_one_layer_of_each_norm(options):
    _compare(zoo.Tiny(**options), 8, 3, 4)
