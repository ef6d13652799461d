"""Checkpoints of a run on disk: the whole TrainState through Orbax with what lies beside it, checked before it is read.

A run's folder keeps several, `checkpoint/0000001200` and so on by back-propagations. Each is written in a hidden folder
and renamed, so that it is there whole or not at all; which there are is read from the disk, never from a memory of what
was saved.
"""

import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax._version import __version__
from hardjax.engine import devices
from hardjax.engine.state import TrainState
from hardjax.training import lines

# Orbax takes over half a second to import, so it is imported where it is used.

FOLDER = "checkpoint"
VERSION = 2
# Fields of TrainState that a version added: in an older checkpoint they begin at zero.
_ADDED = {2: ("samples_hash",)}
_MANIFEST = "hardjax.json"
_FORMAT = "checkpoint of hardjax"
_SCRATCH = ".writing-"
_REPLACED = "replaced-"
# Orbax looks for the parts of a checkpoint with glob patterns made from the whole path, and TensorStore takes a
# backslash for a slash: under `runs/lr[0.1]` or `a\b` the arrays are never merged into the checkpoint, which is then
# written without an error and cannot be read. Of other characters none is known to matter.
_PLAIN = re.compile(r"[\w ./:=,@%+~-]*")
_NEEDED = ("_METADATA", "manifest.ocdbt")  # what Orbax takes for granted


class RunWarning(UserWarning):
    """What a run goes on after, but its user should know."""


@dataclass(frozen=True)
class Kept:
    """One checkpoint on the disk.

    Attributes:
        path: its folder.
        facts: what was saved beside the state; empty where that cannot be read.
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Back-propagations done."""
        return int(self.path.name) if self.path.name.isdecimal() else 0

    @property
    def version(self) -> int:
        """Of the format; 1 held the state alone."""
        return self.facts.get("version", 1)


def save(folder: str | os.PathLike, state: TrainState, facts: Mapping[str, Any] | None = None) -> Path:
    """Write the state into `folder/checkpoint`, beside those that are there; whole or not at all.

    Args:
        facts: JSON to lie beside it.

    Returns:
        The folder of this checkpoint.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    return write(folder, on_host(state), facts or {})


def on_host(state: TrainState) -> dict[str, Any]:
    """A copy of the state in NumPy, which no later step overwrites."""
    # Copies: a view that is still alive when the state is donated disables the donation.
    return jax.tree.map(lambda leaf: np.array(leaf), plain(state))


def plain(state: TrainState) -> dict[str, Any]:
    """The state as a dict of arrays, its key as plain words, which any version of jax wraps again."""
    return {**state.__dict__, "key": jax.random.key_data(state.key)}


def shapes(like: TrainState) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `plain`; of what has no sharding, the first device of this process."""
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves, structure = jax.tree.flatten(jax.eval_shape(plain, like))
    # In the order of the names, as the leaves are; a key is one leaf either way.
    placed = jax.tree.leaves(dict(like.__dict__))
    return structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(given, "sharding", None) or single)
        for leaf, given in zip(leaves, placed, strict=True)
    )


def write(folder: str | os.PathLike, host: dict[str, Any], facts: Mapping[str, Any]) -> Path:
    """`save` of what `on_host` gave."""
    home = Path(folder).resolve() / FOLDER
    path = home / f"{int(host['step']):010}"
    try:
        home.mkdir(exist_ok=True)
        # Beside it, so that moving is renaming; hidden and with a name of its own, so that nobody's copy is in the way.
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=home) as scratch:
            fresh = Path(scratch) / "fresh"
            with _one_voice(), _plain_path(fresh.parent) as where, _checkpointer() as checkpointer:
                # The checkpointer writes in the background; leaving the block waits for it.
                checkpointer.save(where / fresh.name, host)
            _write_manifest(fresh, {"hardjax": __version__, **facts, "files": _files(fresh)})
            if path.exists():
                path.replace(Path(scratch) / f"{_REPLACED}{path.name}")
            fresh.replace(path)
    except OSError as error:
        raise Refusal(f"The checkpoint in {str(folder)!r} cannot be written: {error.strerror or error}.") from error
    except (ValueError, RuntimeError) as error:  # TensorStore's own, which says in its text what the system refused
        text = " ".join(str(error).split())
        system = re.search(r"os_error_code='(\d+)'", text)
        reason = f"{os.strerror(int(system[1]))}." if system else text[:300]
        raise Refusal(f"The checkpoint in {str(folder)!r} cannot be written: {reason}") from error
    return path


