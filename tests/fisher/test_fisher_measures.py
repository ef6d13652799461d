"""Scalars of a spectrum against NumPy in float64, and how far rounding reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax import fisher
from hardjax.fisher.observe import trajectory_of


def _rows(batch, size, seed=0, spread=3.0):
    """(B, P) rows whose singular values fall by `spread` decades."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(batch, batch)))
    right, _ = np.linalg.qr(rng.normal(size=(size, batch)))
    return (left * np.logspace(0, -spread, batch)) @ right.T


def test_c_and_l_are_those_of_the_singular_values():
    rows = _rows(6, 40, spread=2)
    singular = np.linalg.svd(rows, compute_uv=False)
    with jax.enable_x64(True):
        found = fisher.measures(fisher.eigenvalues(rows @ rows.T, np.float64), 0.3, 6, tolerance=1e-12)
    np.testing.assert_allclose(found.condition_number, singular.max() / singular.min(), rtol=1e-9)
    np.testing.assert_allclose(found.energy, 0.3 / 6 * np.linalg.norm(rows), rtol=1e-12)
    np.testing.assert_allclose(found.trace, (rows**2).sum(), rtol=1e-12)
    np.testing.assert_allclose(found.largest, singular.max() ** 2, rtol=1e-12)
    shares = singular**2 / (singular**2).sum()
    np.testing.assert_allclose(found.effective_rank, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-9)
    assert np.isnan(found.covariance) and np.isnan(found.signal)


def test_effective_rank_of_equal_and_of_single_eigenvalues():
    np.testing.assert_allclose(fisher.measures(jnp.full(5, 2.0), 1, 5).effective_rank, 5, rtol=1e-5)
    np.testing.assert_allclose(fisher.measures(jnp.array([0.0, 0, 0, 7]), 1, 4).effective_rank, 1, rtol=1e-5)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([-1e-9, 1e-8, 0.01, 1.0], 10.0),  # negative and below the tolerance: not counted
        ([0.0, 0.0, 4.0], 1.0),
        ([0.0, 0.0, 0.0], np.nan),
        ([np.nan, 1.0, 2.0], np.nan),
        ([np.inf, 1.0, 2.0], np.nan),
    ],
)
def test_what_counts_as_non_zero(values, expected):
    found = fisher.measures(np.array(values, np.float32), 0.1, len(values))
    np.testing.assert_allclose(found.condition_number, expected, rtol=1e-5)
    path = fisher.trajectory([np.array(values)], [0.1], [len(values)])
    np.testing.assert_allclose(path.condition_number, [expected], rtol=1e-5)


def test_trajectory_is_the_running_mean_and_the_weighted_sum():
    rng = np.random.default_rng(1)
    spectra = [rng.uniform(0.1, 1, size) for size in (4, 4, 8, 8)]
    rates, sizes, steps = [0.1, 0.1, 0.2, 0.05], [4, 4, 8, 8], [5, 5, 5, 2]
    c = [np.sqrt(values.max() / values.min()) for values in spectra]
    energy = [rate / size * np.sqrt(values.sum()) for values, rate, size in zip(spectra, rates, sizes, strict=True)]
    found = fisher.trajectory(spectra, rates, sizes, steps)
    np.testing.assert_allclose(found.condition_number, c)
    np.testing.assert_allclose(found.running_condition, [np.mean(c[: i + 1]) for i in range(4)])
    weighted = np.multiply(energy, steps)
    np.testing.assert_allclose(found.cumulative_energy, [weighted[: i + 1].sum() for i in range(4)])
    # with a constant interval, the published division by the sampling ratio
    ratio = 1 / 5
    np.testing.assert_allclose(fisher.trajectory(spectra, rates, sizes, 5).cumulative_energy[-1], sum(energy) / ratio)


def _spectrum(c, trace, size):
    """(size,) eigenvalues of that condition number and trace: one large, the others equal."""
    small = trace / (c**2 + size - 1)
    return np.array([small] * (size - 1) + [c**2 * small])


