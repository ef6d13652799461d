"""How people's own modules are called (modes, streams, axes, collections, outputs), or refused in one line."""

import re

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax._validate import Refusal
from hardjax.models.apply import OTHERS, Logits, init_variables, make_apply, samples_are_independent

SHAPE = (4, 4, 1)
IMAGES = jax.random.normal(jax.random.key(0), (6, *SHAPE))


def _flat(x):
    return x.reshape(len(x), -1)


def _normed(x, frozen, **options):
    """Dense, batch norm, dense: statistics that move in training only."""
    return nn.Dense(3)(nn.BatchNorm(use_running_average=frozen, **options)(nn.Dense(4)(_flat(x))))


def _by_argument(name, default):
    """A module whose __call__ has its mode under this name."""
    scope = {"nn": nn, "_normed": _normed}
    frozen = name if default else f"not {name}"
    exec(f"def call(self, x, {name}={default}): return _normed(x, {frozen})", scope)  # the name is what is tested
    return type("Argument", (nn.Module,), {"__call__": nn.compact(scope["call"]), "__module__": __name__})()


def _by_field(name, default):
    @nn.compact
    def call(self, x):
        return _normed(x, getattr(self, name) == default)

    fields = {"__annotations__": {name: bool}, name: default, "__call__": call, "__module__": __name__}
    return type("Field", (nn.Module,), fields)()


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x, **modes):
        return _normed(x, not modes.get("is_training", False))


