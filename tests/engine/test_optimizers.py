"""Optimisers against PyTorch's formulas in NumPy float64, schedules by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from platforms import near

from hardjax.engine.optimizers import NAMES, Hyper, make_optimizer
from hardjax.engine.rates import Schedule, factors

RATE, DECAY, MOMENTUM = 0.1, 0.03, 0.8
GRADS = np.random.default_rng(0).normal(size=(6, 5))


def torch_like(name: str) -> np.ndarray:
    p, buf, m, v = np.linspace(-1, 1, 5), None, np.zeros(5), np.zeros(5)
    for t, g in enumerate(GRADS, 1):
        if name == "adamw":
            p = p * (1 - RATE * DECAY)
        else:
            g = g + DECAY * p
        if name.startswith("adam"):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - RATE * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            continue
        if name != "sgd":
            buf = g if buf is None else MOMENTUM * buf + g
            g = g + MOMENTUM * buf if name == "nesterov" else buf
        p = p - RATE * g
    return p


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_pytorch(name):
    hyper = Hyper(jnp.float32(DECAY), jnp.float32(MOMENTUM))
    optimizer = make_optimizer(name, hyper, jnp.float32(RATE))
    params = jnp.linspace(-1, 1, 5, dtype=jnp.float32)
    state = optimizer.init(params)
    for grad in GRADS:
        updates, state = optimizer.update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
    # AdamW's decoupled decay takes the old weights in PyTorch and in optax alike.
    np.testing.assert_allclose(params, torch_like(name), **near(rtol=2e-5, atol=2e-6))


@pytest.mark.parametrize(
    "schedule, progress, factor",
    [
        (Schedule("constant"), 0.9, 1.0),
        (Schedule("step"), 0.49, 1.0),
        (Schedule("step"), 0.5, 0.1),
        (Schedule("step"), 0.75, 0.01),
        (Schedule("step", (1 / 3, 2 / 3), 0.5), 50 / 150, 0.5),
        (Schedule("cosine"), 0.5, 0.5),
        (Schedule("cosine"), 0.0, 1.0),
        (Schedule("constant", warmup=0.05), 0.0, 1 / 32),
        (Schedule("constant", warmup=0.05), 0.025, (1 + 1 / 32) / 2),
        (Schedule("step", warmup=0.05), 0.6, 0.1),
    ],
)
def test_schedules_by_hand(schedule, progress, factor):
    assert factors(schedule, progress) == pytest.approx(factor, rel=1e-12)
    assert factors(schedule, np.full((2, 3), progress)).shape == (2, 3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="cosin"), "did you mean 'cosine'"),
        (dict(kind="step", decay_at=(0.8, 0.5)), r"decay_at=\(0.8, 0.5\) to rise"),
        (dict(kind="step", decay_at=(0.5, 1.0)), "to rise within"),
        (dict(warmup=1.0), r"warmup=1.0 in \[0, 1\)"),
    ],
)
def test_bad_schedules(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)
