"""The whole TrainState on disk through Orbax, whatever the folder is called, and checked before it is read."""

import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.engine.state import TrainState

# Orbax takes over half a second to import, so it is imported where it is used.

_MANIFEST = "hardjax.json"
_FORMAT = "checkpoint of hardjax"
# Orbax looks for the parts of a checkpoint with glob patterns made from the whole path, and TensorStore takes a
# backslash for a slash: under `runs/lr[0.1]` or `a\b` the arrays are never merged into the checkpoint, which is then
# written without an error and cannot be read. Of other characters none is known to matter.
_PLAIN = re.compile(r"[\w ./:=,@%+~-]*")
_NEEDED = ("_METADATA", "manifest.ocdbt")  # what Orbax takes for granted


def save(folder: str | os.PathLike, state: TrainState) -> Path:
    """Write the state to `folder/checkpoint`, replacing what is there; whole or not at all.

    A link called `checkpoint` is replaced, what it points to is left alone.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).resolve()
    path = folder / "checkpoint"
    try:
        # Beside it, so that moving is renaming; hidden and with a name of its own, so that nobody's copy is in the way.
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=folder) as scratch:
            fresh = Path(scratch) / "fresh"
            # The checkpointer writes in the background; leaving the block waits for it.
            with _plain_path(fresh.parent) as where, ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(where / fresh.name, _plain(state))
            (fresh / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": _files(fresh)}))
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                path.replace(Path(scratch) / "old")
            fresh.replace(path)
    except OSError as error:
        raise Refusal(f"The checkpoint in {str(folder)!r} cannot be written: {error.strerror or error}.") from error
    return path


def restore(folder: str | os.PathLike, like: TrainState) -> TrainState:
    """Read `folder/checkpoint` into the shapes, dtypes and shardings of `like`.

    Raises:
        ValueError: there is no checkpoint, files of it are missing or changed, or it belongs to another configuration.
    """
    import orbax.checkpoint as ocp

    path = _validate.local_folder(checkpoint=folder).resolve() / "checkpoint"
    if not path.is_dir():
        raise Refusal(f"No checkpoint in {str(folder)!r}; `hardjax train --output` writes one.")
    # Orbax takes its own files for granted: without _METADATA it ends in an AttributeError.
    if damage := _damage(path):
        raise Refusal(f"The checkpoint in {str(folder)!r} is damaged: {damage}.")
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
    with _plain_path(path.parent) as where, ocp.StandardCheckpointer() as checkpointer:
        # Compared by name before anything is read: the refusal is one line, and no array is cast to another dtype.
        held, asked = _kinds(checkpointer.metadata(where / path.name).item_metadata.tree), _kinds(wanted)
        if differ := sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name)):
            first = f"{differ[0]} ({_difference(held.get(differ[0]), asked.get(differ[0]))})"
            raise Refusal(
                f"The checkpoint in {str(folder)!r} does not fit this configuration: {len(differ)} arrays differ, such"
                f" as {first}."
            )
        plain = checkpointer.restore(where / path.name, wanted)
    return TrainState(**{**plain, "key": jax.random.wrap_key_data(plain["key"])})


def is_ours(path: Path) -> bool:
    """Whether this checkpoint folder was written by `save`; other tools call theirs `checkpoint` as well."""
    try:
        found = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT


def _damage(path: Path) -> str:
    """What is wrong with the files, empty where they are as they were written."""
    try:
        kept = json.loads((path / _MANIFEST).read_text())["files"]
        needed = sorted({*_NEEDED, *kept})
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} is missing or unreadable (or the checkpoint was written by another version or tool)"
    try:
        found = _files(path)
    except OSError as error:
        return f"{error.filename} cannot be read, {error.strerror}"
    lost = [name for name in needed if name not in found]
    changed = [name for name in kept if name in found and found[name] != kept[name]]
    faults = [f"{name} is missing" for name in lost] + [f"{name} is not as it was written" for name in changed]
    return f"{faults[0]}{f' ({len(faults)} files in all)' if len(faults) > 1 else ''}" if faults else ""


def _files(path: Path) -> dict[str, list[int]]:
    """Name -> [bytes, CRC-32] of every file but the manifest."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / _MANIFEST:
            found[file.relative_to(path).as_posix()] = [file.stat().st_size, _checksum(file)]
    return found


def _checksum(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """The folder under a path without special characters: itself, or a link to it in the system's temporary folder."""
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    places = [place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _PLAIN.fullmatch(place)]
    if not places:
        raise Refusal(
            f"Expected a temporary folder without special characters (TMPDIR), got {tempfile.gettempdir()!r}."
        )
    with tempfile.TemporaryDirectory(prefix="hardjax-", dir=places[0]) as scratch:
        link = Path(scratch) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link
        link.unlink()  # before the folder around it is cleared


def _kinds(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> shape and dtype of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }


def _difference(held: Any, asked: Any) -> str:
    """What is held instead of what is asked for: shapes, or dtypes where the shapes are equal."""
    if held is None or asked is None:
        return f"{'absent' if held is None else held[0]} instead of {'absent' if asked is None else asked[0]}"
    which = 0 if held[0] != asked[0] else 1
    return f"{held[which]} instead of {asked[which]}"


def _plain(state: TrainState) -> dict[str, Any]:
    # The key as plain words, which any version of jax wraps again.
    return {**state.__dict__, "key": jax.random.key_data(state.key)}
