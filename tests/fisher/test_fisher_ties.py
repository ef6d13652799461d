"""What a check was made of is tied to what is measured: to the batch size at hand, and to values that decide."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax import fisher
from hardjax._validate import Refusal
from hardjax.fisher import alike, check, comparison
from hardjax.fisher.program import Uncovered
from hardjax.fisher.walk import trace

IMAGES, LABELS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 3
OUT_OF_ORDER = "a batch whose samples are out of order or in pairs"


def _shifted(layer, x, shift):
    """A layer on samples in another order, which only values tell, and back."""
    place = jnp.arange(len(x))
    return layer(x[(place + shift) % len(x)])[(place - shift) % len(x)]


class Large(nn.Module):
    """Another program in batches of more than seven samples: in another order, or twice as large."""

    mixes: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(2)
        if len(x) <= 7:
            return layer(x)
        return _shifted(layer, x, 1) if self.mixes else 2 * layer(x)


class Counting(nn.Module):
    """Another order of the samples where a stored count is large."""

    inside: bool

    @nn.compact
    def __call__(self, x, train):
        seen, layer = self.variable("batch_stats", "seen", lambda: jnp.zeros(())), nn.Dense(2)
        if train and not self.is_initializing():
            seen.value += 1
        if not self.inside:
            return _shifted(layer, x, (seen.value > 100).astype(int))
        x = jax.lax.cond(seen.value > 100, lambda x: x[::-1], lambda x: x, x)
        x = layer(x)
        return jax.lax.cond(seen.value > 100, lambda x: x[::-1], lambda x: x, x)


def _gram(model, images, method, *train, **stats):
    variables = {**model.init(jax.random.key(1), images, *train), **stats}
    labels = LABELS[: len(images)] % 2
    found = fisher.gram(model, variables, images, labels, method=method)

    def loss(params, i):
        logits = model.apply({**variables, "params": params}, images, *train, mutable=["batch_stats"])[0]
        return -jax.nn.log_softmax(logits)[i, labels[i]]

    rows = [jax.tree.leaves(jax.grad(loss)(variables["params"], i)) for i in range(len(images))]
    flat = np.stack([np.concatenate([np.ravel(leaf) for leaf in row]) for row in rows])
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", fisher.METHODS)
def test_a_network_is_checked_in_the_program_of_the_batch_at_hand(method, monkeypatch):
    monkeypatch.setattr(check, "_CHECKED", collections.OrderedDict())
    _gram(Large(True), IMAGES[:6], method)
    with pytest.raises(Refusal, match="rows are not those of the gradient of Large"):
        _gram(Large(True), IMAGES, method)
    _gram(Large(False), IMAGES[:6], method)
    _gram(Large(False), IMAGES, method)
    assert len(check._CHECKED) == 2  # of six samples both are the same network


def test_a_batch_too_large_to_compare_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(comparison, "MOST", 100)
    line = "Large computes otherwise for fewer samples than 8, and comparing its rows there takes"
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        _gram(Large(False), IMAGES, "layers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", fisher.METHODS)
@pytest.mark.parametrize("seen", [0.0, 1000.0])
def test_an_order_that_statistics_decide_is_refused_by_name_at_any_values(seen, method):
    with pytest.raises(Refusal, match=OUT_OF_ORDER):
        _gram(Counting(False), IMAGES, method, True, batch_stats={"seen": jnp.float32(seen)})


def test_a_branch_that_statistics_decide_is_checked_with_those_at_hand(monkeypatch):
    monkeypatch.setattr(check, "_CHECKED", collections.OrderedDict())
    for seen in (0.0, 7.0):
        _gram(Counting(True), IMAGES, "layers", True, batch_stats={"seen": jnp.float32(seen)})
    # Values of which the made-up ones would lie on the other side.
    for seen in (100.5, 1000.0):
        with pytest.raises(Refusal, match="rows are not those of the gradient of Counting"):
            _gram(Counting(True), IMAGES, "layers", True, batch_stats={"seen": jnp.float32(seen)})
    _gram(Counting(True), IMAGES, "layers", True, batch_stats={"seen": jnp.float32(99.0)})


def _traced(piece):
    """The network `piece` behind a dense layer, where `stat` is a statistic and `w` a parameter."""

    def apply(variables, images, train, key):
        w = variables["params"]["w"]
        return piece(images.reshape(-1, 4), variables["batch_stats"]["stat"]) @ w, {}

    variables = {"params": {"w": np.eye(4, dtype=np.float32)}, "batch_stats": {"stat": np.zeros((), np.int32)}}
    return trace(apply, variables, IMAGES, None, True)


def _scattered(x, stat):
    return jnp.zeros_like(x).at[(jnp.arange(len(x)) + stat) % len(x)].set(x)


@pytest.mark.parametrize(
    "piece",
    [
        lambda x, stat: x[(jnp.arange(len(x)) + stat) % len(x)],
        lambda x, stat: x[jnp.argsort(x[:, 0])],
        lambda x, stat: x[(jnp.arange(len(x)) + stat) % len(x)][:, (jnp.arange(4) + stat) % 4],
        lambda x, stat: x[((jnp.arange(len(x)) + stat) % len(x))[:, None], jnp.arange(4)],
        lambda x, stat: jnp.roll(x, stat, 0),
        lambda x, stat: jax.lax.dynamic_slice(x.repeat(2, 0), (stat, 0), x.shape),
        lambda x, stat: jax.lax.dynamic_update_slice(x, x[: len(x) // 2], (stat, 0)),
        lambda x, stat: jax.nn.one_hot((jnp.arange(len(x)) + stat) % len(x), len(x)) @ x,
        _scattered,
    ],
    ids=["gather", "sort", "twice", "two indices", "roll", "slice", "update", "product", "scatter"],
)
def test_an_order_that_no_trace_tells_is_refused(piece):
    with pytest.raises(Uncovered, match=f"{OUT_OF_ORDER}|mixes its samples"):
        _traced(piece)


@pytest.mark.parametrize(
    "piece",
    [
        # The last token of each sample, say.
        lambda x, stat: x[jnp.arange(len(x))[:, None], (jnp.argmax(x, 1)[:, None] + jnp.arange(4)) % 4],
        lambda x, stat: jnp.take_along_axis(x, (jnp.argmax(x, 1)[:, None] + jnp.arange(4)) % 4, 1),
        lambda x, stat: jnp.roll(x, stat, 1),
        lambda x, stat: x[:, (jnp.arange(4) + stat) % 4],
        lambda x, stat: x.at[:, stat].set(0.0),
        lambda x, stat: jax.lax.dynamic_update_slice(x, 2 * x[:, :2], (0, stat)),
    ],
    ids=["own entries", "along an axis", "roll", "columns", "a column", "update"],
)
def test_what_values_pick_within_a_sample_keeps_the_order(piece):
    assert _traced(piece).params


def test_numbers_follow_the_batch_size_or_stay():
    def made(size, *, number=1, share=1.0, rows=0):
        table = jnp.zeros((rows, 4))

        def fn(x):
            return (x * share).reshape(size * 2, 2)[:, :number].sum(0) + table.sum()

        return jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((size, 4), jnp.float32))

    def same(here, there):
        return alike.alike(made(5, **here), made(16, **there), 5, 16)

    assert same({}, {}) and same({"share": 1 / 5}, {"share": 1 / 16}) and same({"share": 4.0}, {"share": 15.0})
    assert not same({}, {"number": 2}) and not same({"share": 0.0}, {"share": 1.0})
    assert not same({"share": 0.0}, {"share": 11.0})  # what is more than five
