"""Data sets: people's own arrays, validation shares, the digits, and real prepared data where it is there."""

import dataclasses
import time

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from shared import shared

import hardjax as hj
from hardjax import data
from hardjax._validate import Refusal
from hardjax.data import Dataset, Split, tfds
from hardjax.data.labels import evenly
from hardjax.data.pixels import count_constant, pixel_statistics


def arrays(count=12, shape=(4, 5, 3), dtype=np.uint8):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (count, *shape)).astype(dtype), np.arange(count) % 3


def test_statistics_equal_the_plain_ones():
    images, labels = arrays()
    dataset = Dataset.from_arrays(images, labels, images, labels)
    np.testing.assert_allclose(dataset.mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, (images / 255).std((0, 1, 2)), rtol=1e-5)
    assert (
        dataset.num_classes == 3 and dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32
    )


def test_gray_images_get_a_channel_and_floats_stay():
    images, labels = arrays(shape=(4, 5))
    assert Dataset.from_arrays(images, labels, images, labels).train.images.shape == (12, 4, 5, 1)
    floats = (images / 255).astype(np.float64)
    dataset = Dataset.from_arrays(floats, labels, floats, labels)
    assert dataset.train.images.dtype == np.float32
    np.testing.assert_allclose(dataset.mean, floats.mean(), rtol=1e-6)


def test_a_constant_channel_does_not_divide_by_zero():
    images, labels = arrays()
    images[..., 1] = 7
    mean, std = pixel_statistics(images)
    assert std[1] == 1 and (std[[0, 2]] < 1).all() and mean[1] == np.float32(7 / 255)
    assert (Dataset.from_arrays(images, labels, images, labels).std == std).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_of_more_images_than_are_counted_at_once(dtype, monkeypatch):
    monkeypatch.setattr("hardjax.data.pixels._CHUNK", 5)
    images = np.random.default_rng(1).integers(0, 256, (13, 3, 2, 2))
    images = images.astype(np.uint8) if dtype == np.uint8 else (images / 255).astype(np.float32)
    scaled = images / 255 if dtype == np.uint8 else images
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std((0, 1, 2)), rtol=1e-5)


def test_changing_the_arrays_afterwards_changes_nothing():
    # An address that is a multiple of 64 is what the CPU device would share.
    room = np.zeros(12 * 60 + 64, np.uint8)
    images = room[-room.ctypes.data % 64 :][: 12 * 60].reshape(12, 4, 5, 3)
    images[:, 0] = 1
    labels = np.arange(12, dtype=np.int32) % 3
    dataset = Dataset.from_arrays(images, labels, images, labels)
    images[:], labels[:] = 9, 9
    assert int(dataset.train.images.max()) == 1 and int(dataset.train.labels.max()) == 2


def test_classes_are_counted_from_what_is_given():
    images, labels = arrays()
    assert Dataset.from_arrays(images, labels, images, labels, class_names=("a", "b", "c", "d")).num_classes == 4
    counted = Dataset.from_arrays(images, labels.astype(np.uint8), images, labels, num_classes=np.int64(7))
    assert counted.num_classes == 7 and counted.class_names == tuple("0123456")


GOOD, LABELS = arrays()
FLOATS = GOOD / 255
NAN = np.where(np.arange(12)[:, None, None, None] == 3, np.nan, GOOD.astype(float))


