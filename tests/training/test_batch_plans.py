"""Runs whose batch size changes: what is trained, recorded, compiled, saved."""

import json

import numpy as np
import pytest

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.choose.trimming import Trimming
from hardjax.cli import main
from hardjax.engine.plan import dispatches, programs
from hardjax.fisher.observe import derive
from hardjax.study.measure import measure_run
from hardjax.training.saver import Saver
from hardjax.training.setting import prepare
from hardjax.training.spectra import load

SMALL = dict(model="mlp", model_options={"widths": [4]}, learning_rate=0.05, epochs=4)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (70, 4, 4, 1), np.uint8), rng.integers(0, 3, 70)
    return hj.data.Dataset.from_arrays(images, labels, images[:20], labels[:20], num_classes=3)


def run(data, **settings):
    performance = settings.pop("performance", None)
    output = settings.pop("output", None)
    config = hj.TrainConfig(**SMALL | settings)
    return hj.run(config, dataset=data, performance=performance, output=output, progress=False)


def test_a_constant_plan_is_no_plan_to_the_bit(data):
    settings = dict(selection=HardBatches(0.5), measure=hj.fisher.FisherMeasure(every=3))
    plain = run(data, batch_size=16, **settings)
    planned = run(data, batch_plan=BatchPlan.constant(16), **settings)
    again = run(data, batch_plan=BatchPlan.stages([16, 16, 16]), **settings)
    for found in (planned, again):
        for name, column in plain.history.items():
            if name != "seconds":
                np.testing.assert_array_equal(found.history[name], column, name)
        np.testing.assert_array_equal(found.replays, plain.replays)


