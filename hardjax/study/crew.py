"""Workers of a sweep that this process started: watched, replaced where they die, and ended with it."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax

from hardjax._validate import Refusal
from hardjax.config import Performance
from hardjax.study import processes
from hardjax.study.cells import Cell
from hardjax.study.estimate import Estimate
from hardjax.study.ledger import Ledger
from hardjax.study.outcomes import failed_row
from hardjax.study.work import new_owner

_POLL = 0.5  # seconds between two looks at the rows
_GRACE = 20.0  # seconds for workers to end that are no longer needed
_TO_SAVE = 120.0  # seconds for workers to save what they are at: much longer than that takes, unless they were stopped
_DEATHS = 3  # of processes that a cell may cost


class Crew:
    """Worker processes and the one that waits for them.

    Args:
        held: the sweep.
        cells: to be trained.
        count: of workers at a time.
        performance: of every run.
        expiry: of leases.
        launcher: what starts and ends workers: the module `processes`, or `RayTasks`.
        at_once: workers that there is room for, where not all that are started begin; None: `count`.
    """

    def __init__(
        self,
        held: Ledger,
        cells: Sequence[Cell],
        count: int,
        performance: Performance | None,
        expiry: float,
        launcher: Any = processes,
        at_once: int | None = None,
    ) -> None:
        self._held, self._cells = held, {cell.key: cell for cell in cells}
        self._orders = _orders(cells, performance) | {"folder": str(held.folder), "expiry": expiry}
        # Those that wait for room are to have no part of the cells set aside for them.
        self._orders["workers"] = at_once or count
        self._count = count
        self._launcher, self._workers = launcher, list[Any]()
        self._deaths: Counter[str] = Counter()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for those who are left; who stands still is killed."""
        self._launcher.ask_to_end(self._workers)
        until = time.monotonic() + _GRACE
        for worker in self._workers:
            self._launcher.end(worker, max(0.0, until - time.monotonic()))

    def conduct(self, over: Callable[[], object], tell: Callable[[], None]) -> None:
        """Until every cell has a row, or until it is to end and the workers have.

        Raises:
            ValueError: the workers ended before.
        """
        self._held.refresh()
        for core in range(min(self._count, len(self._left()))):
            self._start(core)
        until = None
        while self._left():
            if until is None and over():
                self._launcher.ask_to_end(self._workers)
                until = time.monotonic() + _TO_SAVE
            self._look(over)
            if not self._workers:
                break
            if until is not None and time.monotonic() >= until:
                while self._workers:
                    self._launcher.end(self._workers.pop(), 0.0)
                break
            tell()
            time.sleep(_POLL)
            self._held.refresh()
        self._held.merge()
        if self._left() and not over():
            raise Refusal(
                f"The workers ended with {len(self._left())} cells left; the last lines above say why. The same command"
                " goes on."
            )

    def _look(self, over: Callable[[], object]) -> None:
        """Who has ended, and why; nobody should have while cells are left, unless asked to."""
        for core, worker in enumerate(list(self._workers)):
            if self._launcher.ended(worker) is None:
                continue
            self._workers.remove(worker)
            code = self._launcher.end(worker, 0.0)
            self._held.refresh()
            if code == processes.REFUSED or not self._left() or over():
                continue
            if code != processes.MORE:
                self._bury(worker, code, core)
            elif len(self._workers) < len(self._left()):
                self._start(core, self._suspects())

    def _left(self) -> list[str]:
        return [key for key in self._cells if key not in self._held.rows]

    def _start(self, core: int, alone: bool = False) -> None:
        orders = self._orders
        if alone:
            orders = orders | {"performance": orders["performance"] | {"population": "workers"}}
        self._workers.append(self._launcher.start(orders, new_owner(), core, _environment()))

    def _suspects(self) -> bool:
        """Whether a cell that is left has cost a process."""
        return any(self._deaths[key] for key in self._left())

    def _bury(self, worker: Any, code: int, core: int) -> None:
        """After a worker that ended by itself: another one, and no cell that costs one after the other."""
        held = [key for key in self._held.leases.held_by(worker.owner) if key in self._left()]
        # Of a chunk nobody knows which cell it was: the next workers train one at a time, until it has shown itself.
        if len(held) == 1:
            self._deaths.update(held)
        how = self._launcher.told(code)
        for key in held:
            if self._deaths[key] >= _DEATHS:
                reason = f"{_DEATHS} processes ended {how} while they trained it" + (
                    ": out of memory?" if code == -signal.SIGKILL else ""
                )
                self._held.add(failed_row(self._cells[key], reason, 0.0, worker.owner))
        # One that dies before it has a cell would die again.
        if self._held.leases.knows(worker.owner) and self._left():
            self._start(core, len(held) > 1 or self._suspects())


def estimates(cells: Sequence[Cell], performance: Performance | None, places: Sequence[int]) -> list[Estimate | str]:
    """Of each cell, tried in a worker of its own; why not, of one that cannot be trained.

    Args:
        places: of each, as in `estimate`.

    Raises:
        ValueError: the worker ended before all were tried.
    """
    worker = processes.start(
        _orders(cells, performance) | {"estimate": list(places)}, "", 0, _environment(), heard=True
    )
    assert worker.process.stdout is not None
    with worker.process.stdout as pipe:
        told = [json.loads(line) for line in pipe]
    found = [one if isinstance(one, str) else Estimate(*one) for one in told]
    if processes.end(worker, _GRACE) or len(found) != len(cells):
        raise Refusal("The worker that tries the cells ended; the last lines above say why.")
    return found


def _orders(cells: Sequence[Cell], performance: Performance | None) -> dict[str, Any]:
    plain = [cell.to_dict() for cell in cells]
    for one in plain:  # what another process would not find is refused here
        Cell.from_dict(one)
    settings = asdict(performance or Performance())
    # Workers share a machine run by run: a device each, also where more of them could be seen.
    return {"performance": settings | {"devices": settings["devices"] or 1}, "cells": plain}


def _environment() -> dict[str, str]:
    """What of jax's configuration workers take over."""
    settings: Any = jax.config
    found = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(int(settings.jax_enable_x64))}
    if cache := settings.jax_compilation_cache_dir:
        found["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        least = settings.jax_persistent_cache_min_compile_time_secs
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(least)
    return found
