"""P4, section 2.2: a step at the rate eta = m * r for the mean of m losses is one at the base rate r for their sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardjax as hj
from hardjax.engine.state import Batch, StepInputs
from hardjax.engine.step import make_step
from hardjax.training.setting import prepare

BASE_RATE, STEPS = 0.003, 3


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("size", [4, 16])
def test_the_mean_at_the_rate_is_the_sum_at_the_base_rate_to_the_bit(tiny, size, decay):
    config = hj.TrainConfig(
        model_options={"widths": [8]},
        batch_size=size,
        base_learning_rate=BASE_RATE,
        optimizer="sgd",
        weight_decay=decay,
    )
    setting = prepare(config, tiny)
    state, apply = setting.init_state(), setting.recipe.apply
    # To scale by a power of two is exact, so that m times the mean of gradients is their sum to the bit. The sum takes
    # the decay m times; lambda itself is never scaled with m.
    rate = np.float32(config.peak_learning_rate) / size

    @jax.jit
    def by_sum(params, images, labels):
        def total(params):
            logits = apply({"params": params, "batch_stats": {}}, images, True)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

        grads = jax.grad(total)(params)
        return jax.tree.map(lambda p, g: p - rate * (g + size * (jnp.float32(decay) * p)), params, grads)

    step = jax.jit(make_step(setting.recipe, None))
    expected, inputs = state.params, StepInputs(jnp.float32(config.peak_learning_rate), jnp.int32(size))
    for place in range(STEPS):
        images = (tiny.train.images[place * size : (place + 1) * size] / 255.0 - 0.4).astype(jnp.float32)
        labels = tiny.train.labels[place * size : (place + 1) * size]
        state, _ = step(state, Batch(images, labels), setting.hyper, inputs, jax.random.key(place))
        expected = by_sum(expected, images, labels)
    moved = 0.0
    for first, got, wanted in zip(
        *map(jax.tree.leaves, (setting.init_state().params, state.params, expected)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
        moved += float(np.abs(first - got).max())
    assert moved > 1e-3
