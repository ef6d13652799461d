"""Cells of a sweep that are trained by one program: how many at once, in which way, and the row of each."""

import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from hardjax._validate import OutOfMemory, Refusal, ran_out_of_memory
from hardjax.config import Performance
from hardjax.engine.population import split
from hardjax.study.cells import Cell
from hardjax.study.ledger import Ledger
from hardjax.study.outcomes import reason_of, row_of
from hardjax.training import files, lock, resume
from hardjax.training.checkpoint import RunWarning
from hardjax.training.population import Population, wanted, why_alone
from hardjax.training.population_run import seconds_a_step, train_population
from hardjax.training.run import RunResult
from hardjax.training.setting import Setting

_SETTLED = "modes.json"  # in the sweep's folder of work: shape -> mode, where that was tried out


class Modes:
    """How the cells of each shape are trained: one after the other ("workers"), or so many at once.

    What `Performance.population` says holds for all (None on a CPU: one after the other); "auto" is found by trying,
    once for a shape: the first worker that is at one settles it for all, and rows keep it.

    Args:
        ledger: of the sweep.
        cells: of the sweep.
        trainer: of the cells, with its performance.
        workers: processes that share the cells of a shape.
    """

    def __init__(self, ledger: Ledger, cells: Sequence[Cell], trainer: Any, workers: int = 1) -> None:
        self._ledger, self._cells, self._trainer, self._workers = ledger, cells, trainer, workers
        self._counts = Counter(cell.shape for cell in cells)
        self._known: dict[str, str] = {}
        self._kept: set[str] = set()  # shapes whose mode was settled by an earlier worker or call

    def __getitem__(self, shape: str) -> str:
        """The mode of a shape that was found."""
        return self._known[shape]

    def places(self, shape: str) -> int:
        """Members of the programs of a shape: the same for all its chunks, so that each is compiled once."""
        return places_of(self._counts[shape], self._workers, self._trainer.performance)

    def most(self, shape: str) -> int:
        """Cells of a shape to claim at once; one while nothing is known of it."""
        return self.places(shape) if shape in self._known and self.together(shape) else 1

    def together(self, shape: str) -> bool:
        """Whether cells of a shape are members of a population; a last one by itself too, so that nothing compiles, and
        where more workers leave each of them one, as the rows that there are were trained."""
        return self._known[shape] != "workers" and (self.places(shape) > 1 or shape in self._kept)

    def find(self, cell: Cell) -> bool:
        """Find the mode of a cell's shape; False where it was known."""
        if cell.shape in self._known:
            return False
        self._known[cell.shape] = self._found(cell)
        return True

    def _found(self, cell: Cell) -> str:
        mode = wanted(self._trainer.performance, "workers")
        if mode != "auto":
            return mode
        if why_alone(cell.config) is not None:
            return "workers"
        alike = [one for one in self._cells if one.shape == cell.shape]
        rows = [self._ledger.rows[one.key].get("population") for one in alike if one.key in self._ledger.rows]
        modes = {row["mode"] for row in rows if isinstance(row, dict)}
        if modes:  # those that did not fit the memory together were trained alone beside the others
            self._kept.add(cell.shape)
            return next(iter(sorted(modes - {"workers"})), "workers")
        return self._settled(cell, alike)

    def _settled(self, cell: Cell, alike: Sequence[Cell]) -> str:
        name = hashlib.blake2b(cell.shape.encode(), digest_size=8).hexdigest()
        path = self._ledger.folder / files.SWEEP_WORK / _SETTLED
        if name in (settled := _read(path)):
            self._kept.add(cell.shape)
            return settled[name]
        if self.places(cell.shape) == 1:
            return "workers"
        mode = fastest_mode(self._trainer, alike, self.places(cell.shape))
        with self._ledger.locked():
            settled = {name: mode} | _read(path)
            files.write_json(path, settled)
        return settled[name]


