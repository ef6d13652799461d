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


def test_a_wrapped_loss_is_never_found_by_the_name_of_what_it_wraps():
    wrapped = functools.partial(huber_of_sums)
    for loss in (
        wrapped,
        jax.vmap(lambda o, t: jnp.square(o - t).sum()),
        lambda o, t: o.sum(),
        jax.vmap(huber_of_sums),
    ):
        name = hj.TrainConfig(loss=loss).to_dict()["loss"]
        assert name.endswith("(not found by this name)")
        with pytest.raises(Refusal, match=r"Expected loss='.*' as package.module:Name"):
            losses.resolve(name)


def test_a_single_output_predicts_nothing():
    loss = losses.resolve(lambda o, t: optax.losses.sigmoid_binary_cross_entropy(o[:, 0], t.astype(o.dtype)))
    outputs, targets = jnp.ones((5, 1)), jnp.zeros(5, jnp.int32)
    loss.check(outputs, targets)
    assert loss.correct(outputs, targets, loss(outputs, targets)) is None
    with pytest.raises(Refusal, match=r"logits of shape \(5, 2\)"):
        losses.resolve(losses.CROSS_ENTROPY).check(outputs, targets, 2)


def test_a_loss_that_fails_in_any_way_is_one_line():
    def broken(outputs, targets):
        raise NotImplementedError("not\nyet")

    with pytest.raises(Refusal, match=r"fails on outputs .* NotImplementedError: not yet"):
        losses.resolve(broken).check(OUTPUTS, SHARES)
    of_five = losses.resolve(lambda o, t: jnp.arange(5.0) * o.sum((1, 2)))
    of_five.check(OUTPUTS, SHARES)
    with pytest.raises(Refusal, match="fails on outputs"):
        of_five.check_independent(jax.ShapeDtypeStruct(OUTPUTS.shape, np.float32), SHARES[:4])


def test_a_loss_balanced_over_equal_labels_mixes_samples():
    def balanced(outputs, labels):
        alike = (labels[:, None] == labels[None]).sum(1)
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels) / alike

    with pytest.raises(Refusal, match="each sample a loss of its own"):
        losses.resolve(balanced).check_independent(jax.ShapeDtypeStruct((3, 3), np.float32), np.arange(3))


def test_configurations_with_a_function_are_hashed_and_optax_s_go_by_name():
    class Unhashable:
        __hash__ = None

        def __call__(self, outputs, targets):
            return outputs.sum(-1)

    assert isinstance(hash(hj.TrainConfig(loss=Unhashable())), int)
    assert hj.TrainConfig(loss=optax.losses.huber_loss) == hj.TrainConfig(loss="huber_loss")
