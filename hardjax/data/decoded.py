"""Arrays that were decoded once, kept in the user's cache folder: whole, or found out and made anew."""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hardjax import _validate

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None  # type: ignore[assignment]

# Raised whenever decoding gives other arrays, or they are kept in another form: what an older one kept is made anew.
_DECODER = 1
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_TRIES = 10  # at putting an entry in place; another process must come between at every one of them to use them up
_BEGINNING = 60.0  # seconds


class Decoded(NamedTuple):
    """A prepared data set as plain arrays.

    Attributes:
        arrays: "train_images", "train_labels", "test_images", "test_labels".
        class_names: one a class.
        mean, std: (C,) float32, see `pixels.pixel_statistics`.
    """

    arrays: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray


def cache_folder() -> Path:
    """HARDJAX_CACHE, else hardjax in XDG_CACHE_HOME, else ~/.cache/hardjax."""
    if own := os.environ.get("HARDJAX_CACHE"):
        return _validate.local_folder(HARDJAX_CACHE=own)
    return _validate.local_folder(XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hardjax"


def entry(name: str, source: Path) -> Path:
    """The folder that the decoded arrays of a prepared folder are kept in, present or not."""
    return cache_folder() / "datasets" / f"{name}-{source.name}-{fingerprint(source)}"


def fingerprint(source: Path) -> str:
    """Twelve hex digits of the names, sizes and times of the files, so that other data never meets an old cache."""
    return _origin(source)[:12]


def _origin(source: Path) -> str:
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(source.iterdir())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def state(name: str, source: Path) -> str:
    """Of the decoded arrays of a prepared folder: "none", "whole", or what is wrong with them."""
    decoded, fault = read(entry(name, source), source)
    return "whole" if decoded else fault or "none"


def read(folder: Path, source: Path) -> tuple[Decoded | None, str]:
    """(what is kept, "") or (None, what is wrong with it), the latter empty where nothing is kept."""
    try:
        text = (folder / "about.json").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None, f"{folder} has no about.json" if folder.exists() else _other_files(folder)
    except (OSError, ValueError):
        return None, f"{folder} has an unreadable about.json"
    try:
        kept = json.loads(text)
        about = kept["about"]
        if kept["crc32"] != _crc(about):
            return None, f"{folder} has a damaged about.json"
        if (about["decoder"], about["source"]) != (_DECODER, _origin(source)):
            return None, f"{folder} is of another version of hardjax or of other files"
        # Only names that are known here: no path is taken from a file.
        files = {name: folder / f"{name}.npy" for name in _ARRAYS}
        for name, file in files.items():
            # The whole file, its header too: of the right length it may hold zeros where the machine went down before
            # they were written, and with another shape in its header the same pixels are other images.
            if zlib.crc32(np.memmap(file, np.uint8, "r")) != about["crc32"][name]:
                return None, f"{folder} has a damaged {file.name}"
        # Mapped: the checksum above and the copy to the device read them, and the host never holds them twice.
        arrays = {name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items()}
        mean, std = (np.array(about[field], np.float32) for field in ("mean", "std"))
        return Decoded(arrays, tuple(about["class_names"]), mean, std), ""
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None, f"{folder} is cut short or of another version of hardjax"


def _other_files(folder: Path) -> str:
    """Something to say where the same version of a data set was decoded from other files; else nothing."""
    prefix = folder.name.rpartition("-")[0] + "-"
    try:
        others = any(path.name.startswith(prefix) for path in folder.parent.iterdir())
    except OSError:
        return ""
    return "the prepared files are not those that were decoded before" if others else ""


def _crc(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _file_crc(array: np.ndarray) -> int:
    """Of the file that `np.save` writes, from what is in memory: what was read back would vouch for itself."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return zlib.crc32(array, zlib.crc32(header.getvalue()))


def write(folder: Path, source: Path, decoded: Decoded) -> None:
    """Written aside and moved into place, so that a reader never meets half of it; a cache that cannot be written is
    done without, with a warning."""
    about = {
        "decoder": _DECODER,
        "source": _origin(source),
        "class_names": list(decoded.class_names),
        "crc32": {name: _file_crc(array) for name, array in decoded.arrays.items()},
        "mean": decoded.mean.tolist(),
        "std": decoded.std.tolist(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch, _held(scratch):
            whole = Path(scratch) / "whole"
            whole.mkdir()
            for name, array in decoded.arrays.items():
                np.save(whole / f"{name}.npy", array, allow_pickle=False)
            (whole / "about.json").write_text(json.dumps({"about": about, "crc32": _crc(about)}))
            _put_in_place(whole, folder, source, Path(scratch))
    except OSError as error:
        warnings.warn(
            f"Decoded data is not kept for next time: {error} (HARDJAX_CACHE names the folder).", stacklevel=4
        )


@contextlib.contextmanager
def _held(scratch: str | Path) -> Iterator[bool]:
    """Lock a folder until the end of the block or of the process; gives whether nobody else holds it."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some network file systems know no locks: then nobody is taken for dead
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _clear_dead(folder: Path) -> None:
    """Take away what writers of this entry left that were killed: as much as the data set each."""
    for scratch in folder.parent.glob(f".{glob.escape(folder.name)}-*"):
        with contextlib.suppress(OSError):  # its writer may have come to its end meanwhile
            # One that has just begun may not have taken its lock yet.
            if time.time() - scratch.stat().st_mtime > _BEGINNING:
                with _held(scratch) as dead:
                    if dead:
                        shutil.rmtree(scratch)


def _put_in_place(whole: Path, folder: Path, source: Path, scratch: Path) -> None:
    """Rename `whole` to `folder`, which other processes may be doing as well."""
    for attempt in range(_TRIES):
        # Another process that decoded the same files was faster: readers may be at its arrays.
        if read(folder, source)[0] is not None:
            return
        with contextlib.suppress(FileNotFoundError):
            folder.replace(scratch / f"old{attempt}")
        try:
            whole.replace(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
