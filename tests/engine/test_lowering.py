"""Every program lowered for devices that are not here: what a GPU or a TPU would be given to compile."""

import re

import jax
import numpy as np
import pytest
import zoo

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples
from hardjax.choose.trimming import Trimming
from hardjax.engine.programs import lowerable
from hardjax.fisher.observe import FisherMeasure

PLATFORMS = ("cuda", "rocm", "tpu")
WIDE = {"model": "mlp", "model_options": {"widths": [8]}}
# Name -> (settings, settings of `lowerable`): together all kinds of programs.
RUNS = {
    "plain, cut rounds": (WIDE | dict(augmentation="standard"), dict(bound=4)),
    "replay, looked at": (WIDE | dict(selection=HardBatches(0.35), measure=FisherMeasure(every=4)), dict(bound=4)),
    "coupled": (WIDE | dict(measure=FisherMeasure(every=4, rows="coupled")), {}),
    "frozen": (WIDE | dict(measure=FisherMeasure(every=4, rows="frozen")), {}),
    "by definition": (WIDE | dict(measure=FisherMeasure(every=4, method="vmap")), {}),
    "samples": (WIDE | dict(selection=HardSamples(0.5), optimizer="adam"), {}),
    "trimmed plain": (WIDE | dict(trimming=Trimming(0.5, 0.5)), dict(trim_path="plain")),
    "trimmed gather": (WIDE | dict(trimming=Trimming(0.5, 0.5)), dict(trim_path="gather")),
    "trimmed reuse": (WIDE | dict(trimming=Trimming(0.5, 0.5)), dict(trim_path="reuse")),
    "trimmed masked": (WIDE | dict(trimming=Trimming(0.5, 0.5, keep="random")), dict(trim_path="plain")),
    "skipped": (WIDE | dict(on_nan="skip-step"), {}),
}
# With the forms that only a CPU takes: convolutions, depthwise ones, pools.
NETWORKS = {"inverted": dict(norm="batch"), "resnet": dict(dropout=0.1), "densenet": dict(norm="group")}


def lowered(programs, platform):
    """Name -> its text for that platform."""
    for name, (fn, args) in programs.items():
        yield name, jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def config(**settings):
    return hj.TrainConfig(**{**dict(epochs=3, batch_size=8, learning_rate=0.1, selection=AllBatches()), **settings})


@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.ci) if i else run for i, run in enumerate(RUNS)])
def test_every_program_lowers_for_every_platform(tiny, run):
    settings, performance = RUNS[run]
    programs = lowerable(config(**settings), tiny, **performance)
    for platform in PLATFORMS:
        for name, text in lowered(programs, platform):
            assert "func.func public @main" in text, name
            assert "callback" not in text, name


def test_what_keeps_bits_on_a_cpu_costs_a_gpu_nothing(tiny):
    """Barriers around a batch would be a launch of every step; a loop around a single step has its predicate read."""
    programs = lowerable(config(**WIDE, augmentation="standard"), tiny, bound=1)
    (name,) = (name for name in programs if name.startswith("segment"))
    programs = {name: programs[name]}
    assert "optimization_barrier" in dict(lowered(programs, "cpu"))[name]  # negative control
    for platform in PLATFORMS:
        assert "optimization_barrier" not in dict(lowered(programs, platform))[name], platform


@pytest.mark.ci
@pytest.mark.parametrize("network", NETWORKS)
def test_forms_for_cpu_stay_there(network):
    images = hj.data.Dataset.from_arrays(*_images(24), *_images(8), num_classes=10, name="random")
    programs = lowerable(config(epochs=1), images, model=zoo.maker(network)(**NETWORKS[network]))
    (name,) = (name for name in programs if name.startswith("rounds"))
    programs = {name: programs[name]}
    texts = {platform: dict(lowered(programs, platform))[name] for platform in (*PLATFORMS, "cpu")}
    counts = {platform: len(re.findall(r"stablehlo\.convolution\(", text)) for platform, text in texts.items()}
    assert counts["cuda"] == counts["rocm"] == counts["tpu"] > 0
    # Negative control: CPU forms are told apart.
    assert counts["cpu"] != counts["cuda"]


def _images(count):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8), np.arange(count) % 10
