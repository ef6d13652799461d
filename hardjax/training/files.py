"""Files of a run: which there are, whose they are, and how they are written."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax._version import __version__
from hardjax.training import checkpoint

# Of all commands: a name that is missing here is neither refused nor cleared away.
FILES = (
    "config.json",
    "history.jsonl",
    "summary.json",
    "replays.npz",
    "spectra.npz",
    "measure.json",
    "hardest.png",
    "measures.png",
    "comparison.png",
    "checkpoint",
)
# Other tools too call their files config.json and checkpoint: only a folder with this file in it is ours to clear.
MARKER = "hardjax.json"
_FORMAT = {"format": "results of hardjax", "version": 1}


def check_folder(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Look whether the folder may take the files of a run, a comparison or a measurement; touches nothing.

    Returns:
        The folder, with ~ expanded.

    Raises:
        ValueError: it holds such files already (unless they are ours and `overwrite`), is a file, an address, or cannot
            be looked at.
    """
    folder = _validate.local_folder(output=folder)
    with _refused(folder, "to be a folder to write in"):
        if folder.exists() and not folder.is_dir():
            raise Refusal(f"Expected output={str(folder)!r} to be a folder; it is a file.")
        held = [name for name in FILES if os.path.lexists(folder / name)]
        if held and not overwrite:
            raise Refusal(
                f"The output folder {str(folder)!r} already holds a run ({', '.join(held)}); "
                "name another, or pass --overwrite (overwrite=True)."
            )
        marker = [MARKER] if os.path.lexists(folder / MARKER) else []
        strange = [name for name in held + marker if not _ours(folder, name)]
    if strange:
        raise Refusal(
            f"The output folder {str(folder)!r} holds {', '.join(strange)}, not written by hardjax (of this version), "
            "which is not overwritten; name another folder."
        )
    return folder


def claim_folder(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make the folder, without the files of a run before.

    Call it last: what it deletes is gone, so everything that can be refused must have been refused.

    Raises:
        ValueError: as `check_folder`, or it cannot be made or written.
    """
    folder = check_folder(folder, overwrite)
    with _refused(folder, "to be a folder to write in"):
        folder.mkdir(parents=True, exist_ok=True)
        # A folder that exists may be read-only, or its disk full: found out now, not after hours.
        tempfile.TemporaryFile(dir=folder).close()
        write_json(folder / MARKER, _FORMAT)
        for path in (folder / name for name in FILES):
            # A link is taken away, never what it points to: somebody keeps checkpoints on a larger disk.
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return folder


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a run's folder (or of its checkpoint folder).

    Raises:
        ValueError: there is no run, it is damaged, or a comparison's.
    """
    folder = _validate.local_folder(run=folder)
    folder = folder.parent if folder.name == "checkpoint" else folder
    path = folder / "config.json"
    try:
        if not path.is_file():
            raise Refusal(f"No run in {str(folder)!r}; `hardjax train --output` writes one.")
        plain = json.loads(path.read_text())
    except Refusal:
        raise
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise Refusal(f"Expected run={str(folder)!r} to be readable: {error.strerror or error}.") from None
    except ValueError as error:
        raise Refusal(f"Damaged config.json in {str(folder)!r}: {error}.") from None
    if not isinstance(plain, dict):
        raise Refusal(f"Damaged config.json in {str(folder)!r}: no JSON object.")
    if "arms" in plain:
        raise Refusal(f"{str(folder)!r} holds a comparison; name the folder of one run of `hardjax train`.")
    return plain


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (NaN and infinities become null), written whole or not at all.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    # Renaming is atomic: a reader, or a run killed here, never leaves half a file.
    scratch = path.with_name(path.name + ".part")
    with _refused(path, "to be writable"):
        scratch.write_text(json.dumps(_strict(content), indent=2) + "\n")
        scratch.replace(path)


def append_line(path: Path, entry: Any) -> None:
    """One strict JSON line, readable while the run goes on.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    with _refused(path, "to be writable"), path.open("a") as file:
        file.write(json.dumps(_strict(entry)) + "\n")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """A compressed .npz, written whole or not at all, so that it can be read while the run goes on.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    scratch = path.with_name(path.name + ".part")
    with _refused(path, "to be writable"):
        with scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)
        scratch.replace(path)


def environment() -> dict[str, Any]:
    """Versions and device, for summaries."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"hardjax": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind} x{jax.device_count()}, {os.cpu_count()} CPU cores",
    }


def _ours(folder: Path, name: str) -> bool:
    """Whether a file of that name in the folder was written by a run: the folder carries our marker, and the thing is
    of the kind that we write there."""
    try:
        marked = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    path = folder / name
    if not isinstance(marked, dict) or marked.get("format") != _FORMAT["format"]:
        return False
    if path.is_symlink() or not path.is_dir():
        return True
    return name == "checkpoint" and checkpoint.is_ours(path)


@contextmanager
def _refused(path: Path, what: str) -> Iterator[None]:
    """What the operating system refuses, as one line of ours."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"Expected output={str(path)!r} {what}: {error.strerror or error}.") from None


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    if isinstance(content, np.ndarray):
        return _strict(content.tolist())
    if isinstance(content, np.generic):
        return _strict(content.item())
    # NaN is no JSON: Python writes it all the same, and other readers refuse the whole file.
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
