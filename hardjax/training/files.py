"""Files of a run: which there are, whose they are, and how they are written."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax._version import __version__
from hardjax.training import checkpoint, lines, lock, record
from hardjax.training.lines import refused

UNDER_WAY = "under-way"  # the run that a comparison is at
MEMBERS = "members"  # the runs of a population
SWEEP_ROWS, SWEEP_WORK = "sweep.jsonl", "sweep"  # rows of a sweep, and what its workers keep beside them
SWEEP_PICTURES = ("performance.png", "best.png", "reliable.png", "curves.png", "norm_batches.png")
# Of all commands: a name that is missing here is neither refused nor cleared away.
FILES = (
    "config.json",
    *record.FILES,
    "summary.json",
    "replays.npz",
    "measure.json",
    "hardest.png",
    "measures.png",
    "plane.png",
    "comparison.png",
    checkpoint.FOLDER,
    UNDER_WAY,
    MEMBERS,
    SWEEP_ROWS,
    SWEEP_WORK,
    *SWEEP_PICTURES,
)
# Other tools too call their files config.json and checkpoint: only a folder with this file in it is ours to clear.
MARKER = lock.MARKER
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
    with refused(folder, "to be a folder to write in"):
        if folder.exists() and not folder.is_dir():
            raise Refusal(f"Expected output={str(folder)!r} to be a folder; it is a file.")
        held = [name for name in FILES if os.path.lexists(folder / name)]
        if held and not overwrite:
            raise Refusal(
                f"The output folder {str(folder)!r} already holds a run ({', '.join(held)}); "
                "name another, or pass --resume (resume=True) to go on with it, or --overwrite (overwrite=True)."
            )
        marker = [MARKER] if os.path.lexists(folder / MARKER) else []
        strange = [name for name in held + marker if not _ours(folder, name)]
    if strange:
        raise Refusal(
            f"The output folder {str(folder)!r} holds {', '.join(strange)}, not written by hardjax (of this version), "
            "which is not overwritten; name another folder."
        )
    return folder


@contextmanager
def claim_folder(folder: str | os.PathLike, overwrite: bool = False, keep: bool = False) -> Iterator[Path]:
    """Make the folder and hold it: no other process writes into it meanwhile.

    Enter it last: unless `keep`, what a run before left is gone, so everything that can be refused must have been
    refused.

    Raises:
        ValueError: as `check_folder`, it cannot be made or written, or another process holds it.
    """
    folder = check_folder(folder, overwrite or keep)
    with refused(folder, "to be a folder to write in"):
        folder.mkdir(parents=True, exist_ok=True)
        # A folder that exists may be read-only, or its disk full: found out now, not after hours.
        tempfile.TemporaryFile(dir=folder).close()
        descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock.hold(descriptor):
            raise Refusal(f"Another process is writing into {str(folder)!r}; wait for its end, or name another folder.")
        with refused(folder, "to be a folder to write in"):
            if not os.fstat(descriptor).st_size:
                os.write(descriptor, _marked())
        if not keep:
            clear(folder)
        yield folder
    finally:
        os.close(descriptor)  # and with it the lock, as at the death of the process


def mark(folder: Path) -> None:
    """Write into a folder that it is ours, unless it says so already."""
    path = folder / MARKER
    # In place: another file of the name would be another lock.
    if not path.exists() or not path.stat().st_size:
        path.write_bytes(_marked())


def clear(folder: Path) -> None:
    """Take away what a run, a comparison or a measurement before left in a claimed folder.

    Raises:
        ValueError: it cannot be removed.
    """
    with refused(folder, "to be a folder to write in"):
        for path in (folder / name for name in FILES):
            _remove(path)


def discard(folder: Path) -> None:
    """Take a run's folder away, as far as that is possible."""
    with suppress(OSError):
        _remove(folder)


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
    except (ValueError, RecursionError) as error:
        raise Refusal(f"Damaged config.json in {str(folder)!r}: {error}.") from None
    if not isinstance(plain, dict):
        raise Refusal(f"Damaged config.json in {str(folder)!r}: no JSON object.")
    if "arms" in plain:
        raise Refusal(f"{str(folder)!r} holds a comparison; name the folder of one run of `hardjax train`.")
    return plain


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run's folder; empty where there is none that can be read."""
    return _object(folder / "summary.json")


