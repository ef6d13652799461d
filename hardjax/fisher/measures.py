"""Scalars of a Gram spectrum: P3's condition number and energy, and what the same eigenvalues give for free."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hardjax import _validate
from hardjax._validate import Refusal

# Relative to the largest eigenvalue. Rounding the products of given rows moves each eigenvalue of a float32 Gram matrix
# by a few times 1e-7 of the largest one (tests/fisher/test_fisher_measures.py), so that 1e-6 keeps that noise out and
# bounds c by 1000. The rows themselves carry the rounding of the network's two passes, larger in a deep one:
# `hardjax measure --float64` shows what it does to c.
TOLERANCE = 1e-6
TOLERANCES = (0.0, 1e-7, 1e-6, 1e-5)


class Measures(NamedTuple):
    """Of one measured batch; every field has the shape of the leading axes of the eigenvalues.

    Attributes:
        condition_number: c, the largest over the smallest non-zero singular value of the rows (P3, eq. 7).
        energy: l = learning_rate / B * sqrt(trace), nats per unit of the parameters, times the rate (P3, eq. 8).
        effective_rank: exp of the entropy of eigenvalues / trace, between 1 and B (Roy and Vetterli, 2007).
        trace: sum of squared norms of the B per-sample gradients, squared nats.
        largest: largest eigenvalue, squared nats.
        covariance: trace of the per-sample gradients' covariance, squared nats, unbiased; NaN where no mean entry is
            given, and for a batch of one.
        signal: squared norm of the mean gradient, unbiased, and so negative where the batch drowns in noise; NaN as
            above. What the two give together is `noise_scale`, over many batches.
    """

    condition_number: Array
    energy: Array
    effective_rank: Array
    trace: Array
    largest: Array
    covariance: Array
    signal: Array


class NoiseScale(NamedTuple):
    """Of many measured batches together, see `noise_scale`.

    Attributes:
        scale: mean covariance over mean signal, in samples; infinite where the signal drowns even in the mean, NaN
            where nothing was measured.
        drowned: how many batches have a signal of at most 0 on their own.
        batches: how many there are.
    """

    scale: float
    drowned: int
    batches: int


class Trajectory(NamedTuple):
    """P3's measures over a run, NumPy arrays with one entry a measurement.

    Attributes:
        condition_number: c.
        energy: l.
        running_condition: C_K, mean of c over the measurements so far (P3, eq. 7, as its code reads it).
        cumulative_energy: L_K, sum of l so far, each weighted by the steps that it stands for (P3, eq. 8, likewise).
        running_condition_by_epoch: C_K with every epoch counting alike, whatever its batch size: the mean of c in which
            a measurement weighs the share of an epoch that it stands for, steps / N.
        cumulative_energy_by_epoch: L_K likewise: sum of l, each weighted by that share, times the N steps that an epoch
            had at the first measurement. Each epoch adds its mean l as often as the first one did.

    P3's text has "K denotes the epoch number", its code counts measurements. Small batches make more steps an epoch,
    hence more measurements: where the batch size changes, the two readings differ. Where it does not they are equal.
    """

    condition_number: np.ndarray
    energy: np.ndarray
    running_condition: np.ndarray
    cumulative_energy: np.ndarray
    running_condition_by_epoch: np.ndarray
    cumulative_energy_by_epoch: np.ndarray


def eigenvalues(gram: Array, dtype: Any = jnp.float32) -> Array:
    """Raw eigenvalues of symmetric (..., B, B) matrices, ascending (..., B), not clamped; NaN for one not finite.

    Args:
        gram: symmetric; only rounding may tell its triangles apart.
        dtype: float32 or float64 of the decomposition. Float64 needs a float64 Gram matrix to mean much, and in
            compiled code 64-bit mode; outside of it NumPy does the work.

    Raises:
        ValueError: another dtype, not a square matrix, or float64 in compiled code without 64-bit mode.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise Refusal(f"Expected dtype={dtype.name} to be float32 or float64.")
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise Refusal(f"Expected a gram of shape (..., B, B), got {gram.shape}.")
    if dtype == np.float64 and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        if isinstance(gram, Tracer):
            raise Refusal("Expected dtype=float64 outside of compiled code, or jax.enable_x64(True) around it.")
        return _numpy_eigenvalues(np.asarray(gram, np.float64))
    gram = jnp.asarray(gram, dtype)
    # What a solver does with NaN is nobody's promise (LAPACK, cuSOLVER): it is given zeros instead.
    finite = jnp.isfinite(gram).all((-2, -1), keepdims=True)
    values = jnp.linalg.eigvalsh(jnp.where(finite, gram, 0))
    return jnp.where(finite[..., 0], values, jnp.nan)


