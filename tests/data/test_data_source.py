"""Reading prepared TFDS data and its cache, on data sets of a few images made here without TensorFlow."""

import io
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared import SHARDS, example, make_prepared

from hardjax import data
from hardjax._validate import Refusal
from hardjax.data import decoded, prepare, tfds
from hardjax.data.pixels import pixel_statistics


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


def _flip(at):
    def flip(path):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return flip


def _reshape(path):
    """The same pixels with their sides the other way round."""
    array = np.load(path)
    np.save(path, array.reshape(len(array), 5, 6, 3))


def _edit_about(path, anew=False, **changes):
    kept = json.loads(path.read_text())
    kept["about"] |= changes
    if anew:
        kept["crc32"] = zlib.crc32(json.dumps(kept["about"], sort_keys=True).encode())
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "file, damage",
    [
        ("train_images.npy", _cut),
        ("train_images.npy", _flip(-5)),
        ("train_images.npy", _flip(40)),  # in its header
        ("train_images.npy", _reshape),
        ("test_labels.npy", lambda path: path.write_bytes(b"")),
        ("test_labels.npy", lambda path: path.unlink()),
        ("about.json", lambda path: path.unlink()),
        ("about.json", lambda path: path.write_bytes(b"\xff")),
        ("about.json", lambda path: path.write_text("[]")),
        ("about.json", lambda path: path.write_text('{"about": {"crc32": {"train_images')),
        ("about.json", lambda path: _edit_about(path, mean=[0.0, 0.0, 0.0])),
        ("about.json", lambda path: _edit_about(path, anew=True, decoder=0)),
        ("about.json", lambda path: _edit_about(path, anew=True, source="other files")),
        ("about.json", lambda path: _edit_about(path, anew=True, crc32={"../../train_images": 0})),
    ],
)
def test_a_damaged_cache_is_made_anew(root, cache, monkeypatch, file, damage):
    _, arrays = make_prepared(root)
    before, lines = data.load("mnist", root), []
    damage(cache / "datasets" / entries(cache)[0] / file)
    after = data.load("mnist", root, say=lines.append)
    np.testing.assert_array_equal(after.train.images, arrays["train"][0])
    assert (after.mean == before.mean).all()
    assert len(lines) == 1 and lines[0].startswith("Decoding mnist anew: ") and "\n" not in lines[0]
    monkeypatch.setattr(tfds, "_decode", refuse)
    np.testing.assert_array_equal(data.load("mnist", root, say=lines.append).train.images, arrays["train"][0])
    assert len(entries(cache)) == 1 and len(lines) == 1


def test_statistics_are_kept_and_read(root, monkeypatch):
    _, arrays = make_prepared(root)
    first = data.load("mnist", root)
    monkeypatch.setattr("hardjax.data.dataset.pixel_statistics", refuse)
    monkeypatch.setattr(tfds, "pixel_statistics", refuse)
    second = data.load("mnist", root)
    mean, std = pixel_statistics(arrays["train"][0])
    for dataset in (first, second):
        assert dataset.mean.dtype == np.float32 and (dataset.mean == mean).all() and (dataset.std == std).all()


def test_a_line_says_that_the_files_have_changed(root):
    folder, _ = make_prepared(root)
    lines = []
    data.load("mnist", root, say=lines.append)
    assert not lines  # nothing was kept yet
    os.utime(folder / "features.json", ns=(1, 1))
    data.load("mnist", root, say=lines.append)
    assert lines == ["Decoding mnist anew: the prepared files are not those that were decoded before."]


_LOAD_OFTEN = """
import pathlib, sys, time, warnings
warnings.simplefilter("error")
from hardjax import data
root, cache, start, me = sys.argv[1:5]
pathlib.Path(start, me).write_text("")
while len(list(pathlib.Path(start).iterdir())) < 3:
    time.sleep(0.002)
for turn in range(12):
    if turn:
        for about in pathlib.Path(cache).glob("datasets/mnist-*/about.json"):
            try:
                about.write_text("damaged by " + me)
            except FileNotFoundError:
                pass
    print(data.load("mnist", root).checksum)
"""


@pytest.mark.ci
def test_processes_that_build_one_cache_at_once_all_succeed(root, cache, tmp_path):
    make_prepared(root)
    start = tmp_path / "start"
    start.mkdir()
    command = [sys.executable, "-c", _LOAD_OFTEN, root, cache, start]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [*command, str(me)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for me in range(3)
    ]
    done = [child.communicate(timeout=120) for child in children]
    assert [errors for _, errors in done] == [""] * 3
    checksum = data.load("mnist", root).checksum
    assert [out.split() for out, _ in done] == [[checksum] * 12] * 3
    # Nothing else is left lying about.
    assert len(entries(cache)) == 1 and decoded.state("mnist", tfds.prepared_folder("mnist", root)) == "whole"


