"""A grid of runs as one piece of work (P4): cells in, a row for each of them out, whatever is killed on the way."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax

from hardjax import _validate
from hardjax._validate import Refusal, shown
from hardjax.choose import losses
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.study import ledger as ledgers
from hardjax.study import processes
from hardjax.study.best_rates import with_best_rates
from hardjax.study.cells import Cell, distinct, ordered, told_apart, weight
from hardjax.study.crew import Crew
from hardjax.study.leases import EXPIRY
from hardjax.study.ledger import Ledger
from hardjax.study.outcomes import DIVERGED, FAILED
from hardjax.study.ray_tasks import RayTasks
from hardjax.study.sweep_rows import Row, key_of_row, read_rows
from hardjax.study.work import Trainer, new_owner, work
from hardjax.training import hosts
from hardjax.training.population import why_alone
from hardjax.training.signals import interruptible

LAUNCHERS = ("local", "ray")


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        rows, total: cells of the grid with a row, and all of them.
        diverged, failed: of those with a row.
        running: cells that workers are at, those of other processes included.
        seconds_left: NaN before a row tells.
    """

    rows: int
    total: int
    diverged: int
    failed: int
    running: int
    seconds_left: float


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns.

    Attributes:
        rows: of the cells asked for that have one, in their order; plain JSON with key, config, status, reason,
            metrics and history.
        left: cells without a row.
        signal: name of the signal that asked it to end, if one did.
    """

    rows: tuple[Row, ...]
    left: int = 0
    signal: str | None = None

    @property
    def diverged(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row["status"] == DIVERGED)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row["status"] == FAILED)


def sweep(
    configs: Iterable[TrainConfig],
    *,
    output: str | os.PathLike,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    workers: int | str | None = None,
    max_hours: float | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    rates_from: str | os.PathLike | None = None,
    expiry: float = EXPIRY,
    launcher: str = "local",
    task_cpus: float = 1.0,
    task_gpus: float = 0.0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Sweep:
    """Train every configuration once; a row each in `output`/sweep.jsonl, the moment it ends.

    The same call again goes on: cells that have a row are not trained again, those that were cut short go on from their
    last checkpoint. Other cells are added to those that are there. Several processes may work on one folder, on several
    machines too if they share it.

    Args:
        configs: the cells, such as `grid` makes; each once.
        output: folder of the sweep.
        dataset, model: one's own data and network, for all cells; with `workers=None` alone.
        performance: of every run; `population` says how cells are trained that may share a program: "vmap" or "map" in
            chunks, each under one lease, "workers" one by one, "auto" by what a few steps of each take.
        workers: processes, each on a core of its own with one thread (on CPU); "auto": one for each core, and in this
            process where there is an accelerator; None: in this process, with all its threads.
        max_hours: begin no cell after that time, and save those under way; what is left is for the next call.
        overwrite: begin anew, whatever of ours the folder holds.
        retry_failed: train cells again whose rows say that they failed; rows of cells not asked for stay.
        rates_from: folder of a finished sweep: each cell is trained at the base rate of the best cell there at the same
            batch size, which its row names (`rate_from`); the configurations then give no rate. See `best_rates`.
        expiry: seconds after which a worker of another machine, or a stopped one, has lost its cells.
        launcher: what workers are: processes of this machine ("local"), or tasks of Ray ("ray"), wherever its cluster
            (RAY_ADDRESS, or a local one) has room: a task for each claim, as many at a time as `workers` says, by
            default as there are cells. They must share the folder, and find data and networks by name.
        task_cpus, task_gpus: that each task asks the cluster for.
        on_progress: called again and again.

    Raises:
        ValueError: a cell twice (also by two names that `model` or `dataset` replace), data or a network that are not
            there, a source without a best rate, a folder that holds something else or rows of another version, workers
            that cannot be had or that ended before the cells were done.
    """
    hosts.check_alone("a sweep")
    configs = distinct(tuple(configs))
    for name, value in (("max_hours", max_hours), ("expiry", expiry)):
        if value is not None:
            _validate.positive(**{name: value})
    _validate.one_of(LAUNCHERS, launcher=launcher)
    tasks = None if launcher == "local" else _ray_tasks(task_cpus, task_gpus, dataset, model)
    count = count_workers(workers, dataset, model) if tasks is None else _tasks_at_once(workers, len(configs))
    _check_population(configs, performance, count)
    folder = ledgers.check(output, overwrite)
    trainer = Trainer(dataset, model, performance)
    given = [trainer.cell(config) for config in configs]
    if rates_from is not None:
        given = with_best_rates(given, rates_from, folder)
    given = told_apart(given)
    _check_starts(trainer, configs)
    until = None if max_hours is None else time.monotonic() + 3600 * max_hours
    again = {cell.key for cell in given} if retry_failed else None
    with (
        tasks or nullcontext(),  # before signals are listened to: Ray listens too
        interruptible(until) as asked,
        ledgers.opened(folder, new_owner(), expiry, overwrite, again) as held,
    ):
        cells = ordered(given)
        places = count if tasks is None or count is None else min(count, tasks.places())
        tell = _Teller(held, cells, places or 1, on_progress)
        if count is None:
            work(held, cells, trainer, lambda: asked, lambda row: tell())
        else:
            with Crew(held, cells, count, trainer.performance, expiry, tasks or processes, places) as crew:
                crew.conduct(lambda: asked, tell)
        tell()
    rows = {key_of_row(row): row for row in read_rows(folder)} if held.rows else {}
    found = tuple(rows[cell.key] for cell in given if cell.key in rows)
    return Sweep(found, len(given) - len(found), asked.signal and asked.signal.name)


def _ray_tasks(cpus: float, gpus: float, dataset: Dataset | None, model: Any) -> RayTasks:
    """Raises ValueError where Ray is not there, or what its tasks could not be given or have no room for."""
    _validate.not_negative(task_cpus=cpus, task_gpus=gpus)
    if not cpus and not gpus:
        raise Refusal("Expected task_cpus or task_gpus above 0: a task that needs nothing would run anywhere at once.")
    if dataset is not None or model is not None:
        raise Refusal("Give dataset= and model= with launcher='local': tasks of Ray load data and networks by name.")
    return RayTasks(cpus, gpus)


def _tasks_at_once(workers: int | str | None, cells: int) -> int:
    if workers is None or workers == "auto":
        return cells
    _validate.at_least(1, workers=workers)  # type: ignore[arg-type]
    return int(workers)


def count_workers(workers: int | str | None, dataset: Dataset | None = None, model: Any = None) -> int | None:
    """Processes to start, None for this one; arguments as in `sweep`.

    Raises:
        ValueError: there are not so many cores, or other processes could not be given the data or the network.
    """
    if workers is None:
        return None
    accelerator = jax.default_backend() != "cpu"
    if workers == "auto":
        workers = None if accelerator else len(processes.cores())
    elif isinstance(workers, str):
        raise Refusal(f"Expected workers={shown(workers)} to be auto or a number.")
    else:
        _validate.at_least(1, workers=workers)
        if accelerator and workers > 1:
            raise Refusal(f"Expected workers={workers} to be 1 or auto on a {jax.default_backend()}.")
        if workers > len(processes.cores()):
            raise Refusal(f"Expected workers={workers} to be at most the {len(processes.cores())} cores.")
        workers = None if accelerator else workers
    if workers is not None and (dataset is not None or model is not None):
        raise Refusal("Give dataset= and model= with workers=None: other processes load data and networks by name.")
    return workers


def _check_population(configs: Sequence[TrainConfig], performance: Performance | None, count: int | None) -> None:
    """Raises ValueError for what no population trains where one is asked for, and what no other process finds."""
    if performance is not None and performance.population in ("vmap", "map"):
        for config in configs:
            if (reason := why_alone(config)) is not None:
                raise Refusal(f"{reason} Give population='auto' or 'workers' (--population).")
    for config in configs if count is not None else ():
        named = {"model": config.model, "loss": losses.name_of(config.loss)}
        for setting, name in named.items():
            if name.startswith("__main__:"):
                raise Refusal(
                    f"Expected {setting}={shown(name)} from a module: other processes have another __main__; put it"
                    " into a file, or give workers=None."
                )


def _check_starts(trainer: Trainer, configs: Sequence[TrainConfig]) -> None:
    if len({config.seed for config in configs}) < 2:
        return
    for config in configs:
        functions = trainer.functions(config)
        if functions is not None and getattr(functions.apply, "starts_alike", False):
            raise Refusal(
                f"{functions.name} holds its weights, from which all seeds would start: give"
                " hj.models.Seeded(lambda key: ...), or one seed."
            )


class _Teller:
    """Says how far a sweep is."""

    def __init__(self, held: Ledger, cells: Sequence[Cell], workers: int, say: Callable[[Progress], None]) -> None:
        self._held, self._cells, self._workers, self._say = held, cells, workers, say

    def __call__(self) -> None:
        rows = {cell.key: self._held.rows[cell.key] for cell in self._cells if cell.key in self._held.rows}
        states = Counter(row["status"] for row in rows.values())
        left = [cell for cell in self._cells if cell.key not in rows]
        held = {key for lease in self._held.leases.living() for key in lease.cells} - set(rows)
        # The lease of this very process is not among them.
        running = len(held | set(self._held.leases.held_by(self._held.owner)) - set(rows))
        seconds = seconds_for(left, self._cells, rows) / max(self._workers, 1)
        self._say(Progress(len(rows), len(self._cells), states[DIVERGED], states[FAILED], running, seconds))


def seconds_for(left: Sequence[Cell], cells: Sequence[Cell], rows: dict[str, Row]) -> float:
    """What cells will take one after another, by the rows of their shapes, else by those of all in proportion to their
    steps; NaN where no row tells."""
    by_shape: dict[str, list[float]] = {}
    seconds, steps = 0.0, 0.0
    for cell in cells:
        row = rows.get(cell.key)
        if row is not None and row["status"] != FAILED:
            by_shape.setdefault(cell.shape, []).append(row["seconds"])
            seconds, steps = seconds + row["seconds"], steps + weight(cell.config)
    if not left:
        return 0.0
    if not steps:
        return float("nan")
    return sum(
        sum(known) / len(known) if (known := by_shape.get(cell.shape)) else seconds / steps * weight(cell.config)
        for cell in left
    )
