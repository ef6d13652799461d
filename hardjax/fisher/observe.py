"""Spectra measured while training, on the very batches being trained: what to measure, and what follows from it."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax.choose.losses import Loss
from hardjax.fisher import memory
from hardjax.fisher.gram import METHODS, ROWS, make_gram
from hardjax.fisher.measures import TOLERANCE, Trajectory, eigenvalues, measures, trajectory


@dataclass(frozen=True)
class FisherMeasure:
    """What to measure in training; it observes and never changes the training.

    Attributes:
        every: steps that each measurement stands for (P3: 50), also the last one, whose interval the end of the run
            may cut short: L_K counts it whole, as P3's does. Where every epoch draws its batches anew, the steps 0,
            every, 2 * every ... of the run are measured, as published; under replay or with fixed batches one step of
            each such interval, at a place that changes from interval to interval and not with the seed.
        rows: "contribution" (P3), "coupled" or "frozen", see `fisher.gram`.
        method: "layers" or "vmap", see `fisher.gram`.
        tolerance: an eigenvalue is non-zero above this share of the largest; the raw ones are recorded as well.

    Raises:
        ValueError: an interval below 1, a tolerance outside [0, 1), an unknown word.
    """

    every: int = 50
    rows: str = "contribution"
    method: str = "layers"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        _settings.settle(self)
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

    def make(self, apply: Callable, loss: Loss) -> Callable[[Any, Array, Array, Array], tuple[Array, Array]]:
        gram = make_gram(apply, self.rows, method=self.method, loss=loss, chunk=self.chunk)

        def observe(variables: Any, images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
            products = gram(variables, images, labels, key)
            # Raw, neither clamped nor cut off: what counts as zero is chosen afterwards. The mean entry, the squared
            # norm of the mean gradient, cannot be had from the spectrum.
            return eigenvalues(products, products.dtype), products.mean()

        return observe

    def advice(self, batch: int) -> str:
        return memory.advice(self.rows, self.method, self.chunk, batch)


def derive(arrays: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> dict[str, np.ndarray]:
    """The record with c, l, C_K, L_K (P3), effective rank, trace, largest eigenvalue, covariance and signal, (M,) each.

    "C_K" and "L_K" count every measurement alike, as P3's code does, "C_K by epoch" and "L_K by epoch" every epoch
    (`fisher.Trajectory`); they are the same thing unless the batch size changes.

    The noise scale is none of a single measurement: `noise_scale(record["covariance"], record["signal"])` of as many as
    one likes to take together.

    Args:
        arrays: the columns of a run's spectra.npz (`training.spectra.Spectra.arrays`).
        tolerance: what counts as non-zero; it can be chosen afterwards.
    """
    path = trajectory_of(arrays, tolerance)
    sizes = arrays["batch_size"]
    fields = ("effective_rank", "trace", "largest", "covariance", "signal")
    rest = {name: np.full(len(sizes), np.nan) for name in fields}
    for size in np.unique(sizes):
        # Spectra of smaller batches are padded with NaN, and a measure takes one size.
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
        "C_K by epoch": path.running_condition_by_epoch,
        "L_K by epoch": path.cumulative_energy_by_epoch,
        **rest,
    }


def trajectory_of(arrays: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> Trajectory:
    """C_K and L_K of a record; see `derive`."""
    columns = (arrays[name] for name in ("eigenvalues", "learning_rate", "batch_size", "stands_for"))
    return trajectory(*columns, epochs=epochs_stood_for(arrays), tolerance=tolerance)


def epochs_stood_for(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(M,) share of an epoch that each measurement stands for: its steps over those of an epoch of its stage.

    Of records of before these were kept it is inferred from the epochs between two measurements, which is exact where a
    stage has two of them.
    """
    known = arrays.get("steps_per_epoch", np.full(len(arrays["step"]), np.nan))
    lacking = np.isnan(known)
    inferred = _inferred(arrays) if lacking.any() else known
    return np.where(lacking, inferred, arrays["stands_for"] / known)


def _inferred(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(M,) `epochs_stood_for` of a record that does not say how many steps its epochs had."""
    step, epoch, sizes = (arrays[name].astype(np.float64) for name in ("step", "epoch", "batch_size"))
    # Epochs grow in proportion to steps while the size is the same, so that two measurements tell what a step is.
    edges = [*np.flatnonzero(np.diff(sizes, prepend=np.nan)), len(step)]  # NaN differs from every size
    found: list[float] = []
    for start, end in itertools.pairwise(edges):
        last = end - 1 if end - 1 > start else min(start + 1, len(step) - 1)  # a single one: up to the next
        if last > start:
            found.append((epoch[last] - epoch[start]) / (step[last] - step[start]))
        else:  # the last measurement alone: as many samples an epoch as before
            found.append(found[-1] * sizes[start] / sizes[start - 1] if found else 1.0)
    return np.repeat(found, np.diff(edges)) * arrays["stands_for"]


def _columns(measure: FisherMeasure, history: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(history[name][-1]) for name in ("C_K", "L_K")}


AXIS = Axis(
    FisherMeasure,
    flags={
        "measure_every": "every",
        "measure_rows": "rows",
        "measure_method": "method",
        "measure_tolerance": "tolerance",
    },
    switch="measure_every",
    least_batch_size=2,  # one sample has no spectrum
    columns=_columns,
)
