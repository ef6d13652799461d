"""Signals that ask a run to end: the first one lets it save, the second one ends it now."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, and what batch systems and container hosts send before they take the machine away.
_ASKING = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Whether the run was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def interruptible() -> Iterator[Asked]:
    """Turn the first signal into an entry that is looked at between dispatches, so that it never hits between a donated
    state and its successor. The second one ends the process as if nobody had listened."""
    asked = Asked()
    # Python lets the main thread alone set handlers; elsewhere (a server, a notebook's worker) signals are not ours.
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.signal = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, on_signal) for number in _ASKING}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
