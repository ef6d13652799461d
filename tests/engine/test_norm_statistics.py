"""Batch statistics estimated anew: equal to a slow loop in float64, for testing alone, whatever the run is part of."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.data.augment import preprocess
from hardjax.engine.programs import lowerable, programs_for
from hardjax.engine.recipe import functions_of
from hardjax.models import make_apply
from hardjax.study.cells import Cell
from hardjax.testing import assert_member_equals_solo, assert_resumes_everywhere
from hardjax.training.population import check_members
from hardjax.training.setting import prepare

NORMED = {"widths": [5, 4], "norm": "batch"}
BASE = hj.TrainConfig(model_options=NORMED, epochs=2, batch_size=16, learning_rate=0.1, norm_statistics="re-estimated")


def by_hand(state, dataset, part):
    """Ioffe and Szegedy's algorithm 2 for a perceptron, batch by batch in float64: means of the batches' means and of
    their unbiased variances, each batch (or part of it) normalised by itself."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.params)
    images = (np.asarray(dataset.train.images, np.float64) / 255 - dataset.mean) / dataset.std
    found = {"bn1": [], "bn2": []}
    for rows in np.asarray(state.partition):
        for start in range(0, len(rows), part):
            x = images[rows[start : start + part]].reshape(part, -1)
            for layer in (1, 2):
                x = x @ params[f"fc{layer}"]["kernel"] + params[f"fc{layer}"]["bias"]
                found[f"bn{layer}"].append((x.mean(0), x.var(0, ddof=1)))
                x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
                x = np.maximum(x * params[f"bn{layer}"]["scale"] + params[f"bn{layer}"]["bias"], 0)
    means = {name: np.mean(moments, 0) for name, moments in found.items()}
    return {name: {"mean": mean, "var": var} for name, (mean, var) in means.items()}


def trained(config, dataset, model=None):
    """(setting, state of a run that has ended)."""
    setting = prepare(config, dataset, model)
    return setting, hj.run(config, dataset=dataset, model=model, progress=False).state


@pytest.mark.parametrize("at_once", [500, 40, 1], ids=lambda count: f"{count} at once")
@pytest.mark.parametrize("options", [{}, {"norm_batch_size": 4, "norm_momentum": 0.99}, {"norm_momentum": 0}], ids=str)
def test_they_are_those_of_a_loop_in_float64(tiny, options, at_once):
    """70 samples in 5 batches of 16, of which the last wraps round."""
    setting, state = trained(dataclasses.replace(BASE, model_options=NORMED | options), tiny)
    found = setting.programs.statistics(at_once, state, setting.splits["train"])
    expected = by_hand(state, tiny, options.get("norm_batch_size", 16))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-5)
    # The running ones are others: this would not show what is left as it was.
    assert np.abs(found["bn1"]["var"] - state.batch_stats["bn1"]["var"]).max() > 1e-2


class Own(nn.Module):
    """A network of one's own, with Flax's batch norm and dropout."""

    momentum: float = 0.97
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dense(3)(x)


@pytest.mark.ci
@pytest.mark.parametrize(
    "model, alone",
    [
        (zoo.Tiny(3, norm="batch"), zoo.Tiny(3, norm="batch", norm_momentum=0)),
        (Own(), Own(momentum=0.0)),
    ],
    ids=("of the zoo", "of one's own"),
)
def test_convolutions_and_networks_of_ones_own(tiny, model, alone):
    """A network that keeps nothing of the old statistics has those of the batch; crops and flips are left out."""
    config = dataclasses.replace(BASE, augmentation="standard")
    setting, state = trained(config, tiny, model)
    apply = jax.jit(make_apply(alone), static_argnums=2)
    augmentation = setting.recipe.augmentation
    of_batches = [
        apply(state.variables, preprocess(tiny.train.images[rows], tiny.mean, tiny.std, augmentation), True)[1]
        for rows in np.asarray(state.partition)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *of_batches)
    chex.assert_trees_all_close(setting.tested(state)["batch_stats"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.ci
def test_draws_of_training_are_made(tiny):
    model = functions_of(Own(dropout=0.5))
    setting, state = trained(BASE, tiny, model)
    found, again = (setting.tested(state)["batch_stats"] for _ in range(2))
    chex.assert_trees_all_equal(found, again)
    still = prepare(BASE, tiny, Own()).tested(state)["batch_stats"]
    chex.assert_trees_all_close(found["BatchNorm_0"], still["BatchNorm_0"], rtol=1e-4, atol=1e-5)
    assert np.abs(found["BatchNorm_1"]["var"] - still["BatchNorm_1"]["var"]).max() > 1e-2


def test_they_are_tested_with_and_change_nothing_of_the_training(tiny):
    config = dataclasses.replace(BASE, validation=0.2)
    found, plain = (
        hj.run(one, dataset=tiny, progress=False)
        for one in (config, dataclasses.replace(config, norm_statistics="running"))
    )
    chex.assert_trees_all_equal(found.state, plain.state)
    np.testing.assert_array_equal(found.history["train_loss"], plain.history["train_loss"])
    setting = prepare(config, tiny)
    apply = make_apply(hj.models.create("mlp", 3, **NORMED))
    for name in ("train", "validation", "test"):
        split = setting.splits[name]
        images = preprocess(
            split.take(np.arange(len(split.labels))), split.mean, split.std, setting.recipe.augmentation
        )
        for result, variables in ((found, setting.tested(found.state)), (plain, plain.state.variables)):
            logits = apply(variables, images, False)[0]
            loss = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), split.labels].mean()
            shown = "full_train" if name == "train" else name
            np.testing.assert_allclose(result.history[f"{shown}_loss"][-1], loss, rtol=1e-4)
        assert abs(found.history["test_loss"][-1] - plain.history["test_loss"][-1]) > 1e-3


