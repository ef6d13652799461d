"""Data that is read while it trains, against the same data on the device: bit for bit."""

import shutil
import types

import chex
import jax
import numpy as np
import pytest
from prepared import make_prepared, make_several_sizes

import hardjax as hj
from hardjax.choose.selection import HardBatches, HardSamples
from hardjax.data import source
from hardjax.data.catalog import Cut
from hardjax.engine import evaluate, memory
from hardjax.study.work import Trainer
from hardjax.testing import assert_resumes_everywhere
from hardjax.training import checkpoint, feed
from hardjax.training.feed import Feed
from hardjax.training.setting import must_stream, prepare

STREAMED = hj.Performance(stream=True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))


def _run(config, performance=None, dataset=None):
    return hj.run(config, dataset=dataset, performance=performance, progress=False)


def _assert_same(one, other):
    chex.assert_trees_all_equal(checkpoint.on_host(one.state), checkpoint.on_host(other.state))
    assert one.history.keys() == other.history.keys()
    for name in one.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(one.history[name], other.history[name])


def config_of(**changes):
    settings = {"model_options": {"widths": [4]}, "batch_size": 4, "epochs": 3, "learning_rate": 0.05}
    return hj.TrainConfig(**{**settings, **changes})


def test_prepared_images_are_trained_as_if_they_were_on_the_device(tmp_path):
    make_prepared(tmp_path, shards={"train": [5, 9, 3], "test": [4]})
    config = config_of(dataset="mnist", data_dir=str(tmp_path), selection=HardBatches(0.5), augmentation="standard")
    resident, streamed = _run(config), _run(config, STREAMED)
    _assert_same(resident, streamed)
    np.testing.assert_array_equal(resident.replays, streamed.replays)
    assert streamed.summary["input_wait_seconds"] > 0 and "input_wait_seconds" not in resident.summary


@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        {"validation": 0.3, "measure": hj.fisher.FisherMeasure(every=3)},
        {"selection": HardSamples(0.5), "trimming": hj.trimming.Trimming(1.0, 0.5)},
        {"batch_plan": hj.batch_plan.BatchPlan.stages([4, 8]), "augmentation": "standard"},
    ],
    ids=["measured", "samples", "plan"],
)
def test_every_kind_of_round(tiny, monkeypatch, changes):
    """Segments of two steps and parts of evaluation of two batches: images arrive in many pieces."""
    monkeypatch.setattr(evaluate, "_PART_BYTES", 1)
    if "batch_plan" in changes:
        changes = changes | {"batch_size": 128}
    config, pieces = config_of(**changes), {"steps_per_dispatch": 2, "eval_batch_size": 6}
    resident = _run(config, hj.Performance(**pieces), tiny)
    streamed = _run(config, hj.Performance(stream=True, **pieces), tiny)
    _assert_same(resident, streamed)
    chex.assert_trees_all_equal(resident.measurements, streamed.measurements)


@pytest.mark.ci
def test_a_streamed_run_resumes_everywhere(tiny):
    config = config_of(selection=HardBatches(0.5), batch_size=8, augmentation="standard")
    performance = hj.Performance(stream=True, steps_per_dispatch=3)
    assert assert_resumes_everywhere(config, tiny, performance=performance) > 4


def test_a_run_goes_on_with_its_data_elsewhere(tiny, tmp_path):
    """Saved on the device, gone on with from the host: the data is the same, and so are the bits."""
    config = config_of(epochs=2, batch_size=16)
    whole = _run(config, dataset=tiny)
    setting = prepare(config, tiny.on_host())
    assert setting.dataset.streamed and setting.performance.stream
    assert setting.whole.checksum == tiny.checksum
    _assert_same(whole, hj.run(config, dataset=tiny.on_host(), progress=False))


def test_a_part_is_read_once_and_a_look_leaves_its_batch(tiny, monkeypatch):
    config = config_of(measure=hj.fisher.FisherMeasure(every=2), batch_size=32, epochs=1, evaluate_train=False)
    setting = prepare(config, tiny, performance=STREAMED)
    taken, original = [], Feed.given

    def given(self, state, dispatch):
        found = original(self, state, dispatch)
        taken.append((dispatch.kind, np.asarray(found.images)))
        return found

    monkeypatch.setattr(Feed, "given", given)
    hj.training.run.train(setting, progress=False)
    kinds = [kind for kind, _ in taken]
    assert kinds == ["look", "segment", "look", "segment"], kinds
    (_, looked), (_, trained), *_ = taken
    np.testing.assert_array_equal(looked[0], trained[0])
    assert len(looked) == 1 and trained.shape[1:] == (32, 6, 6, 1)


