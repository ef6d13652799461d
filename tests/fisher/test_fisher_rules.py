"""Rows and products of single uses against `vmap(grad)` of a layer, in float64, over many geometries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardjax.choose import losses
from hardjax.fisher import by_uses, definition
from hardjax.fisher.names import named_leaves
from hardjax.fisher.rules import forming

LOSS = losses.resolve(losses.CROSS_ENTROPY)

# float64 sums of at most a few thousand products; the two sides differ in order only.
RELATIVE = 1e-11


class Wrapped(nn.Module):
    """A layer between a fixed non-linearity and a mean, so that its cotangent is not constant."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(self.layer(x))
        return jnp.stack([y.reshape(len(y), -1).mean(1), (y * jnp.cos(y)).reshape(len(y), -1).sum(1)], 1)


def _check(layer, shape, chunk, seed=0):
    """The layer's rows, Gram (whole and in chunks) and sums equal those of `vmap(grad)`."""
    model, labels = Wrapped(layer), np.arange(shape[0]) % 2
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)

    def everything(params, x):
        def apply(variables, images, train, key):
            return model.apply(variables, images), {}

        problem = by_uses.problem(apply, LOSS, {"params": params}, x, labels, None, True)
        expected = named_leaves(definition.frozen_rows(apply, LOSS, {"params": params}, x, labels))
        return expected, by_uses.rows(problem), by_uses.grams(problem, None), by_uses.grams(problem, chunk)

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"]
        params = jax.tree.map(lambda p: rng.normal(size=p.shape), shapes)
        expected, rows, whole, chunked = jax.jit(everything)(params, x)
    assert rows.keys() == whole.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(rows[name], value, rtol=RELATIVE, atol=RELATIVE * np.abs(value).max())
        flat = np.asarray(value).reshape(shape[0], -1)
        for gram in (whole[name], chunked[name]):
            np.testing.assert_allclose(gram, flat @ flat.T, rtol=RELATIVE, atol=RELATIVE * np.abs(flat @ flat.T).max())


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from([1, 2, 2, 2]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    per_group = 1 if groups == 4 else draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    each = st.lists(st.integers(1, 2), min_size=rank, max_size=rank).map(tuple)
    padding = draw(
        st.sampled_from(
            ["SAME", "VALID", 1, "CIRCULAR", "REFLECT", [(1, 0)] * rank, *(["CAUSAL"] if rank == 1 else [])]
        )
    )
    return nn.Conv(
        groups * draw(st.integers(1, 3)),
        kernel,
        draw(each),
        padding,
        input_dilation=1 if isinstance(padding, str) else draw(each),
        kernel_dilation=draw(each),
        feature_group_count=groups,
        use_bias=draw(st.booleans()),
    ), (draw(st.integers(2, 5)), *draw(st.lists(st.integers(6, 8), min_size=rank, max_size=rank)), groups * per_group)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 3))
