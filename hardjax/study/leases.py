"""Who works on which cells: a file a worker, with a heartbeat in it.

A lease ends with its worker: at once where the process is dead and this host can see it, else when the file has not
changed for `expiry` seconds of the observer's own clock. No two clocks are compared, and nobody believes a stored
"running".
"""

import functools
import json
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hardjax.training import files

EXPIRY = 60.0  # seconds
_BEATS = 4  # heartbeats in that time, and looks at least before somebody is given up


class Lease(NamedTuple):
    """What one worker holds.

    Attributes:
        owner: of the worker, unlike any other.
        host, pid, started: its process; `started` tells it from a later one of the same number.
        beat: how often it has been renewed.
        cells: keys.
    """

    owner: str
    host: str
    pid: int
    started: str
    beat: int
    cells: tuple[str, ...]


class Leases:
    """The leases of a sweep as one observer sees them. Change its own under the lock of the sweep.

    Args:
        folder: of the lease files.
        owner: whose own lease this process writes.
        expiry: seconds without a heartbeat after which a lease of somebody else has ended.
    """

    def __init__(self, folder: Path, owner: str, expiry: float = EXPIRY) -> None:
        self.owner, self.expiry = owner, expiry
        self._folder, self._path = folder, folder / f"{owner}.json"
        self._beat = 0
        # Owner -> (its heartbeat, seconds that it has not changed for, when it was last looked at).
        self._seen: dict[str, tuple[Any, float, float]] = {}

    def take(self, cells: Iterable[str]) -> None:
        """Hold these cells and no others."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat += 1
        mine = Lease(self.owner, this_host(), os.getpid(), started(os.getpid()) or "", self._beat, tuple(cells))
        files.write_json(self._path, mine._asdict())

    def renew(self) -> None:
        """A heartbeat, if there is anything to hold."""
        mine = _read(self._path)
        if mine is not None:
            self.take(mine.cells)

    def release(self) -> None:
        """Hold nothing."""
        self._path.unlink(missing_ok=True)

    def held_by(self, owner: str) -> tuple[str, ...]:
        """Cells of an owner's lease, whether it is alive or not."""
        lease = _read(self._folder / f"{owner}.json")
        return () if lease is None else lease.cells

    def knows(self, owner: str) -> bool:
        """Whether an owner has a lease, alive or not: it has come as far as claiming cells."""
        return (self._folder / f"{owner}.json").exists()

    def living(self, now: float | None = None) -> list[Lease]:
        """Those of other workers that hold. The others stay where they are: a worker that was stopped may be woken.

        Args:
            now: seconds of a monotonic clock; None reads it.
        """
        now = time.monotonic() if now is None else now
        found = []
        for path in sorted(self._folder.glob("*.json")):
            lease = _read(path)
            if path != self._path and self._holds(path.stem, lease, now) and lease is not None:
                found.append(lease)
        return found

    def _holds(self, owner: str, lease: Lease | None, now: float) -> bool:
        if lease is not None and lease.host == this_host() and started(lease.pid) != lease.started:
            return False
        beat = None if lease is None else lease.beat
        before, quiet, at = self._seen.get(owner, (beat, 0.0, now))
        # Counted in pieces: an observer that was itself stopped, or trained for an hour between two looks, must not
        # take its own absence for the other's.
        quiet = quiet + min(now - at, self.expiry / _BEATS) if beat == before else 0.0
        self._seen[owner] = (beat, quiet, now)
        return quiet < self.expiry

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""
        return self.expiry / _BEATS


@functools.cache
def this_host() -> str:
    """Equal for processes that can see each other: name, boot and process namespace of this machine."""
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(filter(None, (platform.node(), boot, space)))


def started(pid: int) -> str | None:
    """When a process of this host was started, in ticks since boot ("" where the system does not say); None where there
    is none, or only what its parent has not yet asked after."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in brackets, may hold anything.
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            return None
        return None if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        pass
    return ""


def _read(path: Path) -> Lease | None:
    """None where there is none that can be read."""
    try:
        plain = json.loads(path.read_text())
        return Lease(**plain | {"cells": tuple(plain["cells"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