def measures(
    eigenvalues: Array | np.ndarray,
    learning_rate: Array | np.ndarray | float,
    batch_size: Array | float,
    *,
    tolerance: float = TOLERANCE,
    mean_entry: Array | np.ndarray | None = None,
) -> Measures:
    """P3's c and l of one spectrum, and four more; pure JAX, so that it can run inside a compiled round.

    Args:
        eigenvalues: (..., B) of the Gram matrix, in any order; negative ones are clamped at 0 (P3's code).
        learning_rate: of the step on the batch's mean loss, a number or (...).
        batch_size: B.
        tolerance: an eigenvalue is non-zero if it exceeds this share of the largest. P3's code takes exact zeros of
            float32 (tolerance 0), which rounding decides: negative noise is clamped to zero and left out, positive
            noise of the same size becomes the smallest eigenvalue. Keep one tolerance for all runs compared.
        mean_entry: (...) mean of all entries of the Gram matrix, the squared norm of the mean gradient.

    Returns:
        Fields that are NaN where the eigenvalues are not finite; c is NaN where all of them are 0.

    Raises:
        ValueError: a tolerance outside [0, 1); a rate below 0 or a batch size of 0 that are plain numbers.
    """
    _validate.in_unit(tolerance=tolerance)
    if isinstance(learning_rate, int | float):
        _validate.not_negative(learning_rate=learning_rate)
    if isinstance(batch_size, int | float):
        _validate.positive(batch_size=batch_size)
    values = jnp.maximum(jnp.asarray(eigenvalues), 0)
    largest, trace = values.max(-1), values.sum(-1)
    covariance, signal = _noise(trace, mean_entry, batch_size)
    smallest = jnp.where(values > tolerance * largest[..., None], values, jnp.inf).min(-1)
    shares = values / trace[..., None]
    # 0 * log(0) is NaN, and counts as its limit 0; the inner choice keeps NaN out of a derivative as well.
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), -1)
    known = jnp.isfinite(trace) & (largest > 0)
    return Measures(
        condition_number=jnp.where(known, jnp.sqrt(largest / smallest), jnp.nan),
        energy=learning_rate / batch_size * jnp.sqrt(trace),
        effective_rank=jnp.where(known, jnp.exp(entropy), jnp.nan),
        trace=trace,
        largest=largest,
        covariance=covariance,
        signal=signal,
    )


def trajectory(
    eigenvalues: Sequence[np.ndarray] | np.ndarray,
    learning_rates: Sequence[float] | np.ndarray,
    batch_sizes: Sequence[int] | np.ndarray,
    steps: Sequence[float] | np.ndarray | float = 1.0,
    *,
    epochs: Sequence[float] | np.ndarray | None = None,
    tolerance: float = TOLERANCE,
) -> Trajectory:
    """C_K and L_K from recorded raw eigenvalues, with any tolerance, in both readings; NumPy, in float64.

    Args:
        eigenvalues: one (B,) spectrum a measurement; B may change, and NaN pads a rectangular record.
        learning_rates, batch_sizes: of each measurement.
        steps: training steps that each measurement stands for (the measuring interval, one number or one a
            measurement). With a constant interval this is the published division by the sampling ratio.
        epochs: share of an epoch that each measurement stands for, (measurements,), above 0; None: an epoch is as many
            samples at every size, as it is but for what fills its last batch.
        tolerance: as in `measures`.

    Returns:
        A spectrum that is not finite (a diverged step) gives NaN in c and l and is left out of C_K and L_K.

    Raises:
        ValueError: lengths that differ, a share that is not above 0, or a tolerance outside [0, 1).
    """
    _validate.in_unit(tolerance=tolerance)
    count = len(eigenvalues)
    if epochs is not None and not (np.shape(epochs) == (count,) and np.all(np.asarray(epochs) > 0)):
        raise Refusal(f"Expected epochs={_validate.shown(epochs)} to be a number above 0 for each of {count} spectra.")
    if len(learning_rates) != count or len(batch_sizes) != count or np.shape(steps) not in ((), (count,)):
        raise Refusal(
            f"Expected one learning rate, batch size and step count for each of {count} spectra, got"
            f" {len(learning_rates)}, {len(batch_sizes)} and {np.shape(steps)}."
        )
    # Negative eigenvalues are rounding around zero; P3's code clamps them too.
    spectra = [
        np.maximum(np.asarray(values, np.float64)[: int(batch)], 0.0)
        for values, batch in zip(eigenvalues, batch_sizes, strict=True)
    ]
    condition = np.array([_condition(values, tolerance) for values in spectra])
    energy = np.array([np.sqrt(values.sum()) for values in spectra]) * np.asarray(learning_rates, np.float64)
    energy = energy / np.asarray(batch_sizes, np.float64)
    energy = np.where(np.isfinite(energy), energy, np.nan)
    steps = np.broadcast_to(np.asarray(steps, np.float64), count)
    shares = steps * np.asarray(batch_sizes, np.float64) if epochs is None else np.asarray(epochs, np.float64)
    # Steps that each would stand for had its epoch as many as the first one.
    alike = shares * (steps[:1] / shares[:1])
    added = np.nan_to_num(energy, nan=0.0)
    return Trajectory(
        condition,
        energy,
        _running_mean(condition, np.ones(count)),
        np.cumsum(added * steps),
        _running_mean(condition, shares),
        np.cumsum(added * alike),
    )


