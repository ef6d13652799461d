"""What a worker of a sweep does: claim cells, train them, write their rows, until none is left."""

import dataclasses
import json
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hardjax._by_name import is_own
from hardjax._validate import OutOfMemory, Refusal
from hardjax.choose import losses
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, load
from hardjax.engine.recipe import Functions, functions_named, functions_of
from hardjax.study.cells import Cell
from hardjax.study.chunks import Modes, check_data, discarded, rows_together
from hardjax.study.ledger import Ledger
from hardjax.study.outcomes import failed_row, row_of
from hardjax.training import lock
from hardjax.training.checkpoint import RunWarning
from hardjax.training.population import Population, prepare_population
from hardjax.training.run import RunResult, train
from hardjax.training.setting import Setting, must_stream, prepare

_POLL = 0.5  # seconds between two looks while others hold what is left


class Trainer:
    """Turns configurations into runs; data is read once, and a network of one's own made once, for all of them.

    Args:
        dataset, model, performance: as in `run`.
    """

    def __init__(
        self, dataset: Dataset | None = None, model: Any = None, performance: Performance | None = None
    ) -> None:
        self.performance = performance
        self._given = dataset
        self._model = None if model is None else functions_of(model)
        self._datasets: dict[Any, Dataset] = {}
        self._functions: dict[str, Functions] = {}

    def dataset(self, config: TrainConfig) -> Dataset:
        """The data of a configuration, before its validation share is split off."""
        if self._given is not None:
            return self._given
        name = (config.dataset, config.data_dir)
        if name not in self._datasets:
            self._datasets[name] = load(*name, stream=must_stream(config, self.performance or Performance()))
        return self._datasets[name]

    def functions(self, config: TrainConfig) -> Functions | None:
        """A network of one's own; None for one of the zoo. Each run would compile its programs anew otherwise."""
        if self._model is not None or not is_own(config.model):
            return self._model
        name = json.dumps([config.model, dict(config.model_options), config.dataset])
        if name not in self._functions:
            outputs = self.dataset(config).num_outputs
            self._functions[name] = functions_named(config.model, outputs, config.model_options)
        return self._functions[name]

    def cell(self, config: TrainConfig) -> Cell:
        """The cell of a configuration, with what tells it from others.

        Raises:
            ValueError: data or network are not there, or do not fit.
        """
        if self.functions(config) is None:  # names and options are refused here, not in a row of each cell
            functions_named(config.model, self.dataset(config).num_outputs, config.model_options)
        own = self.functions(config) is not None or losses.resolve(config.loss).targets == "any"
        dataset = self.dataset(config)
        network = self.setting(config).network if own else None
        named = dataclasses.replace(
            config, dataset=dataset.name, model=config.model if self._model is None else self._model.name
        )
        return Cell(named, dataset.checksum, network)

    def setting(self, config: TrainConfig) -> Setting:
        """What a run needs before its first step."""
        return prepare(config, self.dataset(config), self.functions(config), self.performance)

    def population(self, configs: Sequence[TrainConfig], mode: str, places: int) -> Population:
        """What a population needs before its first step."""
        config = configs[0]
        given = self.dataset(config), self.functions(config), self.performance
        return prepare_population(configs, *given, mode=mode, places=places)


def work(
    ledger: Ledger,
    cells: Sequence[Cell],
    trainer: Trainer,
    asked: Callable[[], object],
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None,
    workers: int = 1,
    once: bool = False,
) -> None:
    """Train cells until every one has a row, or until asked to end.

    Args:
        cells: in the order in which to train them.
        asked: looked at between two cells; a run under way looks at what `interruptible` yielded around all this.
        on_row: called after every row that was added.
        workers: processes that share the cells: each is to have a part of those of a shape.
        once: end after the cells that were claimed first.

    Raises:
        ValueError: rows cannot be written (a full disk), or the data are no longer those of the cells.
    """
    shape, modes = None, Modes(ledger, cells, trainer, workers)
    with _beating(ledger):
        while not asked():
            taken = ledger.claim(cells, shape, modes.most)
            if taken and modes.find(taken[0]):  # now that it is known, more of them at once perhaps
                taken = ledger.claim(cells, taken[0].shape, modes.most)
            if taken is None:
                return
            if not taken:  # others hold them: until their rows are there, or their leases end
                time.sleep(min(_POLL, ledger.leases.interval))
                continue
            shape = taken[0].shape
            for row in _rows(ledger, taken, trainer, modes, asked):
                if row is None:
                    return
                if ledger.add(row):
                    on_row(row)
                ledger.discard(row["key"])
            if once:
                return


