"""Prepared images that are read when they are needed: for data that does not fit the device, or the host."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hardjax._validate import Refusal
from hardjax.data import catalog, decoded, tfds, views
from hardjax.data.catalog import Cut, Fit
from hardjax.data.dataset import Dataset, Split
from hardjax.data.labels import checked
from hardjax.data.pixels import pixel_statistics

_TOLD = 5000  # samples between two calls of `advance`


class Records:
    """The images of a split, on the disk, read by index as of an array (n, H, W, C) uint8; by several threads at once.

    Attributes:
        shape, dtype: as an array's.
        sides: see `Dataset.sides`.
        statistics: published mean and deviation, or None.
        checksum: of the files' names and sizes.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, name: str, folder: Path, parts: tuple[str, ...], fit: Fit | None, statistics: Any) -> None:
        """
        Args:
            name: in the catalogue.
            folder: of the prepared files.
            parts: TFDS splits, one after the other.
            fit: how images of several sizes are brought to one.
        """
        described = tfds.describe(folder)
        self._name, self._folder, self._fit = name, folder, fit
        self._parts, counts = parts, [described.samples((part,)) for part in parts]
        with tfds.reading(name, folder):
            for part in parts:
                tfds.check_records(name, folder, part, described.shards[part])
        self._sources = self._opened(decode=True)
        self._ends = np.cumsum(counts)
        shape = (fit.crop, fit.crop, described.image_shape[2]) if fit else described.image_shape
        if None in shape:
            raise Refusal(f"Expected prepared {name} in {folder} to say the size of its images, got {shape}.")
        self.shape = (int(self._ends[-1]), *(int(side) for side in shape))  # type: ignore[arg-type]
        self.sides, self._classes = (fit.sides if fit else ()), described.num_classes
        self.statistics = statistics and tuple(np.asarray(found, np.float32) for found in statistics)
        files = sorted(path for part in parts for path in folder.glob(f"*-{part}.array_record-*"))
        self.checksum = json.dumps([(path.name, path.stat().st_size) for path in files])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Images (k, H, W, C) by index (k,) or slice, one (H, W, C) by a number; of several sizes the centres."""
        if isinstance(indices, int | np.integer):
            return self.read(np.array([indices]))[0]
        return self.read(np.arange(len(self))[indices] if isinstance(indices, slice) else np.asarray(indices))

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None, cut: Cut | None = None) -> np.ndarray:
        """Images (k, H, W, C) of these samples, in this order.

        Args:
            indices: (k,).
            draws: (k, 3) in [0, 1): of the crop's size, and of its place from above and from the left; None takes the
                centre.
            cut: what the crops are drawn from.

        Raises:
            ValueError: a record is damaged, or its image of another shape than the files say.
        """
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for place, (row, index) in enumerate(zip(self._rows(self._sources, indices), indices, strict=True)):
            image = np.asarray(row["image"])
            if self._fit is not None:
                image = fitted(image, self._fit, None if draws is None else draws[place], cut)
            if image.shape != self.shape[1:] or image.dtype != np.uint8:
                raise self._fault(f"image {index} is {image.shape} {image.dtype}, not {self.shape[1:]} uint8")
            images[place] = image
        return images

    def remembered(self, named: str, find: Callable[[], str]) -> str:
        """The checksum of data that is known by the name `named`, kept beside what else is known of these files."""
        kept = _beside(self._name, self._folder, ".sums.json")
        known = _sums(kept)
        if named not in known:
            known = _sums(kept) | {named: find()}
            with suppress(OSError):  # it is found again the next time
                kept.parent.mkdir(parents=True, exist_ok=True)
                scratch = kept.with_name(f".{kept.name}-{os.getpid()}")
                scratch.write_text(json.dumps(known))
                scratch.replace(kept)
        return known[named]

    def labels(self, advance: Callable[[int, int], None]) -> np.ndarray:
        """(n,) int32, of all records; no image is decoded."""
        found, sources = np.empty(len(self), np.int32), self._opened(decode=False)
        for start in range(0, len(self), _TOLD):
            some = np.arange(start, min(start + _TOLD, len(self)))
            found[some] = [int(row["label"]) for row in self._rows(sources, some)]
            advance(int(some[-1]) + 1, len(self))
        outside = np.flatnonzero((found < 0) | (found >= self._classes))
        if len(outside):
            raise self._fault(f"image {outside[0]} has label {found[outside[0]]}, which is not in [0, {self._classes})")
        return found

    def _opened(self, decode: bool) -> list[Any]:
        """TFDS's data source of each part, with images decoded or as they are stored."""
        with tfds.reading(self._name, self._folder), tfds.quiet():
            import tensorflow_datasets

            builder = tensorflow_datasets.builder_from_directory(str(self._folder))
            decoders = None if decode else {"image": tensorflow_datasets.decode.SkipDecoding()}
            return [builder.as_data_source(split=part, decoders=decoders) for part in self._parts]

    def _rows(self, sources: list[Any], indices: np.ndarray) -> list[dict[str, Any]]:
        """Of these samples, in this order."""
        parts = np.searchsorted(self._ends, indices, side="right")
        rows: list[Any] = [None] * len(indices)
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            first = int(self._ends[part - 1]) if part else 0
            wanted = [int(indices[place]) - first for place in places]
            with tfds.reading(self._name, self._folder), tfds.quiet():
                found = sources[part].__getitems__(wanted)
            for place, row in zip(places, found, strict=True):
                rows[place] = row
        return rows

    def _fault(self, what: str) -> Refusal:
        return Refusal(f"Prepared {self._name} in {self._folder} cannot be read: {what}.")


