"""Rows and Gram matrices of losses other than cross-entropy, and of outputs with more axes than classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tasks

import hardjax as hj
from hardjax.choose import losses
from hardjax.fisher import by_uses, definition, gram, jacobian
from hardjax.models.apply import init_variables, make_apply


def far_off(outputs, targets):
    return jax.nn.relu(jnp.abs(outputs - targets) - 0.1).sum(-1)


def setting(model, dataset, samples=5):
    images = np.asarray(dataset.train.images[:samples], np.float64) / 255
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), init_variables(model, jax.random.key(0), images.shape[1:])
    )
    return variables, images, np.asarray(dataset.train.labels[:samples])


def one_at_a_time(model, loss_of, variables, images, labels, train=True):
    """(B, P) rows, a `jax.grad` of each sample's own loss."""
    apply = make_apply(model)

    def loss(params, i):
        outputs = apply({**variables, "params": params}, images[i][None], train)[0][0]
        return loss_of(outputs, labels[i])

    rows = [jax.grad(loss)(variables["params"], i) for i in range(len(images))]
    return np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(row)]) for row in rows])


def pixels(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


CASES = {
    "squares": (tasks.Values(), tasks.regression(), "squared_error", lambda o, t: jnp.square(o - t).mean()),
    "of one's own": (tasks.Values(), tasks.regression(), far_off, far_off),
    "pixels": (tasks.Pixels(norm=False), tasks.segmentation(), losses.CROSS_ENTROPY, pixels),
}


@pytest.mark.parametrize("case", CASES)
def test_a_gram_is_that_of_each_samples_own_gradient(case):
    model, dataset, loss, loss_of = CASES[case]
    with jax.enable_x64(True):
        inputs = setting(model, dataset)
        rows = one_at_a_time(model, loss_of, *inputs)
        for kind in ("contribution", "frozen", "coupled"):
            found = np.asarray(gram(model, *inputs, rows=kind, loss=loss))
            np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-9, atol=1e-12 * np.trace(found))


@pytest.mark.ci
@pytest.mark.parametrize("rows", ["contribution", "frozen"])
def test_pixels_under_batch_norm(rows):
    model = tasks.Pixels()
    with jax.enable_x64(True):
        inputs = setting(model, tasks.segmentation())
        found = jacobian(model, *inputs, rows=rows)
        flat = np.concatenate([found[name].reshape(5, -1) for name in sorted(found)], 1)
        apply, loss = make_apply(model), losses.resolve(losses.CROSS_ENTROPY)
        if rows == "frozen":
            expected = one_at_a_time(model, pixels, *inputs, train=False)
            np.testing.assert_allclose(flat @ flat.T, expected @ expected.T, rtol=1e-9)
            return
        defined = definition.contribution_rows(apply, loss, *inputs)
        expected = np.concatenate([np.reshape(leaf, (5, -1)) for leaf in jax.tree.leaves(defined)], 1)
        np.testing.assert_allclose(flat @ flat.T, expected @ expected.T, rtol=1e-9)
        variables, images, labels = inputs

        def summed(params):
            return pixels(apply({**variables, "params": params}, images, True)[0], labels) * 5

        whole = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.grad(summed)(variables["params"]))])
        np.testing.assert_allclose(np.square(flat.sum(0)).sum(), np.square(whole).sum(), rtol=1e-9)


def test_a_loss_of_its_own_is_checked_with_networks_of_the_zoo(monkeypatch):
    """Rows of another loss than the one given are noticed."""
    inputs, problem = setting(hj.models.create("mlp", 2, widths=[4]), tasks.regression()), by_uses.problem

    def forgetful(apply, loss, *rest):
        return problem(apply, losses.resolve("squared_error"), *rest)

    monkeypatch.setattr(by_uses, "problem", forgetful)
    with pytest.raises(ValueError, match="rows are not those of the gradient"):
        gram(hj.models.create("mlp", 2, widths=[4]), *inputs, loss=far_off)
