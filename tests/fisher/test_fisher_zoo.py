"""Gram matrices by layers equal the definition for every network of the zoo."""

import goldens
import jax
import numpy as np
import pytest
import zoo

from hardjax import fisher, models
from hardjax.choose import losses
from hardjax.fisher import by_uses, rules
from hardjax.fisher.unchecked import make_unchecked
from hardjax.models.apply import init_variables, make_apply

LOSS = losses.resolve(losses.CROSS_ENTROPY)


def _compare(module, side, channels, batch):
    with jax.enable_x64(True):
        variables = jax.jit(lambda key: init_variables(module, key, (side, side, channels)))(jax.random.key(0))
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        images = goldens.images(batch, channels, side).astype(np.float64)
        labels = np.arange(batch) % 10
        fast, slow = (
            jax.jit(make_unchecked(module, LOSS, "contribution", method, None, False))(variables, images, labels)
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


@pytest.mark.ci
@pytest.mark.parametrize("size", [2, 4])
def test_sub_batches_whatever_the_batch(size):
    _compare(models.create("mlp", widths=(6,), norm="batch", norm_batch_size=size), 4, 1, 4)


@pytest.mark.ci
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_parameter_has_one_use_and_a_fast_rule(name):
    module, shape = models.create(name), (64, 64, zoo.channels(name))
    if name == "mlp":
        shape = (32, 32, zoo.channels(name))
    variables = jax.eval_shape(lambda: init_variables(module, jax.random.key(0), shape))
    images = jax.ShapeDtypeStruct((4, *shape), np.float32)
    problem = by_uses.problem(make_apply(module), LOSS, variables, images, np.arange(4), None, True)
    assert len(problem.uses) == len(problem.shapes) and not problem.shared
    assert not any(isinstance(use.rule, rules.Whole) for use in problem.uses)
    assert all(use.direct for use in problem.uses if isinstance(use.rule, rules.Product | rules.Convolution))