def places_of(count: int, workers: int, performance: Performance | None) -> int:
    """Members of each program that so many cells are trained by."""
    # No worker is to wait for another that has all cells.
    share = -(-count // min(workers, count))
    return split(share, None if performance is None else performance.population_chunk)[0]


def fastest_mode(trainer: Any, alike: Sequence[Cell], places: int) -> str:
    """What takes the least time a step and member, tried over a few steps of each.

    A way that is refused, or that the memory does not hold, is none, and a warning says so. Where a cell cannot be
    trained alone, its row will say why.
    """
    configs = [cell.config for cell in alike[:places]]
    # One after the other in one program is no faster than a run each where calls cost little.
    candidates = ("workers", "vmap") if jax.default_backend() == "cpu" else ("workers", "map", "vmap")
    found: dict[str, float] = {}
    for mode in candidates:
        alone = mode == "workers"
        try:
            setting = trainer.setting(configs[0]) if alone else trainer.population(configs, mode, places)
            found[mode] = seconds_a_step(setting) / (1 if alone else places)
        except (Exception, SystemExit) as error:  # a network of one's own may raise anything
            if alone:
                return "workers"
            if not _is_expected(error):
                raise
            warnings.warn(f"No population by {mode} of {_named(alike)}: {reason_of(error)}", RunWarning, stacklevel=2)
    return min(found, key=lambda mode: found[mode]) if found else "workers"


def rows_together(
    ledger: Ledger, cells: Sequence[Cell], trainer: Any, modes: Modes, asked: Callable[[], object]
) -> list[dict[str, Any] | None] | None:
    """The rows of a chunk, None after them where it was asked to end before; None for all where they cannot be trained
    together (no memory, a setting of one of them that is refused), as a warning says: each is then tried alone.

    Raises:
        ValueError: rows or runs cannot be written, or the data are no longer those of the cells.
    """
    shape, began = cells[0].shape, time.monotonic()
    check_data(trainer, cells[0])
    try:
        population = trainer.population([cell.config for cell in cells], modes[shape], modes.places(shape))
    except Exception as error:
        if not _is_expected(error):
            raise
        return _one_by_one(cells, error)
    if asked():  # preparing may take minutes
        return [None]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # that one goes on is in its row
            results = _trained(ledger, cells, population)
    except OutOfMemory as error:  # any other refusal is of a folder, not of a cell: the disk is full
        return _one_by_one(cells, error)
    seconds = (time.monotonic() - began) / len(cells)
    rows: list[dict[str, Any] | None] = [
        row_of(cell, result, population.dataset, seconds, ledger.owner, one.plan)
        for cell, result, one in zip(cells, results, population.members, strict=True)
        if result.summary["end"] != "interrupted"
    ]
    return rows if len(rows) == len(cells) else [*rows, None]


def _one_by_one(cells: Sequence[Cell], error: Exception) -> None:
    """Say why cells are not trained together."""
    said = f"{_named(cells)}, are trained one by one instead of together: {reason_of(error)}"
    warnings.warn(said, RunWarning, stacklevel=3)


def _named(cells: Sequence[Cell]) -> str:
    config = cells[0].config
    return f"{len(cells)} cells of {config.title}, {config.batches}"


def _is_expected(error: BaseException) -> bool:
    """Of what a device holds, or of a setting; anything else is a fault, which nobody may take for slowness."""
    return isinstance(error, Refusal) or (isinstance(error, jax.errors.JaxRuntimeError) and ran_out_of_memory(error))


def _trained(ledger: Ledger, cells: Sequence[Cell], population: Population) -> list[RunResult]:
    for last in (False, False, True):
        places = [ledger.place(cell.key) for cell in cells]
        folders = [folder for folder, _ in places]
        folders[0].parent.mkdir(parents=True, exist_ok=True)
        try:
            there = any(found for _, found in places)
            return train_population(population, folders, resume=there, progress=False, keep=False)
        except OutOfMemory:
            raise
        except Refusal:
            # Another process was there first, or was for a moment; or what is there cannot be gone on with.
            pairs = zip(places, population.members, strict=True)
            changed = [lock.is_being_written(at) or (found and discarded(at, one)) for (at, found), one in pairs]
            if last or not any(changed):
                raise
    raise AssertionError


def check_data(trainer: Any, cell: Cell) -> None:
    """Raises ValueError where the data are no longer those of a cell."""
    if trainer.dataset(cell.config).checksum != cell.data:
        raise Refusal(f"The data of {cell.config.dataset!r} changed while the sweep was under way.")


def discarded(folder: Path, setting: Setting) -> bool:
    """Take a run away that cannot be gone on with: its checkpoints are damaged, of another version, or of another run.

    Raises:
        ValueError: the folder cannot be written (a full disk), so that nothing is known of the run in it.
    """
    with files.claim_folder(folder, keep=True):
        try:
            files.check_resumable(folder)
            resume.find(folder, setting)
        except OutOfMemory:
            raise
        except Refusal:
            files.discard(folder)
            return True
    return False


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
