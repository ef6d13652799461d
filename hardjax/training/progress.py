"""A progress bar on standard error: epoch, loss, accuracy, time left."""

from typing import Any


class Silent:
    """Shows nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exc: Any) -> None: ...

    def update(self, epoch: float, loss: float, top1: float) -> None: ...

    def tested(self, entry: dict[str, float]) -> None: ...


class ProgressBar(Silent):
    """One line, redrawn on a terminal; nothing on a pipe."""

    def __init__(self, epochs: int, title: str = "train") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", "epoch {task.completed:.1f}/{task.total}", "{task.fields[shown]}")
        texts = [TextColumn(column) for column in columns]
        console = Console(stderr=True)
        self._bar = Progress(
            *(texts[0], BarColumn(20), *texts[1:], TimeRemainingColumn()),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=float("inf"),  # an update may take minutes
        )
        self._task = self._bar.add_task(title, total=epochs, shown="compiling and training the first epoch")
        self._test = ""

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def update(self, epoch: float, loss: float, top1: float) -> None:
        shown = f"loss {loss:.4f}  batch accuracy {top1:.1f} %{self._test}"
        self._bar.update(self._task, completed=epoch, shown=shown)

    def tested(self, entry: dict[str, float]) -> None:
        self._test = f"  test {entry['test_top1']:.2f} %"
