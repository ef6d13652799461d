"""Rows of people's own networks: right, zero where they are zero, or refused in one line; never wrong in silence."""

import collections
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax import fisher
from hardjax._validate import Refusal
from hardjax.fisher import check, executables

IMAGES, LABELS = jax.random.normal(jax.random.key(0), (6, 2, 2, 1)), jnp.arange(6) % 3


def _flat(x):
    return x.reshape(len(x), -1)


class Standardised(nn.Dense):
    def param(self, name, *rest, **more):
        value = super().param(name, *rest, **more)
        return (value - value.mean(0)) / (value.std(0) + 1e-5) if name == "kernel" else value


class Bit(nn.Module):
    """A rewritten kernel, perhaps behind a head that starts at zero and hides it."""

    head: str = "lecun_normal"

    @nn.compact
    def __call__(self, x):
        kernel_init = nn.initializers.zeros if self.head == "zeros" else nn.initializers.lecun_normal()
        return nn.Dense(3, kernel_init=kernel_init)(jnp.tanh(Standardised(5)(_flat(x))))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        encoder = nn.Dense(3, name="encoder")
        return jnp.tanh(encoder(_flat(x)[:, :3])) @ encoder.variables["params"]["kernel"].T


class Backwards(nn.Module):
    """The batch turned round for one layer: its rows add up, and belong to other samples."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(4)(_flat(x)[::-1]))[::-1])


class Times(nn.Module):
    """As many steps as the batch has samples; `major`: the axis that comes first in the inner layer."""

    major: str
    steps: int = 6

    @nn.compact
    def __call__(self, x):
        x = jnp.tile(_flat(x)[:, None], (1, self.steps, 1)) * jnp.arange(1, self.steps + 1)[None, :, None]
        x = x.swapaxes(0, 1) if self.major == "time" else x
        x = jnp.tanh(nn.Dense(2)(x))
        return nn.Dense(3)(_flat(x.swapaxes(0, 1) if self.major == "time" else x))


class Stopped(nn.Module):
    """Behind a stop_gradient stand a layer with a rule and a parameter without one; beside it, heads nobody uses."""

    @nn.compact
    def __call__(self, x):
        x = _flat(x)
        nn.Dense(5, name="unused")(x)
        self.param("forgotten", nn.initializers.ones, (3,))
        gain = self.param("gain", nn.initializers.ones, (4,))
        return nn.Dense(3, name="head")(jax.lax.stop_gradient(gain * nn.WeightNorm(nn.Dense(4, name="body"))(x)))


class Attentive(nn.Module):
    """The bias of the keys moves nothing: softmax takes it away."""

    @nn.compact
    def __call__(self, x):
        tokens = nn.Dense(4)(x.reshape(len(x), 4, 1) + jnp.arange(4)[None, :, None])
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(1)(tokens, tokens).mean(1))


class Normed(nn.Module):
    """A bias that batch norm takes away, a dropout mask, and statistics reduced over a named axis."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(4)(_flat(x)))
        return nn.Dense(3)(nn.Dropout(0.3, deterministic=not train)(jnp.tanh(x)))


def _rows_of_samples(model, variables):
    """{name: (6, *shape)}, one jax.grad a sample: no batch norm."""

    def loss(params, i):
        return -jax.nn.log_softmax(model.apply({"params": params}, IMAGES))[i, LABELS[i]]

    rows = jax.lax.map(lambda i: jax.grad(loss)(variables["params"], i), jnp.arange(6))
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(rows)}


def _check_right(model, method):
    variables = model.init(jax.random.key(1), IMAGES)
    expected = {
        name: _flat(row) @ _flat(row).T
        for name, row in jax.jit(lambda v: _rows_of_samples(model, v))(variables).items()
    }
    found = fisher.gram(model, variables, IMAGES, LABELS, method=method, by_parameter=True)
    scale = sum(float(jnp.trace(gram)) for gram in expected.values())
    chex.assert_trees_all_close(found, expected, atol=1e-5 * scale)
    return found