@pytest.mark.parametrize(
    "images, labels, settings, message",
    [
        (GOOD[None], LABELS, {}, r"shape \(n, H, W, C\) or \(n, H, W\), got"),
        (GOOD.astype(np.int32), LABELS, {}, "dtype uint8 or float .* got int32"),
        (NAN, LABELS, {}, "finite train images, got 60 NaN"),
        (np.full(GOOD.shape, 1e39), LABELS, {}, "finite train images, got 720 NaN or infinite"),
        (GOOD, LABELS[:5], {}, "as many train labels as images, got 5 and 12"),
        (GOOD, LABELS, {"num_classes": 2}, r"labels in \[0, 2\), got 2"),
        (GOOD, LABELS - 1, {"num_classes": 3}, r"labels in \[0, 3\), got -1"),
        (GOOD, LABELS.astype(float), {}, "test labels of floats like those of train, got int64"),
        (GOOD, LABELS * np.nan, {}, "finite train labels, got 12 NaN"),
        (GOOD, np.zeros((12, 0)), {}, r"train labels \(n,\) or \(n, ...\), got shape \(12, 0\)"),
        (GOOD, np.zeros((0, 3), int), {}, "as many train labels as images, got 0 and 12"),
        (GOOD, np.float32(1), {}, r"train labels \(n,\) or \(n, ...\), got shape \(\)"),
        (GOOD, LABELS / 2, {"num_classes": 3}, "num_classes and class_names with integer labels alone"),
        (GOOD, np.eye(3, dtype=int)[LABELS], {}, r"labels \(n,\) of integers, got int64 of shape \(12, 3\)"),
        (GOOD, np.stack([LABELS, LABELS], 1), {}, r"labels of one shape a sample, got \(2,\) and \(\)"),
        (GOOD, LABELS[:, None], {}, r"labels \(n,\) of integers, got int64 of shape \(12, 1\)"),
        (GOOD, LABELS, {"num_classes": 0}, "num_classes=0 to be a whole number of at least 1"),
        (GOOD[:0], LABELS[:0], {}, "at least one train image"),
        (GOOD[:, :3], LABELS, {}, "images of one shape"),
        (GOOD, LABELS, {"class_names": ("a", "b", "c"), "num_classes": 4}, "Expected 4 class_names, got 3"),
        (GOOD, LABELS, {"class_names": "abc"}, "class_names='abc' to be a list of texts"),
        (GOOD, LABELS, {"num_classes": 3.0}, "num_classes=3.0 to be a whole number"),
        (GOOD, LABELS, {"num_classes": 2**31}, "num_classes=2147483648 to be at most 2"),
        (GOOD, LABELS, {"flip": "no"}, "flip='no' to be True or False"),
        (GOOD.astype(np.float32), LABELS, {}, "train images of floats scaled to 0..1, got values from 0 to 254"),
        (FLOATS - 0.5, LABELS, {}, "scaled to 0..1, got values from -0.5"),
        (FLOATS, LABELS, {}, "images of one dtype, got float32 and uint8"),
        (GOOD // 255 + 1, LABELS, {}, "images of one scale, got values up to 1 and 254"),
        (GOOD, LABELS * 0 + 2, {}, "train labels of at least two classes, got 2 alone"),
        (np.full(GOOD.shape, 7, np.uint8), LABELS, {}, "half of the train images to be constant, got 12 of 12"),
        (np.where(np.arange(12)[:, None, None, None] < 7, 9, GOOD).astype(np.uint8), LABELS, {}, "got 7 of 12"),
    ],
)
def test_arrays_that_do_not_fit(images, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        Dataset.from_arrays(images, labels, GOOD, LABELS, **settings)


def test_floats_are_checked_in_both_splits_and_may_be_off_by_rounding():
    with pytest.raises(Refusal, match=r"test images of floats scaled to 0\.\.1, got values from 0 to 1\.99"):
        Dataset.from_arrays(FLOATS, LABELS, FLOATS * 2, LABELS)
    with pytest.raises(Refusal, match="images of one scale"):
        Dataset.from_arrays(FLOATS, LABELS, FLOATS / 255, LABELS)
    dark = np.zeros_like(FLOATS)  # black ones are no scale, but nothing to test on either
    with pytest.raises(Refusal, match="half of the test images to be constant, got 12 of 12 that are one colour"):
        Dataset.from_arrays(FLOATS, LABELS, dark, LABELS)
    dataset = Dataset.from_arrays(FLOATS * (1 + 1e-6), LABELS, FLOATS, LABELS)
    np.testing.assert_array_equal(dataset.train.images, (FLOATS * (1 + 1e-6)).astype(np.float32))


@pytest.mark.parametrize("label", [12, 2**31 - 1, 2**62])
def test_one_label_does_not_decide_the_size_of_the_network(label):
    labels = np.where(np.arange(12) == 5, label, LABELS)
    with pytest.raises(Refusal, match=f"below the number of training labels, 12, got {label}; .* give num_classes"):
        Dataset.from_arrays(GOOD, labels, GOOD, LABELS)
    if label == 12:
        assert Dataset.from_arrays(GOOD, labels, GOOD, LABELS, num_classes=40).num_classes == 40


def test_test_labels_are_checked_too():
    with pytest.raises(ValueError, match=r"test labels in \[0, 2\), got 2"):
        Dataset.from_arrays(GOOD, LABELS % 2, GOOD, LABELS)


@hypothesis.given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 9))
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_an_even_choice_takes_each_class_in_proportion(labels, count, seed):
    labels = np.array(labels)
    count = min(count, len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = evenly(labels, count, order)
    assert len(set(chosen.tolist())) == count
    for label in set(labels.tolist()):
        assert abs((labels[chosen] == label).sum() - count * (labels == label).mean()) < 1


def test_validation_is_stratified_disjoint_and_repeatable():
    digits = data.load("digits")
    split = digits.with_validation(0.2, seed=1)
    again = digits.with_validation(0.2, seed=1)
    assert len(split.train.labels) + len(split.validation.labels) == len(digits.train.labels)
    assert len(split.validation.labels) == 287
    assert (abs(np.bincount(split.validation.labels) - 0.2 * np.bincount(digits.train.labels)) < 1).all()
    np.testing.assert_array_equal(split.validation.rows, again.validation.rows)
    each = lambda split: {bytes(image) for image in np.asarray(split.take(slice(None)))}  # noqa: E731
    assert each(split.train) | each(split.validation) == each(digits.train)
    assert (split.mean != digits.mean).all()
    assert digits.with_validation(0.0) is digits
    other = digits.with_validation(0.2, seed=2)
    assert each(other.validation) != each(split.validation)


def test_some_training_samples_are_by_class_in_their_order_and_repeatable():
    digits = data.load("digits")
    some, again, other = (digits.with_train_samples(500, seed=seed) for seed in (1, 1, 2))
    assert some.train.rows is None and some.train.images.shape == (500, *digits.train.image_shape)
    assert (abs(np.bincount(some.train.labels) - 500 / 1437 * np.bincount(digits.train.labels)) < 1).all()
    places = {bytes(image): at for at, image in enumerate(np.asarray(digits.train.images))}
    found = [places[bytes(image)] for image in np.asarray(some.train.images)]
    assert found == sorted(set(found))
    np.testing.assert_array_equal(some.train.labels, digits.train.labels[np.array(found)])
    np.testing.assert_array_equal(some.train.images, again.train.images)
    assert (np.asarray(some.train.images) != np.asarray(other.train.images)).any()
    np.testing.assert_allclose(some.mean, np.asarray(some.train.images).mean((0, 1, 2)) / 255, rtol=1e-5)
    assert some.test is digits.test and digits.with_train_samples(None) is digits
    assert some.with_validation(0.2).validation.num_samples == 100
    # A run takes them itself, the validation share out of them.
    config = hj.TrainConfig(epochs=1, batch_size=40, model_options={"widths": [8]}, train_samples=500, validation=0.2)
    asked = hj.run(config, dataset=digits, progress=False)
    given = hj.run(
        dataclasses.replace(config, train_samples=None, validation=0.0),
        dataset=digits.with_train_samples(500).with_validation(0.2),
        progress=False,
    )
    assert asked.summary["backprops"] == 10
    chex.assert_trees_all_equal(asked.state.variables, given.state.variables)


def materialised(dataset):
    """A share with images of its own: what a gather by rows must equal."""
    train, validation = (Split(split.images[split.rows], split.labels) for split in (dataset.train, dataset.validation))
    mean, std = pixel_statistics(np.asarray(train.images))
    return Dataset(
        dataset.name, train, dataset.test, dataset.num_classes, dataset.class_names, mean, std, dataset.flip, validation
    )


def test_a_share_is_what_copies_would_be(tiny):
    shared_images = tiny.with_validation(0.3, seed=4)
    copies = materialised(shared_images)
    for split in ("train", "validation"):
        share, copy = getattr(shared_images, split), getattr(copies, split)
        assert share.images is tiny.train.images and share.rows.dtype == np.int32
        assert (
            (share.num_samples, share.image_shape) == (copy.num_samples, copy.image_shape) == (len(copy[1]), (6, 6, 1))
        )
        for indices in (slice(None), slice(3, 9), np.array([5, 0, 5]), 2):
            np.testing.assert_array_equal(share.take(indices), copy.take(indices))
        np.testing.assert_array_equal(share.labels, tiny.train.labels[share.rows])
    assert (shared_images.mean == copies.mean).all() and (shared_images.std == copies.std).all()


@pytest.mark.ci
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"augmentation": "standard", "trimming": hj.trimming.Trimming(end=0.4)},
        {"model": "resnet8", "selection": hj.selection.HardSamples(0.5)},
        {"selection": hj.selection.HardBatches(0.5), "measure": hj.fisher.FisherMeasure(every=5)},
    ],
    ids=["plain", "trimmed", "convolutions", "measured"],
)
def test_a_run_on_a_share_equals_one_on_copies_bit_for_bit(tiny, settings):
    options = {} if "model" in settings else {"model_options": {"widths": [8]}}
    config = hj.TrainConfig(**({"epochs": 3, "batch_size": 8, "learning_rate": 0.05} | options | settings))
    share = tiny.with_validation(0.3, seed=4)
    first, second = (hj.run(config, dataset=dataset, progress=False) for dataset in (share, materialised(share)))
    assert set(first.history) == set(second.history) and "validation_top1" in first.history
    for name in first.history:
        if "seconds" not in name:
            np.testing.assert_array_equal(first.history[name], second.history[name], name)
    chex.assert_trees_all_equal(first.state.variables, second.state.variables)
    np.testing.assert_array_equal(first.state.table, second.state.table)
    for name in first.measurements:
        np.testing.assert_array_equal(first.measurements[name], second.measurements[name], name)


