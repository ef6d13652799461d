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


def hold(descriptor: int) -> bool:
    """Take the lock of an open marker until it is closed; False where another process holds it."""
    until = time.monotonic() + _PATIENCE
    while not _locked(descriptor, shared=False):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


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