def test_records_are_read_in_any_order(tmp_path):
    folder, arrays = make_prepared(tmp_path, shards={"train": [5, 3], "extra": [4], "test": [4]})
    records = source.Records("mnist", folder, ("train", "extra"), None, None)
    images = np.concatenate([arrays["train"][0], arrays["extra"][0]])
    assert records.shape == (12, 6, 5, 3) and len(records) == 12 and records.dtype == np.uint8
    order = np.array([11, 0, 7, 8, 0, 4])
    np.testing.assert_array_equal(records[order], images[order])
    np.testing.assert_array_equal(records[2:5], images[2:5])
    np.testing.assert_array_equal(records[3], images[3])
    labels = np.concatenate([arrays["train"][1], arrays["extra"][1]])
    np.testing.assert_array_equal(records.labels(lambda done, total: None), labels)


def test_what_is_known_of_the_records_is_kept(tmp_path, monkeypatch):
    make_prepared(tmp_path)
    first = hj.data.load("mnist", tmp_path, stream=True)
    resident = hj.data.load("mnist", tmp_path)
    for name in ("mean", "std"):
        np.testing.assert_array_equal(getattr(first, name), getattr(resident, name))
    assert first.streamed and first.class_names == resident.class_names and first.num_classes == 3
    monkeypatch.setattr(source.Records, "labels", None)  # not read again
    again = hj.data.load("mnist", tmp_path, stream=True)
    np.testing.assert_array_equal(again.train.labels, resident.train.labels)
    assert again.checksum == first.checksum == resident.checksum
    for shared in (lambda one: one.with_train_samples(6), lambda one: one.with_validation(0.5)):
        assert shared(first).checksum == shared(resident).checksum
    both = [one.with_train_samples(6).with_validation(0.5).checksum for one in (first, resident)]
    assert both[0] == both[1] == resident.with_train_samples(6).checksum != resident.checksum
    with monkeypatch.context() as patch:
        patch.setattr(source.Records, "read", None)  # the images are not read again
        assert hj.data.load("mnist", tmp_path, stream=True).checksum == resident.checksum
    (kept,) = (tmp_path / "cache").glob("datasets/*.stream.npz")
    kept.write_bytes(kept.read_bytes()[:-20])
    with pytest.raises(TypeError):  # it would be
        hj.data.load("mnist", tmp_path, stream=True)
    monkeypatch.undo()


def test_what_is_known_of_other_files_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))
    make_prepared(tmp_path / "a")
    make_prepared(tmp_path / "b", seed=1)
    one, other = (hj.data.load("mnist", tmp_path / name, stream=True) for name in "ab")
    assert (one.mean != other.mean).any()
    np.testing.assert_array_equal(other.mean, hj.data.load("mnist", tmp_path / "b").mean)


def test_a_damaged_record_is_one_line(tmp_path):
    folder, _ = make_prepared(tmp_path)
    records = source.Records("mnist", folder, ("train",), None, None)
    records.shape = (8, 6, 6, 3)
    with pytest.raises(ValueError, match=r"image 3 is \(6, 5, 3\) uint8, not \(6, 6, 3\) uint8"):
        records[np.array([3])]