class Reduced(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return _normed(x, not train, axis_name="batch")


def _trained_and_tested(module):
    """(statistics before, after training, logits in training, in evaluation)."""
    variables, apply = init_variables(module, jax.random.key(1), SHAPE), make_apply(module)
    logits, after = apply(variables, IMAGES, True, jax.random.key(2))
    tested, kept = apply(variables, IMAGES, False)
    chex.assert_trees_all_equal(kept, variables["batch_stats"])
    chex.assert_trees_all_equal_shapes_and_dtypes(after, variables["batch_stats"])
    return variables["batch_stats"], after, logits, tested


@pytest.mark.parametrize(
    "module",
    [
        *(_by_argument(name, False) for name in ("train", "training", "is_training", "is_train", "learn")),
        *(_by_argument(name, True) for name in ("deterministic", "use_running_average", "eval", "inference", "asleep")),
        *(_by_argument(name, 0) for name in ("train", "training")),
        *(_by_field(name, False) for name in ("train", "is_training", "learn")),
        *(_by_field(name, True) for name in ("deterministic", "use_running_average", "asleep")),
        Keywords(),
        Reduced(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_training_mode_is_found_by_name_or_by_trying(module):
    before, after, trained, tested = _trained_and_tested(module)
    assert abs(after["BatchNorm_0"]["mean"] - before["BatchNorm_0"]["mean"]).max() > 1e-4
    assert abs(trained - tested).max() > 1e-4
    assert not samples_are_independent(make_apply(module), init_variables(module, jax.random.key(1), SHAPE), SHAPE)


def test_a_reduced_axis_of_one_program_is_the_batch_itself():
    plain, reduced = (_trained_and_tested(module) for module in (_by_argument("train", False), Reduced()))
    chex.assert_trees_all_close(plain, reduced, rtol=1e-5, atol=1e-6)


class Option(nn.Module):
    """A switch that changes what the network is, not its mode."""

    use_norm: bool = False

    @nn.compact
    def __call__(self, x):
        return _normed(x, False) if self.use_norm else nn.Dense(3)(_flat(x))


def test_other_switches_are_left_as_they_are():
    assert list(init_variables(Option(), jax.random.key(0), SHAPE)["params"]) == ["Dense_0"]
    with pytest.raises(Refusal, match="moves its statistics in evaluation"):
        init_variables(Option(use_norm=True), jax.random.key(0), SHAPE)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return _normed(x, True)


class FrozenInside(nn.Module):
    """Checkpointed: statistics and keys pass through a call that hands them on."""

    inner: type

    @nn.compact
    def __call__(self, x):
        return nn.remat(self.inner)(name="inner")(x)


class Still(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(_flat(x)))


class Asleep(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=True)(nn.Dense(3)(_flat(x)))


class Awake(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(_flat(x)))


class Fixed(nn.Module):
    """What a refused network with frozen statistics is told to do."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(_flat(x))
        mean = self.variable("constants", "mean", lambda: jnp.full((3,), 0.5))
        return x - mean.value


def test_statistics_that_stay_fixed_are_constants():
    before, after, *_ = _trained_and_tested(Fixed())
    chex.assert_trees_all_equal(before, after)


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        steps = self.variable("counter", "steps", lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            steps.value += 1
        return nn.Dense(3)(_flat(x))


class Mapping(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return {"logits": nn.Dense(3)(_flat(x))}


class Demanding(nn.Module):
    @nn.compact
    def __call__(self, x, labels, train):
        return nn.Dense(3)(_flat(x))


class Misshapen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(_flat(x) @ jnp.zeros((5, 3)))


@pytest.mark.parametrize(
    "module, line",
    [
        (Frozen(), "Frozen has batch statistics and a training pass leaves them as they were"),
        (FrozenInside(Frozen), "FrozenInside has batch statistics and a training pass leaves them as they were"),
        (FrozenInside(Still), "FrozenInside has dropout and a training pass draws nothing"),
        (Asleep(), "Asleep has dropout and a training pass draws nothing: tried with train; expected an argument"),
        (
            nn.Sequential([_flat, nn.Dense(3), nn.BatchNorm(use_running_average=True)]),
            "(around an nn.Sequential: a module that hands it on); statistics that shall stay fixed belong in a",
        ),
        (Awake(), "Awake draws random numbers or moves its statistics in evaluation as in training"),
        (Counting(), "Counting changes its collection 'counter' in training"),
        (
            Mapping(),
            "Expected logits (2, classes) alone from Mapping, got dict of logits (2, 3): say which they are, hj.",
        ),
        (Demanding(), "Demanding cannot be called: Demanding.__call__() missing 1 required positional argument"),
        (Misshapen(), "Misshapen cannot be called: dot_general requires contracting dimensions to have the same shape"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_called_is_refused_in_one_line(module, line):
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        init_variables(module, jax.random.key(0), SHAPE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


class Streams(nn.Module):
    """Draws from a stream of its own, and from dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(_flat(x))
        if train:
            keep = jax.random.bernoulli(self.make_rng("a stream"), 0.5, x.shape)
            also = jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)
            return jnp.stack([keep, also]).sum(0) * jnp.ones_like(x), keep & also
        return x, None


def test_every_stream_is_provided_and_none_draws_like_another():
    apply = make_apply(Logits(Streams(), 0))
    variables = apply.init(jax.random.key(1), SHAPE)
    drawn = apply(variables, IMAGES, True, jax.random.key(2))[0]
    assert set(drawn.ravel().tolist()) == {0.0, 1.0, 2.0}
    assert not samples_are_independent(apply, variables, SHAPE)
    assert apply(variables, IMAGES, False)[0].shape == (6, 3)
    with pytest.raises(Refusal, match="Streams draws random numbers in training: pass key="):
        apply(variables, IMAGES, True)


class Furnished(nn.Module):
    """A layer that only training has, constants, boxes and a second output."""

    @nn.compact
    def __call__(self, x, train):
        x = _flat(x)
        scale = self.variable("constants", "scale", lambda: jnp.full((3,), 2.0))
        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        logits = nn.Dense(3, kernel_init=boxed, name="head")(x) * scale.value
        if train:
            logits = logits + nn.Dense(3, name="helper")(x)
        return logits, {"features": x}


def test_layers_of_training_constants_boxes_and_extra_outputs():
    apply = make_apply(Logits(Furnished(), 0))
    variables = apply.init(jax.random.key(1), SHAPE)
    assert sorted(variables["params"]) == ["head", "helper"]
    assert isinstance(variables["params"]["head"]["kernel"], jax.Array)
    chex.assert_trees_all_equal(variables["batch_stats"][OTHERS], {"constants": {"scale": jnp.full((3,), 2.0)}})
    assert samples_are_independent(apply, variables, SHAPE)
    logits, after = jax.jit(apply, static_argnums=2)(variables, IMAGES, True)
    chex.assert_trees_all_equal(after, variables["batch_stats"])
    head, helper = (variables["params"][name] for name in ("head", "helper"))
    expected = 2 * (_flat(IMAGES) @ head["kernel"]) + _flat(IMAGES) @ helper["kernel"]
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_variables_may_be_as_flax_gives_them():
    own = flax.core.freeze(Furnished().init(jax.random.key(1), IMAGES, True))
    chex.assert_trees_all_close(
        make_apply(Logits(Furnished(), 0))(own, IMAGES, True)[0], Furnished().apply(own, IMAGES, True)[0], rtol=1e-6
    )


class Parts(nn.Module):
    """Batch norm over parts of a batch, of which no smaller batch has any."""

    size: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
        if not train:
            return x - mean.value
        parts = x.reshape(-1, self.size, 4)
        means = parts.mean(1, keepdims=True)
        mean.value = 0.5 * mean.value + 0.5 * means.mean((0, 1))
        return (parts - means).reshape(-1, 4)


@pytest.mark.parametrize("size", [2, 4, 32, 48, 128, 180])
def test_a_network_that_cuts_its_batches_is_made_of_enough_images(size):
    apply = make_apply(Parts(size))
    variables = apply.init(jax.random.key(0), (2, 2, 1))
    assert variables["params"]["Dense_0"]["kernel"].shape == (4, 4)
    images = jax.random.normal(jax.random.key(1), (2 * size, 2, 2, 1))
    logits, stats = apply(variables, images, True)
    np.testing.assert_allclose(logits.reshape(2, size, 4).mean(1), 0, atol=1e-6)
    assert jax.tree.leaves(stats)[0].shape == (4,)


def test_a_network_that_cuts_its_batches_otherwise_is_refused():
    with pytest.raises(ValueError, match=r"Parts cannot be called: cannot reshape array of shape \(2, 4\)"):
        make_apply(Parts(77)).init(jax.random.key(0), (2, 2, 1))
