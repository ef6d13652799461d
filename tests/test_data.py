"""Data sets: people's own arrays, the digits, prepared TFDS data and its cache."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from shared import shared

from hardjax import data
from hardjax.data import Dataset, tfds


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
    images, labels = np.full((6, 2, 2, 1), 7, np.uint8), np.arange(6) % 2
    assert Dataset.from_arrays(images, labels, images, labels).std == [1.0]


GOOD, LABELS = arrays()
NAN = np.where(np.arange(12)[:, None, None, None] == 3, np.nan, GOOD.astype(float))


@pytest.mark.parametrize(
    "images, labels, settings, message",
    [
        (GOOD[0], LABELS, {}, None),
        (GOOD[None], LABELS, {}, r"shape \(n, H, W, C\) or \(n, H, W\), got"),
        (GOOD.astype(np.int32), LABELS, {}, "dtype uint8 or float .* got int32"),
        (NAN, LABELS, {}, "finite train images, got 60 NaN"),
        (GOOD, LABELS[:5], {}, "as many train labels as images, got 5 and 12"),
        (GOOD, LABELS, {"num_classes": 2}, r"labels in \[0, 2\), got 2"),
        (GOOD, LABELS - 1, {"num_classes": 3}, r"labels in \[0, 3\), got -1"),
        (GOOD, LABELS.astype(float), {}, "of integers, got float64"),
        (GOOD[:0], LABELS[:0], {}, "at least one train image"),
        (GOOD[:, :3], LABELS, {}, "images of one shape"),
        (GOOD, LABELS, {"class_names": ("a", "b", "c"), "num_classes": 4}, "Expected 4 class_names, got 3"),
    ],
)
def test_arrays_that_do_not_fit(images, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        Dataset.from_arrays(images, labels, GOOD, LABELS, **settings)


def test_validation_is_stratified_disjoint_and_repeatable():
    digits = data.load("digits")
    split = digits.with_validation(0.2, seed=1)
    again = digits.with_validation(0.2, seed=1)
    assert len(split.train.labels) + len(split.validation.labels) == len(digits.train.labels)
    shares = np.bincount(split.validation.labels) / np.bincount(digits.train.labels)
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    np.testing.assert_array_equal(split.validation.images, again.validation.images)
    rows = lambda images: {bytes(image) for image in np.asarray(images)}  # noqa: E731
    assert rows(split.train.images) | rows(split.validation.images) == rows(digits.train.images)
    assert (split.mean != digits.mean).all()
    assert digits.with_validation(0.0) is digits
    with pytest.raises(ValueError, match=r"validation=1.5 in \[0, 1\)"):
        digits.with_validation(1.5)


def test_digits():
    digits = data.load("digits")
    assert digits.train.images.shape == (1442, 8, 8, 1) and digits.test.images.shape == (355, 8, 8, 1)
    assert int(digits.train.images.max()) == 255
    shares = np.bincount(digits.test.labels) / (np.bincount(digits.test.labels) + np.bincount(digits.train.labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_unknown_name_offers_the_closest():
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        data.load("fashionmnist")


def test_missing_data_is_said_at_once(tmp_path):
    started = time.perf_counter()
    with pytest.raises(data.DataNotPrepared, match="run `hardjax data prepare stl10 --data-dir"):
        data.load("stl10", tmp_path)
    assert time.perf_counter() - started < 5


def test_no_tensorflow_is_imported(tmp_path):
    folder = shared("tfds")
    code = (
        "import sys, hardjax as hj; d = hj.data.load('mnist', sys.argv[1]); "
        "print('tensorflow' in sys.modules, d.train.images.shape, int(d.train.labels[0]))"
    )
    environment = os.environ | {"HARDJAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("False (60000, 28, 28, 1)"), done.stderr


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """MNIST decoded once into a cache of its own."""
    folder = shared("tfds")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDJAX_CACHE", str(cache))
        seen = []
        arrays, names, source = tfds.load_arrays("mnist", folder, lambda done, total: seen.append((done, total)))
    return folder, cache, arrays, names, source, seen


def test_prepared_data_is_decoded_whole(decoded, monkeypatch):
    _, cache, arrays, names, _, seen = decoded
    assert seen[-1] == (70_000, 70_000)
    assert np.bincount(arrays["train_labels"]).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert names == tuple("0123456789")
    assert arrays["train_images"].mean() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_second_load_reads_the_cache_and_a_damaged_one_is_made_anew(decoded, monkeypatch):
    folder, cache, arrays, *_ = decoded
    monkeypatch.setenv("HARDJAX_CACHE", str(cache))
    calls = []
    monkeypatch.setattr(tfds, "_decode", lambda *args: calls.append(args) or ({"x": np.zeros(2)}, ("a",)))
    again, names, _ = tfds.load_arrays("mnist", folder)
    assert not calls and names == tuple("0123456789")
    np.testing.assert_array_equal(again["test_labels"], arrays["test_labels"])
    (about,) = cache.glob("datasets/*/about.json")
    kept = about.read_text()
    about.write_text(json.dumps({"arrays": {"train_images": [1, 2]}, "class_names": []}))
    assert tfds.load_arrays("mnist", folder)[1] == ("a",) and len(calls) == 1
    about.write_text(kept)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    source = tmp_path / "mnist" / "3.0.1"
    source.mkdir(parents=True)
    (source / "dataset_info.json").write_text("{}")
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "blocked"))
    monkeypatch.setattr(tfds, "_decode", lambda *args: ({"x": np.arange(3)}, ("a",)))
    arrays, names, found = tfds.load_arrays("mnist", tmp_path)
    assert arrays["x"].tolist() == [0, 1, 2] and names == ("a",) and found == source


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.1", "3.0.10", "2.9.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
    assert tfds.prepared_folder("mnist", tmp_path).name == "3.0.10"
