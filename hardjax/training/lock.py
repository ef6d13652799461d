"""One writer a folder, by a lock that ends with the process; needs no jax, so that looking at a folder is quick."""

import os
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None  # type: ignore[assignment]

MARKER = "hardjax.json"  # the file that carries the lock
_PATIENCE = 0.5  # seconds: somebody who only looks holds it for a moment


def hold(descriptor: int, *, shared: bool = False, patience: float = _PATIENCE) -> bool:
    """Take the lock of an open file until it is closed; False where another process holds it all the time.

    Args:
        shared: with others who take it so; a lock that is held already is turned into one of this kind.
        patience: seconds to try for.
    """
    until = time.monotonic() + patience
    while not _locked(descriptor, shared):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def works(path: Path) -> bool:
    """Whether locks of this file keep anybody out: some network file systems, and Windows, know none."""
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT, 0o666) for _ in range(2))
    try:
        # Another process may hold it at this moment, which shows as well that they do.
        return not (_locked(first, shared=False) and _locked(second, shared=False))
    finally:
        os.close(first)
        os.close(second)


def is_being_written(folder: str | os.PathLike) -> bool:
    """Whether a process writes into the folder at this moment."""
    try:
        descriptor = os.open(Path(folder) / MARKER, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared: two who look do not take each other for the writer.
        return not _locked(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, shared: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems know no locks
        return True
    return True
