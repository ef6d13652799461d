"""Networks of any make, as pure functions: rows equal their definition in float64, whatever the pieces."""

import re

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardjax import fisher
from hardjax._validate import Refusal
from hardjax.choose import losses
from hardjax.fisher import by_uses, rules
from hardjax.fisher.names import named_leaves

LOSS = losses.resolve(losses.CROSS_ENTROPY)

RELATIVE = 1e-9
QUICK = ("attention", "batch_norm", "merged")


def _check(names, seed=0, chunk=None):
    network, *setting, labels = blocks.make(names, seed)
    coupled = bool(blocks.COUPLED & set(names))

    def everything(variables, images):
        problem = by_uses.problem(blocks.apply_of(network), LOSS, variables, images, labels, None, True)
        definition = blocks.defined if coupled else blocks.defined_alone
        expected = named_leaves(definition(network, variables, images, labels))
        return expected, *by_uses.rows_and_grams(problem), by_uses.gram(problem, chunk)

    with jax.enable_x64(True):
        found = jax.jit(everything)(*setting)
        expected, rows, grams, total = jax.tree.map(np.asarray, found)
    flat = {name: row.reshape(len(row), -1) for name, row in expected.items()}
    products = {name: row @ row.T for name, row in flat.items()}
    scale = max(np.abs(row).max() for row in expected.values())
    assert rows.keys() == expected.keys() == grams.keys()
    for name, row in expected.items():
        np.testing.assert_allclose(rows[name], row, rtol=RELATIVE, atol=RELATIVE * scale)
        np.testing.assert_allclose(grams[name], products[name], rtol=RELATIVE, atol=RELATIVE * scale**2)
    whole = sum(products.values())
    np.testing.assert_allclose(total, whole, rtol=RELATIVE, atol=RELATIVE * np.abs(whole).max())


@pytest.mark.parametrize(
    "piece", [piece if piece in QUICK else pytest.param(piece, marks=pytest.mark.ci) for piece in blocks.PIECES]
)
def test_a_piece_between_dense_layers(piece):
    _check([piece], chunk=2)


@pytest.mark.ci
@pytest.mark.parametrize("piece", blocks.PIECES)
def test_a_piece_before_and_behind_batch_norm(piece):
    _check([piece, "batch_norm", piece])


@pytest.mark.ci
@settings(max_examples=16, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(blocks.PIECES)), min_size=1, max_size=3), st.booleans(), st.integers(0, 9))
def test_random_networks(pieces, norm, seed):
    _check([*pieces[:1], "batch_norm", *pieces[1:]] if norm else pieces, seed)


@pytest.mark.parametrize("piece", ["lstm", pytest.param("scanned_layers", marks=pytest.mark.ci)])
def test_loops_are_pulled_back_sample_by_sample(piece, monkeypatch):
    network, variables, images, labels = blocks.make([piece])
    problem = by_uses.problem(blocks.apply_of(network), LOSS, variables, images, labels, None, True)
    wholes = [use.rule for use in problem.uses if isinstance(use.rule, rules.Whole)]
    assert wholes and all(rule.has_single for rule in wholes)
    monkeypatch.setattr(rules.Whole, "has_single", False)
    _check([piece])


def _normalised_layers(w, x):
    """Batch statistics inside a loop over layers."""
    return jax.lax.scan(lambda x, w: (jnp.tanh((x - x.mean(0)) @ w), None), x, w)[0]


def _pairs(w, x):
    """How alike samples are, weighed by a parameter."""
    return jnp.einsum("btc,stc->bs", x, x)[..., None, None] * w[0] @ x.mean((0, 1))


def _shuffled(w, x):
    """The samples in another order for one layer (shuffled batch norm, without the norm)."""
    order = np.array([2, 0, 3, 1])[np.arange(len(x)) % 4] + np.arange(len(x)) // 4 * 4
    return jnp.tanh(x[order] @ w[0])[np.argsort(order)]


def _repeated_statistics(w, x):
    """Statistics of sub-batches, spread over their samples by an index."""
    return (x - jnp.repeat(x.reshape(-1, 2, *x.shape[1:]).mean(1) @ w[0], 2, 0)) @ w[1]


def _mean_in_a_loop(w, x):
    return x + jax.lax.scan(lambda c, w: (c + jnp.tanh(x @ w).mean(0), None), jnp.zeros(x.shape[1:], x.dtype), w)[0]


@pytest.mark.parametrize(
    "piece, line",
    [
        (_normalised_layers, "parameter w is used inside scan, which couples samples."),
        (_pairs, "parameter w meets in mul a batch whose samples are out of order or in pairs."),
        pytest.param(_shuffled, "rows are not those of the gradient of apply, by ", marks=pytest.mark.ci),
        pytest.param(_repeated_statistics, "parameter w meets", marks=pytest.mark.ci),
        (_mean_in_a_loop, "parameter w meets the batch in scan, which mixes its samples."),
    ],
)
def test_what_mixes_samples_and_parameters_is_refused_by_name(piece, line):
    def apply(variables, images, train, key):
        return piece(variables["params"]["w"], images).reshape(len(images), -1)[:, :3], {}

    rng = np.random.default_rng(0)
    variables = {"params": {"w": rng.normal(size=(3, 4, 4)).astype(np.float32)}}
    images, labels = rng.normal(size=(4, 4, 4)).astype(np.float32), np.arange(4) % 3
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        fisher.gram(apply, variables, images, labels)
    assert str(caught.value).startswith('rows="coupled" takes any network: ') and "\n" not in str(caught.value)
    assert fisher.gram(apply, variables, images, labels, rows="coupled").shape == (4, 4)


def test_a_function_with_batch_norm_and_attention_needs_no_framework():
    network, *setting = blocks.make(["attention", "batch_norm"])
    variables, images, labels = (*jax.tree.map(np.float32, setting[:2]), setting[2])
    rows = named_leaves(jax.jit(lambda v, x: blocks.defined(network, v, x, labels))(variables, images))
    flat = np.concatenate([np.asarray(row).reshape(4, -1) for row in rows.values()], 1)
    for method in fisher.METHODS:
        gram = fisher.gram(blocks.apply_of(network), variables, images, labels, method=method)
        np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-4, atol=1e-4 * np.abs(gram).max())