def test_a_share_takes_no_room_for_images():
    images = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), np.uint8)
    dataset = Dataset.from_arrays(images, np.arange(400) % 10, images[:40], np.arange(40) % 10)

    def live():
        return sum(array.nbytes for array in jax.live_arrays())

    before = live()
    share = dataset.with_validation(0.25)
    # A row and a label of four bytes a sample, and images of 768.
    assert live() - before <= 400 * 8
    splits = hj.engine.recipe.splits_on_device(share)
    assert live() - before <= 400 * 8 + 1000
    assert splits["train"].images is splits["validation"].images is dataset.train.images


def test_a_share_must_leave_two_classes():
    labels = np.array([0] + [1] * 11)  # the one of its class is held out, whatever the seed
    dataset = Dataset.from_arrays(GOOD, labels, GOOD, labels)
    with pytest.raises(Refusal, match=r"train \(validation=0.5\) labels of at least two classes, got 1 alone"):
        dataset.with_validation(0.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_constant_images_are_counted_as_one_by_one(dtype):
    images = np.random.default_rng(3).integers(0, 256, (600, 4, 5, 3)).astype(dtype)
    images[5:290] = images[5:290, :1, :1]  # one colour each
    images[300, 2] = images[300, 2, 0]  # the middle row alone
    images[310, :, :, 1] = 4  # one channel alone
    slow = sum(all(len(np.unique(image[..., channel])) == 1 for channel in range(3)) for image in images)
    assert count_constant(images) == slow == 285
    assert count_constant(images[:, :1, :1]) == 0
    if dtype == np.uint8:  # some of them are no reason to refuse
        assert Dataset.from_arrays(images, np.arange(600) % 2, images, np.arange(600) % 2).num_classes == 2


def test_the_checksum_is_of_the_data_alone():
    dataset = Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS)
    checksum = dataset.checksum
    assert len(checksum) == 32 and set(checksum) <= set("0123456789abcdef")
    same = Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS, class_names=("a", "b", "c"), name="other", flip=True)
    assert same.checksum == checksum
    for position in range(4):
        given = [GOOD.copy(), LABELS.copy(), GOOD.copy(), LABELS.copy()]
        given[position].flat[7] ^= 1  # labels 0, 1, 2: the eighth is 1
        assert Dataset.from_arrays(*given).checksum != checksum, position
    assert Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS, num_classes=4).checksum != checksum
    assert Dataset.from_arrays(FLOATS, LABELS, FLOATS, LABELS).checksum != checksum
    turned = [np.ascontiguousarray(GOOD.reshape(12, 5, 4, 3)), LABELS] * 2
    assert Dataset.from_arrays(*turned).checksum != checksum
    swapped = Dataset.from_arrays(GOOD[::-1], LABELS[::-1], GOOD, LABELS)
    assert swapped.checksum != checksum