def fitted(image: np.ndarray, fit: Fit, draw: np.ndarray | None, cut: Cut | None) -> np.ndarray:
    """A crop (crop, crop, C) of an image (h, w, C), resized (bilinear, with antialiasing).

    Args:
        draw: (3,) in [0, 1), see `Records.read`; None takes the centre of the image of testing.
        cut: what a crop is drawn from where there are draws.
    """
    from PIL import Image

    flat = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    size, shape = (fit.crop, fit.crop), (fit.crop, fit.crop, -1)
    if cut is not None and cut.area is not None and draw is not None:
        top, left, height, width = _box(image.shape[:2], cut.area, draw)
        box = (left, top, left + width, top + height)
        return np.asarray(flat.resize(size, Image.Resampling.BILINEAR, box)).reshape(shape)
    height, width = image.shape[:2]
    side = fit.side
    if draw is not None and cut is not None:
        side = cut.sides[0] + int(draw[0] * (cut.sides[1] - cut.sides[0] + 1))
    shorter = min(height, width)
    high, wide = (max(side, round(length * side / shorter)) for length in (height, width))
    top, left = (
        (free // 2 if draw is None else int(draw[axis] * (free + 1)))
        for axis, free in enumerate((high - fit.crop, wide - fit.crop), start=1)
    )
    resized = np.asarray(flat.resize((wide, high), Image.Resampling.BILINEAR))
    return resized[top : top + fit.crop, left : left + fit.crop].reshape(shape)


def _box(size: tuple[int, ...], area: float, draw: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of Inception's; of an image that is too long for any, the most of its
    middle whose sides are as 3 to 4 or 4 to 3."""
    height, width = size
    sizes = views.crop_sizes(height, width, area)
    if len(sizes):
        high, wide = (int(length) for length in sizes[int(draw[0] * len(sizes))])
        return int(draw[1] * (height - high + 1)), int(draw[2] * (width - wide + 1)), high, wide
    high, wide = min(height, round(width * views.WIDEST)), min(width, round(height * views.WIDEST))
    return (height - high) // 2, (width - wide) // 2, high, wide


def open_records(
    name: str, data_dir: str | os.PathLike | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Dataset:
    """A prepared data set whose images stay on the disk.

    Labels are read once, and where none are published so are the mean and deviation of the pixels; both are kept in the
    cache folder.

    Raises:
        DataNotPrepared: no prepared data.
        ValueError: prepared files are damaged, or hold something else than they say.
    """
    entry, folder = catalog.find(name), tfds.prepared_folder(name, data_dir)
    splits = {"train": entry.train, "test": (entry.test,)}
    images = {split: Records(name, folder, parts, entry.fit, entry.statistics) for split, parts in splits.items()}
    kept = _beside(name, folder, ".stream.npz")
    known = _known(kept, images)
    if known is None:
        mean, std = images["train"].statistics or pixel_statistics(images["train"])
        known = {split: records.labels(advance) for split, records in images.items()} | {"mean": mean, "std": std}
        _keep(kept, known)
    names = _class_names(name, folder)
    counts = {split: len(records) for split, records in images.items()}
    labels, num_classes = checked({split: known[split] for split in splits}, counts, None, names)
    train, test = (Split(images[split], jnp.array(labels[split], jnp.int32)) for split in ("train", "test"))
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=num_classes,
        class_names=names,
        mean=known["mean"],
        std=known["std"],
        flip=entry.flip,
        sides=images["train"].sides,
    )


def _class_names(name: str, folder: Path) -> tuple[str, ...]:
    with tfds.reading(name, folder), tfds.quiet():
        import tensorflow_datasets

        features: Any = tensorflow_datasets.builder_from_directory(str(folder)).info.features
        return tuple(features["label"].names)


def decoded_bytes(name: str, data_dir: str | os.PathLike | None = None) -> int:
    """Of the images of all splits as arrays; 0 of data that comes with a package.

    Raises:
        DataNotPrepared: no prepared data.
    """
    entry = catalog.find(name)
    if entry.tfds_name is None:
        return 0
    described = tfds.describe(tfds.prepared_folder(name, data_dir))
    pixels = 1
    for side in described.image_shape:
        pixels *= side or (entry.fit.crop if entry.fit else 1)
    return pixels * described.samples((*entry.train, entry.test))


def _beside(name: str, folder: Path, suffix: str) -> Path:
    """A file of the cache folder for these prepared files, whose fingerprint it has in its name."""
    entry = decoded.entry(name, folder)
    # Not `with_suffix`: the version has points in it, and the fingerprint stands behind the last of them.
    return entry.with_name(entry.name + suffix)


def _sums(kept: Path) -> dict[str, str]:
    """Name of some data -> its checksum; nothing where the file is not there or damaged."""
    try:
        found = json.loads(kept.read_text())
    except (OSError, ValueError):
        return {}
    return {name: known for name, known in found.items() if isinstance(known, str)} if isinstance(found, dict) else {}


def _known(kept: Path, images: dict[str, Records]) -> dict[str, np.ndarray] | None:
    """What was read before of the same files (the name says which they are), None where it is not there or damaged."""
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as found:
            known = {name: found[name] for name in ("train", "test", "mean", "std")}
            fits = all(known[split].shape == (len(records),) for split, records in images.items())
            return known if fits and int(found["crc32"]) == _crc(known) else None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
        return None


def _keep(kept: Path, known: dict[str, np.ndarray]) -> None:
    scratch = kept.with_name(f".{kept.name}-{os.getpid()}.npz")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(scratch, crc32=_crc(known), **known)
        scratch.replace(kept)
    except OSError:  # it is read again the next time
        scratch.unlink(missing_ok=True)


def _crc(known: dict[str, np.ndarray]) -> int:
    total = 0
    for name in ("train", "test", "mean", "std"):
        total = zlib.crc32(np.ascontiguousarray(known[name]), total)
    return total