def noise_scale(covariances: np.ndarray, signals: np.ndarray) -> NoiseScale:
    """The simple noise scale (McCandlish et al., 2018): batches much smaller than it waste nothing.

    Both parts are averaged over the batches and divided once. A single batch of B samples knows its signal to about
    covariance / B, so that at a noise scale above B its own ratio is mostly noise, of either sign: neither the mean nor
    the median of such ratios says anything.

    Args:
        covariances, signals: (batches,) as `measures` gives them; batches where either is not finite are left out. They
            are unbiased whatever the size of a batch, so that batches of several sizes can stand together.
    """
    covariances, signals = np.asarray(covariances, np.float64), np.asarray(signals, np.float64)
    known = np.isfinite(covariances) & np.isfinite(signals)
    covariances, signals = covariances[known], signals[known]
    drowned = int((signals <= 0).sum())
    if not known.any():
        return NoiseScale(float("nan"), 0, 0)
    # The ratio of the means. Ratios of single batches were infinite in every row of the first experiments.
    signal = float(signals.mean())
    return NoiseScale(float(covariances.mean()) / signal if signal > 0 else float("inf"), drowned, len(signals))


def sensitivity(
    eigenvalues: Sequence[np.ndarray] | np.ndarray, tolerances: Sequence[float] = TOLERANCES
) -> Mapping[float, float]:
    """C_K over all of these spectra (or one) for each tolerance: how much "non-zero" decides.

    Args:
        eigenvalues: one (B,) spectrum, or one a measurement; NaN where padded.

    Raises:
        ValueError: a tolerance outside [0, 1).
    """
    for tolerance in tolerances:
        _validate.in_unit(tolerance=tolerance)
    spectra = [eigenvalues] if np.ndim(eigenvalues[0]) == 0 else eigenvalues
    clean = [np.asarray(values, np.float64) for values in spectra]
    clean = [np.maximum(values[~np.isnan(values)], 0.0) for values in clean]
    return {tolerance: _mean([_condition(values, tolerance) for values in clean]) for tolerance in tolerances}


def _condition(values: np.ndarray, tolerance: float) -> float:
    largest = values.max(initial=0.0)
    if not np.isfinite(values).all() or largest == 0:
        return float("nan")
    return float(np.sqrt(largest / values[values > tolerance * largest].min()))


def _running_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the finite ones so far; NaN before the first of them."""
    finite = np.isfinite(values)
    total, weight = (np.cumsum(np.where(finite, part, 0.0)) for part in (values * weights, weights))
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _noise(trace: Array, mean_entry: Array | np.ndarray | None, batch_size: Array | float) -> tuple[Array, Array]:
    """Unbiased covariance and signal (McCandlish et al., 2018, appendix A.1, with batches of 1 and of B samples)."""
    if mean_entry is None:
        return jnp.full_like(trace, jnp.nan), jnp.full_like(trace, jnp.nan)
    others = jnp.where(jnp.asarray(batch_size) > 1, batch_size - 1, jnp.nan)  # of one sample nothing is known
    covariance = (trace - batch_size * mean_entry) / others
    return covariance, mean_entry - covariance / batch_size


def _numpy_eigenvalues(gram: np.ndarray) -> Any:
    finite = np.isfinite(gram).all((-2, -1), keepdims=True)
    return np.where(finite[..., 0], np.linalg.eigvalsh(np.where(finite, gram, 0)), np.nan)
