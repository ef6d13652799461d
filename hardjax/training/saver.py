"""When a run saves, and the thread that writes while training goes on."""

import re
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import Refusal
from hardjax.engine.state import TrainState
from hardjax.training import checkpoint
from hardjax.training.checkpoint import RunWarning

LAST = 2  # checkpoints kept beside the best and the last finite one
_SECONDS = 60.0  # between two saves, unless asked for otherwise
_UNITS = {"s": 1, "min": 60, "h": 3600}


class Saver:
    """The checkpoints of one run.

    One save is written at a time, from a copy of the state on the host: the device goes on meanwhile. A save that
    failed is said at the next one, and the checkpoints before it are kept. Leaving the block waits for the save under
    way: who holds the folder next must not meet it there.

    Args:
        folder: of the run.
        every: as `Performance.save_every`.
        limit: bytes that the checkpoints may take together, or None.
    """

    def __init__(self, folder: Path, every: int | str | None, limit: float | None = None) -> None:
        self._folder, self._limit = folder, limit
        self._points = every if isinstance(every, int) else None
        # What is asked for in seconds may cut an epoch; by default a save waits for a test point.
        self._only_tested = every is None
        self._seconds = _SECONDS if every is None else seconds_of(every)
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A second Ctrl-C is not to wait for a disk.
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()

    def due(self, tested: int | None) -> bool:
        """Whether to save now.

        Args:
            tested: test points so far if one has just passed, else None.
        """
        if self._points is not None:
            return tested is not None and tested % self._points == 0
        if self._seconds is None or (self._only_tested and tested is None):
            return False
        return time.monotonic() - self._last >= self._seconds

    def save(self, state: TrainState, facts: Mapping[str, Any]) -> None:
        """Begin to write a state; what belongs to it is in the facts."""
        self.wait()
        if self._failure is not None:
            warnings.warn(f"{self._failure} Training goes on, without it.", RunWarning, stacklevel=2)
            self._failure = None
        self._last = time.monotonic()
        plain = checkpoint.on_host(state)
        # A daemon: a second Ctrl-C need not wait for a disk, and a checkpoint cut short is no checkpoint.
        self._thread = threading.Thread(target=self._write_aside, args=(plain, dict(facts)), daemon=True)
        self._thread.start()

    def finish(self, state: TrainState, facts: Mapping[str, Any]) -> None:
        """Write the last state and wait for it.

        Raises:
            ValueError: it cannot be written.
        """
        self.wait()
        self._failure = None
        self._write(checkpoint.on_host(state), dict(facts))
        if self._failure is not None:
            raise Refusal(self._failure)

    def _write_aside(self, plain: dict[str, Any], facts: dict[str, Any]) -> None:
        try:
            self._write(plain, facts)
        except Exception as error:  # a thread that ends in an error would end unheard (no memory for a second state)
            self._failure = (
                f"The checkpoint in {str(self._folder)!r} cannot be written: {type(error).__name__}: {error}."
            )

    def _write(self, plain: dict[str, Any], facts: dict[str, Any]) -> None:
        self._write_into(self._folder, plain, facts)

    def _write_into(self, folder: Path, plain: dict[str, Any], facts: dict[str, Any]) -> None:
        # A step may overflow with a loss that is finite: the next one would be the first to tell.
        facts = facts | {"finite": bool(facts.get("finite")) and _is_finite(plain)}
        try:
            checkpoint.write(folder, plain, facts)
            checkpoint.prune(folder, LAST, self._limit)
        except Refusal as refusal:
            self._failure = str(refusal)
        except OSError as error:
            self._failure = f"Old checkpoints in {str(folder)!r} cannot be removed: {error.strerror or error}."

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class PopulationSaver(Saver):
    """The checkpoints of a population: each member's in a folder of its own, as those of a run alone.

    A save that is cut short leaves some members with the one before; each keeps the last two, so that there is one that
    all have.

    Args:
        folders: of the members.
        every, limit: as in `Saver`; the limit is for all members together.
    """

    def __init__(self, folders: Sequence[Path], every: int | str | None, limit: float | None = None) -> None:
        super().__init__(folders[0].parent, every, None if limit is None else limit / len(folders))
        self._folders = folders

    def end(self, index: int, state: TrainState, facts: Mapping[str, Any]) -> None:
        """Write the last state of one member and wait for it.

        Raises:
            ValueError: it cannot be written.
        """
        self.wait()
        self._failure = None
        self._write_into(self._folders[index], checkpoint.on_host(state), dict(facts))
        if self._failure is not None:
            raise Refusal(self._failure)

    def _write(self, plain: dict[str, Any], facts: dict[str, Any]) -> None:
        for index, own in facts["members"].items():
            self._write_into(self._folders[index], jax.tree.map(lambda leaf, i=index: leaf[i], plain), own)


def _is_finite(plain: dict[str, Any]) -> bool:
    leaves = jax.tree.leaves([plain[name] for name in ("params", "batch_stats", "opt_state")])
    return all(np.isfinite(leaf).all() for leaf in leaves)


def seconds_of(every: int | str | None) -> float | None:
    """Seconds of a time such as "90s", "10min" or "2h"; None of what is no time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", every) if isinstance(every, str) else None
    return float(found[1]) * _UNITS[found[2]] if found else None


def check_space(limit: float | None, state: Any, members: int = 1) -> None:
    """Refuse a limit that two states do not fit in: the one before is kept while the next is written.

    Args:
        state: shapes and dtypes.
        members: runs of a population, which share the limit.

    Raises:
        ValueError: it is too small.
    """
    needed = 2 * members * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(checkpoint.shapes(state)))
    if limit is not None and needed > limit:
        raise Refusal(
            f"Expected checkpoint_gigabytes={limit / 1e9:g} to hold two states of this run, {needed / 1e9:.3g} GB."
        )
