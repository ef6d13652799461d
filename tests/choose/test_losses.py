"""Losses of a sample: optax's by name, people's own, and what does not fit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose import losses

RNG = np.random.default_rng(0)
OUTPUTS = RNG.standard_normal((5, 6, 3)).astype(np.float32)
CLASSES = RNG.integers(0, 3, (5, 6))
SHARES = np.abs(OUTPUTS) / np.abs(OUTPUTS).sum(-1, keepdims=True)


def huber_of_sums(outputs, targets):
    return optax.losses.huber_loss(outputs.sum((1, 2)), targets.sum((1, 2)))


@pytest.mark.parametrize("name", losses.NAMES)
def test_a_named_loss_is_the_mean_of_optax_over_a_sample(name):
    loss, fn = hj.losses.resolve(name), getattr(optax.losses, name)
    targets = CLASSES if loss.targets == "classes" else SHARES
    loss.check(OUTPUTS, targets, 3)
    found = loss(jnp.asarray(OUTPUTS), jnp.asarray(targets))
    for i in range(5):
        # Of classes a position at a time: some of optax's take no more.
        pairs = [(o[None], t[None]) for o, t in zip(OUTPUTS[i], targets[i], strict=True)]
        expected = np.mean([np.mean(fn(*map(jnp.asarray, pair))) for pair in pairs])
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)
    assert losses.resolve(fn) is loss is losses.resolve(name), "one loss, so that runs share programs"


def test_the_default_is_the_loss_that_the_papers_train():
    loss = hj.losses.resolve(hj.TrainConfig().loss)
    outputs, targets = jnp.asarray(OUTPUTS[:, 0]), jnp.asarray(CLASSES[:, 0])
    expected = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    np.testing.assert_array_equal(loss(outputs, targets), expected)
    assert loss(outputs.astype(jnp.bfloat16), targets).dtype == jnp.float32


def test_what_is_right_is_counted_by_positions():
    loss = losses.resolve(losses.CROSS_ENTROPY)
    outputs = np.eye(3)[CLASSES]
    outputs[0, :2] = np.eye(3)[(CLASSES[0, :2] + 1) % 3]
    outputs[1, 0] = np.nan
    outputs, targets = jnp.asarray(outputs), jnp.asarray(CLASSES)
    np.testing.assert_allclose(loss.correct(outputs, targets, loss(outputs, targets)), [4 / 6, 0, 1, 1, 1])
    one = loss.correct(outputs[:, 0], targets[:, 0], loss(outputs[:, 0], targets[:, 0]))
    assert one.dtype == bool and one.tolist() == [False, False, True, True, True]
    values = losses.resolve("squared_error")
    assert values.correct(outputs, jnp.asarray(SHARES), jnp.zeros(5)) is None


def test_a_loss_is_recorded_by_name_and_read_again():
    config = hj.TrainConfig(loss=huber_of_sums)
    assert config.to_dict()["loss"] == f"{__name__}:huber_of_sums"
    assert losses.resolve(config.to_dict()["loss"]).fn is huber_of_sums
    assert hj.TrainConfig(loss=optax.losses.l2_loss).to_dict()["loss"] == "l2_loss"
    assert losses.name_of(functools.partial(huber_of_sums)) == f"{__name__}:huber_of_sums"
    assert hj.TrainConfig.from_dict(hj.TrainConfig(loss="log_cosh").to_dict()) == hj.TrainConfig(loss="log_cosh")
    assert hj.TrainConfig.from_dict({}).loss == losses.CROSS_ENTROPY, "what was recorded before there was a choice"


@pytest.mark.parametrize(
    "loss, outputs, targets, words",
    [
        ("squared_error", OUTPUTS, CLASSES, "Expected floats shaped like the model's outputs as labels with loss=squ"),
        (losses.CROSS_ENTROPY, OUTPUTS, SHARES, "Expected integer classes as labels with loss=softmax_cross_entropy_w"),
        (
            "squared_error",
            OUTPUTS[:, 0, :1],
            SHARES[:, 0, 0],
            "outputs of the labels' shape (5,); the model gives (5, 1)",
        ),
        (
            losses.CROSS_ENTROPY,
            OUTPUTS,
            CLASSES[:, 0],
            "Expected logits of shape (5, 3) from the model; it gives (5, 6, 3)",
        ),
        (losses.CROSS_ENTROPY, OUTPUTS[..., :2], CLASSES, "shape (5, 6, 3) from the model; it gives (5, 6, 2)"),
        (lambda o, t: (o - t).mean(), OUTPUTS, SHARES, "to give (5,) floats, one a sample, for outputs (5, 6, 3)"),
        (lambda o, t: o - t, OUTPUTS, SHARES, "it gives float32 of shape (5, 6, 3)"),
        (lambda o, t: None, OUTPUTS, SHARES, "it gives nothing"),
        (lambda o, t: o[:, :, 7].argmax(1), OUTPUTS, SHARES, "it gives int32 of shape (5,)"),
        (
            lambda o, t: (o @ t).sum((1, 2)),
            OUTPUTS,
            SHARES,
            "fails on outputs (5, 6, 3) and labels (5, 6, 3): TypeError",
        ),
        (lambda o: o, OUTPUTS, SHARES, "TypeError"),
    ],
)
def test_what_does_not_fit_is_one_line(loss, outputs, targets, words):
    with pytest.raises(Refusal, match=re.escape(words)) as caught:
        losses.resolve(loss).check(outputs, targets, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "loss, words",
    [
        ("squared_eror", "Unknown loss 'squared_eror'; did you mean 'squared_error'?"),
        ("ntxent", "Unknown loss 'ntxent'"),  # of pairs of samples
        (losses.Loss, "to be a function of (outputs, labels) or a name"),
        (3, "Expected loss=3 to be text or a function."),
        ("hardjax.choose.losses:NAMES", "to be a function of (outputs, labels) or a name"),
        ("hardjax.choose.losses:nothing", "There is no 'nothing' in hardjax.choose.losses"),
        ("no_such_module:loss", "There is no module 'no_such_module' for loss='no_such_module:loss'"),
    ],
)
def test_a_loss_that_there_is_not(loss, words):
    with pytest.raises(Refusal, match=re.escape(words)):
        losses.resolve(hj.TrainConfig(loss=loss).loss)


def test_a_loss_that_mixes_samples_is_refused():
    def centred(outputs, targets):
        return jnp.square(outputs - outputs.mean(0) - targets).sum((1, 2))

    shape = jax.ShapeDtypeStruct(OUTPUTS.shape, np.float32)
    with pytest.raises(Refusal, match="each sample a loss of its own; it changes with the others"):
        losses.resolve(centred).check_independent(shape, SHARES)
    losses.resolve(lambda o, t: jnp.square(o - t).sum((1, 2))).check_independent(shape, SHARES)
    losses.resolve(lambda o, t: jnp.log(o - t).sum((1, 2))).check_independent(shape, SHARES)  # NaN alone and together
