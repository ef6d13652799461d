"""Reading prepared TFDS data and its cache, on data sets of a few images made here without TensorFlow."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hardjax import data
from hardjax.data import prepare, tfds

SHARDS = {"train": [5, 3], "test": [4]}


def _field(number: int, payload: bytes) -> bytes:
    size, length = len(payload), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


def _example(image: bytes, label: int) -> bytes:
    """A serialised tf.train.Example."""
    image = _field(1, b"image") + _field(2, _field(1, _field(1, image)))
    label = _field(1, b"label") + _field(2, _field(3, _field(1, bytes([label]))))
    return _field(1, _field(1, image) + _field(1, label))


def _feature(kind: str, module: str, **settings) -> dict:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{module}", kind: settings}


def make_prepared(root, name="mnist", version="3.0.1", shards=SHARDS, encoding="PNG", seed=0):
    """A prepared data set as TFDS lays it out; returns its folder and the arrays in it."""
    from array_record.python import array_record_module

    folder = root / name / version
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    image = _feature("image", "image_feature.Image", dtype="uint8", shape={"dimensions": ["6", "5", "3"]})
    label = _feature("classLabel", "class_label_feature.ClassLabel", numClasses="3")
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image, "label": label}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "label.labels.txt").write_text("cat\ndog\nowl\n")
    arrays = {}
    for part, sizes in shards.items():
        images = rng.integers(0, 256, (sum(sizes), 6, 5, 3)).astype(np.uint8)
        labels, at = np.arange(sum(sizes)) % 3, 0
        for shard, size in enumerate(sizes):
            file = folder / f"{name}-{part}.array_record-{shard:05d}-of-{len(sizes):05d}"
            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for _ in range(size):
                buffer = io.BytesIO()
                Image.fromarray(images[at]).save(buffer, encoding)
                writer.write(_example(buffer.getvalue(), int(labels[at])))
                at += 1
            writer.close()
        arrays[part] = (images, labels)
    splits = [
        {
            "name": part,
            "numBytes": "1",
            "shardLengths": [str(size) for size in sizes],
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for part, sizes in shards.items()
    ]
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": splits, "description": "made"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder, arrays


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def entries(cache):
    return sorted(path.name for path in (cache / "datasets").iterdir())


def refuse(*args):
    raise AssertionError("decoded again")


def test_images_and_labels_come_back_in_order(root):
    _, arrays = make_prepared(root)
    dataset = data.load("mnist", root)
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(dataset, part).images, arrays[part][0])
        np.testing.assert_array_equal(getattr(dataset, part).labels, arrays[part][1])
    assert dataset.class_names == ("cat", "dog", "owl") and not dataset.flip


def test_a_folder_with_brackets_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "cache[0]"))
    _, arrays = make_prepared(tmp_path / "data[1:2] *")
    for _ in range(2):
        np.testing.assert_array_equal(data.load("mnist", tmp_path / "data[1:2] *").train.images, arrays["train"][0])


def test_extra_is_joined_and_unlabelled_is_never_read(root):
    _, arrays = make_prepared(root, "svhn_cropped", "3.1.0", SHARDS | {"extra": [2]})
    np.testing.assert_array_equal(data.load("svhn_cropped", root).train.images, arrays["train"][0])
    joined = np.concatenate([arrays["train"][0], arrays["extra"][0]])
    np.testing.assert_array_equal(data.load("svhn_cropped_extra", root).train.images, joined)
    folder, arrays = make_prepared(root, "stl10", "1.0.0", SHARDS | {"unlabelled": [3]})
    for file in folder.glob("*unlabelled*"):
        file.unlink()
    np.testing.assert_array_equal(data.load("stl10", root).train.images, arrays["train"][0])


def test_loading_writes_nothing_into_the_data_folder_and_prints_nothing(root, capfd):
    make_prepared(root)
    before = {path: path.stat().st_mtime_ns for path in [*root.rglob("*"), root]}
    data.load("mnist", root, progress=True)
    assert {path: path.stat().st_mtime_ns for path in [*root.rglob("*"), root]} == before
    assert capfd.readouterr() == ("", "")


def test_second_load_decodes_nothing_and_changed_data_is_decoded_anew(root, cache, monkeypatch):
    folder, arrays = make_prepared(root)
    data.load("mnist", root)
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "_decode", refuse)
        np.testing.assert_array_equal(data.load("mnist", root).train.images, arrays["train"][0])
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    _, changed = make_prepared(root, seed=1)
    np.testing.assert_array_equal(data.load("mnist", root).train.images, changed["train"][0])
    assert len(entries(cache)) == 2


def test_data_moved_elsewhere_is_not_decoded_again(root, monkeypatch):
    make_prepared(root)
    before = data.load("mnist", root)
    monkeypatch.setattr(tfds, "_decode", refuse)
    after = data.load("mnist", root.rename(root.parent / "moved"))
    np.testing.assert_array_equal(after.train.images, before.train.images)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file, damage",
    [
        ("train_images.npy", _cut),
        ("train_images.npy", _flip),
        ("test_labels.npy", lambda path: path.write_bytes(b"")),
        ("test_labels.npy", lambda path: path.unlink()),
        ("about.json", lambda path: path.unlink()),
        ("about.json", lambda path: path.write_text("[]")),
        ("about.json", lambda path: path.write_text('{"crc32": {"train_images')),
    ],
)
def test_a_damaged_cache_is_made_anew(root, cache, monkeypatch, file, damage):
    _, arrays = make_prepared(root)
    data.load("mnist", root)
    damage(cache / "datasets" / entries(cache)[0] / file)
    np.testing.assert_array_equal(data.load("mnist", root).train.images, arrays["train"][0])
    monkeypatch.setattr(tfds, "_decode", refuse)
    np.testing.assert_array_equal(data.load("mnist", root).train.images, arrays["train"][0])
    assert len(entries(cache)) == 1


def test_a_write_that_fails_leaves_nothing_and_the_data_is_there(root, cache, monkeypatch):
    _, arrays = make_prepared(root)
    save, saved = np.save, []

    def full_disk(path, array):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save(path, array)

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.warns(UserWarning, match="not kept for next time.*No space left"):
        dataset = data.load("mnist", root)
    np.testing.assert_array_equal(dataset.train.images, arrays["train"][0])
    assert entries(cache) == []


def test_a_cache_folder_that_cannot_be_is_done_without(root, tmp_path, monkeypatch):
    _, arrays = make_prepared(root)
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("HARDJAX_CACHE", str(tmp_path / "blocked"))
    with pytest.warns(UserWarning, match="HARDJAX_CACHE names the folder"):
        dataset = data.load("mnist", root)
    np.testing.assert_array_equal(dataset.test.images, arrays["test"][0])


def test_cache_and_data_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("HARDJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tfds.cache_folder() == tmp_path / "hardjax"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    assert tfds.data_folder() == tmp_path / "prepared" and tfds.data_folder("other").name == "other"


def test_the_newest_whole_version_is_taken(root):
    for version in ("3.0.1", "3.0.10", "2.9.0"):
        make_prepared(root, version=version)
    (root / "mnist" / "3.0.11.incomplete.AB12").mkdir()
    (root / "mnist" / "3.0.11.incomplete.AB12" / "dataset_info.json").write_text("{}")
    assert tfds.prepared_folder("mnist", root).name == "3.0.10"
    next((root / "mnist" / "3.0.10").glob("*test.array_record*")).unlink()
    assert tfds.prepared_folder("mnist", root).name == "3.0.1"


def _edit(**changes):
    def edit(folder):
        info = json.loads((folder / "dataset_info.json").read_text())
        (folder / "dataset_info.json").write_text(json.dumps(info | changes))

    return edit


@pytest.mark.parametrize(
    "damage, message",
    [
        (_edit(fileFormat="tfrecord"), "is stored as tfrecord, which is not read here"),
        (_edit(splits=[]), "has no split 'train'"),
        (lambda folder: (folder / "mnist-train.array_record-00001-of-00002").unlink(), "has 1 of 2 files of split"),
        (lambda folder: (folder / "dataset_info.json").write_text("{"), "has an unreadable dataset_info.json"),
    ],
)
def test_prepared_data_that_cannot_be_read_is_named(root, damage, message):
    folder, _ = make_prepared(root)
    damage(folder)
    with pytest.raises(data.DataNotPrepared, match=message) as caught:
        data.load("mnist", root)
    assert "hardjax data prepare mnist" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_records_are_one_line(root, cache):
    folder, _ = make_prepared(root)
    file = folder / "mnist-train.array_record-00000-of-00002"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"Prepared mnist in .* cannot be read: ") as caught:
        data.load("mnist", root)
    assert "\n" not in str(caught.value) and not (cache / "datasets").exists()


def test_no_tensorflow_is_imported_and_the_import_is_light(root):
    make_prepared(root)
    code = (
        "import sys, hardjax.data as data; light = {'tensorflow_datasets', 'sklearn', 'array_record'}.isdisjoint("
        "sys.modules); d = data.load('mnist', sys.argv[1]); print(light, 'tensorflow' in sys.modules, len(d.train[1]))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, env=environment)
    assert done.stdout == "True False 8\n", done.stderr


def test_check_reports_what_is_there(root):
    folder, arrays = make_prepared(root)
    report = prepare.check("mnist", root)
    low, high = arrays["train"][0].min(), arrays["train"][0].max()
    assert report["train images"] == f"(8, 6, 5, 3) uint8, values {low} to {high}"
    assert report["train samples per class"] == "3, 3, 2" and report["classes"] == "cat, dog, owl"
    expected = ", ".join(f"{value:.4f}" for value in (arrays["train"][0] / 255).mean((0, 1, 2)))
    assert report["mean (0..1)"] == expected
    assert report["stored as"] == "PNG (lossless)" and report["fingerprint"] == tfds.fingerprint(folder)
    make_prepared(root, "cifar10", encoding="JPEG")
    assert prepare.check("cifar10", root)["stored as"].startswith("JPEG (lossy")


def test_status_says_what_is_prepared_and_decoded(root):
    folder, _ = make_prepared(root)
    rows = {row["name"]: row for row in prepare.status(root)}
    assert list(rows) == data.names()
    assert rows["mnist"]["prepared"].startswith(str(folder)) and rows["mnist"]["decoded"] == "no"
    assert rows["stl10"]["prepared"] == "no: hardjax data prepare stl10"
    data.load("mnist", root)
    assert {row["name"]: row for row in prepare.status(root)}["mnist"]["decoded"].startswith("yes")