# 32 samples: an epoch of 4 steps at batch 8, then one of 2 at batch 16; a spectrum at each step. sqrt(trace) = 8, 16.
TWO_STAGES = {
    "eigenvalues": [_spectrum(c, 64.0, 8) for c in (1, 2, 3, 4)] + [_spectrum(c, 256.0, 16) for c in (10, 20)],
    "learning_rate": np.array([0.1] * 4 + [0.2] * 2),  # l = 0.1 at batch 8, 0.2 at batch 16
    "batch_size": np.array([8] * 4 + [16] * 2),
    "step": np.arange(6),
    "epoch": np.array([0, 0.25, 0.5, 0.75, 1, 1.5]),
    "stands_for": np.ones(6, np.int64),
}


def test_the_two_readings_of_a_changing_batch_size_by_hand():
    found = trajectory_of(TWO_STAGES)
    np.testing.assert_allclose(found.condition_number, [1, 2, 3, 4, 10, 20])
    np.testing.assert_allclose(found.energy, [0.1] * 4 + [0.2] * 2)
    # Each measurement alike: (1 + 2 + 3 + 4 + 10 + 20) / 6, and 4 * 0.1 + 2 * 0.2.
    np.testing.assert_allclose(found.running_condition, [1, 1.5, 2, 2.5, 4, 40 / 6])
    np.testing.assert_allclose(found.cumulative_energy, [0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
    # Each epoch alike: means 2.5 and 15, hence 8.75; half of the second epoch weighs a half. L_K: 4 * (0.1 + 0.2), four
    # being the steps of the first epoch.
    np.testing.assert_allclose(found.running_condition_by_epoch, [1, 1.5, 2, 2.5, (2.5 + 5) / 1.5, 8.75])
    np.testing.assert_allclose(found.cumulative_energy_by_epoch, [0.1, 0.2, 0.3, 0.4, 0.8, 1.2])


def test_the_two_readings_of_one_batch_size_are_equal():
    rng = np.random.default_rng(3)
    record = {
        "eigenvalues": rng.uniform(0.1, 1, (9, 6)),
        "learning_rate": rng.uniform(0.1, 1, 9),
        "batch_size": np.full(9, 6),
        "step": np.arange(9) * 5 + rng.integers(0, 5, 9),  # somewhere in each interval, as under replay
        "stands_for": np.full(9, 5),
    }
    record["eigenvalues"][4] = np.nan
    found = trajectory_of(record | {"epoch": record["step"] / 7})  # 7 steps an epoch: no whole number of intervals
    np.testing.assert_allclose(found.running_condition_by_epoch, found.running_condition)
    np.testing.assert_allclose(found.cumulative_energy_by_epoch, found.cumulative_energy)


def test_an_epoch_is_what_the_record_says_not_as_many_samples():
    """70 samples make 9 steps at batch 8 and 3 at 32, 72 and 96 samples with what fills the last batch."""
    epoch = np.array([*np.arange(9) / 9, *(1 + np.arange(3) / 3)])
    sizes = np.repeat([8, 32], [9, 3])
    spectra = [_spectrum(c, 1.0, size) for c, size in zip([2] * 9 + [6] * 3, sizes, strict=True)]
    record = {"eigenvalues": spectra, "learning_rate": np.ones(12), "batch_size": sizes, "stands_for": np.ones(12)}
    found = trajectory_of(record | {"step": np.arange(12), "epoch": epoch})
    np.testing.assert_allclose(found.running_condition_by_epoch[-1], 4)
    np.testing.assert_allclose(found.cumulative_energy_by_epoch[-1], 9 * (1 / 8 + 1 / 32))
    # Without epochs there is nothing but samples to go by.
    without = fisher.trajectory(spectra, np.ones(12), sizes)
    np.testing.assert_allclose(without.running_condition_by_epoch[-1], (72 * 2 + 96 * 6) / 168)


@pytest.mark.parametrize("kept", [[0], [0, 4], [0, 1, 4], [0, 1, 2, 3, 5], []])
def test_stages_of_a_single_measurement(kept):
    """A stage with one measurement counts up to the next; the last one as many samples as the stage before."""
    few = {name: np.array(list(values), object)[kept] for name, values in TWO_STAGES.items()}
    few |= {name: few[name].astype(float) for name in few if name != "eigenvalues"}
    found = trajectory_of(few)
    weights = np.array([1, 1, 1, 1, 2, 2])[kept]
    c = np.array([1, 2, 3, 4, 10, 20])[kept]
    energy = np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.2])[kept]
    np.testing.assert_allclose(found.running_condition_by_epoch, np.cumsum(c * weights) / np.cumsum(weights))
    np.testing.assert_allclose(found.cumulative_energy_by_epoch, np.cumsum(energy * weights))


