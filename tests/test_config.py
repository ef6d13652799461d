"""Settings: JSON and back, and what is refused, by type before by value."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.choose.selection import AllBatches, HardBatches
from hardjax.choose.trimming import Trimming
from hardjax.fisher import FisherMeasure


def test_json_round_trip():
    config = hj.TrainConfig(
        selection=HardBatches(0.2),
        trimming=Trimming(1.0, 0.2),
        measure=FisherMeasure(50),
        schedule=hj.Schedule("step", (0.3,), 0.5),
        augmentation=hj.Augmentation(pad=2),
        model_options={"widths": (3,)},
    )
    assert hj.TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_scalars_of_numpy_and_paths_become_plain_python():
    config = hj.TrainConfig(
        seed=np.int64(1),
        epochs=np.int32(3),
        data_dir=Path("somewhere"),
        learning_rate=np.float32(0.5),
        momentum=jnp.float32(0.25),
        weight_decay=0,
        evaluate_train=np.bool_(True),
        dataset=np.str_("digits"),
        model_options={"widths": np.array([3, 4]), "deep": {"rate": np.float32(0.5), "from": Path("x")}},
        selection=HardBatches(np.float32(0.5)),
        schedule=hj.Schedule("step", decay_at=np.array([0.25, 0.5]), warmup=np.float64(0.1)),
        measure=FisherMeasure(every=np.int64(2)),
    )
    plain = json.loads(json.dumps(config.to_dict()))
    assert hj.TrainConfig.from_dict(plain) == config
    assert plain["model_options"] == {"widths": [3, 4], "deep": {"rate": 0.5, "from": "x"}}
    assert (plain["data_dir"], plain["seed"], plain["schedule"]["decay_at"]) == ("somewhere", 1, [0.25, 0.5])
    for settings in (config, config.selection, config.schedule, config.measure):
        values = [getattr(settings, field.name) for field in dataclasses.fields(settings)]
        assert all(type(value).__module__.split(".")[0] in ("builtins", "hardjax") for value in values)
    assert hj.Performance(gram_chunk=np.int64(3)) == hj.Performance(gram_chunk=3)


def test_options_changed_afterwards_change_nothing():
    options = {"widths": [3]}
    config = hj.TrainConfig(model_options=options)
    options["widths"].append(4)
    assert config.model_options == {"widths": [3]}


def test_title():
    assert hj.TrainConfig(model_options={"norm": "batch"}).title == "mlp norm=batch on digits"


def test_base_learning_rate_is_per_sample_of_the_batch():
    assert hj.TrainConfig(base_learning_rate=0.001, batch_size=64).peak_learning_rate == 0.064
    assert hj.TrainConfig().peak_learning_rate == 0.005


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(epochs=0), "epochs=0 to be a whole number of at least 1"),
        (dict(batch_size=1.5), "batch_size=1.5 to be a whole number"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**32), "seed=4294967296 below 2\\^32"),
        (dict(selection=None), "selection=None to be a strategy"),
        (dict(model_options={"dtype": np.float32}), "to be plain JSON"),
        (dict(model_options={"rate": float("nan")}), "to be plain JSON"),
        (dict(model_options={1: 2}), "to be plain JSON"),
        (dict(model_options=["norm"]), "to be plain JSON"),
        (dict(learning_rate=0.1, base_learning_rate=0.1), "not both"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        # As a float32 these are 0, 0, infinite and infinite.
        (dict(learning_rate=1e-46), "learning_rate=1e-46 to be 0 or of a size from 1.2e-38 to 3.4e38"),
        (dict(base_learning_rate=1e-41), "learning_rate=1.28e-39"),
        (dict(learning_rate=1e39), "learning_rate=1e\\+39"),
        (dict(weight_decay=1e39), "weight_decay=1e\\+39"),
        (dict(optimizer="adamm"), "did you mean 'adam'"),
        (dict(precision="low"), "precision"),
        (dict(validation=1.0), r"validation=1.0 in \[0, 1\)"),
        (dict(selection="hard-batches"), "HardBatches"),
        (dict(selection=AllBatches), "to be a strategy"),
        (dict(test_every="step"), "test_every"),
        (dict(augmentation="standrd"), "did you mean 'standard'"),
        (dict(evaluate_train="no"), "evaluate_train='no' to be True or False"),
        (dict(evaluate_train=1), "evaluate_train=1 to be True or False"),
        (dict(epochs="3"), "epochs='3' to be a whole number"),
        (dict(epochs=3.0), "epochs=3.0 to be a whole number"),
        (dict(epochs=True), "epochs=True to be a whole number"),
        (dict(momentum="0.9"), "momentum='0.9' to be a number"),
        (dict(weight_decay=False), "weight_decay=False to be a number"),
        (dict(learning_rate=[0.1]), "to be a number or None"),
        (dict(trimming={"end": 0.2}), "to be Trimming or None"),
        (dict(measure=50), "measure=50 to be FisherMeasure or None"),
        (dict(schedule=3), "schedule=3 to be Schedule or text"),
        (dict(dataset=None), "dataset=None to be text"),
        (dict(data_dir="gs://bucket/data"), "a folder of this machine, not an address"),
        (dict(data_dir=""), "data_dir='' to be a folder"),
        (dict(validation=np.zeros(300)), r"validation=array.*\.\.\. to be a number"),
        (dict(trimming=Trimming(), batch_size=1), "batch_size=1 to be at least 2 with trimming"),
        (dict(measure=FisherMeasure(), batch_size=1), "batch_size=1 to be at least 2 with measure"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(Refusal, match=message) as caught:
        hj.TrainConfig(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "plain, message",
    [
        ({"epoch": 3}, "Unknown setting 'epoch'; did you mean 'epochs'"),
        ({"selection": {"name": "all-batches", "fixed": "false"}}, "fixed='false' to be True or False"),
        ({"selection": {"name": "hard-batches"}}, "selection 'hard-batches' with delta"),
        ({"selection": {"name": "hard-batches", "dleta": 0.2}}, "did you mean 'delta'"),
        ({"selection": {"name": "hard-batch", "delta": 0.2}}, "did you mean 'hard-batches'"),
        ({"selection": {"name": "hard-samples", "delta": "0.2"}}, "delta='0.2'"),
        ({"trimming": {"end": "0.2"}}, "end='0.2'"),
        ({"trimming": {"ende": 0.2}}, "Unknown setting of trimming 'ende'; did you mean 'end'"),
        ({"trimming": [1.0, 0.2]}, "to be Trimming or None"),
        ({"measure": {"stop_when_not_finite": True}}, "Unknown setting of measure 'stop_when_not_finite'"),
        ({"on_nan": "skip"}, "on_nan"),
        ({"on_nan": None}, "on_nan=None to be text"),
        ({"measure": {"every": 2.0}}, "every=2.0 to be a whole number"),
        ({"schedule": {"decay_at": "0.5"}}, "decay_at='0.5' to be a list of numbers"),
        ({"schedule": {"decay_at": 0.5}}, "decay_at=0.5 to be a list of numbers"),
        ({"augmentation": {"normalize": 1}}, "normalize=1 to be True or False"),
        ({"augmentation": {"pad": 1.5}}, "pad=1.5"),
        ([1], "to be a JSON object"),
    ],
)
def test_bad_json(plain, message):
    with pytest.raises(Refusal, match=message):
        hj.TrainConfig.from_dict(plain)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(donate="no"), "donate='no' to be True or False"),
        (dict(gram_chunk=2.0), "gram_chunk=2.0"),
        (dict(eval_batch_size="500"), "eval_batch_size='500'"),
        (dict(trim_programs=0), "trim_programs=0"),
        (dict(trim_path="fast"), "trim_path"),
    ],
)
def test_bad_performance(settings, message):
    with pytest.raises(Refusal, match=message):
        hj.Performance(**settings)


def test_a_truth_value_is_no_text():
    with pytest.raises(Refusal, match="fixed='false' to be True or False"):
        AllBatches(fixed="false")


def test_a_rate_is_divided_by_a_factor_below_one():
    with pytest.raises(ValueError, match=r"Expected decay_factor=10(\.0)? in \(0, 1\]"):
        hj.Schedule("step", decay_factor=10)