def test_images_of_several_sizes(tmp_path):
    """The layout of imagenet2012: photographs of several sizes, a split called validation."""
    make_several_sizes(tmp_path)
    dataset = hj.data.load("imagenet2012", tmp_path)
    assert dataset.streamed and dataset.train.images.shape == (8, 224, 224, 3) and dataset.sides == (256, 480)
    np.testing.assert_allclose(dataset.mean, [0.485, 0.456, 0.406], rtol=1e-6)
    standard = prepare(hj.TrainConfig(dataset="x", batch_size=4, augmentation="standard"), dataset).recipe.augmentation
    assert (standard.sides, standard.pad, standard.flip) == ((256, 480), 0, True)
    plain = prepare(hj.TrainConfig(dataset="x", batch_size=4), dataset).recipe.augmentation
    assert (plain.sides, plain.pad, plain.flip) == (None, 0, False)
    draws = np.random.default_rng(0).random((3, 3))
    some = np.array([4, 1, 4])
    first, second = (dataset.train.images.read(some, draws, Cut((256, 480))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (3, 224, 224, 3) and (first[0] != first[2]).any()
    # A share keeps the published statistics: none are computed.
    np.testing.assert_array_equal(dataset.with_validation(0.25).mean, dataset.mean)


@pytest.mark.parametrize(("before", "after"), [(True, None), (None, True)])
def test_a_run_goes_on_with_its_images_on_the_disk_or_not(tmp_path, before, after):
    make_prepared(tmp_path)
    config = config_of(dataset="mnist", data_dir=str(tmp_path), batch_size=4, train_samples=7, validation=0.3, epochs=3)
    whole = hj.run(config, progress=False)
    how = [hj.Performance(stream=stream, save_every=1) for stream in (before, after)]
    hj.run(config, output=tmp_path / "run", performance=how[0], progress=False)
    newest = sorted((tmp_path / "run" / "checkpoint").glob("0*"))[-1]
    shutil.rmtree(newest)
    (tmp_path / "run" / "summary.json").unlink()
    rest = hj.run(config, output=tmp_path / "run", performance=how[1], resume=True, progress=False)
    assert rest.summary["resumed_at"] and rest.summary["backprops"] == whole.summary["backprops"]
    _assert_same(whole, rest)


def test_a_sweep_streams_as_asked_and_its_cells_keep_their_names(tmp_path):
    make_prepared(tmp_path)
    config = config_of(dataset="mnist", data_dir=str(tmp_path), batch_size=4, epochs=1)
    resident, streamed = Trainer(), Trainer(performance=STREAMED)
    assert streamed.dataset(config).streamed and not resident.dataset(config).streamed
    assert streamed.cell(config).key == resident.cell(config).key


class _Due:
    """An array that is there when it is told."""

    there = False

    def is_ready(self):
        return self.there


def test_waiting_while_the_device_computes_is_none(monkeypatch):
    clock = types.SimpleNamespace(now=10.0)
    monkeypatch.setattr(feed.time, "perf_counter", lambda: clock.now)
    due = _Due()
    idle = feed._Idle(due)
    clock.now += 5
    idle.look()
    assert idle.seconds() == 0
    due.there = True
    idle.look()
    clock.now += 2
    assert idle.seconds() == 2
    there = feed._Idle(due)
    clock.now += 1
    assert (there.seconds(), idle.seconds()) == (1, 3)


def test_what_was_waited_for_is_part_of_a_run_that_goes_on(tmp_path):
    make_prepared(tmp_path)
    config = config_of(dataset="mnist", data_dir=str(tmp_path), batch_size=4, epochs=2)
    first = hj.run(config, output=tmp_path / "run", performance=STREAMED, progress=False)
    again = hj.run(config, output=tmp_path / "run", performance=STREAMED, resume=True, progress=False)
    assert again.summary["input_wait_seconds"] == first.summary["input_wait_seconds"] > 0


@pytest.mark.ci
@pytest.mark.parametrize("augmentation", ["standard", hj.Augmentation(flip=True, crop_area=0.1)], ids=["P4", "crops"])
def test_a_run_on_images_of_several_sizes_resumes_everywhere(tmp_path, augmentation):
    make_several_sizes(tmp_path)
    config = config_of(
        dataset="imagenet2012", data_dir=str(tmp_path), augmentation=augmentation, epochs=2, evaluate_train=False
    )
    assert assert_resumes_everywhere(config, performance=hj.Performance(steps_per_dispatch=1)) > 2


def test_crops_are_where_they_should_be():
    """Columns 0..9 of a 4x10 image as grey values: its shorter side to 4 changes nothing but the crop."""
    image = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None], (4, 10, 3))
    fit = hj.data.catalog.Fit(crop=4, side=4, sides=(4, 4))
    np.testing.assert_array_equal(source.fitted(image, fit, None, None)[0, :, 0], [3, 4, 5, 6])
    for draw, first in ((0.0, 0), (0.5, 3), (0.999, 6)):
        crop = source.fitted(image, fit, np.array([0.0, 0.7, draw]), Cut((4, 4)))
        np.testing.assert_array_equal(crop[0, :, 0], np.arange(first, first + 4))
    # To a shorter side of 5 to 8 by the first draw: the crop is the same share of the image, or smaller.
    wide = [source.fitted(image * 25, fit, np.array([d, 0, 0.999]), Cut((4, 8)))[0, :, 0] for d in (0.0, 0.999)]
    assert wide[0].tolist() == [150, 175, 200, 225] and np.ptp(wide[1]) < 50 and wide[1][-1] == 225