def test_the_checksum_of_a_share_is_that_of_the_whole():
    dataset = Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS)
    shares = [dataset.with_validation(0.25, seed=seed).checksum for seed in range(3)]
    assert shares == [Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS).checksum] * 3
    copies = materialised(dataset.with_validation(0.25))
    assert copies.checksum != shares[0]


@pytest.mark.parametrize(
    "share, message",
    [
        (1.5, r"validation=1.5 in \[0, 1\)"),
        (0.01, "validation=0.01 of 12 samples leaves a split empty"),
        (0.99, "validation=0.99 of 12 samples leaves a split empty"),
    ],
)
def test_validation_shares_that_cannot_be(share, message):
    dataset = Dataset.from_arrays(GOOD, LABELS, GOOD, LABELS)
    with pytest.raises(ValueError, match=message):
        dataset.with_validation(share)
    with pytest.raises(ValueError, match="already has a validation split of 3 samples"):
        dataset.with_validation(0.25).with_validation(0.25)
    with pytest.raises(Refusal, match="seed=-1 to be a whole number of at least 0"):
        dataset.with_validation(0.25, seed=-1)


def test_digits():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 8, 8, 1) and digits.test.images.shape == (360, 8, 8, 1)
    assert int(digits.train.images.max()) == 255
    test, train = np.bincount(digits.test.labels), np.bincount(digits.train.labels)
    assert (abs(test - 360 / 1797 * (test + train)) < 1).all()


