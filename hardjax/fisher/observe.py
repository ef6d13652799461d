"""Spectra measured inside the training loop, on the very batches being trained, and their record on the host."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.fisher.gram import METHODS, ROWS, make_gram
from hardjax.fisher.measures import TOLERANCE, Trajectory, eigenvalues, measures, trajectory


@dataclass(frozen=True)
class FisherMeasure:
    """What to measure in training; it observes and never changes the training.

    Attributes:
        every: steps between measurements (P3: 50). A round of at least this many steps is measured at its steps 0,
            every, 2 * every ... (so that an interval just below the length of a round measures nearly twice as often);
            of shorter rounds one step, about every `every` steps: the first one where all batches are trained, the
            one in the middle where some are replayed, hardest first.
        rows: "contribution" (P3), "coupled" or "frozen", see `fisher.gram`.
        method: "layers" or "vmap", see `fisher.gram`.
        tolerance: an eigenvalue is non-zero above this share of the largest; the raw ones are recorded as well.
        stop_when_not_finite: end the run after the dispatch in which a spectrum was not finite (at most an epoch),
            instead of going on and recording NaN.

    Raises:
        ValueError: an interval below 1, a tolerance outside [0, 1), an unknown word.
    """

    every: int = 50
    rows: str = "contribution"
    method: str = "layers"
    tolerance: float = TOLERANCE
    stop_when_not_finite: bool = False

    def __post_init__(self) -> None:
        _validate.at_least(1, every=self.every)
        _validate.one_of(ROWS, rows=self.rows)
        _validate.one_of(METHODS, method=self.method)
        _validate.in_unit(tolerance=self.tolerance)


@dataclass(frozen=True)
class SpectrumObserver:
    """An `Observer` that returns the raw eigenvalues (B,) and the mean entry () of a batch's Gram matrix."""

    every: int
    rows: str
    method: str
    chunk: int | None

    def make(self, apply: Callable) -> Callable[[Any, Array, Array, Array], tuple[Array, Array]]:
        gram = make_gram(apply, self.rows, method=self.method, chunk=self.chunk)

        def observe(variables: Any, images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
            products = gram(variables, images, labels, key)
            return eigenvalues(products, products.dtype), products.mean()

        return observe


def make_observer(measure: FisherMeasure, chunk: int | None) -> SpectrumObserver:
    """The static part of a measure, as the rounds take it; `chunk` bounds the memory, see `make_gram`."""
    return SpectrumObserver(measure.every, measure.rows, measure.method, chunk)


class Spectra:
    """Measurements so far, raw.

    Args:
        num_batches: N, steps an epoch.

    Attributes:
        all_finite: every spectrum so far is.
    """

    def __init__(self, num_batches: int) -> None:
        self._num_batches = num_batches
        self._rows: list[tuple[int, float, np.ndarray, float, int]] = []
        self.all_finite = True

    @property
    def last_step(self) -> int | None:
        return self._rows[-1][0] if self._rows else None

    def add(self, step: int, learning_rate: float, values: np.ndarray, mean_entry: float, slot: int) -> None:
        """One measurement: values (B,), taken of the batch `slot` when `step` back-propagations were done."""
        self._rows.append((step, learning_rate, np.asarray(values), float(mean_entry), slot))
        self.all_finite &= bool(np.isfinite(values).all())

    def arrays(self, done: int) -> dict[str, np.ndarray]:
        """Columns of the record, `done` back-propagations into the run.

        Returns:
            step (M,): back-propagations done before each measurement; epoch (M,): the same in epochs; stands_for (M,):
            steps until the next one; learning_rate, batch_size, mean_entry (M,); slot (M,): row of the partition that
            was measured, -1 where batches are dealt from samples; eigenvalues (M, B) ascending, NaN where a batch was
            smaller.
        """
        steps = np.array([row[0] for row in self._rows], np.int64)
        sizes = np.array([len(row[2]) for row in self._rows], np.int64)
        dtype = np.result_type(np.float32, *(row[2].dtype for row in self._rows[:1]))
        values = np.full((len(self._rows), sizes.max(initial=0)), np.nan, dtype)
        for row, spectrum in zip(values, self._rows, strict=True):
            row[: len(spectrum[2])] = spectrum[2]
        return {
            "step": steps,
            "epoch": steps / self._num_batches,
            "stands_for": np.diff(steps, append=done),
            "learning_rate": np.array([row[1] for row in self._rows]),
            "batch_size": sizes,
            "eigenvalues": values,
            "mean_entry": np.array([row[3] for row in self._rows]),
            "slot": np.array([row[4] for row in self._rows], np.int64),
        }

    def derived(self, done: int, measure: FisherMeasure) -> dict[str, np.ndarray]:
        """See `derive`."""
        return derive(self.arrays(done), measure.tolerance)

    def latest(self, done: int, measure: FisherMeasure | None) -> dict[str, float]:
        """c, l, C_K, L_K of the last measurement; empty without one."""
        if measure is None or not self._rows:
            return {}
        path = _trajectory(self.arrays(done), measure.tolerance)
        return dict(zip(("c", "l", "C_K", "L_K"), (float(values[-1]) for values in path), strict=True))

    def save(self, folder: Path, done: int) -> None:
        """Write the raw record to spectra.npz, whole or not at all, so that it can be read while the run goes on."""
        scratch = folder / "spectra.npz.part"
        with scratch.open("wb") as file:
            np.savez(file, **self.arrays(done))
        scratch.replace(folder / "spectra.npz")


def derive(arrays: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> dict[str, np.ndarray]:
    """The record with c, l, C_K, L_K (P3), effective rank, trace, largest eigenvalue, covariance and signal, (M,) each.

    The noise scale is none of a single measurement: `noise_scale(record["covariance"], record["signal"])` of as many as
    one likes to take together.

    Args:
        arrays: as `Spectra.arrays` gives them, or as loaded from a run's spectra.npz.
        tolerance: what counts as non-zero; it can be chosen afterwards.
    """
    path = _trajectory(arrays, tolerance)
    sizes = arrays["batch_size"]
    fields = ("effective_rank", "trace", "largest", "covariance", "signal")
    rest = {name: np.full(len(sizes), np.nan) for name in fields}
    for size in np.unique(sizes):
        those = sizes == size
        values, rates, entries = (arrays[name][those] for name in ("eigenvalues", "learning_rate", "mean_entry"))
        found = measures(values[:, :size], rates, size, tolerance=tolerance, mean_entry=entries)
        for name, column in rest.items():
            column[those] = getattr(found, name)
    return {
        **arrays,
        "c": path.condition_number,
        "l": path.energy,
        "C_K": path.running_condition,
        "L_K": path.cumulative_energy,
        **rest,
    }


def _trajectory(arrays: dict[str, np.ndarray], tolerance: float) -> Trajectory:
    columns = (arrays[name] for name in ("eigenvalues", "learning_rate", "batch_size", "stands_for"))
    return trajectory(*columns, tolerance=tolerance)


def load(folder: Path) -> dict[str, np.ndarray]:
    """The raw record in a run's folder, as `Spectra.arrays` gives it.

    Raises:
        ValueError: there is none.
    """
    path = folder / "spectra.npz"
    if not path.is_file():
        raise Refusal(f"No spectra in {str(folder)!r}; `hardjax train --measure-every 50` writes them.")
    with np.load(path) as file:
        return dict(file)
