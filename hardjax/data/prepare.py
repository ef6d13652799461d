"""Preparing, checking and listing data sets: what stands behind `hardjax data`."""

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np

from hardjax.data import catalog, tfds

_CONNECT_SECONDS = 3.0


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Download and prepare a data set with TFDS; returns its folder.

    Raises:
        ValueError: unknown name, no TensorFlow, or no network.
    """
    entry = catalog.find(name)
    if entry.tfds_name is None:
        raise ValueError(f"{name} comes with scikit-learn and needs no preparation.")
    try:
        return tfds.prepared_folder(name, data_dir)
    except tfds.DataNotPrepared:
        pass
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            "Preparing data needs TensorFlow: install hardjax[prepare] (tensorflow-cpu), then run this again."
        )
    try:
        socket.create_connection((entry.host, 443), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"No way to {entry.host} ({error}), where {name} is downloaded from; prepare it on a machine with a network "
            "and name that folder with --data-dir."
        ) from None
    import tensorflow_datasets

    builder = tensorflow_datasets.builder(
        entry.tfds_name, data_dir=str(tfds.data_folder(data_dir)), file_format="array_record"
    )
    builder.download_and_prepare()
    return tfds.prepared_folder(name, data_dir)


def check(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, Any]:
    """Read a data set whole and report what it holds; accuracies of anything rest on these being right.

    Raises:
        ValueError: unknown name, labels outside the classes.
        DataNotPrepared: no prepared data.
    """
    from hardjax.data import load

    dataset = load(name, data_dir)
    report: dict[str, Any] = {"name": name, "classes": ", ".join(dataset.class_names)}
    for split in ("train", "test"):
        images, labels = (np.asarray(leaf) for leaf in getattr(dataset, split))
        counts = np.bincount(labels, minlength=dataset.num_classes)
        report |= {
            f"{split} images": f"{images.shape} {images.dtype}, values {images.min()} to {images.max()}",
            f"{split} samples per class": f"{counts.min()} to {counts.max()}",
        }
    report["mean (0..1)"] = ", ".join(f"{value:.4f}" for value in dataset.mean)
    report["std (0..1)"] = ", ".join(f"{value:.4f}" for value in dataset.std)
    if catalog.find(name).tfds_name is not None:
        source = tfds.prepared_folder(name, data_dir)
        report |= {"read from": str(source), "fingerprint": tfds.fingerprint(source), "stored as": _encoding(source)}
    return report


def status(data_dir: str | os.PathLike | None = None) -> list[dict[str, str]]:
    """A row for each data set: is it prepared, is it decoded into the cache."""
    rows = []
    for name, entry in catalog.CATALOG.items():
        prepared, cached = "comes with scikit-learn", "-"
        if entry.tfds_name is not None:
            try:
                source = tfds.prepared_folder(name, data_dir)
                prepared = str(source)
                kept = tfds.cache_folder() / "datasets" / f"{name}-{source.name}-{tfds.fingerprint(source)}"
                cached = "yes" if kept.is_dir() else "no"
            except tfds.DataNotPrepared:
                prepared, cached = f"no: hardjax data prepare {name}", "no"
        rows.append({"name": name, "about": entry.about, "prepared": prepared, "decoded": cached})
    return rows


def _encoding(source: Path) -> str:
    """PNG is lossless; JPEG re-encodings are fit for comparing methods, not for published figures."""
    from array_record.python import array_record_data_source

    file = next(iter(sorted(source.glob("*train*array_record*"))), None)
    if file is None:
        return "unknown"
    record = array_record_data_source.ArrayRecordDataSource(str(file))[0]
    if b"\x89PNG" in record:
        return "PNG (lossless)"
    return "JPEG (lossy: not the original pixels)" if b"\xff\xd8\xff" in record else "unknown"
