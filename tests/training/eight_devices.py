"""One device against eight, in one process that has so many: pytest runs this file in a process of its own, started by
test_devices.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import MLP, NORMED, PATH, config_of
from wide import wide

import hardjax as hj
from hardjax.choose.batch_plan import BatchPlan
from hardjax.choose.selection import HardBatches, HardSamples
from hardjax.testing import _Everywhere, assert_resumes_everywhere
from hardjax.training import checkpoint, resume
from hardjax.training.loop import Loop
from hardjax.training.progress import Silent
from hardjax.training.setting import prepare
from hardjax.training.signals import Asked

assert jax.device_count() == 8, "see test_devices.py"

CASES = {
    "all batches": (MLP, {}),
    "hard batches": (MLP, {"selection": HardBatches(0.5)}),
    "hard samples": (MLP, {"selection": HardSamples(0.5)}),
    "trimming": (MLP, {"trimming": hj.trimming.Trimming(0.8, 0.3)}),
    "trimming at random": (MLP, {"trimming": hj.trimming.Trimming(0.8, 0.3, keep="random")}),
    "batch norm, global": (NORMED, {"selection": HardBatches(0.5)}),
    "batch norm, a part a device": (("mlp", {**NORMED[1], "norm_batch_size": 2}), {}),
    "batch norm, a part over devices": (("mlp", {**NORMED[1], "norm_batch_size": 2}), {"batch_size": 8}),
    "batch norm, trimmed": (NORMED, {"trimming": hj.trimming.Trimming(0.8, 0.3)}),
    "batch plan": (NORMED, {"batch_plan": BatchPlan.stages([8, 16, 32]), "epochs": 3}),
    "spectra": (NORMED, {"measure": hj.fisher.FisherMeasure(every=2), "selection": HardBatches(0.5)}),
    "batch norm, re-estimated": (NORMED, {"norm_statistics": "re-estimated", "augmentation": "standard"}),
    "convolutions": (("resnet8", {}), {"augmentation": hj.Augmentation(pad=1, flip=True, frame=8), "epochs": 1}),
    "dropout": (("mlp", {"widths": [8], "dropout": 0.5}), {}),
}


def _assert_equal(one, many, tolerance):
    chex.assert_trees_all_close(many.state.params, one.state.params, rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_close(many.state.batch_stats, one.state.batch_stats, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(many.history["samples_hash"], one.history["samples_hash"])
    if one.replays is not None:
        np.testing.assert_array_equal(many.replays, one.replays)
    np.testing.assert_array_equal(many.drop_counts, one.drop_counts)
    for name in ("full_train_loss", "test_loss", "train_loss", "table_loss", "kept_loss", "dropped_loss"):
        np.testing.assert_allclose(many.history[name], one.history[name], rtol=max(tolerance, 2e-6))
    np.testing.assert_array_equal(many.history["test_top1"], one.history["test_top1"])


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_do_what_one_does(tiny, name):
    network, changes = CASES[name]
    with jax.enable_x64(True):
        model, config = wide(*network), config_of(**changes)
        path = {} if network == NORMED else PATH  # batch statistics leave one path
        ways = (hj.Performance(devices=count, **path) for count in (1, None))
        one, many = (hj.run(config, dataset=tiny, model=model, performance=way, progress=False) for way in ways)
        assert (one.summary["devices"], many.summary["devices"]) == (1, 8)
        assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(many.state.params))
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(many.state.params))
        _assert_equal(one, many, 1e-10)
        if config.measure is not None:
            values, expected = (run.measurements["eigenvalues"] for run in (many, one))
            assert values.dtype == np.float64 and len(values) == 5
            np.testing.assert_allclose(values, expected, atol=1e-10 * expected.max())


@pytest.mark.parametrize("path", ["plain", "gather", "reuse"])
def test_every_trim_path(tiny, path):
    with jax.enable_x64(True):
        model, config = wide(*MLP), config_of(trimming=hj.trimming.Trimming(0.5, 0.3))
        one, many = (
            hj.run(
                config,
                dataset=tiny,
                model=model,
                performance=hj.Performance(devices=count, trim_path=path),
                progress=False,
            )
            for count in (1, 8)
        )
        _assert_equal(one, many, 1e-10)


def test_the_first_epoch_in_float32(tiny):
    config = config_of(model="resnet8", augmentation=hj.Augmentation(pad=1, frame=8), epochs=1)
    one, many = (
        hj.run(config, dataset=tiny, performance=hj.Performance(devices=count), progress=False) for count in (1, 8)
    )
    chex.assert_trees_all_close(many.state.params, one.state.params, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(many.history["train_loss"], one.history["train_loss"], rtol=1e-5)


def test_images_shared_out_change_no_bit(tiny):
    """70 images on 4 devices: filled up to 72, which nobody sees."""
    config = config_of(validation=0.2, selection=HardBatches(0.5), augmentation="standard", batch_size=4)
    whole, shares = (
        hj.run(config, dataset=tiny, performance=hj.Performance(devices=4, shard_data=kept), progress=False)
        for kept in (False, True)
    )
    chex.assert_trees_all_equal(checkpoint.on_host(shares.state), checkpoint.on_host(whole.state))
    for name in ("full_train_loss", "validation_loss", "test_loss"):
        np.testing.assert_array_equal(shares.history[name], whole.history[name])
    setting = prepare(config, tiny, performance=hj.Performance(devices=4, shard_data=True))
    held = {name: split.images.addressable_shards[0].data.shape[0] for name, split in setting.splits.items()}
    assert held == {"train": 18, "validation": 18, "test": 6}


def test_it_takes_the_most_that_divide_and_refuses_others(tiny):
    def taken(**given):
        performance = hj.Performance(devices=given.pop("devices", None))
        return prepare(config_of(**given), tiny, performance=performance).performance.devices

    assert taken(batch_size=16) == 8 and taken(batch_size=12) == 6 and taken(batch_size=7) == 7
    assert taken(batch_size=11) == 1 and taken(batch_plan=BatchPlan.stages([8, 12])) == 4
    with pytest.raises(
        ValueError, match=r"devices=3 to divide the samples of a batch \(16\); allowed here: 1, 2, 4, 8"
    ):
        taken(devices=3)
    with pytest.raises(ValueError, match="devices=9 to be at most the 8 visible"):
        taken(devices=9)


def test_a_run_that_is_told_of_one_device_takes_that(tiny):
    with jax.default_device(jax.devices()[3]):
        result = hj.run(config_of(epochs=1), dataset=tiny, progress=False)
    assert result.summary["devices"] == 1 and result.state.step.devices() == {jax.devices()[3]}


def test_it_resumes_on_as_many_devices_to_the_bit(tiny):
    config = config_of(model_options={"widths": [8], "norm": "batch"}, selection=HardBatches(0.5))
    performance = hj.Performance(devices=8, steps_per_dispatch=2)
    assert assert_resumes_everywhere(config, tiny, performance=performance) > 2


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 2), (1, 8)])
def test_it_resumes_on_another_number_of_devices_to_rounding(tiny, tmp_path, before, after):
    with jax.enable_x64(True):
        model = wide(*NORMED)
        config = config_of(selection=HardBatches(0.5), epochs=3)
        first, second = (
            prepare(config, tiny, model, hj.Performance(devices=count, steps_per_dispatch=3))
            for count in (before, after)
        )
        whole = Loop(first, Silent(), 0.0)
        whole.go(Asked())
        (tmp_path / "run").mkdir()
        saver = _Everywhere(tmp_path / "run", tmp_path / "copies")
        Loop(first, Silent(), 0.0, tmp_path / "run", saver).go(Asked())
        place = sorted((tmp_path / "copies").iterdir())[2]
        said = f"devices is {before} there and {after} here"
        with pytest.warns(checkpoint.RunWarning, match=said):
            start = resume.find(place, second)
        assert start is not None and 0 < start.position.backprops < 15
        assert len(start.state.step.sharding.device_set) == after
        rest = Loop(second, Silent(), 0.0, place, None, start)
        assert rest.go(Asked()) == "budget spent"
        chex.assert_trees_all_close(rest.state.params, whole.state.params, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(rest.record.replays, whole.record.replays)


def test_it_starts_from_variables_that_lie_on_one_device(tiny):
    config = config_of(epochs=1)
    given = hj.run(config, dataset=tiny, performance=hj.Performance(devices=1), progress=False).state.variables
    one, many = (
        hj.run(config, dataset=tiny, variables=given, performance=hj.Performance(devices=n), progress=False)
        for n in (1, 8)
    )
    chex.assert_trees_all_close(many.state.params, one.state.params, rtol=1e-5, atol=1e-6)


def test_the_first_line_says_how_many(tiny, capsys):
    hj.run(config_of(epochs=1, batch_size=12), dataset=tiny)
    assert capsys.readouterr().err.startswith("hardjax: training on 6 of the 8 devices that are visible\n")
