"""How far a run is, on standard error: a bar on a terminal, a plain line every so often in a log."""

import math
import sys
import time
from typing import Any, ClassVar

_SECONDS = 30.0  # between two lines of a log


def score(top1: float, loss: float) -> str:
    """How good a network is, in words: its accuracy, or its loss where nothing is predicted that is right or wrong."""
    return f"{top1:.2f} %" if math.isfinite(top1) else f"loss {loss:.4g}"


class Silent:
    """Shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def update(self, epoch: float, loss: float, top1: float | None) -> None: ...

    def tested(self, entry: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


class ProgressBar(Silent):
    """One line, redrawn, on a terminal; where there is none (a batch job's log), `Lines`.

    Args:
        epochs: of the whole run.
        title: in front of it.
        steps: back-propagations of the whole run; 0 leaves the speed out.
    """

    def __init__(self, epochs: int, title: str = "train", steps: int = 0) -> None:
        shown = _Bar(epochs, title) if sys.stderr.isatty() else Lines(epochs, title, steps)
        self._shown: Silent = shown

    def __enter__(self) -> "ProgressBar":
        self._shown.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._shown.__exit__(*exc)

    def update(self, epoch: float, loss: float, top1: float | None) -> None:
        self._shown.update(epoch, loss, top1)

    def tested(self, entry: dict[str, float]) -> None:
        self._shown.tested(entry)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._shown.say(text)


class _Bar(Silent):
    def __init__(self, epochs: int, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", "epoch {task.completed:.1f}/{task.total}", "{task.fields[shown]}")
        texts = [TextColumn(column) for column in columns]
        self._bar = Progress(
            *(texts[0], BarColumn(20), *texts[1:], TimeRemainingColumn()),
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=float("inf"),  # an update may take minutes
        )
        self._task = self._bar.add_task(title, total=epochs, shown="compiling and training the first epoch")
        self._test = ""

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def update(self, epoch: float, loss: float, top1: float | None) -> None:
        accuracy = "" if top1 is None else f"  batch accuracy {top1:.1f} %"
        shown = f"loss {loss:.4f}{accuracy}{self._test}"
        self._bar.update(self._task, completed=epoch, shown=shown)

    def tested(self, entry: dict[str, float]) -> None:
        self._test = f"  test {score(entry['test_top1'], entry['test_loss'])}"

    def say(self, text: str) -> None:
        self._bar.console.print(f"hardjax: {text}", markup=False, highlight=False)


class Lines(Silent):
    """Whole lines, the first one early, then at most one in 30 s, and one at the end.

    A comparison makes many short runs in one process: one that ends before a line was due shows none, unless it is the
    first.
    """

    _last: ClassVar[float] = float("-inf")  # when this process showed a line

    def __init__(self, epochs: int, title: str, steps: int = 0) -> None:
        self._epochs, self._title, self._steps = epochs, title, steps
        self._first: tuple[float, float] | None = None  # (epoch, seconds) of the first update: compilation is over
        self._state: tuple[float, float, float | None] | None = None
        self._test, self._spoke, self._behind = "", False, False

    def update(self, epoch: float, loss: float, top1: float | None) -> None:
        now = time.monotonic()
        self._first = self._first or (epoch, now)
        self._state, self._behind = (epoch, loss, top1), True
        # By the process, not by the run: a comparison's runs may each take less than a line is due in.
        if now - Lines._last >= _SECONDS:
            self._show(now)

    def tested(self, entry: dict[str, float]) -> None:
        self._test, self._behind = f", test {score(entry['test_top1'], entry['test_loss'])}", True

    def say(self, text: str) -> None:
        print(f"hardjax: {text}", file=sys.stderr, flush=True)

    def __exit__(self, *exc: Any) -> None:
        if self._spoke and self._behind:
            self._show(time.monotonic())

    def _show(self, now: float) -> None:
        assert self._state is not None and self._first is not None
        epoch, loss, top1 = self._state
        accuracy = "" if top1 is None else f", batch accuracy {top1:.1f} %"
        line = f"{self._title}: epoch {epoch:.1f}/{self._epochs}, loss {loss:.4f}{accuracy}{self._test}"
        done, seconds = epoch - self._first[0], now - self._first[1]
        if done > 0 and seconds > 0:
            speed = done / seconds
            steps = f", {speed * self._steps / self._epochs:.3g} steps/s" if self._steps else ""
            line += f"{steps}, {_clock((self._epochs - epoch) / speed)} left"
        print(line, file=sys.stderr, flush=True)
        Lines._last, self._spoke, self._behind = now, True, False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