def check_resumable(folder: Path) -> None:
    """Look whether what a folder holds could be gone on with, or begun anew without a loss.

    Raises:
        ValueError: a comparison, a sweep, or a finished run without its checkpoints.
    """
    check_no_sweep(folder)
    if os.path.lexists(folder / MEMBERS):
        raise Refusal(f"{str(folder)!r} holds a population; `hj.run_population` goes on with it.")
    # Each by itself: a comparison that was killed has no summary.
    plain, summary = (_object(folder / name) for name in ("config.json", "summary.json"))
    ended = summary.get("end", "interrupted")
    if "arms" in plain or os.path.lexists(folder / UNDER_WAY) or _holds_rows(folder):
        raise Refusal(f"{str(folder)!r} holds a comparison; name the folder of one run of `hardjax train`.")
    if os.path.lexists(folder / "measure.json"):
        raise Refusal(f"{str(folder)!r} holds a measurement; name the folder of one run of `hardjax train`.")
    if ended != "interrupted" and not checkpoint.kept(folder):
        raise Refusal(
            f"The run in {str(folder)!r} is finished and its checkpoints are gone: there is nothing to go on from; name"
            " another folder, or pass --overwrite (overwrite=True)."
        )


def check_no_sweep(folder: Path) -> None:
    """Raises ValueError where a folder holds a sweep, which no run and no comparison goes on with."""
    if any(os.path.lexists(folder / name) for name in (SWEEP_ROWS, SWEEP_WORK)):
        raise Refusal(f"{str(folder)!r} holds a sweep; `hardjax sweep` goes on with it.")


def write_json(path: Path, content: Any) -> None:
    """Strict JSON (see `lines.encode`), written whole or not at all.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    # Renaming is atomic: a reader, or a run killed here, never leaves half a file.
    scratch = path.with_name(path.name + ".part")
    with refused(path, "to be writable"):
        scratch.write_text(lines.encode(content, indent=2) + "\n")
        scratch.replace(path)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """A compressed .npz, written whole or not at all, so that it can be read while the run goes on.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    scratch = path.with_name(path.name + ".part")
    with refused(path, "to be writable"):
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
        "device_kind": f"{device.platform}: {device.device_kind} x{jax.device_count()}",
    }


@functools.cache
def commit() -> str | None:
    """The commit of a checkout of hardjax, with "+" where files differ from it; None of an installed package."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(root), *arguments), capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A package installed into somebody's project lies in their repository, not in ours.
        if Path(git("rev-parse", "--show-toplevel") or "/nowhere").resolve() != root.resolve():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _marked() -> bytes:
    return (lines.encode(_FORMAT) + "\n").encode()


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_rows(folder: Path) -> bool:
    """Whether the history is a comparison's, which its settings would say if they could be read."""
    try:
        return any(isinstance(entry, dict) and "arm" in entry for entry in lines.read_lines(folder / record.HISTORY))
    except Refusal:
        return False


def _remove(path: Path) -> None:
    # A link is taken away, never what it points to: somebody keeps checkpoints on a larger disk.
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Marker or manifest last: killed meanwhile, what is left is still known as ours.
    for child in sorted(path.iterdir(), key=lambda child: child.name == MARKER):
        _remove(child)
    path.rmdir()


def _ours(folder: Path, name: str) -> bool:
    """Whether a file of that name in the folder was written by a run: the folder carries our marker, and the thing is
    of the kind that we write there."""
    try:
        text = (folder / MARKER).read_text()
        # Empty where its writer was killed between making and filling it.
        marked = json.loads(text) if text else _FORMAT
    except (OSError, ValueError, RecursionError):
        return False
    path = folder / name
    if not isinstance(marked, dict) or marked.get("format") != _FORMAT["format"]:
        return False
    if path.is_symlink() or not path.is_dir():
        return True
    if name in (UNDER_WAY, MEMBERS, SWEEP_WORK):
        return (path / MARKER).is_file() or not any(path.iterdir())
    return name == checkpoint.FOLDER and checkpoint.is_ours(path)
