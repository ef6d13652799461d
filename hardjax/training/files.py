"""Files of a run: which there are, and how they are written."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import Refusal
from hardjax._version import __version__

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


def check_folder(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Look whether the folder may take the files of a run, a comparison or a measurement; touches nothing.

    Raises:
        ValueError: it holds such files already (unless `overwrite`), or is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"Expected output={str(folder)!r} to be a folder; it is a file.")
    held = [name for name in FILES if (folder / name).exists()]
    if held and not overwrite:
        raise Refusal(
            f"The output folder {str(folder)!r} already holds a run ({', '.join(held)}); "
            "name another, or pass --overwrite (overwrite=True)."
        )
    return folder


def claim_folder(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Make the folder, without the files of a run before.

    Raises:
        ValueError: as `check_folder`, or it cannot be made or written.
    """
    folder = check_folder(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refusal(f"Expected output={str(folder)!r} to be a folder to write in: {error.strerror}.") from None
    return folder


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (NaN and infinities become null), written whole or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(_strict(content), indent=2) + "\n")
    scratch.replace(path)


def append_line(path: Path, entry: Any) -> None:
    """One strict JSON line, readable while the run goes on."""
    with path.open("a") as file:
        file.write(json.dumps(_strict(entry)) + "\n")


def environment() -> dict[str, Any]:
    """Versions and device, for summaries."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {"hardjax": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind} x{jax.device_count()}, {os.cpu_count()} CPU cores",
    }


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    if isinstance(content, np.ndarray):
        return _strict(content.tolist())
    if isinstance(content, np.generic):
        return _strict(content.item())
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