def new_owner() -> str:
    """A name unlike any other, that says of which process."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _rows(
    ledger: Ledger, cells: Sequence[Cell], trainer: Trainer, modes: Modes, asked: Callable[[], object]
) -> Iterator[dict[str, Any] | None]:
    """The rows of cells that were claimed together; None where it was asked to end before."""
    if modes.together(cells[0].shape):
        began = time.monotonic()
        try:
            together = rows_together(ledger, cells, trainer, modes, asked)
        except Refusal:  # of the folder, or of data that changed
            raise
        except (Exception, SystemExit) as error:  # a fault in what they share is what became of each of them
            seconds = (time.monotonic() - began) / len(cells)
            yield from (failed_row(cell, error, seconds, ledger.owner) for cell in cells)
            return
        if together is not None:
            yield from together
            return
    for cell in cells:
        yield None if asked() else _row(ledger, cell, trainer, asked)


def _row(ledger: Ledger, cell: Cell, trainer: Trainer, asked: Callable[[], object]) -> dict[str, Any] | None:
    """The row of a cell; None where it was asked to end before."""
    began = time.monotonic()
    check_data(trainer, cell)
    try:
        setting = trainer.setting(cell.config)
    except (Exception, SystemExit) as error:  # whatever it is, it is what became of this cell; the others go on
        return failed_row(cell, error, time.monotonic() - began, ledger.owner)
    if asked():  # preparing may take minutes
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # that it diverged, or goes on, is in its row
            result = _trained(ledger, cell, setting)
    except OutOfMemory as error:
        return failed_row(cell, error, time.monotonic() - began, ledger.owner)
    except Refusal:  # of the folder, not of the cell: the disk is full
        raise
    except (Exception, SystemExit) as error:  # a network of one's own may end the process it is in
        return failed_row(cell, error, time.monotonic() - began, ledger.owner)
    if result.summary["end"] == "interrupted":
        return None
    return row_of(cell, result, setting.dataset, time.monotonic() - began, ledger.owner, setting.plan)


def _trained(ledger: Ledger, cell: Cell, setting: Setting) -> RunResult:
    for last in (False, False, True):
        folder, there = ledger.place(cell.key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Of a controller nobody knows what it would have decided.
            whole = bool(setting.plan.ladder)
            return train(setting, folder, resume=there, progress=False, keep=False, while_finite=not whole)
        except OutOfMemory:
            raise
        except Refusal:
            # Another process was there first, or was for a moment; or what is there cannot be gone on with.
            if last or not (lock.is_being_written(folder) or (there and discarded(folder, setting))):
                raise
    raise AssertionError


@contextmanager
def _beating(ledger: Ledger) -> Iterator[None]:
    """Renew the lease meanwhile, from a thread; give it back at the end, and where the folder is in the way.

    A process that ends by any other exception keeps it: it says at which cell.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(ledger.leases.interval):
            try:
                ledger.renew()
            except (
                Refusal,
                OSError,
            ):  # a full disk: the lease may end, and the row is looked at again when it is added
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        _stop(over, thread)
        if isinstance(error, Refusal):
            ledger.release()
        raise
    _stop(over, thread)
    ledger.release()


def _stop(over: threading.Event, thread: threading.Thread) -> None:
    over.set()
    thread.join()
