import numpy as np
import pytest

import hardjax as hj
from hardjax.choose.selection import HardBatches


def test_json_round_trip():
    config = hj.TrainConfig(
        selection=HardBatches(0.2),
        schedule=hj.Schedule("step", (0.3,), 0.5),
        augmentation=hj.Augmentation(pad=2),
        model_options={"widths": [3]},
    )
    assert hj.TrainConfig.from_dict(config.to_dict()) == config


def test_title():
    assert hj.TrainConfig(model_options={"norm": "batch"}).title == "mlp norm=batch on digits"


def test_base_learning_rate_is_per_sample_of_the_batch():
    assert hj.TrainConfig(base_learning_rate=0.001, batch_size=64).peak_learning_rate == 0.064
    assert hj.TrainConfig().peak_learning_rate == 0.005


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(epochs=0), "epochs=0 to be a whole number of at least 1"),
        (dict(batch_size=1.5), "batch_size=1.5"),
        (dict(seed=-1), "seed=-1"),
        (dict(seed=2**32), "seed=4294967296 below 2\\^32"),
        (dict(selection=None), "selection=None to be a strategy"),
        (dict(model_options={"dtype": np.float32}), "to be plain JSON"),
        (dict(learning_rate=0.1, base_learning_rate=0.1), "not both"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(optimizer="adamm"), "did you mean 'adam'"),
        (dict(precision="low"), "precision"),
        (dict(validation=1.0), r"validation=1.0 in \[0, 1\)"),
        (dict(selection="hard-batches"), "HardBatches"),
        (dict(test_every="step"), "test_every"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        hj.TrainConfig(**settings)


def test_unknown_settings_offer_the_closest():
    with pytest.raises(ValueError, match="Unknown setting 'epoch'; did you mean 'epochs'"):
        hj.TrainConfig.from_dict({"epoch": 3})
