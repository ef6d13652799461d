"""Prepared TFDS data without TensorFlow: which files there are, what they say of themselves, and their images."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.data import catalog, decoded
from hardjax.data.decoded import Decoded
from hardjax.data.pixels import pixel_statistics

# tensorflow_datasets takes half a second to import, so it is imported where it is used.

_BATCH = 500
# Features are classes that TFDS imports by the names in features.json: no other module's are.
_FEATURES = "tensorflow_datasets."


class DataNotPrepared(Refusal, FileNotFoundError):
    """Prepared data was asked for and is not there; the message names the command that prepares it."""


class Description(NamedTuple):
    """What prepared files say of themselves.

    Attributes:
        shards: split -> samples in each of its files.
        num_classes: labels lie in [0, num_classes).
        image_shape: (H, W, C), None where a side is not fixed.
    """

    shards: dict[str, list[int]]
    num_classes: int
    image_shape: tuple[int | None, ...]

    def samples(self, parts: tuple[str, ...]) -> int:
        """Of these splits together."""
        return sum(sum(self.shards[part]) for part in parts)


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder of prepared data: as given, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    if data_dir is not None:
        return _validate.local_folder(data_dir=data_dir)
    return _validate.local_folder(TFDS_DATA_DIR=os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def prepared_folder(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """The newest prepared version of a data set; looks at the disk only.

    Raises:
        DataNotPrepared: there is none.
    """
    entry = catalog.find(name)
    assert entry.tfds_name is not None
    folder = data_folder(data_dir)
    # TFDS prepares in a folder with ".incomplete" in its name and renames it at the end: what was cut short stays
    # there.
    infos = (folder / entry.tfds_name).glob("**/dataset_info.json")
    found = sorted((path.parent for path in infos if ".incomplete" not in path.parent.name), key=_version)
    if not found:
        where = "" if data_dir is None else f" --data-dir {data_dir}"
        raise DataNotPrepared(
            f"No prepared {name} in {folder}; run `hardjax data prepare {name}{where}`, "
            "or name a folder of prepared TFDS data with --data-dir (data_dir=)."
        )
    lacking = {path: _lacking(path, entry) for path in found}
    whole = [path for path in found if not lacking[path]]
    if not whole:
        raise DataNotPrepared(
            f"Prepared {name} in {found[-1]} {lacking[found[-1]]}; "
            f"run `hardjax data prepare {name} --data-dir FOLDER` with another folder."
        )
    return whole[-1]


def load_arrays(
    name: str,
    data_dir: str | os.PathLike | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    anew: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Decoded, Path]:
    """The splits of a prepared data set, from the cache where they were decoded before; checked against what the
    prepared files say of themselves.

    Args:
        name: in the catalogue, with a TFDS builder.
        data_dir: folder of prepared data; it is only read.
        advance: called with (images decoded, images in all).
        anew: read the prepared files even where decoded arrays are kept.
        say: called with a line where arrays were kept and could not be used.

    Returns:
        What was decoded, and the folder that was read.

    Raises:
        DataNotPrepared: no prepared data.
        ValueError: prepared files are damaged, or hold something else than they say.
    """
    source = prepared_folder(name, data_dir)
    kept, entry, described = decoded.entry(name, source), catalog.find(name), describe(source)
    found, fault = (None, "") if anew else decoded.read(kept, source)
    if found is None:
        if fault:
            say(f"Decoding {name} anew: {fault}.")
        found = _decode(name, source, entry, described, advance)
        decoded.write(kept, source, found)
    _check_described(name, source, entry, described, found)
    return found, source


def describe(source: Path) -> Description:
    """What prepared files say of themselves.

    Raises:
        ValueError, KeyError, TypeError, OSError, AttributeError: they are damaged or say it in another way.
    """
    info = json.loads((source / "dataset_info.json").read_text())
    features = json.loads((source / "features.json").read_text())["featuresDict"]["features"]
    sides = features["image"]["image"]["shape"]["dimensions"]
    return Description(
        shards={split["name"]: [int(count) for count in split["shardLengths"]] for split in info["splits"]},
        num_classes=int(features["label"]["classLabel"]["numClasses"]),
        image_shape=tuple(int(side) if int(side) > 0 else None for side in sides),
    )


def _version(path: Path) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in path.name.split(".")]


def _lacking(source: Path, entry: catalog.Entry) -> str:
    """Why a prepared folder cannot be read, empty where it can."""
    faults = (OSError, ValueError, KeyError, TypeError, AttributeError)
    try:
        info = json.loads((source / "dataset_info.json").read_text())
        files = {split["name"]: len(split["shardLengths"]) for split in info["splits"]}
        names = [info["name"], *(split.get("filepathTemplate", "") for split in info["splits"])]
        outside = [name for name in names if "/" in name or "\\" in name]
    except faults:
        return "has an unreadable dataset_info.json"
    # Reading TFRecord would need TensorFlow.
    if info.get("fileFormat") != "array_record":
        return f"is stored as {info.get('fileFormat')}, which is not read here (array_record is)"
    if outside:
        return f"names files outside of its folder ({_validate.shown(outside[0])})"
    for part in (*entry.train, entry.test):
        if part not in files:
            return f"has no split {part!r}"
        found = len(list(source.glob(f"*-{part}.array_record-*")))
        if found != files[part]:
            return f"has {found} of {files[part]} files of split {part!r}"
    try:
        described, strange = describe(source), _strange_features(source)
        empty = [part for part in (*entry.train, entry.test) if described.samples((part,)) < 1]
    except faults:
        return "has an unreadable features.json"
    if strange:
        return f"has features that are not of TFDS ({_validate.shown(strange[0])})"
    return f"has no samples in split {empty[0]!r}" if empty else ""


def _strange_features(source: Path) -> list[str]:
    """Names of classes in features.json that TFDS would import from elsewhere."""

    def classes(tree: Any) -> Iterator[str]:
        if isinstance(tree, dict):
            for name, branch in tree.items():
                yield from [branch] if name == "pythonClassName" else classes(branch)
        elif isinstance(tree, list):
            for branch in tree:
                yield from classes(branch)

    found = classes(json.loads((source / "features.json").read_text()))
    return [name for name in found if not str(name).startswith(_FEATURES)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS recommends OpenCV at every image."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def reading(name: str, source: Path) -> Iterator[None]:
    """What TFDS, array_record and the image decoders raise over damaged files, of whatever class, is one line."""
    try:
        yield
    except (Refusal, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"Prepared {name} in {source} cannot be read: {first}") from error


def _decode(
    name: str,
    source: Path,
    entry: catalog.Entry,
    described: Description,
    advance: Callable[[int, int], None],
) -> Decoded:
    with reading(name, source), quiet():
        import tensorflow_datasets as tfds

        # By its folder, not by its name: nothing is looked up in a network, nor retried for minutes where there is
        # none.
        builder = tfds.builder_from_directory(str(source))
        features: Any = builder.info.features
        class_names = tuple(features["label"].names)
    if len(class_names) != described.num_classes:
        counts = f"{described.num_classes} classes, got {len(class_names)} label names"
        raise Refusal(f"Expected prepared {name} in {source} to be of {counts}.")
    for part in (*entry.train, entry.test):
        with reading(name, source):
            check_records(name, source, part, described.shards[part])
    splits = {"train": entry.train, "test": (entry.test,)}
    total = sum(described.samples(parts) for parts in splits.values())
    arrays, done, shape = {}, 0, None
    for split, parts in splits.items():
        count = described.samples(parts)
        images, labels, at = None, np.empty(count, np.int32), 0
        for part in parts:
            for rows in _rows(name, source, builder, part):
                # The first image decides what the description leaves open.
                shape = shape or _filled(described.image_shape, rows[0][0].shape)
                images = np.empty((count, *shape), np.uint8) if images is None else images
                for image, label in rows:
                    _check_row(name, source, f"{split} image {at}", image, label, shape, described.num_classes)
                    images[at], labels[at] = image, label
                    at += 1
                done += len(rows)
                advance(done, total)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return Decoded(arrays, class_names, *pixel_statistics(arrays["train_images"]))


def _rows(name: str, source: Path, builder: Any, part: str) -> Iterator[list[tuple[np.ndarray, int]]]:
    """(image, label) of a TFDS split, some at a time."""
    with reading(name, source), quiet():
        records = builder.as_data_source(split=part)
    for start in range(0, len(records), _BATCH):
        with reading(name, source), quiet():
            rows = records.__getitems__(list(range(start, min(start + _BATCH, len(records)))))
            rows = [(np.asarray(row["image"]), int(row["label"])) for row in rows]
        yield rows


def _filled(described: tuple[int | None, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side or first for side, first in zip(described, found, strict=False))


def _check_row(
    name: str, source: Path, what: str, image: np.ndarray, label: int, shape: tuple[int, ...], num_classes: int
) -> None:
    """What does not fit would be spread over the row, or cut to its bits, without a word."""
    fault = ""
    if image.shape != shape or image.dtype != np.uint8:
        fault = f"{what} is {image.shape} {image.dtype}, not {shape} uint8"
    elif not 0 <= label < num_classes:
        fault = f"{what} has label {label}, which is not in [0, {num_classes})"
    if fault:
        raise Refusal(f"Prepared {name} in {source} cannot be read: {fault}.")


def check_records(name: str, source: Path, part: str, lengths: list[int]) -> None:
    """Rows that no record fills would be trained as whatever the memory held."""
    from array_record.python import array_record_module

    for file, length in zip(sorted(source.glob(f"*-{part}.array_record-*")), lengths, strict=True):
        reader = array_record_module.ArrayRecordReader(str(file))
        try:
            found = reader.num_records()
        finally:
            reader.close()
        if found != length:
            raise Refusal(
                f"Expected {length} records in {file.name} of {name} in {source}, as its dataset_info.json says, got "
                f"{found}."
            )


def _check_described(name: str, source: Path, entry: catalog.Entry, described: Description, found: Decoded) -> None:
    """Decoded arrays, kept or new, are what the prepared files say that they hold."""
    for split, parts in {"train": entry.train, "test": (entry.test,)}.items():
        shape = found.arrays[f"{split}_images"].shape
        expected = (described.samples(parts), *described.image_shape)
        fits = len(shape) == len(expected) and all(b is None or a == b for a, b in zip(shape, expected, strict=True))
        if not fits or found.arrays[f"{split}_labels"].shape != shape[:1]:
            raise Refusal(f"Expected {split} images of prepared {name} in {source} of shape {expected}, got {shape}.")
