"""Prepared TFDS data without TensorFlow, decoded once into plain arrays in the user's cache folder."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hardjax.data import catalog

# tensorflow_datasets takes half a second to import, so it is imported where it is used.

_BATCH = 500


class DataNotPrepared(FileNotFoundError):
    """Prepared data was asked for and is not there; the message names the command that prepares it."""


def cache_folder() -> Path:
    """HARDJAX_CACHE, else hardjax in XDG_CACHE_HOME, else ~/.cache/hardjax."""
    if own := os.environ.get("HARDJAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hardjax"


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder of prepared data: as given, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_folder(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """The newest prepared version of a data set; looks at the disk only.

    Raises:
        DataNotPrepared: there is none.
    """
    entry = catalog.find(name)
    base = data_folder(data_dir) / entry.tfds_name
    versions = [path.parent for path in base.glob("**/dataset_info.json")]
    if not versions:
        where = "" if data_dir is None else f" --data-dir {data_dir}"
        raise DataNotPrepared(
            f"No prepared {name} in {data_folder(data_dir)}; run `hardjax data prepare {name}{where}`, "
            "or name a folder of prepared TFDS data with --data-dir (data_dir=)."
        )
    return max(versions, key=lambda path: [int(part) if part.isdigit() else 0 for part in path.name.split(".")])


def load_arrays(
    name: str, data_dir: str | os.PathLike | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> tuple[dict[str, np.ndarray], tuple[str, ...], Path]:
    """The splits of a prepared data set, from the cache where they were decoded before.

    Args:
        name: in the catalogue, with a TFDS builder.
        data_dir: folder of prepared data; it is only read.
        advance: called with (images decoded, images in all).

    Returns:
        {"train_images", "train_labels", "test_images", "test_labels"}, class names, and the folder that was read.

    Raises:
        DataNotPrepared: no prepared data.
    """
    source = prepared_folder(name, data_dir)
    kept = cache_folder() / "datasets" / f"{name}-{source.name}-{fingerprint(source)}"
    arrays = _read_cache(kept)
    if arrays is None:
        decoded, class_names = _decode(name, source, advance)
        _write_cache(kept, decoded, class_names)
        arrays = _read_cache(kept) or (decoded, class_names)
    return *arrays, source


def fingerprint(source: Path) -> str:
    """Twelve hex digits of the names, sizes and times of the files, so that other data never meets an old cache."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir())]
    return hashlib.sha256(json.dumps([str(source.resolve()), facts]).encode()).hexdigest()[:12]


def _decode(name: str, source: Path, advance: Callable[[int, int], None]) -> tuple[dict, tuple[str, ...]]:
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at every image
    import tensorflow_datasets as tfds

    entry = catalog.find(name)
    builder = tfds.builder_from_directory(str(source))
    label = builder.info.features["label"]
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
    return arrays, tuple(label.names)


def _read_cache(folder: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]] | None:
    """None where there is no whole cache entry."""
    try:
        about = json.loads((folder / "about.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in about["arrays"]}
        whole = all(list(arrays[name].shape) == shape for name, shape in about["arrays"].items())
    except (OSError, ValueError, KeyError):
        return None
    return (arrays, tuple(about["class_names"])) if whole else None


def _write_cache(folder: Path, arrays: dict[str, np.ndarray], class_names: tuple[str, ...]) -> None:
    """Written aside and moved into place, so that a reader never meets half of it; a cache that cannot be written is
    done without."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    except OSError:
        return
    try:
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array)
        about = {"arrays": {name: array.shape for name, array in arrays.items()}, "class_names": class_names}
        (scratch / "about.json").write_text(json.dumps(about))
        if folder.exists():
            shutil.rmtree(folder)
        scratch.replace(folder)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
