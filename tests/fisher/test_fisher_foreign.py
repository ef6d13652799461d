"""Networks of any make, as pure functions: rows equal their definition in float64, whatever the pieces."""

import blocks
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardjax.fisher import by_uses, rules
from hardjax.fisher.names import named_leaves

RELATIVE = 1e-9
QUICK = ("attention", "batch_norm", "merged")


def _check(names, seed=0, chunk=None):
    network, *setting, labels = blocks.make(names, seed)
    coupled = bool(blocks.COUPLED & set(names))

    def everything(variables, images):
        problem = by_uses.problem(blocks.apply_of(network), variables, images, labels, None, True)
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
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(blocks.PIECES)), min_size=1, max_size=3), st.booleans(), st.integers(0, 9))
def test_random_networks(pieces, norm, seed):
    _check([*pieces[:1], "batch_norm", *pieces[1:]] if norm else pieces, seed)


@pytest.mark.parametrize("piece", ["lstm", pytest.param("scanned_layers", marks=pytest.mark.ci)])
def test_loops_are_pulled_back_sample_by_sample(piece, monkeypatch):
    network, variables, images, labels = blocks.make([piece])
    problem = by_uses.problem(blocks.apply_of(network), variables, images, labels, None, True)
    wholes = [use.rule for use in problem.uses if isinstance(use.rule, rules.Whole)]
    assert wholes and all(rule.has_single for rule in wholes)
    monkeypatch.setattr(rules.Whole, "has_single", False)
    _check([piece])
