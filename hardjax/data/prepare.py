"""Preparing, checking and listing data sets: what stands behind `hardjax data`."""

import importlib.util
import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hardjax._validate import Refusal
from hardjax.data import catalog, decoded, load, tfds
from hardjax.data.pixels import count_constant

# TFDS without a network retries for 200 s (measured), prints pages and then fails.
_CONNECT_SECONDS = 3.0
_FEW_CLASSES = 20


def prepare(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Download and prepare a data set with TFDS; returns its folder.

    Raises:
        ValueError: unknown name, no TensorFlow, no network, a folder that cannot be written, or a failed download.
    """
    entry = catalog.find(name)
    if entry.tfds_name is None:
        raise Refusal(f"{name} comes with scikit-learn and needs no preparation.")
    try:
        return tfds.prepared_folder(name, data_dir)
    except tfds.DataNotPrepared:
        pass
    if entry.url is None:
        raise Refusal(
            f"{name} is made of archives that its authors give on request: prepare them with TFDS, as its page on"
            f" {entry.tfds_name} says (file_format='array_record'), and name that folder with --data-dir."
        )
    # Looked for, not imported: importing TensorFlow takes seconds.
    if importlib.util.find_spec("tensorflow") is None:
        raise Refusal(
            f"Preparing {name} needs TensorFlow: `pip install tensorflow-cpu` (the extra hardjax[prepare]), "
            "then run this again."
        )
    folder = tfds.data_folder(data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"Expected a folder to write prepared data in, got {folder}: {error.strerror}.") from None
    if not os.access(folder, os.W_OK):
        raise Refusal(f"Expected a folder to write prepared data in, got {folder}: read-only.")
    _check_reachable(name, entry.url)
    _download(entry.tfds_name, folder)
    return tfds.prepared_folder(name, data_dir)


def check(
    name: str, data_dir: str | os.PathLike | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Read the prepared files whole and report what they hold; accuracies of anything rest on these being right.

    Args:
        say: called with a line where what the cache holds of them cannot be used; it is then made anew.

    Raises:
        ValueError: unknown name, damaged files, or what `load` refuses.
        DataNotPrepared: no prepared data.
    """
    named = catalog.find(name).tfds_name is not None
    state = decoded.state(name, tfds.prepared_folder(name, data_dir)) if named else ""
    if state not in ("", "none", "whole"):
        say(f"Decoding {name} anew: {state}.")
    # Read anew: a check of the cache would not find what is wrong with the prepared files.
    dataset = load(name, data_dir, progress=True, anew=True)
    report: dict[str, Any] = {"name": name, "classes": ", ".join(dataset.class_names)}
    for split in ("train", "test"):
        whole = getattr(dataset, split)
        counts = _histogram(np.bincount(np.asarray(whole.labels), minlength=dataset.num_classes))
        if whole.streamed:  # more than a machine may hold: every label was read, and no image decoded
            report |= {f"{split} images": f"{whole.images.shape} as streamed", f"{split} samples per class": counts}
            continue
        images = np.asarray(whole.images)
        report |= {
            f"{split} images": f"{images.shape} {images.dtype}, values {images.min()} to {images.max()}",
            f"{split} samples per class": counts,
            f"{split} images of one colour": f"{count_constant(images):,} of {len(images):,}",
        }
    report["mean (0..1)"] = ", ".join(f"{value:.4f}" for value in dataset.mean)
    report["std (0..1)"] = ", ".join(f"{value:.4f}" for value in dataset.std)
    report["checksum"] = dataset.checksum
    if named:
        source = tfds.prepared_folder(name, data_dir)
        # Refused by `load` otherwise.
        report["dataset_info.json, features.json"] = "counts, shapes and labels are as they say"
        report |= {"read from": str(source), "fingerprint": decoded.fingerprint(source), "stored as": _encoding(source)}
        report["decoded cache"] = _cache_words(state, decoded.state(name, source))
    return report


def status(data_dir: str | os.PathLike | None = None) -> list[dict[str, str]]:
    """A row for each data set: is it prepared, is it decoded into the cache, where, and its size on disk."""
    rows = []
    for name, entry in catalog.CATALOG.items():
        prepared, in_cache = "comes with scikit-learn", "-"
        if entry.tfds_name is not None:
            try:
                source = tfds.prepared_folder(name, data_dir)
                prepared = f"{source} ({_megabytes(source)})"
                kept = decoded.entry(name, source)
                in_cache = f"yes ({_megabytes(kept)})" if kept.is_dir() else "no"
            except tfds.DataNotPrepared:
                prepared, in_cache = f"no: hardjax data prepare {name}", "no"
        rows.append({"name": name, "about": entry.about, "prepared": prepared, "decoded": in_cache})
    return rows


def _check_reachable(name: str, url: str) -> None:
    """TFDS itself retries for minutes; through a proxy it is the proxy that must answer."""
    proxy = urllib.request.getproxies().get(urllib.parse.urlsplit(url).scheme)
    address = urllib.parse.urlsplit(proxy if proxy and "//" in proxy else f"http://{proxy}" if proxy else url)
    port = address.port or (443 if address.scheme == "https" else 80)
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((address.hostname, port), timeout=_CONNECT_SECONDS).close()
            outcome.append("")
        except OSError as error:
            outcome.append(str(error))

    # In a thread: looking up a name takes no time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS + 1)
    problem = outcome[0] if outcome else "no answer"
    if problem:
        raise Refusal(
            f"No way to {address.hostname} ({problem}), which {name} is downloaded through; prepare it on a machine "
            "with a network and name that folder with --data-dir."
        )


def _download(tfds_name: str, folder: Path) -> None:
    import tensorflow_datasets
    from tensorflow_datasets.core.download import download_manager, extractor, util

    failures = (OSError, util.DownloadError, download_manager.NonMatchingChecksumError, extractor.ExtractError)
    try:
        # TFDS's own default is TFRecord, which cannot be read without TensorFlow.
        builder = tensorflow_datasets.builder(tfds_name, data_dir=str(folder), file_format="array_record")
        builder.download_and_prepare()
    except failures as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"Preparing {tfds_name} in {folder} failed: {first}") from error


def _cache_words(before: str, after: str) -> str:
    if after != "whole":
        return "not kept"
    return {"none": "made now", "whole": "whole"}.get(before, "made anew")


def _histogram(counts: np.ndarray) -> str:
    if counts.min() == counts.max():
        return f"{counts[0]:,} each"
    if len(counts) <= _FEW_CLASSES:
        return ", ".join(f"{count:,}" for count in counts)
    return f"{counts.min():,} to {counts.max():,}"


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.0f} MB"


def _encoding(source: Path) -> str:
    """PNG is lossless; JPEG re-encodings are fit for comparing methods, not for published figures."""
    from array_record.python import array_record_data_source

    file = min(source.glob("*-train.array_record-*"))
    record = array_record_data_source.ArrayRecordDataSource(str(file))[0]
    if b"\x89PNG" in record:
        return "PNG (lossless)"
    return "JPEG (lossy: not the original pixels)" if b"\xff\xd8\xff" in record else "unknown"
