"""Prepared TFDS data without TensorFlow, decoded once into plain arrays in the user's cache folder."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.data import catalog

# tensorflow_datasets takes half a second to import, so it is imported where it is used.

_BATCH = 500


class DataNotPrepared(Refusal, FileNotFoundError):
    """Prepared data was asked for and is not there; the message names the command that prepares it."""


def cache_folder() -> Path:
    """HARDJAX_CACHE, else hardjax in XDG_CACHE_HOME, else ~/.cache/hardjax."""
    if own := os.environ.get("HARDJAX_CACHE"):
        return _validate.local_folder(HARDJAX_CACHE=own)
    return _validate.local_folder(XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hardjax"


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
) -> tuple[dict[str, np.ndarray], tuple[str, ...], Path]:
    """The splits of a prepared data set, from the cache where they were decoded before.

    Args:
        name: in the catalogue, with a TFDS builder.
        data_dir: folder of prepared data; it is only read.
        advance: called with (images decoded, images in all).
        anew: read the prepared files even where decoded arrays are kept.

    Returns:
        {"train_images", "train_labels", "test_images", "test_labels"}, class names, and the folder that was read.

    Raises:
        DataNotPrepared: no prepared data.
        ValueError: prepared files are damaged.
    """
    source = prepared_folder(name, data_dir)
    kept = cache_entry(name, source)
    cached = None if anew else _read_cache(kept)
    if cached is None:
        cached = _decode(name, source, advance)
        _write_cache(kept, *cached)
    return *cached, source


def cache_entry(name: str, source: Path) -> Path:
    """The folder that the decoded arrays of a prepared folder are kept in, present or not."""
    return cache_folder() / "datasets" / f"{name}-{source.name}-{fingerprint(source)}"


def fingerprint(source: Path) -> str:
    """Twelve hex digits of the names, sizes and times of the files, so that other data never meets an old cache."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _version(path: Path) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in path.name.split(".")]


def _lacking(source: Path, entry: catalog.Entry) -> str:
    """Why a prepared folder cannot be read, empty where it can."""
    try:
        info = json.loads((source / "dataset_info.json").read_text())
        shards = {split["name"]: len(split["shardLengths"]) for split in info["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        return "has an unreadable dataset_info.json"
    # Reading TFRecord would need TensorFlow.
    if info.get("fileFormat") != "array_record":
        return f"is stored as {info.get('fileFormat')}, which is not read here (array_record is)"
    for part in (*entry.train, entry.test):
        if part not in shards:
            return f"has no split {part!r}"
        files = len(list(source.glob(f"*-{part}.array_record-*")))
        if files != shards[part]:
            return f"has {files} of {shards[part]} files of split {part!r}"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS recommends OpenCV at every image."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _decode(name: str, source: Path, advance: Callable[[int, int], None]) -> tuple[dict, tuple[str, ...]]:
    with _quiet():
        import tensorflow_datasets as tfds

        # By its folder, not by its name: nothing is looked up in a network, nor retried for minutes where there is
        # none.
        builder = tfds.builder_from_directory(str(source))
        try:
            return _decode_splits(catalog.find(name), builder, advance)
        except (RuntimeError, OSError) as error:  # from array_record and from the image decoder
            raise Refusal(f"Prepared {name} in {source} cannot be read: {str(error).splitlines()[0]}") from error


def _decode_splits(
    entry: catalog.Entry, builder: Any, advance: Callable[[int, int], None]
) -> tuple[dict, tuple[str, ...]]:
    splits = {"train": entry.train, "test": (entry.test,)}
    total = sum(builder.info.splits[part].num_examples for parts in splits.values() for part in parts)
    arrays, done = {}, 0
    for split, parts in splits.items():
        count = sum(builder.info.splits[part].num_examples for part in parts)
        labels = np.empty(count, np.int32)
        images, at = None, 0
        for part in parts:
            records = builder.as_data_source(split=part)
            for start in range(0, len(records), _BATCH):
                rows = records.__getitems__(list(range(start, min(start + _BATCH, len(records)))))
                if images is None:
                    images = np.empty((count, *rows[0]["image"].shape), np.uint8)
                for row in rows:
                    images[at], labels[at] = row["image"], row["label"]
                    at += 1
                done += len(rows)
                advance(done, total)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays, tuple(builder.info.features["label"].names)


def _read_cache(folder: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]] | None:
    """None where there is no whole cache entry: absent, cut short, or changed since it was written."""
    try:
        about = json.loads((folder / "about.json").read_text())
        # Mapped: the checksum below and the copy to the device read them, and the host never holds them twice.
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about["crc32"]}
        class_names = tuple(about["class_names"])
        # A file of the right length may hold zeros where the machine went down before they were written.
        whole = all(zlib.crc32(arrays[name]) == crc for name, crc in about["crc32"].items())
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return (arrays, class_names) if whole else None


def _write_cache(folder: Path, arrays: dict[str, np.ndarray], class_names: tuple[str, ...]) -> None:
    """Written aside and moved into place, so that a reader never meets half of it; a cache that cannot be written is
    done without, with a warning."""
    about = {"class_names": class_names, "crc32": {name: zlib.crc32(array) for name, array in arrays.items()}}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            for name, array in arrays.items():
                np.save(whole / f"{name}.npy", array)
            (whole / "about.json").write_text(json.dumps(about))
            if folder.exists():
                folder.replace(Path(scratch) / "old")
            whole.replace(folder)
    except OSError as error:
        warnings.warn(
            f"Decoded data is not kept for next time: {error} (HARDJAX_CACHE names the folder).", stacklevel=4
        )