@pytest.mark.ci
@pytest.mark.parametrize("selection", [AllBatches(), AllBatches(fixed=True), HardBatches(0.4), HardSamples(0.5)])
def test_every_stage_trains_its_epochs(data, selection):
    """N = 9 and 3 for 70 samples at 8 and 32: two epochs of each."""
    config = hj.TrainConfig(
        **SMALL, batch_plan=BatchPlan("8-32"), selection=selection, measure=hj.fisher.FisherMeasure(every=5)
    )
    result = hj.run(config, dataset=data, progress=False)
    assert result.summary["backprops"] == 2 * 9 + 2 * 3
    history = result.history
    np.testing.assert_array_equal(history["batch_size"][history["backprops"] <= 18], 8)
    np.testing.assert_array_equal(history["batch_size"][history["backprops"] > 18], 32)
    late = history["backprops"] > 18
    np.testing.assert_allclose(history["epoch"][~late], history["backprops"][~late] / 9)
    np.testing.assert_allclose(history["epoch"][late], 2 + (history["backprops"][late] - 18) / 3)
    spectra = result.measurements
    np.testing.assert_array_equal(spectra["batch_size"], np.where(spectra["step"] < 18, 8, 32))
    # What was seen: 18 batches of 8 and 6 of 32, fillers of wrapped last batches among them.
    assert int(np.asarray(result.state.seen).sum()) == 18 * 8 + 6 * 32
    if isinstance(selection, AllBatches):
        seen = np.asarray(result.state.seen)
        assert seen.min() >= 4 and seen.sum() - 4 * 70 == 2 * (9 * 8 - 70) + 2 * (3 * 32 - 70)
    assert result.state.partition.shape == (3, 32)
    if result.replays is not None:
        assert result.replays[:, 3:][result.replays.shape[0] // 2 + 1 :].sum() == 0, "of the later stage three slots"
        assert int(result.replays.sum()) == 24


def test_a_stage_with_one_measurement_is_weighed_by_its_own_epochs(data, tmp_path):
    """Of epochs of 5, 9 and 3 steps one measurement of 7 steps each, as docs/papers.md defines both readings."""
    settings = dict(batch_plan=BatchPlan("1/4*16-1/4*8-1/2*32"), measure=hj.fisher.FisherMeasure(every=7))
    found = run(data, **settings, optimizer="adam", output=tmp_path).measurements
    np.testing.assert_array_equal(found["batch_size"], [16, 8, 32])
    share = np.array([7 / 5, 7 / 9, 7 / 3])
    np.testing.assert_allclose(found["C_K by epoch"], np.cumsum(found["c"] * share) / np.cumsum(share), rtol=1e-12)
    np.testing.assert_allclose(found["L_K by epoch"], 5 * np.cumsum(found["l"] * share), rtol=1e-12)
    read = derive(load(tmp_path))
    np.testing.assert_array_equal(read["L_K by epoch"], found["L_K by epoch"])
    # Steps are whole: 4/3 epochs of 5 steps are 7 steps, of which 5.25 are an epoch, and 8/3 of 9 are then 23.
    found = run(data, **settings | dict(batch_plan=BatchPlan("1/3*16-2/3*8"))).measurements
    np.testing.assert_array_equal(found["steps_per_epoch"], np.where(found["batch_size"] == 16, 7 * 3 / 4, 23 * 3 / 8))


def test_rates_of_the_stages(data):
    plain = dict(batch_plan=BatchPlan("8-32"), schedule=hj.Schedule("step", (0.75,)), optimizer="sgd")
    for scaling, factor in (("none", 1), ("linear", 4), ("sqrt", 2)):
        config = hj.TrainConfig(**SMALL, **plain, rate_scaling=scaling)
        setting = prepare(config, data)
        rates = [stage.learning_rate for stage in setting.plan.stages]
        np.testing.assert_allclose(rates, [0.05, 0.05 * factor])
    history = run(data, **plain, rate_scaling="linear").history
    # Of the steps that ended the epochs 1 to 4.
    np.testing.assert_allclose(history["learning_rate"], [0.05, 0.05, 0.2, 0.02])


@pytest.mark.ci
def test_nothing_is_compiled_beyond_the_plan(data):
    # A network that no other test has, or some of its programs would be there already.
    own = SMALL | {"epochs": 6, "model_options": {"widths": [11]}}
    config = hj.TrainConfig(**own, batch_plan=BatchPlan("8-16-8"), selection=HardBatches(0.4), optimizer="adam")
    performance = hj.Performance(steps_per_dispatch=64, donate=True)
    setting = prepare(config, data, performance=performance)
    before = sum(setting.programs.traces.values())
    hj.run(config, dataset=data, performance=performance, progress=False)
    made = sum(setting.programs.traces.values()) - before
    stages = {(call.kind, call.spec, setting.plan.stages[call.stage].sizes) for call in dispatches(setting.plan)}
    # A first state, an evaluation of each split, two changes, and what trains: two sizes share what they can.
    assert made == 1 + 2 + 2 + len(stages) and len(stages) < len(programs(setting.plan))
    hj.run(config, dataset=data, performance=performance, progress=False)
    assert sum(setting.programs.traces.values()) - before == made


@pytest.mark.ci
@pytest.mark.parametrize(
    "settings",
    [
        dict(selection=HardBatches(0.4), measure=hj.fisher.FisherMeasure(every=4)),
        dict(selection=HardSamples(0.5), trimming=Trimming(end=0.5)),
        dict(batch_plan=BatchPlan("8-32-16-MS"), schedule=hj.Schedule("step", (0.5,)), validation=0.2, epochs=6),
    ],
    ids=["hard-batches", "hard-samples trimmed", "multi-step"],
)
def test_a_run_resumes_everywhere(data, settings):
    config = hj.TrainConfig(**{**SMALL, "batch_plan": BatchPlan("8-32-16"), **settings})
    hj.testing.assert_resumes_everywhere(config, dataset=data)


class Killed(Exception):
    pass


@pytest.mark.ci
def test_it_goes_on_exactly_at_a_boundary_from_its_files(data, tmp_path, monkeypatch):
    config = hj.TrainConfig(**SMALL, batch_plan=BatchPlan("8-32"), selection=RandomBatches(0.5))
    whole = hj.run(config, dataset=data, progress=False)

    def due(self, tested):
        """Saves at the second test point, which is the end of the first stage; what comes after is lost."""
        if tested == 3:
            raise Killed
        return tested == 2

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "due", due)
        with pytest.raises(Killed):
            hj.run(config, dataset=data, output=tmp_path, progress=False)
    found = hj.run(config, dataset=data, output=tmp_path, resume=True, progress=False)
    assert found.summary["resumed_at"] == [18]
    for name in ("samples_hash", "test_loss", "batch_size", "table_loss"):
        np.testing.assert_array_equal(found.history[name], whole.history[name])
    final = measure_run(tmp_path, batches=1, dataset=data).final
    assert final["eigenvalues"].shape == (1, 32)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(batch_plan=BatchPlan("16-128")), "Expected batch_size=128 to be at most the 70 training samples"),
        (
            dict(batch_plan=BatchPlan("0.001*8-0.999*32")),
            "stages of a step at least; 0.004 epochs of 9 batches",
        ),
    ],
)
def test_plans_that_do_not_fit_the_data(data, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        run(data, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.ci
def test_the_command_line_prints_the_stages(tmp_path, capsys):
    words = (
        "train --epochs 4 --batch-plan 32-64-MS --schedule step --rate-scaling sqrt --model-option widths=[4] --quiet"
    )
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--model-option", "widths=[4]", "--output", str(tmp_path)])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "stages" in printed and "surplus" in printed
    assert json.loads((tmp_path / "config.json").read_text())["batch_plan"] == {"text": "32-64-MS"}
