"""Data sets by name, on the device as uint8."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from hardjax._validate import Refusal
from hardjax.data import catalog, source, tfds
from hardjax.data.augment import Augmentation
from hardjax.data.dataset import Dataset, Split, assemble, evenly
from hardjax.data.tfds import DataNotPrepared

__all__ = ["Augmentation", "DataNotPrepared", "Dataset", "Split", "load", "names"]

# A fifth of the samples. One of them is 0.28 points of accuracy: differences below that are no differences.
_DIGITS_TEST = 360


def names() -> list[str]:
    """Names that `load` takes."""
    return list(catalog.CATALOG)


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    progress: bool = False,
    anew: bool = False,
    say: Callable[[str], None] = lambda line: None,
    stream: bool = False,
) -> Dataset:
    """A data set by name, checked; the first load decodes it into the cache folder, later ones read arrays.

    Args:
        name: "digits" needs no download; the others are prepared TFDS data.
        data_dir: folder of prepared data; None takes TFDS_DATA_DIR or TFDS's own default.
        progress: a bar on standard error while decoding.
        anew: decode the prepared files again, whatever the cache holds.
        stream: leave the images where they are, to be read when they are needed; those of several sizes always are.
        say: called with a line where the cache held arrays that could not be used, and the files are decoded again.

    Raises:
        ValueError: unknown name (the closest one is offered), damaged files, or data that nothing can be learnt from
            (see `Dataset.from_arrays`).
        DataNotPrepared: no prepared data; the message names the command that prepares it.
    """
    entry = catalog.find(name)
    if entry.tfds_name is None:
        return _digits().on_host() if stream else _digits()
    with _Bar(name, progress and sys.stderr.isatty()) as bar:
        if stream or entry.fit is not None:
            return source.open_records(name, data_dir, bar.advance)
        found, folder = tfds.load_arrays(name, data_dir, bar.advance, anew, say)
    images, labels = (
        {split: found.arrays[f"{split}_{what}"] for split in ("train", "test")} for what in ("images", "labels")
    )
    try:
        return assemble(
            images,
            labels,
            num_classes=None,
            class_names=found.class_names,
            name=name,
            flip=entry.flip,
            statistics=(found.mean, found.std),
        )
    except Refusal as refusal:
        raise Refusal(f"Prepared {name} in {folder} cannot be used. {refusal}") from None


def _digits() -> Dataset:
    """scikit-learn's digits: values 0..16 rescaled to uint8; 1,437 for training, 360 (evenly by class) for testing."""
    # Imported here: nothing but the digits needs scikit-learn.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int32)
    test = np.isin(np.arange(len(labels)), evenly(labels, _DIGITS_TEST))
    return Dataset.from_arrays(images[~test], labels[~test], images[test], labels[test], num_classes=10, name="digits")


class _Bar:
    """A progress bar for decoding, made when there is something to decode."""

    def __init__(self, name: str, shown: bool) -> None:
        self._name, self._shown, self._bar = name, shown, None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"reading {self._name} (once)", total=total)
        self._bar.update(self._task, completed=done)