def kept(folder: str | os.PathLike) -> list[Kept]:
    """The checkpoints in a run's folder, oldest first, damaged ones included."""
    home = Path(folder) / FOLDER
    if (home / _MANIFEST).is_file():  # version 1: one checkpoint, which was the folder itself
        return [Kept(home, _manifest(home))]
    if not home.is_dir():
        return []
    found = sorted(path for path in home.iterdir() if path.name.isdecimal() and path.is_dir())
    return [Kept(path, _manifest(path)) for path in found]


def newest(
    folder: str | os.PathLike,
    like: TrainState | Callable[[Kept], TrainState],
    usable: Callable[[Kept], str] = lambda kept: "",
    step: int | None = None,
) -> tuple[Kept, TrainState]:
    """The newest checkpoint that is as it was written; those passed over are named in a `RunWarning`.

    Args:
        folder: of the run.
        like: a state, or its shapes and dtypes; or kept -> those of it.
        usable: kept -> what else is wrong with it, or "".
        step: the one after so many back-propagations alone; None: any.

    Raises:
        ValueError: there is no checkpoint, none that is undamaged, or it belongs to another configuration.
    """
    folder = _validate.local_folder(checkpoint=folder)
    candidates = [one for one in kept(folder.resolve()) if step is None or one.step == step]
    if not candidates:
        raise Refusal(f"No checkpoint in {str(folder)!r}; `hardjax train --output` writes one.")
    faults = []
    for candidate in reversed(candidates):
        # Orbax takes its own files for granted: without _METADATA it ends in an AttributeError.
        fault = _damage(candidate) or usable(candidate)
        if not fault:
            break
        faults.append(f"the checkpoint {str(candidate.path)!r} is damaged: {fault}")
    else:
        raise Refusal(f"{faults[0][0].upper()}{faults[0][1:]}.")
    state = _read(candidate, like(candidate) if callable(like) else like)
    for fault in faults:
        warnings.warn(f"{fault}; the one at {candidate.step:,} back-propagations is taken", RunWarning, stacklevel=2)
    return candidate, state


def restore(folder: str | os.PathLike, like: TrainState | Callable[[Kept], TrainState]) -> TrainState:
    """The state of the newest checkpoint in a run's folder, see `newest`."""
    return newest(folder, like)[1]


def prune(folder: str | os.PathLike, last: int, limit: float | None = None) -> None:
    """Take away all checkpoints but those worth keeping: the last ones, the best by validation, the last that was
    finite.

    Args:
        last: how many of the newest to keep.
        limit: bytes that they may take together; beyond it the oldest of them go, the newest never.
    """
    found = kept(folder)
    worth = {one.path for one in found[-last:]}
    scored = [one for one in found if one.facts.get("validation")]
    if scored:
        # The earliest of equals: what came later has only trained longer.
        worth.add(max(scored, key=lambda one: (*_worth(one.facts["validation"]), -one.step)).path)
    worth |= {one.path for one in [one for one in found if one.facts.get("finite")][-1:]}
    total = 0
    for one in reversed(found):
        total += _size(one.path) if one.path in worth else 0
        if one.path not in worth or (limit is not None and total > limit and one is not found[-1]):
            _remove(one.path)


def _worth(validation: Mapping[str, float | None]) -> tuple[float, float]:
    """By accuracy; where there is none (null), by loss. What is not finite is worth least."""
    top1, loss = (validation[name] for name in ("top1", "loss"))
    if top1 is not None and math.isfinite(top1):
        return top1, 0.0
    return -math.inf, -loss if loss is not None and math.isfinite(loss) else -math.inf


def clean(folder: str | os.PathLike) -> None:
    """Take away what writers that were killed left; call it where nobody else writes, before anything is read."""
    home = Path(folder) / FOLDER
    for path in home.glob(f"{_SCRATCH}*"):
        # Killed between two renames: the one that was to be replaced is still the newest.
        for old in path.glob(f"{_REPLACED}*"):
            if not (home / old.name.removeprefix(_REPLACED)).exists():
                old.replace(home / old.name.removeprefix(_REPLACED))
        shutil.rmtree(path, ignore_errors=True)


def forget(folder: str | os.PathLike, step: int) -> None:
    """Take away the checkpoints beyond the one that a run goes on from: they are damaged, or no longer fit its record,
    and would count among the newest."""
    with lines.refused(Path(folder) / FOLDER, "to be writable"):
        for one in kept(folder):
            if one.step > step:
                _remove(one.path)


