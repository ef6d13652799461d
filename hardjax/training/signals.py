"""What asks a run to end: a signal, of which the first one lets it save and the second one ends it now; or the time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, and what batch systems and container hosts send before they take the machine away.
_ASKING = (signal.SIGINT, signal.SIGTERM)


class Asked:
    """Whether the run was asked to end, and by which signal.

    Args:
        until: seconds of the monotonic clock at which it is asked by the time; None: never.
    """

    def __init__(self, until: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.until = until

    def __bool__(self) -> bool:
        return self.signal is not None or (self.until is not None and time.monotonic() >= self.until)


_here = threading.local()  # .asked: what the outermost `interruptible` of a thread yielded


@contextmanager
def interruptible(until: float | None = None) -> Iterator[Asked]:
    """Turn the first signal into an entry that is looked at between dispatches, so that it never hits between a donated
    state and its successor. The second one ends the process as if nobody had listened.

    Inside another one of the same thread the outer one's is yielded: what asks a sweep to end asks its run.

    Args:
        until: as in `Asked`; of the outermost alone.
    """
    if (outer := getattr(_here, "asked", None)) is not None:
        yield outer
        return
    _here.asked = asked = Asked(until)
    try:
        with _listening(asked):
            yield asked
    finally:
        del _here.asked


@contextmanager
def _listening(asked: Asked) -> Iterator[None]:
    # Python lets the main thread alone set handlers; elsewhere (a server, a notebook's worker) signals are not ours.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.signal is None:
            asked.signal = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, on_signal) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None: C code listened before, whose handler Python cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