def test_crops_of_inception_are_cut_from_each_image(tmp_path):
    """Of an image whose pixels say where they are: a share of the area, sides as 3 to 4 up to 4 to 3, anywhere."""
    down, right = np.meshgrid(np.arange(60), np.arange(90), indexing="ij")
    image, fit = np.stack([down, right, 0 * right], -1).astype(np.uint8), hj.data.catalog.Fit(8, 8, (8, 8))
    rng, shares, ratios = np.random.default_rng(0), [], []
    for draw in rng.random((400, 3)):
        crop = source.fitted(image, fit, draw, Cut(area=0.2)).astype(float)
        assert crop.shape == (8, 8, 3)
        # Pixels of the result lie an eighth of the crop apart; those at the rim are pulled inwards by the filter.
        high, wide = ((crop[6, 6] - crop[1, 1]) * 8 / 5)[:2]
        shares.append(high * wide / (60 * 90))
        ratios.append(wide / high)
        assert high <= 62 and wide <= 92
    # 60x80 is the widest crop that fits.
    assert 0.17 < min(shares) < 0.24 and 0.8 < max(shares) < 0.95 and 0.42 < np.mean(shares) < 0.52
    assert 0.66 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.5
    # Whole image: nothing but its size changes, and so it is where the draw says.
    first, last = (source.fitted(image, fit, np.array([0.5, at, at]), Cut(area=0.2)) for at in (0.0, 0.999))
    assert first[0, 0, 0] < 5 and first[0, 0, 1] < 5 and last[-1, -1, 0] > 54 and last[-1, -1, 1] > 84
    # No crop of that shape covers half of an image ten times as wide as high: the middle does.
    long = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (10, 100, 3))
    middle = source.fitted(long, fit, np.array([0.3, 0.1, 0.9]), Cut(area=0.5))
    np.testing.assert_allclose(middle[0, [0, -1], 0], [44, 55], atol=1.5)


def test_either_way_of_cutting_is_of_the_reader(tmp_path):
    make_several_sizes(tmp_path)
    dataset = hj.data.load("imagenet2012", tmp_path)
    standard, inception = (
        hj.data.augment.resolve(augmentation, dataset)
        for augmentation in ("standard", hj.Augmentation(pad=None, flip=None, crop_area=0.08))
    )
    assert hj.data.augment.where_read(standard, dataset) == Cut((256, 480))
    assert hj.data.augment.where_read(inception, dataset) == Cut((), 0.08)
    assert hj.data.augment.on_device(inception, dataset) == hj.Augmentation(pad=0, flip=True)
    config = config_of(dataset="imagenet2012", augmentation=hj.Augmentation(crop_area=0.08), batch_size=4)
    assert prepare(config, dataset).recipe.augmentation.crop_area is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sides": (256, 480)}, r"sides=\(\) with tiny, whose images are of one size; got \(256, 480\)"),
        ({"sides": (480, 256)}, r"sides=\(480, 256\) as two lengths that do not fall"),
        ({"sides": (3,)}, "as two lengths that do not fall"),
    ],
)
def test_sides_that_do_not_fit(tiny, changes, words):
    with pytest.raises(ValueError, match=words):
        prepare(config_of(augmentation=hj.Augmentation(**changes)), tiny)


def test_sides_are_written_where_they_are_given():
    """Settings of before they were there keep their names and their keys."""
    assert "sides" not in hj.TrainConfig(augmentation=hj.Augmentation(pad=2)).to_dict()["augmentation"]
    config = hj.TrainConfig(augmentation=hj.Augmentation(sides=(256, 480)))
    assert config.to_dict()["augmentation"]["sides"] == [256, 480]
    assert hj.TrainConfig.from_dict(config.to_dict()) == config


def test_what_does_not_fit_the_device_is_streamed(tmp_path, monkeypatch):
    make_prepared(tmp_path)
    config, size = config_of(dataset="mnist", data_dir=str(tmp_path)), 12 * 6 * 5 * 3
    assert source.decoded_bytes("mnist", tmp_path) == size and source.decoded_bytes("digits") == 0
    for room, expected in ((2 * size, False), (2 * size - 1, True), (None, False)):
        monkeypatch.setattr(memory, "available", lambda device, room=room: room)
        assert must_stream(config, hj.Performance()) is expected
    assert must_stream(config, hj.Performance(stream=False)) is False


def test_what_cannot_be_held_is_refused_by_name(tmp_path):
    make_several_sizes(tmp_path)
    config = config_of(dataset="imagenet2012", data_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="stream=True or None with imagenet2012: its images are not held by any device"
    ):
        prepare(config, performance=hj.Performance(stream=False))


def test_no_index_into_no_images(tiny):
    setting = prepare(config_of(), tiny, performance=STREAMED)
    assert setting.splits["train"].elsewhere and setting.splits["train"].images.shape == (0, 6, 6, 1)
    with pytest.raises(AssertionError, match="index into no images"):
        jax.eval_shape(setting.splits["train"].take, np.arange(3))
