"""The record of spectra measured while training, raw, and where a run's folder keeps it."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from hardjax._validate import Refusal
from hardjax.fisher.observe import derive, trajectory_of
from hardjax.training import lines

FILE = "spectra.jsonl"  # a line a measurement


class Spectra:
    """Measurements so far, raw.

    Args:
        every: steps that each stands for.

    Attributes:
        all_finite: every spectrum so far is.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._rows: list[tuple[int, float, float, np.ndarray, float, int, float]] = []
        self.all_finite = True

    def add(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        values: np.ndarray,
        mean_entry: float,
        slot: int,
        steps_per_epoch: float,
    ) -> None:
        """One measurement: values (B,), taken of the batch `slot` when `step` back-propagations were done."""
        entry = math.nan if np.isnan(mean_entry) else float(mean_entry)  # its sign is kept by no file
        self._rows.append((step, epoch, learning_rate, np.asarray(values), entry, slot, steps_per_epoch))
        self.all_finite &= bool(np.isfinite(values).all())

    def __len__(self) -> int:
        return len(self._rows)

    def entries(self, start: int) -> list[dict[str, Any]]:
        """Lines of the measurements from `start` on; `restore` reads them back to the bit."""
        names = ("step", "epoch", "learning_rate", "eigenvalues", "mean_entry", "slot", "steps_per_epoch")
        found = [dict(zip(names, row, strict=True)) for row in self._rows[start:]]
        return [row | {"eigenvalues": lines.pack(row["eigenvalues"]), "stands_for": self._every} for row in found]

    def restore(self, entries: list[Any]) -> None:
        """Take in the lines of a file.

        Raises:
            ValueError: a line is damaged.
        """
        for row in entries:
            try:
                values, entry = lines.unpack(row["eigenvalues"]), row["mean_entry"]
                per_epoch = row.get("steps_per_epoch", math.nan)  # lines of before it was kept
                self.add(
                    row["step"],
                    row["epoch"],
                    row["learning_rate"],
                    values,
                    float("nan") if entry is None else entry,
                    row["slot"],
                    per_epoch,
                )
                self._every = row["stands_for"]
            except (KeyError, TypeError) as error:
                raise Refusal(f"Expected a measurement, got a line without {error}.") from None

    def arrays(self) -> dict[str, np.ndarray]:
        """Columns of the record.

        Returns:
            step (M,): back-propagations done before each measurement; epoch (M,): the same in epochs; stands_for (M,):
            steps; steps_per_epoch (M,): of its stage, NaN where it was not kept; learning_rate, batch_size, mean_entry
            (M,); slot (M,): row of the partition that was measured, -1 where batches are dealt from samples;
            eigenvalues (M, B) ascending, NaN where a batch was smaller.
        """
        columns = zip(*self._rows, strict=True) if self._rows else ((),) * 7
        steps, epochs, rates, spectra, entries, slots, per_epoch = columns
        sizes = np.array([len(values) for values in spectra], np.int64)
        dtype = np.result_type(np.float32, *(values.dtype for values in spectra[:1]))
        # Padded to a rectangle: an .npz of arrays of several lengths would need pickle to be read.
        table = np.full((len(sizes), sizes.max(initial=0)), np.nan, dtype)
        for row, values in zip(table, spectra, strict=True):
            row[: len(values)] = values
        return {
            "step": np.array(steps, np.int64),
            "epoch": np.array(epochs, np.float64),
            "stands_for": np.full(len(sizes), self._every, np.int64),
            "steps_per_epoch": np.array(per_epoch, np.float64),
            "learning_rate": np.array(rates, np.float64),
            "batch_size": sizes,
            "eigenvalues": table,
            "mean_entry": np.array(entries, np.float64),
            "slot": np.array(slots, np.int64),
        }

    def derived(self, tolerance: float) -> dict[str, np.ndarray]:
        """See `derive`."""
        return derive(self.arrays(), tolerance)

    def latest(self, tolerance: float) -> dict[str, float]:
        """c, l, C_K, L_K of the last measurement; empty without one."""
        if not self._rows:
            return {}
        path = trajectory_of(self.arrays(), tolerance)
        return dict(zip(("c", "l", "C_K", "L_K"), (float(values[-1]) for values in path[:4]), strict=True))


def load(folder: Path) -> dict[str, np.ndarray]:
    """The raw record in a run's folder, as `Spectra.arrays` gives it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise Refusal(f"No spectra in {str(folder)!r}; `hardjax train --measure-every 50` writes them.")
    spectra = Spectra(1)
    try:
        spectra.restore(lines.read_lines(path))
    except Refusal as refusal:
        raise Refusal(f"Damaged {FILE} in {str(folder)!r}: {refusal}") from None
    return spectra.arrays()