@pytest.mark.parametrize("method", fisher.METHODS)
@pytest.mark.parametrize(
    "model",
    [Bit(), Bit("zeros"), Tied(), Times("time"), Times("time", 5), Attentive()],
    ids=["rewritten", "behind a zero head", "tied", "time", "time as the check", "attention"],
)
def test_what_layers_hide_is_right(model, method):
    _check_right(model, method)


def test_a_batch_whose_order_changes_is_refused_by_name():
    variables = Backwards().init(jax.random.key(1), IMAGES)
    line = "parameter Dense_1/kernel meets in dot_general a batch whose samples are out of order or in pairs"
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        fisher.gram(Backwards(), variables, IMAGES, LABELS)
    assert str(caught.value).startswith('rows="coupled" takes any network: ')
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_steps_as_many_as_samples_behind_the_batch_axis_are_right():
    _check_right(Times("batch"), "layers")


def test_parameters_without_a_gradient_have_rows_of_zero():
    found = _check_right(Stopped(), "layers")
    zero = {name for name, gram in found.items() if not np.any(gram)}
    assert {name.split("/")[0] for name in found if name not in zero} == {"head"} and len(zero) == 7
    variables = Stopped().init(jax.random.key(1), IMAGES)
    assert not any(map(np.any, [fisher.jacobian(Stopped(), variables, IMAGES, LABELS)["unused/kernel"]]))


def test_a_bias_before_batch_norm_has_rows_that_are_rounding_alone():
    variables = Normed().init(jax.random.key(1), IMAGES, False)
    layers, defined = (
        fisher.gram(Normed(), variables, IMAGES, LABELS, method=method, by_parameter=True, key=jax.random.key(2))
        for method in fisher.METHODS
    )
    scale = sum(float(jnp.trace(gram)) for gram in defined.values())
    chex.assert_trees_all_close(layers, defined, atol=1e-5 * scale)
    assert max(fisher.coverage(Normed(), variables, IMAGES, LABELS, key=jax.random.key(2)).values()) < 1e-5