def is_ours(path: Path) -> bool:
    """Whether this checkpoint folder holds what `save` wrote and nothing else; other tools call theirs `checkpoint` as
    well."""
    if (path / _MANIFEST).is_file():
        return _manifest(path).get("format") == _FORMAT
    return all(
        child.name.startswith(_SCRATCH)
        # Empty where it was being taken away.
        or (child.name.isdecimal() and child.is_dir() and ((child / _MANIFEST).is_file() or not any(child.iterdir())))
        for child in path.iterdir()
    )


def _checkpointer() -> Any:
    """Orbax's, of this process alone: states are whole on every device, so that there is nothing to gather, and no
    process is to wait for one that was lost."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"hardjax-{own}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _read(one: Kept, like: TrainState) -> TrainState:
    wanted = shapes(like)
    placed = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    if jax.process_count() > 1:  # each reads all by itself: a read that all take part in would wait for all
        wanted = shapes(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like))
    lacking = {name for version, names in _ADDED.items() if version > one.version for name in names}
    fresh = {name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted.pop(name)) for name in lacking}
    with _plain_path(one.path.parent) as where, _checkpointer() as checkpointer:
        # Compared by name before anything is read: the refusal is one line, and no array is cast to another dtype.
        held, asked = _kinds(checkpointer.metadata(where / one.path.name).item_metadata.tree), _kinds(wanted)
        if differ := sorted(name for name in held.keys() | asked.keys() if held.get(name) != asked.get(name)):
            first = f"{differ[0]} ({_difference(held.get(differ[0]), asked.get(differ[0]))})"
            raise Refusal(
                f"The checkpoint {str(one.path)!r} does not fit this configuration: {len(differ)} arrays differ, such"
                f" as {first}."
            )
        found = checkpointer.restore(where / one.path.name, wanted)
    found |= fresh
    if jax.process_count() > 1:
        found = jax.tree.map(devices.place, found, placed)
    return TrainState(**{**found, "key": jax.random.wrap_key_data(found["key"])})


def _write_manifest(path: Path, facts: Mapping[str, Any]) -> None:
    body = json.loads(lines.encode({"format": _FORMAT, "version": VERSION, **facts}))
    # A flipped digit of the position would be read like any other: the manifest is checked as the other files are.
    text = lines.encode({"checksum": _checksum_of(body), **body}, indent=1)
    with (path / _MANIFEST).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _manifest(path: Path) -> dict[str, Any]:
    """What lies beside the state; empty where it is missing or not as it was written."""
    try:
        body = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(body, dict) or body.get("format") != _FORMAT:
        return {}
    checksum = body.pop("checksum", None)
    if "version" in body and checksum != _checksum_of(body):
        return {}
    return body


def _checksum_of(body: Mapping[str, Any]) -> int:
    return zlib.crc32(lines.encode(dict(sorted(body.items()))).encode())


def _damage(one: Kept) -> str:
    """What is wrong with the files, empty where they are as they were written."""
    expected = one.facts.get("files")
    if not isinstance(expected, dict):
        return f"{_MANIFEST} is missing or unreadable (or the checkpoint was written by another version or tool)"
    if one.version > VERSION:
        return f"its format {one.version} is newer than this version of hardjax reads ({VERSION})"
    try:
        found = _files(one.path)
    except OSError as error:
        return f"{error.filename} cannot be read, {error.strerror}"
    lost = [name for name in sorted({*_NEEDED, *expected}) if name not in found]
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    faults = [f"{name} is missing" for name in lost] + [f"{name} is not as it was written" for name in changed]
    return f"{faults[0]}{f' ({len(faults)} files in all)' if len(faults) > 1 else ''}" if faults else ""


def _files(path: Path) -> dict[str, list[int]]:
    """Name -> [bytes, CRC-32] of every file but the manifest."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / _MANIFEST:
            found[file.relative_to(path).as_posix()] = [file.stat().st_size, _checksum(file)]
    return found


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    # Renamed first: one that is half removed would look like a damaged one.
    doomed = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=path.parent))
    path.replace(doomed / path.name)
    shutil.rmtree(doomed, ignore_errors=True)


def _checksum(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


@contextmanager
def _one_voice() -> Iterator[None]:
    """A write that fails is told by what it raises alone: Orbax's threads print pages of tracebacks beside it."""
    _leave_closed_loops_alone()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except BaseException:
        # Tasks of a write that failed are told of when they are collected, at any later time.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    finally:
        logger.setLevel(level)


@functools.cache
def _leave_closed_loops_alone() -> None:
    """After a write that failed TensorStore goes on to answer an event loop that has given up, at any later time."""
    hook = sys.unraisablehook

    def unraisable(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            hook(found)

    sys.unraisablehook = unraisable


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
