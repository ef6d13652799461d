"""Networks of one's own by name, `package.module:Name` and `./file.py:Name`: found, made, recorded, or refused."""

import json
import re
import sys

import jax
import numpy as np
import pytest

import hardjax as hj
from hardjax import _by_name
from hardjax._validate import Refusal
from hardjax.cli import main
from hardjax.models import named

CODE = """
from dataclasses import dataclass

import flax.linen as nn
from flax import nnx
from hardjax.models import Logits


class Dense(nn.Module):
    num_classes: int
    widths: tuple = (8,)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class Held(nnx.Module):
    def __init__(self, width=8, *, num_classes, rngs):
        self.first, self.last = nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


class Plain:
    net = Dense(10)


def made(num_classes, key, width=4):
    return Held(width, num_classes=num_classes, rngs=nnx.Rngs(key))


class Two(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        return {"features": x, "scores": nn.Dense(self.num_classes)(x.reshape(len(x), -1))}


chosen = Logits(Two(), "scores")


def choosing(num_classes):
    return Logits(Two(num_classes), "scores")


class Pair(Held):
    def __call__(self, x):
        return super().__call__(x), x


def drawn(rngs, num_classes):
    return Logits(Pair(num_classes=num_classes, rngs=rngs), 0)


def broken():
    raise OSError("no weights\\nhere")


def number(**options):
    return 3


def asks(images):
    return images


instance = Dense(10)
with open(__file__ + ".txt", "a") as times:
    times.write("x")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with `nets.py`, `inner/nets.py` and modules that fail."""
    (tmp_path / "inner").mkdir()
    for place in (tmp_path, tmp_path / "inner"):
        (place / "nets.py").write_text(CODE)
    (tmp_path / "fails.py").write_text("import no_such_framework")
    (tmp_path / "stops.py").write_text("raise SystemExit('stop')")
    (tmp_path / "wrong.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("nets", "inner", "fails", "stops", "wrong"):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name, options, made",
    [
        ("nets:Dense", {"widths": [4, 4]}, "Dense"),
        ("inner.nets:instance", {}, "Dense"),
        ("nets:Plain.net", {}, "Dense"),
        ("./nets.py:Held", {"width": 4}, "./nets.py:Held"),
        ("inner/nets.py:made", {}, "inner/nets.py:made"),
        ("nets:chosen", {}, "Two"),
        ("./nets.py:choosing", {}, "Two"),
        ("nets:drawn", {}, "nets:drawn"),
    ],
)
def test_a_name_stands_for_a_network_or_for_what_makes_one(folder, name, options, made):
    network = named.create(name, 10, options)
    assert network.name == made
    one, two = (network.init(jax.random.key(k), (8, 8, 1)) for k in (0, 1))
    assert network(one, np.zeros((3, 8, 8, 1), np.float32), True)[0].shape == (3, 10)
    kernels = [max(jax.tree.leaves(v["params"]), key=np.size) for v in (one, two)]
    assert abs(kernels[0] - kernels[1]).max() > 0.01  # another seed, other weights


REFUSED = {
    "no module": ("absent:Net", {}, "There is no module 'absent' for model='absent:Net'"),
    "no module in a package": ("inner.absent:Net", {}, "There is no module 'inner.absent'"),
    "no name": ("nets:Dens", {}, "There is no 'Dens' in nets; did you mean 'Dense'?"),
    "no file": ("./absent.py:Net", {}, "Cannot read ./absent.py for model='./absent.py:Net': No such file"),
    "a file without a name": ("nets.py", {}, "Expected model='nets.py' as package.module:Name or ./file.py:Name."),
    "an empty name": ("nets:", {}, "Expected model='nets:' as package.module:Name"),
    "an empty module": (":Net", {}, "Expected model=':Net' as package.module:Name"),
    "a relative module": ("..nets:Net", {}, "Expected model='..nets:Net' as package.module:Name"),
    "code that lacks a module": ("fails:Net", {}, "The code of fails fails: ModuleNotFoundError: No module named"),
    "code that stops": ("stops:Net", {}, "The code of stops fails: SystemExit: stop"),
    "code that cannot be read": ("./wrong.py:Net", {}, "The code of ./wrong.py fails: SyntaxError: "),
    "a function that fails": ("nets:broken", {}, "nets:broken cannot be made: no weights here"),
    "a function of something else": ("nets:number", {"a": 1}, "Expected a network as nets:number (a Linen, NNX"),
    "a module": ("nets:nn", {}, "Expected a network as nets:nn (a Linen, NNX"),
    "an argument missing": ("nets:asks", {}, "Expected model_options for nets:asks with images, which it asks for."),
    "an unknown option": ("nets:Held", {"widht": 3}, "Unknown option of nets:Held 'widht'; did you mean 'width'?"),
    "a key for an option": ("nets:made", {"key": 3}, "Unknown option of nets:made 'key'"),
    "options of an instance": ("nets:instance", {"widths": [3]}, "nets:instance is a network already"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_name_does_not_give_is_refused_in_one_line(folder, what):
    name, options, line = REFUSED[what]
    with pytest.raises(Refusal, match=re.escape(line)) as caught:
        named.create(name, 10, options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_runs_once_and_again_when_it_has_changed(folder):
    for _ in range(3):
        assert _by_name.find("nets.py:instance", "model").num_classes == 10
    assert (folder / "nets.py.txt").read_text() == "x"
    (folder / "nets.py").write_text(CODE.replace("instance = Dense(10)", "instance = Dense(9)"))
    assert _by_name.find("nets.py:instance", "model").num_classes == 9


@pytest.mark.ci
def test_the_command_line_trains_measures_and_resumes_it_by_its_name(folder, capsys):
    def run(command):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), "--overwrite"] if "--resume" not in command else command.split())
        assert stopped.value.code == 0, capsys.readouterr().err

    train = "train --model nets:Held --model-option width=4 --epochs 2 --output run --quiet"
    run(train)
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["model"], config["model_options"]) == ("nets:Held", {"width": 4})
    run("measure run --batches 1 --rows coupled --output measured")
    run(f"{train} --resume")
    run("compare --model ./nets.py:made --epochs 2 --seeds 1 --deltas 0.5 --controls --output compared --quiet")
    # By the library, as by the command line, and as by an instance with the same weights.
    result = hj.run(hj.TrainConfig(model="nets:Held", model_options={"width": 4}, epochs=2), progress=False)
    assert result.config.model == "nets:Held"
    history = [json.loads(line) for line in (folder / "run" / "history.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(result.history["test_loss"], [row["test_loss"] for row in history])


@pytest.mark.ci
def test_the_command_line_refuses_in_one_line_before_any_data_is_read(folder, capsys):
    for command, line in (
        ("train --model absent:Net --dataset cifar10", "There is no module 'absent'"),
        ("compare --model ./nets.py:Dens --dataset cifar10", "did you mean 'Dense'?"),
        ("train --model nets:number", "Expected a network as nets:number"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command.split())
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and line in said and said.count("\n") == 1