@pytest.mark.ci
def test_runs_that_are_cut_and_populations_are_tested_alike(tiny):
    config = dataclasses.replace(BASE, selection=hj.selection.HardBatches(0.4), batch_size=8)
    assert assert_resumes_everywhere(config, tiny) > 2
    assert_member_equals_solo(
        [dataclasses.replace(config, seed=seed, learning_rate=0.1 / seed) for seed in (1, 2)], tiny
    )


@pytest.mark.ci
@pytest.mark.parametrize("ahead", ["first", "background"])
def test_the_program_of_every_stage_is_compiled_ahead(tiny, ahead):
    programs_for.cache_clear()
    plan = {"batch_size": 128, "batch_plan": hj.batch_plan.BatchPlan("8-16"), "epochs": 4}
    config = dataclasses.replace(BASE, **plan)
    setting = prepare(config, tiny, performance=hj.Performance(compile_ahead=ahead))
    if ahead == "first":
        setting.compile(False)
        assert setting.programs.traces["statistics"] == 2
    hj.run(config, dataset=tiny, performance=setting.performance, progress=False)
    assert setting.programs.traces["statistics"] == 2


def test_the_setting_is_written_and_told_apart_only_where_it_is_set():
    plain = dataclasses.replace(BASE, norm_statistics="running")
    assert "norm_statistics" not in plain.to_dict() and BASE.to_dict()["norm_statistics"] == "re-estimated"
    for config in (plain, BASE):
        assert hj.TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Cell(plain, "data").key != Cell(BASE, "data").key and Cell(plain, "data").shape != Cell(BASE, "data").shape
    for pair in ((plain, BASE), (BASE, plain)):
        with pytest.raises(Refusal, match=r"share norm_statistics, got '(running|re-estimated)' and"):
            check_members(pair)


def test_the_program_is_among_those_that_are_listed(tiny):
    function, args = lowerable(BASE, tiny)["statistics"]
    found = jax.eval_shape(function, *args)
    expected = jax.eval_shape(lambda state: state.batch_stats, args[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    assert "statistics" not in lowerable(dataclasses.replace(BASE, norm_statistics="running"), tiny)


class Renormed(nn.Module):
    """Training reads the running mean, as batch renormalisation does."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (36,))
        x = x.reshape(len(x), -1)
        y = nn.Dense(3)(x - mean.value)
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return y


class Largest(nn.Module):
    """A statistic that is no average."""

    @nn.compact
    def __call__(self, x, train):
        largest = self.variable("batch_stats", "largest", jnp.zeros, (36,))
        x = x.reshape(len(x), -1)
        if train and not self.is_initializing():
            largest.value = jnp.maximum(largest.value, x.max(0))
        return nn.Dense(3)(x if train else x / (1 + largest.value))


@pytest.mark.parametrize(
    "settings, model, said",
    [
        ({"model_options": {"widths": [4]}}, None, "Expected a network with batch statistics with norm_statistics"),
        ({"model_options": {"widths": [4], "norm": "group"}}, None, "got one without"),
        ({}, Renormed(), "that are moving averages, and that no logits in training depend on"),
        ({}, Largest(), "that are moving averages"),
    ],
)
def test_what_has_no_such_statistics_is_refused(tiny, settings, model, said):
    with pytest.raises(Refusal, match=said) as caught:
        prepare(dataclasses.replace(BASE, **settings), tiny, model)
    assert "\n" not in str(caught.value)


def test_streamed_data_and_other_words_are_refused(tiny):
    with pytest.raises(Refusal, match="Expected resident data with norm_statistics='re-estimated', got tiny streamed"):
        prepare(BASE, tiny, performance=hj.Performance(stream=True))
    with pytest.raises(Refusal, match="Unknown norm_statistics 'reestimated'; did you mean 're-estimated'"):
        dataclasses.replace(BASE, norm_statistics="reestimated")
