"""The folder of a sweep: its rows, each cell at most once, and who works on what; for many processes at once.

`sweep.jsonl` is the result. A worker first appends a row to a file of its own, which nobody else writes to, then under
the lock of the sweep to `sweep.jsonl`, unless the cell has a row there by then. Whoever opens the folder brings over
what a killed worker left in its own file. A cell is done when it has a row; nothing else says so.
"""

import os
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hardjax._validate import Refusal
from hardjax.study.cells import Cell
from hardjax.study.leases import EXPIRY, Leases
from hardjax.study.outcomes import FAILED
from hardjax.study.sweep_rows import Row, check_row, key_of_row
from hardjax.training import files, lines, lock
from hardjax.training.lines import LineFile, Mark, refused

_PATIENCE = 120.0  # seconds for a lock that is held for milliseconds, unless its holder was stopped


class Ledger:
    """One process's view of a sweep. Make one with `opened`.

    Args:
        folder: of the sweep.
        owner: of this process, unlike any other.
        expiry: as in `Leases`.

    Attributes:
        rows: key -> row without its history, as last read.
    """

    def __init__(self, folder: Path, owner: str, expiry: float = EXPIRY) -> None:
        self.folder, self.owner = folder, owner
        self.rows: dict[str, Row] = {}
        self.leases = Leases(folder / files.SWEEP_WORK / "leases", owner, expiry)
        self._work = folder / files.SWEEP_WORK
        self._path = folder / files.SWEEP_ROWS
        self._own = LineFile(self._work / "rows" / f"{owner}.jsonl")
        self._read_to, self._inode = 0, -1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process reads or changes rows and leases meanwhile.

        Raises:
            ValueError: somebody holds the lock and does not go on.
        """
        descriptor = os.open(self._work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock.hold(descriptor, patience=_PATIENCE):
                raise Refusal(
                    f"Another process has held the lock of the sweep in {str(self.folder)!r} for {_PATIENCE:g} s: it"
                    " may be stopped; end it, or let it go on."
                )
            yield
        finally:
            os.close(descriptor)

    def refresh(self) -> None:
        """Read what was added since the last look.

        Raises:
            ValueError: a damaged line, or a row of another version.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._read_to:
                    self.rows, self._read_to, self._inode = {}, 0, status.st_ino
                file.seek(self._read_to)
                data = file.read()
        except FileNotFoundError:
            self.rows, self._read_to, self._inode = {}, 0, -1
            return
        # A last line that is torn, or being written, is looked at again, or overwritten.
        found, size = lines.parse(data, self._path)
        for row in found:
            check_row(row, self._path)
            self.rows.setdefault(key_of_row(row), {name: value for name, value in row.items() if name != "history"})
        self._read_to += size

    def claim(
        self, cells: Sequence[Cell], shape: str | None = None, most: Callable[[str], int] = lambda shape: 1
    ) -> list[Cell] | None:
        """Cells to work on next: without a row, and held by no living worker.

        Those of the shape that this process has its programs for come first, then those of a shape that nobody is at.

        Args:
            cells: of the sweep, in the order in which to train them.
            shape: of the cells before.
            most: shape -> cells of it to take at once, for one population.

        Returns:
            None where every cell has a row; an empty list where others hold what is left.
        """
        with self.locked():
            self.refresh()
            pending = [cell for cell in cells if cell.key not in self.rows]
            if not pending:
                return None
            held = {key for lease in self.leases.living() for key in lease.cells}
            free = [cell for cell in pending if cell.key not in held]
            if not free:
                return []
            busy = {cell.shape for cell in pending if cell.key in held}
            first = next((cell for cell in free if cell.shape == shape), None)
            first = first or next((cell for cell in free if cell.shape not in busy), free[0])
            taken = [cell for cell in free if cell.shape == first.shape][: most(first.shape)]
            self.leases.take(cell.key for cell in taken)
            return taken

    def renew(self) -> None:
        """A heartbeat."""
        with self.locked():
            self.leases.renew()

    def release(self) -> None:
        """Give back what this process holds."""
        with self.locked():
            self.leases.release()

    def add(self, row: Row) -> bool:
        """A row; False (and it is dropped) where the cell has one by now.

        Raises:
            ValueError: it cannot be written (a full disk).
        """
        (self._work / "rows").mkdir(exist_ok=True)
        self._own.append(row, durable=True)
        with self.locked():
            self.refresh()
            return self._bring(row)

    def merge(self) -> None:
        """Bring over the rows that killed workers left in files of their own."""
        with self.locked():
            self.refresh()
            for path in sorted((self._work / "rows").glob("*.jsonl")):
                for row in lines.read_lines(path):
                    self._bring(row)

    def place(self, key: str) -> tuple[Path, bool]:
        """(folder for the run of a cell, whether a run that was cut short is there)."""
        for attempt in range(1000):
            folder = self._work / "cells" / (key if attempt == 0 else f"{key}-{attempt}")
            # Of a worker that was stopped and is still in it, if it is woken.
            if not lock.is_being_written(folder):
                return folder, (folder / "config.json").is_file()
        raise Refusal(f"A thousand processes write into {str(self._work / 'cells' / key)!r} and its like.")

    def discard(self, key: str) -> None:
        """Take away the folders of a cell's runs that nobody is in."""
        for folder in (self._work / "cells").glob(f"{key}*"):
            if not lock.is_being_written(folder):
                files.discard(folder)

    def _bring(self, row: Row) -> bool:
        """Add a row to `sweep.jsonl`, under the lock and after `refresh`; a torn last line is taken away."""
        if key_of_row(row) in self.rows:
            return False
        LineFile(self._path, Mark(self._read_to)).append(row)
        self.refresh()
        return True

    def clean(self, drop: Callable[[Row], bool] = lambda row: False) -> None:
        """While nobody else is here: rows of killed workers are brought over, and what they left is taken away.

        Args:
            drop: rows to take out of `sweep.jsonl`.
        """
        self.merge()
        if any(drop(row) for row in self.rows.values()):
            kept = [row for row in lines.read_lines(self._path) if not drop(row)]
            scratch = self._path.with_name(self._path.name + ".part")
            scratch.unlink(missing_ok=True)
            LineFile(scratch).append(*kept, durable=True)
            with refused(self._path, "to be writable"):
                scratch.replace(self._path)
            self.refresh()
        elif self._path.exists():
            # Before the files that its rows were brought over from go.
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        for name in ("rows", "leases"):
            shutil.rmtree(self._work / name, ignore_errors=True)
        for folder in (self._work / "cells").glob("*"):
            if folder.name.partition("-")[0] in self.rows:
                files.discard(folder)
        with suppress(OSError):
            (self._work / "cells").rmdir()