def test_unknown_name_offers_the_closest():
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        data.load("fashionmnist")


def test_missing_data_is_said_at_once(tmp_path):
    started = time.perf_counter()
    with pytest.raises(data.DataNotPrepared, match="run `hardjax data prepare stl10 --data-dir"):
        data.load("stl10", tmp_path)
    assert time.perf_counter() - started < 5
    assert issubclass(data.DataNotPrepared, Refusal) and issubclass(data.DataNotPrepared, FileNotFoundError)


def test_addresses_are_no_folders_of_data(monkeypatch):
    with pytest.raises(Refusal, match="data_dir='gs://bucket/data' to be a folder of this machine"):
        data.load("mnist", "gs://bucket/data")
    monkeypatch.setenv("TFDS_DATA_DIR", "s3://bucket")
    with pytest.raises(Refusal, match="TFDS_DATA_DIR='s3://bucket' to be a folder of this machine"):
        data.load("mnist")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """The real MNIST, decoded once into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        seen = []
        decoded, _ = tfds.load_arrays("mnist", shared("tfds"), lambda done, total: seen.append((done, total)))
        return decoded, seen


def test_real_mnist_is_whole(mnist):
    decoded, seen = mnist
    arrays = decoded.arrays
    assert seen[-1] == (70_000, 70_000) and sorted(seen) == seen
    assert np.bincount(arrays["train_labels"]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert decoded.class_names == tuple("0123456789")
    # The figures that everybody normalises MNIST with.
    assert (round(float(decoded.mean[0]), 4), round(float(decoded.std[0]), 4)) == (0.1307, 0.3081)


@pytest.mark.slow
def test_second_load_of_cifar10_decodes_nothing(tmp_path, monkeypatch):
    folder = shared("tfds")
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path))
    first = data.load("cifar10", folder)
    monkeypatch.setattr(tfds, "_decode", None)
    second = data.load("cifar10", folder)
    assert second.train.images.shape == (50_000, 32, 32, 3) and second.flip and second.class_names[3] == "cat"
    assert bool((first.train.images == second.train.images).all())
