"""Populations: each member is the run that it is alone, whatever the others do and however it is cut."""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest
from platforms import near

import hardjax as hj
from hardjax.choose.selection import HardBatches
from hardjax.training import checkpoint, population_loop
from hardjax.training.record import HISTORY

BASE = hj.TrainConfig(model_options={"widths": [6]}, epochs=3, batch_size=16, learning_rate=0.05)
OWN = (
    {"seed": 3, "learning_rate": 0.1},
    {"seed": 4, "weight_decay": 1e-3, "momentum": 0.5},
    {"seed": 3, "schedule": hj.Schedule("step", warmup=0.3)},
)
MAP, VMAP = hj.Performance(population="map"), hj.Performance(population="vmap")
CLOCKS = {"seconds"}


def _members(**settings):
    return [dataclasses.replace(BASE, **(settings | own)) for own in OWN]


def _reported(result):
    kept = ("diverged", "bad_steps", "first_bad_step", "backprops", "final_test_top1", "end")
    return {
        "history": {name: column for name, column in result.history.items() if name not in CLOCKS},
        "summary": {name: result.summary[name] for name in kept},
        "state": checkpoint.on_host(result.state),
        "replays": result.replays,
        "drops": result.drop_counts,
        "measured": result.measurements,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selection": HardBatches(0.4), "augmentation": "standard", "batch_size": 8},
        {"trimming": hj.trimming.Trimming(1.0, 0.4)},
        {"measure": hj.fisher.FisherMeasure(every=4), "batch_size": 8, "validation": 0.2},
        {"batch_plan": hj.batch_plan.BatchPlan("8-16"), "batch_size": 128, "optimizer": "adam"},
    ],
    ids=("plain", "replay", "trimmed", "measured", "staged"),
)
def test_a_member_is_its_run_to_the_bit(tiny, settings):
    configs = _members(**settings)
    found = hj.run_population(configs, dataset=tiny, performance=MAP, progress=False)
    for config, result in zip(configs, found, strict=True):
        alone = hj.run(config, dataset=tiny, progress=False)
        assert result.config == alone.config
        chex.assert_trees_all_equal(_reported(result), _reported(alone))


def test_all_at_once_is_equal_to_rounding(tiny):
    configs = _members(selection=HardBatches(0.4), batch_size=8)
    for config, result in zip(
        configs, hj.run_population(configs, dataset=tiny, performance=VMAP, progress=False), strict=True
    ):
        alone = hj.run(config, dataset=tiny, progress=False)
        np.testing.assert_array_equal(result.replays, alone.replays)
        assert result.history["samples_hash"].tolist() == alone.history["samples_hash"].tolist()
        chex.assert_trees_all_close(result.state.params, alone.state.params, **near(rtol=1e-3, atol=1e-5))
        chex.assert_trees_all_close(result.history["test_loss"], alone.history["test_loss"], **near(rtol=1e-3))
