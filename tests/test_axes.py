"""An axis is declared once: an imaginary one is seen in the configuration's JSON, the command line and a table."""

from dataclasses import dataclass

import numpy as np
import pytest

import hardjax as hj
from hardjax import _settings
from hardjax._axis import Axis, axes, axis
from hardjax._validate import Refusal
from hardjax.cli import options, output, parsing
from hardjax.cli.train import Train


@dataclass(frozen=True)
class Shake:
    """An imaginary axis.

    Attributes:
        strength: how hard to shake, in [0, 1). And more that help does not show.
        gently: without a sound.
    """

    strength: float
    gently: bool = False

    def __post_init__(self) -> None:
        _settings.settle(self)


SHAKE = Axis(
    Shake,
    flags={"shake": "strength", "shake_gently": "gently"},
    switch="shake",
    columns=lambda shake, history: {"shaken": f"{shake.strength:g} to {history['epoch'][-1]:g}"},
)


@dataclass(frozen=True)
class Config(hj.TrainConfig):
    shake: Shake | None = axis(SHAKE)  # the one line


@pytest.fixture
def parsed(monkeypatch):
    monkeypatch.setattr(options, "TrainConfig", Config)
    return lambda *words: parsing.parse(options.with_axes(Train), "train", list(words)).config()


def test_it_is_read_and_written_as_json():
    config = Config(shake=Shake(0.5))
    assert config.to_dict()["shake"] == {"strength": 0.5, "gently": False}
    assert Config.from_dict(config.to_dict()) == config and Config.from_dict({}).shake is None
    for wrong in ({"strength": "hard"}, {"strenght": 0.5}, {}, "hard", {"strength": 0.5, "gently": "false"}):
        with pytest.raises(Refusal, match=r"streng|Shake|gently"):
            Config.from_dict({"shake": wrong})


def test_it_is_asked_for_on_the_command_line(parsed, capsys):
    assert parsed("--shake", "0.5", "--shake-gently").shake == Shake(0.5, gently=True) and parsed().shake is None
    with pytest.raises(Refusal, match=r"--shake-gently goes with --shake, how hard to shake, in \[0, 1\)"):
        parsed("--shake-gently")
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "shake options" in shown and "how hard to shake, in [0, 1)" in shown and "And more" not in shown


def test_it_stands_in_a_table(capsys):
    columns = Config(shake=Shake(0.5)).columns({"epoch": np.arange(4)})
    output.table("run", [columns])
    assert "shaken" in capsys.readouterr().out and Config().columns({}) == {}


def test_the_axes_of_today():
    assert list(axes(hj.TrainConfig)) == ["selection", "trimming", "batch_plan", "schedule", "augmentation", "measure"]
    history = {"keep_fraction": np.array([1.0, 0.2]), "C_K": np.array([3.0, 4.0]), "L_K": np.array([0.1, 0.2])}
    config = hj.TrainConfig(trimming=hj.trimming.Trimming(), measure=hj.fisher.FisherMeasure())
    assert config.columns(history) == {"kept, first to last epoch": "1 to 0.2", "C_K": 4.0, "L_K": 0.2}


@pytest.mark.parametrize("name", list(axes(hj.TrainConfig)))
def test_flags_left_alone_give_the_default(name):
    declared = axes(hj.TrainConfig)[name]
    setting = declared.from_flags({option.flag: option.default for option in declared.options("")})
    default = getattr(hj.TrainConfig(), name)
    assert setting == (hj.Augmentation() if default == "none" else default)
    assert all(option.help for option in declared.options("which"))


def test_augmentation_that_fits_the_data_is_filled_in(tiny):
    from hardjax.data import augment

    flags = {flag: default for flag, _, default, _ in augment.AXIS.options("")}
    asked = augment.AXIS.from_flags(flags | {"augmentation": "standard", "frame": 9, "place": "random"})
    assert augment.resolve(asked, tiny) == hj.Augmentation(pad=1, flip=False, frame=9, place="random")
    with pytest.raises(Refusal, match="pad=None, flip=None as `resolve` fills them in"):
        augment.preprocess(tiny.train.images[:2], tiny.mean, tiny.std, asked)