def check(output: str | os.PathLike, overwrite: bool = False) -> Path:
    """Look whether a sweep could write there; touches nothing.

    Raises:
        ValueError: it holds something else than a sweep.
    """
    folder = files.check_folder(output, overwrite=True)
    ours = (files.SWEEP_ROWS, files.SWEEP_WORK, *files.SWEEP_PICTURES)
    others = [name for name in files.FILES if name not in ours and os.path.lexists(folder / name)]
    if others and not overwrite:
        raise Refusal(
            f"The output folder {str(folder)!r} holds no sweep ({', '.join(others)}); name another, or pass --overwrite"
            " (overwrite=True)."
        )
    return folder


@contextmanager
def opened(
    output: str | os.PathLike,
    owner: str,
    expiry: float = EXPIRY,
    overwrite: bool = False,
    retry_failed: Container[str] | None = None,
) -> Iterator[Ledger]:
    """The ledger of a sweep, shared with other processes; made where there is none.

    Args:
        overwrite: begin anew, whatever of ours is there.
        retry_failed: keys of the cells whose rows are forgotten where they say that they failed; None: of none.

    Raises:
        ValueError: it holds something else, another process is in the way, or the file system knows no locks.
    """
    folder = check(output, overwrite)
    with refused(folder, "to be a folder to write in"):
        folder.mkdir(parents=True, exist_ok=True)
    alone = overwrite or retry_failed is not None
    with _shared(folder, alone) as descriptor:
        ledger = Ledger(folder, owner, expiry)
        if alone or lock.hold(descriptor, patience=0):
            if overwrite:
                files.clear(folder)
            _make(folder)
            again = () if retry_failed is None else retry_failed
            ledger.clean(lambda row: row["status"] == FAILED and key_of_row(row) in again)
        # To have tried for it alone may cost the share, and to turn one kind of lock into the other lets others in
        # between: what a sweep that ended meanwhile took away is made again.
        _share(descriptor, folder)
        _make(folder)
        ledger.merge()
        yield ledger
        if lock.hold(descriptor, patience=0):
            ledger.clean()
            if not any((ledger.folder / files.SWEEP_WORK / "cells").glob("*")):
                files.discard(ledger.folder / files.SWEEP_WORK)


def _make(folder: Path) -> None:
    """What a sweep needs before its first row, as far as it is not there."""
    with refused(folder, "to be a folder to write in"):
        (folder / files.SWEEP_WORK).mkdir(exist_ok=True)
        for place in (folder, folder / files.SWEEP_WORK):
            files.mark(place)
    if not lock.works(folder / files.SWEEP_WORK / "locks"):
        raise Refusal(f"Expected output={str(folder)!r} on a file system with locks, which a sweep needs.")


def _share(descriptor: int, folder: Path) -> None:
    if not lock.hold(descriptor, shared=True, patience=_PATIENCE):
        raise Refusal(f"Another process is writing in {str(folder)!r}; wait for its end, or name another folder.")


@contextmanager
def _shared(folder: Path, alone: bool) -> Iterator[int]:
    """Hold the marker of a folder together with other sweeps, or alone; no run can be written there meanwhile."""
    with refused(folder, "to be a folder to write in"):
        descriptor = os.open(folder / files.MARKER, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not alone:
            _share(descriptor, folder)
        elif not lock.hold(descriptor, patience=2.0):
            raise Refusal(
                f"Another process works on the sweep in {str(folder)!r}; wait for its end, or name another folder."
            )
        yield descriptor
    finally:
        os.close(descriptor)
