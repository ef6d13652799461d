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
        every: steps that each measurement stands for (P3: 50). Where every epoch draws its batches anew, the steps 0,
            every, 2 * every ... of the run are measured, as published; under replay or with fixed batches one step of
            each such interval, at a place that changes from interval to interval and not with the seed.
        rows: "contribution" (P3), "coupled" or "frozen", see `fisher.gram`.
        method: "layers" or "vmap", see `fisher.gram`.
        tolerance: an eigenvalue is non-zero above this share of the largest; the raw ones are recorded as well.
        stop_when_not_finite: end the run at the first test point after a spectrum that was not finite, instead of
            going on and recording NaN.

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

    def observer(self, chunk: int | None) -> "SpectrumObserver":
        """The part that shapes a trace; `chunk` bounds the memory, see `make_gram`."""
        return SpectrumObserver(self.rows, self.method, chunk)


@dataclass(frozen=True)
class SpectrumObserver:
    """An `engine.rounds.Observer`: the raw eigenvalues (B,) and the mean entry () of a batch's Gram matrix."""

    rows: str
    method: str
    chunk: int | None

    def make(self, apply: Callable) -> Callable[[Any, Array, Array, Array], tuple[Array, Array]]:
        gram = make_gram(apply, self.rows, method=self.method, chunk=self.chunk)

        def observe(variables: Any, images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
            products = gram(variables, images, labels, key)
            return eigenvalues(products, products.dtype), products.mean()

        return observe


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
        path = _trajectory(self.arrays(), tolerance)
        return dict(zip(("c", "l", "C_K", "L_K"), (float(values[-1]) for values in path), strict=True))

    def save(self, folder: Path) -> None:
        """Write the raw record to spectra.npz, whole or not at all, so that it can be read while the run goes on."""
        scratch = folder / "spectra.npz.part"
        with scratch.open("wb") as file:
            np.savez(file, **self.arrays())
        scratch.replace(folder / "spectra.npz")


def derive(arrays: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> dict[str, np.ndarray]:
    """The record with c, l, C_K, L_K (P3), effective rank, trace, largest eigenvalue and noise scale, (M,) each.

    Args:
        arrays: as `Spectra.arrays` gives them, or as loaded from a run's spectra.npz.
        tolerance: what counts as non-zero; it can be chosen afterwards.
    """
    path = _trajectory(arrays, tolerance)
    sizes = arrays["batch_size"]
    rest = {name: np.full(len(sizes), np.nan) for name in ("effective_rank", "trace", "largest", "noise_scale")}
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