class Weak(nn.Module):
    """Samples coupled by less than the tolerance (batch norm by a running average, as Equinox has it)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(_flat(x))
        return 3 * (x - 0.004 * x.mean(0))


@pytest.mark.ci
def test_samples_that_are_hardly_coupled_have_rows_of_their_own_definition():
    variables = Weak().init(jax.random.key(1), IMAGES)
    assert max(fisher.coverage(Weak(), variables, IMAGES, LABELS).values()) < 1e-5


class Both(nn.Module):
    """Another order of the samples, which only values tell, in one layer, and the mean of the batch taken away."""

    coupled: bool = True

    @nn.compact
    def __call__(self, x):
        place = jnp.arange(len(x))
        x = jnp.tanh(nn.Dense(4)(_flat(x)[(place + 1) % len(x)]))[(place - 1) % len(x)]
        return nn.Dense(3)(x - x.mean(0, keepdims=True) if self.coupled else x)


@pytest.mark.parametrize("coupled", [True, False])
def test_an_order_that_values_decide_is_refused_by_the_check_and_methods_that_fail_are_not_advised(coupled):
    variables = Both(coupled).init(jax.random.key(1), IMAGES)
    for method in fisher.METHODS:
        line = r'^rows="coupled" takes any network: rows are not those of the gradient of Both'
        with pytest.raises(Refusal, match=line):
            fisher.gram(Both(coupled), variables, IMAGES, LABELS, method=method)
    assert fisher.gram(Both(), variables, IMAGES, LABELS, rows="coupled").shape == (6, 6)


class Two(nn.Module):
    k: object = 1

    @nn.compact
    def __call__(self, x):
        return _helper(nn.Dense(3)(_flat(x))) * (2 if self.k is True else 1)


def _helper(x):
    return x


def test_networks_are_told_apart_by_what_they_compute(monkeypatch):
    variables = Two().init(jax.random.key(1), IMAGES)

    def trace_of(model):
        return float(jnp.trace(fisher.gram(model, variables, IMAGES, LABELS)))

    assert Two(1) == Two(True)
    one, true = trace_of(Two(1)), trace_of(Two(True))
    right = [float(sum(jnp.sum(r**2) for r in _rows_of_samples(Two(k), variables).values())) for k in (1, True)]
    np.testing.assert_allclose([one, true], right, rtol=1e-5)
    for factor in (3.0, 4.0):  # the same text but for a number
        weights = jnp.full((3,), factor)
        monkeypatch.setitem(globals(), "_helper", lambda x, weights=weights: x * weights)
        right = float(sum(jnp.sum(r**2) for r in _rows_of_samples(Two(), variables).values()))
        np.testing.assert_allclose(trace_of(Two()), right, rtol=1e-5)


def test_inside_jit_a_network_must_have_been_checked(monkeypatch):
    monkeypatch.setattr(check, "_CHECKED", collections.OrderedDict())
    variables = Two().init(jax.random.key(1), IMAGES)
    line = "Call hardjax.fisher.coverage(model, variables, images, labels, rows='contribution', method='layers') before"
    closed = lambda variables, *_: fisher.gram(Two(), variables, IMAGES, LABELS)  # noqa: E731
    for fn in (fisher.make_gram(Two()), lambda *args: fisher.gram(Two(), *args), closed):
        with pytest.raises(Refusal, match=re.escape(line)):
            jax.jit(fn)(variables, IMAGES, LABELS)
    alone = fisher.gram(Two(), variables, IMAGES[:4], LABELS[:4])  # another batch size: the same network
    with pytest.raises(Refusal, match="coverage to be called on arrays outside of jit"):
        jax.jit(lambda variables: fisher.coverage(Two(), variables, IMAGES, LABELS))(variables)
    fn = jax.jit(chex.assert_max_traces(fisher.make_gram(Two()), n=1))
    for _ in range(2):
        chex.assert_trees_all_close(fn(variables, IMAGES, LABELS)[:4, :4], alone, rtol=1e-4, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    mapped = jax.vmap(fisher.make_gram(Two()), (0, None, None))(stacked, IMAGES[:4], LABELS[:4])
    chex.assert_trees_all_close(mapped[1], alone, rtol=1e-4, atol=1e-5)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, IMAGES[:4]))
        chex.assert_trees_all_close(
            np.asarray(jax.jit(fisher.make_gram(Two()))(*double, LABELS[:4]), np.float32), alone, rtol=1e-4, atol=1e-5
        )
    monkeypatch.setitem(globals(), "_helper", lambda x: x * 5)
    with pytest.raises(Refusal, match=re.escape(line)):
        jax.jit(fisher.make_gram(Two()))(variables, IMAGES, LABELS)


def test_networks_of_the_zoo_need_no_check_and_are_found_again():
    model = hj.models.create("mlp", widths=(4,), num_classes=3)
    variables = model.init(jax.random.key(1), IMAGES)
    found = fisher.gram(model, variables, IMAGES, LABELS)
    chex.assert_trees_all_close(
        jax.jit(fisher.make_gram(model))(variables, IMAGES, LABELS), found, rtol=1e-4, atol=1e-6
    )
    before = executables._of_zoo.cache_info()
    fisher.gram(model, variables, IMAGES, LABELS)
    after = executables._of_zoo.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_training_that_measures_checks_at_generic_parameters(tiny):
    settings = hj.TrainConfig(epochs=1, batch_size=8, measure=fisher.FisherMeasure(every=4))
    assert len(hj.run(settings, dataset=tiny, model=Bit("zeros"), progress=False).measurements["step"])
    with pytest.raises(Refusal, match=r'^rows="coupled" takes any network: rows are not those of the gradient of Both'):
        hj.run(settings, dataset=tiny, model=Both(), progress=False)
