"""Names that other programs rely on: what stands in their scripts keeps working, signatures included."""

import dataclasses
import inspect
import re

import jax
import numpy as np
import pytest

import hardjax as hj
from hardjax.cli import main


def _takes(fn, *positional, **keywords):
    """The names come first and in this order, and the keywords have these defaults."""
    parameters = inspect.signature(fn).parameters
    assert list(parameters)[: len(positional)] == list(positional), fn
    for name, default in keywords.items():
        assert parameters[name].default == default, (fn, name)


def test_functions_take_what_they_took():
    plain = dict(dataset=None, model=None, variables=None, performance=None, output=None, progress=True)
    _takes(hj.run, "config", **plain)
    keywords = {name for name, p in inspect.signature(hj.run).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords >= set(plain)
    _takes(hj.data.load, "name", "data_dir", data_dir=None)
    _takes(hj.data.Dataset.from_arrays, "train_images", "train_labels", "test_images", "test_labels")
    _takes(hj.models.create, "name", "num_classes", num_classes=10)
    _takes(hj.models.from_torch, "name", "state_dict", "num_classes", num_classes=10)
    _takes(hj.trimming.trimmed_mean, "losses", "keep_count")
    _takes(hj.fisher.gram, "model", "variables", "images", "labels", rows="contribution", method="layers")
    _takes(hj.fisher.measures, "eigenvalues", "learning_rate", "batch_size")
    _takes(hj.testing.assert_selection_is_sound, "strategy", num_slots=12)
    for function in (hj.models.create, hj.models.from_torch):
        assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()), function
    assert hj.fisher.ROWS and set(hj.fisher.ROWS) == {"contribution", "coupled", "frozen"}
    assert set(hj.fisher.METHODS) >= {"layers", "vmap"}
    assert {"mlp", "resnet8", "resnet20", "resnet18", "densenet121"} <= set(hj.models.names())


def test_settings_are_frozen_dataclasses_that_survive_json():
    names = {f.name for f in dataclasses.fields(hj.TrainConfig)}
    assert names >= {
        *("dataset", "data_dir", "validation", "model", "model_options", "epochs", "batch_size", "selection"),
        *("trimming", "optimizer", "learning_rate", "base_learning_rate", "schedule", "augmentation", "precision"),
        *("measure", "seed"),
    }
    config = hj.TrainConfig(
        selection=hj.selection.HardBatches(0.2), trimming=hj.trimming.Trimming(end=0.5), model_options={"widths": [4]}
    )
    assert hj.TrainConfig.from_dict(config.to_dict()) == config
    for settings in (config, hj.Performance()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, dataclasses.fields(settings)[0].name, None)


def test_strategies_by_name():
    made = [hj.selection.AllBatches(), hj.selection.AllBatches(fixed=True), hj.selection.HardBatches(delta=0.5)]
    made += [hj.selection.RandomBatches(delta=0.5), hj.selection.HardSamples(delta=0.5)]
    assert all(isinstance(strategy, hj.selection.Selection) for strategy in made)
    assert float(hj.trimming.trimmed_mean(jax.numpy.array([1.0, 4.0, 2.0]), 2)) == 3.0


def test_a_run_hands_back_what_scripts_read(tiny):
    config = hj.TrainConfig(epochs=2, batch_size=16, model_options={"widths": [4]})
    result = hj.run(config, dataset=tiny, progress=False)
    assert isinstance(result, hj.RunResult) and isinstance(result.config, hj.TrainConfig)
    assert result.history and all(isinstance(values, np.ndarray) for values in result.history.values())
    assert {len(values) for values in result.history.values()} == {2}  # one entry a test point
    assert result.state.params and result.summary["seconds_per_step"] > 0


def test_the_command_line_has_its_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    for command in ("train", "compare", "show", "measure", "data", "models"):
        assert re.search(rf"\b{command}\b", printed), command
