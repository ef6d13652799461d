"""What `hardjax sweep` shows while it works, and before it does."""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hardjax.cli import output
from hardjax.config import TrainConfig
from hardjax.study.sweep import Progress

_SECONDS = 30.0  # between two lines of a log


class Screen:
    """A line now and then on standard error; on a terminal one line, redrawn.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._last, self._shown = float("-inf"), ""

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal and self._shown:
            print(file=sys.stderr)

    def __call__(self, progress: Progress) -> None:
        if self._quiet:
            return
        text = _told(progress)
        now = time.monotonic()
        over = progress.rows == progress.total
        if text == self._shown or not (self._terminal or over or now - self._last >= _SECONDS):
            return
        start, end = ("\r\x1b[2K", "") if self._terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
        self._shown, self._last = text, now


def _told(progress: Progress) -> str:
    parts = [f"sweep: {progress.rows} of {progress.total} cells done"]
    if progress.diverged:
        parts.append(f"{progress.diverged} diverged")
    parts.append(f"{progress.failed} failed")
    if progress.rows < progress.total:
        parts.append(f"{progress.running} under way")
        parts.append(f"about {_clock(progress.seconds_left)} left" if progress.rows else "time left not known yet")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def tell_rates(choices: Iterable[Mapping[str, Any] | None]) -> None:
    """Print where base rates were taken from, a line each."""
    from hardjax.study.best_rates import told

    for line in dict.fromkeys(told(choice) for choice in choices if choice is not None):
        print(line)


def plan_table(configs: Sequence[TrainConfig], options: Any, workers: int | str, folder: Path) -> None:
    """What `--dry-run` prints: a row for each shape, tried for a moment as a worker would train it."""
    from hardjax.engine.memory import shown
    from hardjax.study.best_rates import with_best_rates
    from hardjax.study.cells import ordered
    from hardjax.study.chunks import places_of
    from hardjax.study.crew import estimates
    from hardjax.study.estimate import tried
    from hardjax.study.sweep import count_workers
    from hardjax.study.sweep_rows import done_in
    from hardjax.study.work import Trainer

    count, trainer = count_workers(workers), Trainer(performance=options.performance())
    cells = [trainer.cell(config) for config in configs]
    if options.rates_from is not None:
        cells = with_best_rates(cells, options.rates_from, folder)
        tell_rates(cell.rate_from for cell in cells)
    cells = ordered(cells)
    done = set() if options.overwrite else done_in(folder, failed=not options.retry_failed)
    left = Counter(cell.shape for cell in cells if cell.key not in done)
    first = {cell.shape: cell for cell in reversed(cells)}
    wanted = [first[shape] for shape in left]
    counts, performance = Counter(cell.shape for cell in cells), options.performance()
    places = [places_of(counts[cell.shape], count or 1, performance) for cell in wanted]
    if count is None:
        found = [tried(trainer, *one) for one in zip(wanted, places, strict=True)]
    else:
        found = estimates(wanted, performance, places)
    rows, seconds = [], 0.0
    for cell, one in zip(wanted, found, strict=True):
        config, cells_left = cell.config, left[cell.shape]
        if isinstance(one, str):
            what = f"{cells_left} cell{'s' * (cells_left > 1)} of {config.title}, {config.batches}"
            print(f"hardjax: would fail: {what}: {one}", file=sys.stderr)
            continue
        took = one.compile_seconds + cells_left * one.seconds
        seconds += took
        rows.append(
            {
                "network": config.title,
                "batches": config.batches,
                "cells left": cells_left,
                "steps of a cell": one.steps,
                "ms a step": f"{1e3 * one.seconds_per_step:.3g}",
                "at once": one.members,
                "programs": one.programs,
                "memory": shown(one.bytes),
                "time": _clock(took),
            }
        )
    if rows:
        output.table(f"{_counted(len(cells), 'cell')}, {len(done & {cell.key for cell in cells})} of them done", rows)
    processes = 1 if count is None else count
    print(
        f"{_counted(sum(left.values()), 'cell')} left, {_counted(len(rows), 'shape')} to compile, about"
        f" {_clock(seconds / processes)} with {_counted(processes, 'worker')}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