def test_a_diverged_step_is_left_out_and_nan_pads():
    padded = np.array([[1.0, 4.0, np.nan], [np.nan] * 3, [1.0, 9.0, np.nan]])
    found = fisher.trajectory(padded, [1, 1, 1], [2, 2, 2])
    np.testing.assert_allclose(found.condition_number, [2, np.nan, 3])
    np.testing.assert_allclose(found.running_condition, [2, 2, 2.5])
    np.testing.assert_allclose(found.cumulative_energy[-1], (np.sqrt(5) + np.sqrt(10)) / 2)


def test_sensitivity_lists_c_for_each_tolerance():
    spectra = [np.array([1e-12, 5e-7, 1.0]), np.array([1e-12, 2e-6, 1.0])]
    found = fisher.sensitivity(spectra)
    assert list(found) == [0.0, 1e-7, 1e-6, 1e-5]
    np.testing.assert_allclose(found[0.0], 1e6)
    np.testing.assert_allclose(found[1e-7], (np.sqrt(2e6) + np.sqrt(5e5)) / 2)
    np.testing.assert_allclose(found[1e-6], (1 + np.sqrt(5e5)) / 2)
    np.testing.assert_allclose(found[1e-5], 1)
    assert fisher.sensitivity(spectra[0])[1e-7] == pytest.approx(np.sqrt(2e6))


@pytest.mark.parametrize("batch", [8, 64, 256])
def test_rounding_of_a_float32_gram_stays_below_the_default_tolerance(batch):
    """Each eigenvalue moves by a few times 1e-7 of the largest one: what TOLERANCE rests on."""
    rows = _rows(batch, 2000, seed=batch, spread=5)
    exact = np.linalg.eigvalsh(rows @ rows.T)
    short = rows.astype(np.float32)
    found = np.asarray(fisher.eigenvalues(jnp.matmul(short, short.T, precision="highest")), np.float64)
    error = np.abs(found - exact).max() / exact.max()
    assert 1e-9 < error < fisher.measures.__kwdefaults__["tolerance"]


def test_float64_eigenvalues_outside_of_64_bit_mode():
    rows = _rows(5, 30, spread=5)
    found = fisher.eigenvalues(rows @ rows.T, np.float64)
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.sqrt(found), np.linalg.svd(rows, compute_uv=False)[::-1], rtol=1e-5)
    with pytest.raises(ValueError, match="float64 outside of compiled code"):
        jax.jit(lambda gram: fisher.eigenvalues(gram, np.float64))(jnp.eye(3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fisher.measures(jnp.ones(3), 1, 3, tolerance=1.0), "tolerance=1.0"),
        (lambda: fisher.trajectory([np.ones(3)], [1, 2], [3]), "Expected one learning rate"),
        (lambda: fisher.trajectory([np.ones(3)], [1], [3], epochs=[0.0]), r"epochs=\[0.0\] to be a number above 0"),
        (lambda: fisher.eigenvalues(jnp.ones((3, 4))), r"shape \(..., B, B\), got \(3, 4\)"),
        (lambda: fisher.eigenvalues(jnp.eye(3), np.float16), "dtype=float16"),
        (lambda: fisher.sensitivity([np.ones(3)], [-1.0]), "tolerance=-1.0"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