def test_a_write_that_fails_leaves_nothing_and_the_data_is_there(root, cache, monkeypatch):
    _, arrays = make_prepared(root)
    save, saved = np.save, []

    def full_disk(path, array, **settings):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save(path, array, **settings)

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


def test_an_entry_that_another_process_puts_there_in_between(root, cache, monkeypatch):
    folder, arrays = make_prepared(root)
    replace, turns = Path.replace, []

    def replace_late(path, target):
        if path.name == "whole" and len(turns) < 2:
            turns.append(target)
            target.mkdir()
            (target / "about.json").write_text("half of another's")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_late)
    np.testing.assert_array_equal(data.load("mnist", root).train.images, arrays["train"][0])
    assert len(turns) == 2 and len(entries(cache)) == 1 and decoded.state("mnist", folder) == "whole"


_LOAD_AS_READER = """
import os, sys
from hardjax import data
root, warm, cache = sys.argv[1:]
os.environ["HARDJAX_CACHE"] = warm
print(data.load("mnist", root).checksum)  # imports all that decoding needs, from folders that may be closed to others
os.environ["HARDJAX_CACHE"] = cache
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
print(data.load("mnist", root).checksum)
"""


@pytest.mark.ci
def test_folders_that_cannot_be_written_are_read():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        top = Path(folder)
        make_prepared(top / "data")
        (top / "cache").mkdir()
        paths = [*(top / "data").rglob("*"), top / "data", top / "cache", top]
        for path in paths[:-1]:
            path.chmod(0o555)
        top.chmod(0o755)
        command = [sys.executable, "-c", _LOAD_AS_READER, top / "data", top / "warm", top / "cache"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for path in reversed(paths):
            path.chmod(0o755)
        first, second = done.stdout.split() or [done.stderr, ""]
        assert first == second and not list((top / "cache").iterdir())
        assert "not kept for next time: [Errno 13] Permission denied" in done.stderr


def test_cache_and_data_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("HARDJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert decoded.cache_folder() == tmp_path / "hardjax"
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


def _edit_split(**changes):
    """Of the training split."""

    def edit(folder):
        info = json.loads((folder / "dataset_info.json").read_text())
        info["splits"][0] |= changes
        (folder / "dataset_info.json").write_text(json.dumps(info))

    return edit


def _features(old, new):
    def edit(folder):
        text = (folder / "features.json").read_text()
        assert old in text
        (folder / "features.json").write_text(text.replace(old, new))

    return edit


@pytest.mark.parametrize(
    "damage, message",
    [
        (_edit(fileFormat="tfrecord"), "is stored as tfrecord, which is not read here"),
        (_edit(splits=[]), "has no split 'train'"),
        (lambda folder: (folder / "mnist-train.array_record-00001-of-00002").unlink(), "has 1 of 2 files of split"),
        (lambda folder: (folder / "dataset_info.json").write_text("{"), "has an unreadable dataset_info.json"),
        (lambda folder: (folder / "dataset_info.json").write_text("[]"), "has an unreadable dataset_info.json"),
        (_edit(name="../../elsewhere"), r"names files outside of its folder \('../../elsewhere'\)"),
        (_edit_split(filepathTemplate="/etc/{DATASET}-{SPLIT}"), "names files outside of its folder"),
        (_edit_split(shardLengths=["0", "0"]), "has no samples in split 'train'"),
        (_edit_split(shardLengths=["many", "3"]), "has an unreadable"),
        (lambda folder: (folder / "features.json").unlink(), "has an unreadable features.json"),
        (
            lambda folder: (folder / "features.json").write_text('{"featuresDict": 3}'),
            "has an unreadable features.json",
        ),
        (_features("tensorflow_datasets.core.features.image", "antigravity"), r"not of TFDS \('antigravity"),
    ],
)
def test_prepared_data_that_cannot_be_read_is_named(root, damage, message):
    folder, _ = make_prepared(root)
    damage(folder)
    with pytest.raises(data.DataNotPrepared, match=message) as caught:
        data.load("mnist", root)
    assert "hardjax data prepare mnist" in str(caught.value) and "\n" not in str(caught.value)


def _names(text):
    return lambda folder: (folder / "label.labels.txt").write_text(text)


@pytest.mark.parametrize("kept", [False, True], ids=["decoding", "kept"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (_edit_split(shardLengths=["5", "4"]), r"Expected 4 records in mnist-train.*00001-of-00002.* got 3"),
        (_edit_split(shardLengths=["4", "3"]), r"Expected 4 records in mnist-train.*00000-of-00002.* got 5"),
        (_features('"numClasses": "3"', '"numClasses": "2"'), "to be of 2 classes, got 3 label names"),
        (_names("cat\ndog\n"), "to be of 3 classes, got 2 label names"),
        (_names("cat\ndog\nowl\neel\n"), "to be of 3 classes, got 4 label names"),
        (_features('["6", "5", "3"]', '["5", "6", "3"]'), r"train image 0 is \(6, 5, 3\) uint8, not \(5, 6, 3\)"),
    ],
)
def test_files_that_hold_something_else_than_they_say(root, kept, damage, message):
    folder, _ = make_prepared(root)
    if kept:
        data.load("mnist", root)
    damage(folder)
    seen = []
    for _ in range(2):
        with pytest.raises(Refusal, match=message) as caught:
            tfds.load_arrays("mnist", root, advance=lambda done, total: seen.append(done))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not seen  # before anything is decoded


def test_kept_arrays_are_held_against_the_description(root, cache):
    folder, _ = make_prepared(root)
    data.load("mnist", root)
    # A cache entry that is whole, and of these very files, and says something else.
    entry = decoded.entry("mnist", folder)
    _edit_split(shardLengths=["5", "2"])(folder)
    entry.rename(decoded.entry("mnist", folder))
    about = decoded.entry("mnist", folder) / "about.json"
    _edit_about(about, anew=True, source=decoded._origin(folder))
    with pytest.raises(
        Refusal, match=r"train images of prepared mnist in .* of shape \(7, 6, 5, 3\), got \(8, 6, 5, 3"
    ):
        data.load("mnist", root)


def _rewrite(folder, part, examples):
    from array_record.python import array_record_module

    (file,) = folder.glob(f"*-{part}.array_record-*")
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for image, label in examples:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        writer.write(example(buffer.getvalue(), label))
    writer.close()


_NOISE = np.random.default_rng(5).integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "part, examples, message",
    [
        ("train", [(image, 1) for image in _NOISE], "cannot be used. Expected train labels of at least two classes"),
        ("test", [(image, 7) for image in _NOISE], r"test image 0 has label 7, which is not in \[0, 3\)"),
        (
            "test",
            [(_NOISE[i], 1) if i else (_NOISE[i, :1, :1], 1) for i in range(4)],
            r"test image 0 is \(1, 1, 3\) uint8, not ",
        ),
        ("train", [(image // 255, i % 3) for i, image in enumerate(_NOISE)], "of one scale|to be constant, got"),
        ("test", [(image * (i < 1), i % 3) for i, image in enumerate(_NOISE)], "3 of 4 that are one colour all over"),
    ],
    ids=["one class", "label", "shape", "dark", "constant"],
)
def test_records_that_nothing_can_be_learnt_from(root, part, examples, message):
    folder, _ = make_prepared(root, shards={"train": [4], "test": [4]})
    _rewrite(folder, part, examples)
    for _ in range(2):
        with pytest.raises(Refusal, match=message) as caught:
            data.load("mnist", root)
        assert str(caught.value).startswith(f"Prepared mnist in {folder} cannot be ") and "\n" not in str(caught.value)


def test_some_constant_images_are_reported(root):
    folder, _ = make_prepared(root, shards={"train": [4], "test": [4]})
    _rewrite(folder, "train", [(image * (i != 2), i % 3) for i, image in enumerate(_NOISE)])
    report = prepare.check("mnist", root)
    assert report["train images of one colour"] == "1 of 4" and report["test images of one colour"] == "0 of 4"


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
    assert report["stored as"] == "PNG (lossless)" and report["fingerprint"] == decoded.fingerprint(folder)
    assert report["checksum"] == data.load("mnist", root).checksum and report["decoded cache"] == "made now"
    assert "as they say" in report["dataset_info.json, features.json"]
    lines = []
    assert prepare.check("mnist", root, lines.append)["decoded cache"] == "whole" and not lines
    (decoded.entry("mnist", folder) / "test_labels.npy").write_bytes(b"?")
    assert prepare.check("mnist", root, lines.append)["decoded cache"] == "made anew"
    assert len(lines) == 1 and "has a damaged test_labels.npy" in lines[0]
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
