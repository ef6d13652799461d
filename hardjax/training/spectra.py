"""The record of spectra measured while training, raw, and where a run's folder keeps it."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from hardjax._validate import Refusal
from hardjax.fisher.observe import derive, trajectory_of

FILE = "spectra.npz"


class Spectra:
    """Measurements so far, raw.

    Args:
        every: steps that each stands for.

    Attributes:
        all_finite: every spectrum so far is.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._rows: list[tuple[int, float, float, np.ndarray, float, int]] = []
        self.all_finite = True

    def add(
        self, step: int, epoch: float, learning_rate: float, values: np.ndarray, mean_entry: float, slot: int
    ) -> None:
        """One measurement: values (B,), taken of the batch `slot` when `step` back-propagations were done."""
        self._rows.append((step, epoch, learning_rate, np.asarray(values), float(mean_entry), slot))
        self.all_finite &= bool(np.isfinite(values).all())

    def arrays(self) -> dict[str, np.ndarray]:
        """Columns of the record.

        Returns:
            step (M,): back-propagations done before each measurement; epoch (M,): the same in epochs; stands_for (M,):
            steps; learning_rate, batch_size, mean_entry (M,); slot (M,): row of the partition that was measured, -1
            where batches are dealt from samples; eigenvalues (M, B) ascending, NaN where a batch was smaller.
        """
        steps, epochs, rates, spectra, entries, slots = zip(*self._rows, strict=True) if self._rows else ((),) * 6
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
        return dict(zip(("c", "l", "C_K", "L_K"), (float(values[-1]) for values in path), strict=True))


def load(folder: Path) -> dict[str, np.ndarray]:
    """The raw record in a run's folder, as `Spectra.arrays` gives it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise Refusal(f"No spectra in {str(folder)!r}; `hardjax train --measure-every 50` writes them.")
    try:
        # Opened here: of a file that is no archive, NumPy would leave the closing to chance.
        with path.open("rb") as stream, np.load(stream) as file:
            found = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Refusal(f"Damaged {FILE} in {str(folder)!r}: {error}.") from None
    if lacking := sorted(Spectra(1).arrays().keys() - found.keys()):
        raise Refusal(f"Damaged {FILE} in {str(folder)!r}: it lacks {', '.join(lacking)}.")
    return found
