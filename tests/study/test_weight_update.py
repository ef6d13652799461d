"""The measurement of P4's argument (`experiments/weight_update.py`) against its definition, sample by sample."""

import importlib.util
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import hardjax as hj
from hardjax.data.augment import preprocess
from hardjax.training.setting import prepare

PATH = Path(__file__).parents[2] / "experiments" / "weight_update.py"
RATE = 2.0**-6


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("weight_update", PATH)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def config(**settings):
    return hj.TrainConfig(
        model_options={"widths": [5]}, batch_size=16, base_learning_rate=RATE, optimizer="sgd", **settings
    )


@pytest.fixture
def given(tiny):
    """(update made by the script, gradient of one sample as a flat float64 array, parameters)."""
    setting = prepare(config(), tiny)
    state, train = setting.init_state(), setting.splits["train"]
    images = preprocess(train.images, train.mean, train.std, setting.recipe.augmentation)

    @jax.jit
    def one(params, index):
        def loss(params):
            logits, _ = setting.recipe.apply({"params": params, "batch_stats": {}}, images[index][None], True)
            return -jax.nn.log_softmax(logits)[0, train.labels[index]]

        return jax.flatten_util.ravel_pytree(jax.grad(loss)(params))[0]

    return setting.recipe.apply, images, train.labels, one, state.params


@pytest.mark.ci
def test_variance_and_distance_are_those_of_the_definition(script, given):
    apply, images, labels, one, params = given
    update = script.make_update(apply, {}, images, labels, RATE)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    batches = np.stack([np.random.default_rng(draw).permutation(70)[:12] for draw in range(5)])

    def change(flat, indices):
        return -RATE * np.sum([np.asarray(one(unravel(flat), index), np.float64) for index in indices], 0)

    updates = np.stack([change(flat, batch) for batch in batches])
    np.testing.assert_allclose(script.variance(update, params, batches), updates.var(0, ddof=1).sum(), rtol=1e-4)
    distances, lengths = script.apart(update, params, batches.reshape(5, 3, 4))
    for batch, once, distance, length in zip(batches, updates, distances, lengths, strict=True):
        several = np.asarray(flat, np.float64)
        for part in batch.reshape(3, 4):
            several = several + change(several.astype(np.float32), part)
        np.testing.assert_allclose(length, np.linalg.norm(once), rtol=1e-4)
        np.testing.assert_allclose(distance, np.linalg.norm(several - flat - once), rtol=1e-3)


@pytest.mark.ci
def test_rows_of_a_small_study(script, tiny, monkeypatch):
    monkeypatch.setattr(script, "STEPS", (2, 3))
    monkeypatch.setattr(script, "OF", 8)
    found = [
        row
        for seed in range(2)
        for row in script.rows(config(seed=seed), tiny, epochs=(0, 2), sizes=(1, 2, 4), draws=48)
    ]
    assert [(row["seed"], row["epochs"]) for row in found] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert found[0]["train_loss"] is None and found[1]["train_loss"] > 0
    for row in found:
        assert list(row["variance"]) == [1, 2, 4] and 0.5 < row["exponent"] < 1.5
        assert list(row["apart"]) == [2, 3] and 0 < row["apart"][2] < row["apart"][3] < 1
    linear, stale = script.verdicts(found)
    assert [row["epochs"] for row in linear] == [0, 2] and [row["steps"] for row in stale] == [2, 3]


def test_a_state_of_a_run_that_was_cut_short_is_none(script, tiny, monkeypatch):
    cut = types.SimpleNamespace(summary={"interrupted": True}, state=None, history={"full_train_loss": [1.0]})
    monkeypatch.setattr(script.hj, "run", lambda *given, **more: cut)
    with pytest.raises(KeyboardInterrupt):
        list(script.rows(config(), tiny, epochs=(1,)))


def test_the_rule(script):
    assert script.exponent((1, 2, 4), (3.0, 12.0, 48.0)) == pytest.approx(2)

    def row(seed, epochs, exponent, apart):
        noise = 0.001 * seed
        apart = {str(count): apart + noise * apart for count in script.STEPS}
        return {"seed": seed, "epochs": epochs, "exponent": exponent + noise, "apart": apart}

    found = []
    for seed in range(3):
        found += [row(seed, 0, 1.0, 0.4), row(seed, 1, 1.2, 0.1 + 0.09 * seed), row(seed, 16, 1.05, 0.1 * 1.001**seed)]
    linear, stale = script.verdicts(found)
    assert [one["verdict"] for one in linear] == ["linear", "not linear", "open"]
    assert [one["verdict"] for one in stale] == ["further apart early"] * 4 + ["open"] * 4
    assert stale[0]["ratio"] == pytest.approx(4, rel=1e-2) and stale[0]["n"] == 3
    reversed_states = [one | {"epochs": 16 - one["epochs"]} for one in found if one["epochs"] != 1]
    assert {one["verdict"] for one in script.verdicts(reversed_states)[1]} == {"further apart late"}