def test_convolutions(layer_and_shape, chunk):
    _check(*layer_and_shape, chunk)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Dense(3), (4, 5)),
        (nn.Dense(3, use_bias=False), (4, 5)),
        (nn.Dense(3), (4, 2, 3, 5)),
        (nn.Dense(2), (3, 40, 2)),
        (nn.Conv(64, (3, 3)), (4, 2, 2, 64)),
        (nn.Conv(8, (3, 3), padding=1), (4, 8, 8, 3)),
        (nn.Conv(8, (1, 1), (2, 2), use_bias=False), (4, 7, 7, 6)),
        (nn.Conv(12, (5, 5), feature_group_count=6), (3, 6, 6, 6)),
        (nn.Conv(4, (3, 3), padding=[(-1, 0), (0, 2)], input_dilation=(2, 1)), (3, 6, 6, 2)),
        (nn.Conv(4, (2, 3), 2, padding="SAME_LOWER"), (3, 7, 6, 2)),
        (nn.LayerNorm(), (4, 5)),
        (nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 3)), (4, 5, 3, 2)),
        (nn.LayerNorm(use_bias=False), (4, 3, 5)),
        (nn.RMSNorm(), (4, 3, 5)),
        (nn.GroupNorm(2), (4, 5, 5, 6)),
        (nn.InstanceNorm(), (4, 5, 5, 6)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else type(value).__name__,
)
def test_layers(layer, shape):
    _check(layer, shape, chunk=1)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(
    "layer, shape, cut_out",
    [
        (nn.Conv(8, (3, 3), padding=1), (4, 8, 8, 3), 8 * 10 * (9 + 24)),
        (nn.Conv(12, (5, 5), feature_group_count=3), (4, 6, 6, 6), 36 * 150),
        (nn.Conv(5, (3,), strides=2), (4, 40, 3), 21 * (3 + 10)),
        (nn.Dense(2), (4, 40, 2), 40 * 2),
    ],
    ids=["convolution", "grouped", "one axis", "dense"],
)
def test_rows_of_some_samples_at_a_time(monkeypatch, layer, shape, cut_out, together):
    """In a loop over parts of the batch, as where the patches of the whole batch are too many to be cut in one go."""
    counts = []
    rows_of = forming.Former.rows

    def spy(former, a, d):
        counts.append(len(a))
        return rows_of(former, a, d)

    monkeypatch.setattr(forming, "TOGETHER", together * cut_out)
    monkeypatch.setattr(forming.Former, "rows", spy)
    _check(layer, shape, chunk=2)
    assert min(counts) == together


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv(8, (3, 3), padding=1), (4, 8, 8, 3)),
        (nn.Conv(24, (3, 3), 2), (4, 6, 6, 2)),
        (nn.Conv(8, (3, 3), feature_group_count=2), (3, 6, 6, 4)),
        (nn.Conv(6, (3, 3), feature_group_count=3), (3, 6, 6, 3)),
        (nn.Dense(6), (4, 40, 2)),
    ],
    ids=["shifts", "patches", "grouped", "depthwise", "dense"],
)
def test_rows_in_strips(monkeypatch, layer, shape):
    """Formed and multiplied in parts, as where the rows of the whole batch are too many for the caches."""
    counts = []
    outer = forming.outer

    def spy(rows):
        counts.append(rows.shape[1])
        return outer(rows)

    monkeypatch.setattr(forming, "STRIP_ENTRIES", 1)
    monkeypatch.setattr(forming, "STRIP_WIDTH", 2)
    monkeypatch.setattr(forming, "outer", spy)
    _check(layer, shape, chunk=2)
    (use, *_) = _uses(layer, shape)
    assert min(counts) < use.rule.cost().row_size


def test_the_cheaper_form_is_chosen():
    pairs = nn.Conv(64, (3, 3)), (4, 2, 2, 64)
    rows = nn.Conv(8, (3, 3), padding=1), (4, 8, 8, 3)
    assert _form(*pairs) == "pairs"
    assert _form(*rows) == "rows"


def test_a_chunk_bounds_what_is_formed_at_once(monkeypatch):
    sizes, form = [], forming.form_rows

    def spy(*args):
        sizes.append(form(*args).size)
        return form(*args)

    monkeypatch.setattr(forming, "form_rows", spy)
    layer, x = nn.Conv(10, (3, 3), use_bias=False), jnp.ones((8, 6, 6, 4))
    rule, d = _uses(layer, x.shape)[0].rule, jnp.ones((8, 6, 6, 10))
    whole = rule.gram([x], [d], None)
    assert sizes == [8 * 360]
    for chunk in (1, 3):
        sizes.clear()
        np.testing.assert_allclose(rule.gram([x], [d], chunk), whole, rtol=1e-6)
        assert max(sizes) <= chunk * 360
        assert sum(sizes) == 8 * 360


def _uses(layer, shape):
    x = jnp.ones(shape)
    params = layer.init(jax.random.key(0), x)["params"]

    def apply(variables, images, train, key):
        return layer.apply(variables, images), {}

    # The logits' shape is no matter as long as nothing is computed.
    return by_uses.problem(apply, LOSS, {"params": params}, x, jnp.zeros(len(x), int), None, True).uses


def _form(layer, shape):
    return _uses(layer, shape)[0].rule.cost().form
