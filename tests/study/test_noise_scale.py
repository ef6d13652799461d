"""The noise scale of synthetic gradients whose mean and covariance are known."""

import chex
import numpy as np
import pytest

from hardjax import fisher
from hardjax.fisher.observe import derive
from hardjax.study.measure import Report

NOISE, MEAN, SIZE = 2.0, 0.2, 30
TRUE = NOISE**2 / MEAN**2  # trace SIZE * NOISE^2 over squared norm SIZE * MEAN^2: 100 samples


def _spectra(batches, batch, seed=0):
    """Eigenvalues (batches, B) and mean entries (batches,) of Gaussian per-sample gradients."""
    rows = MEAN + NOISE * np.random.default_rng(seed).normal(size=(batches, batch, SIZE))
    grams = rows @ rows.swapaxes(1, 2)
    return np.linalg.eigvalsh(grams), grams.mean((1, 2)), rows


def test_parts_are_the_unbiased_estimates():
    values, entries, rows = _spectra(6, 16)
    found = fisher.measures(values, 1, 16, mean_entry=entries)
    covariances = rows.var(1, ddof=1).sum(1)
    signals = (rows.mean(1) ** 2).sum(1) - covariances / 16
    chex.assert_trees_all_close(
        (np.asarray(found.covariance), np.asarray(found.signal)), (covariances, signals), rtol=1e-3, atol=1e-4
    )


def test_pooled_where_single_batches_drown():
    """At B = 16 and a noise scale of 100 samples, every fourth batch has a signal below 0: ratios of single ones are
    infinite, or off by any factor."""
    values, entries, _ = _spectra(4000, 16)
    found = fisher.measures(values, 1, 16, mean_entry=entries)
    pooled = fisher.noise_scale(found.covariance, found.signal)
    assert pooled.batches == 4000 and 800 < pooled.drowned < 1400
    np.testing.assert_allclose(pooled.scale, TRUE, rtol=0.1)  # its standard deviation is 3 %


def test_what_was_not_finite_is_left_out_and_nothing_is_nan():
    assert fisher.noise_scale([8.0, np.nan, 4.0, 4.0], [1.0, 1.0, np.inf, -0.5]) == (6.0 / 0.25, 1, 2)
    assert fisher.noise_scale([1.0, 1.0], [0.0, -1.0]) == (np.inf, 2, 2)
    scale, *counts = fisher.noise_scale([], [])
    assert np.isnan(scale) and counts == [0, 0]


def test_one_sample_has_no_covariance_and_no_mean_entry_no_parts():
    one = fisher.measures(np.array([3.0]), 1, 1, mean_entry=np.array(3.0))
    none = fisher.measures(np.array([3.0, 1.0]), 1, 2)
    assert all(np.isnan(part) for found in (one, none) for part in (found.covariance, found.signal))


@pytest.fixture(scope="module")
def record():
    """Raw, of two batch sizes."""
    small, large = _spectra(500, 8, seed=1), _spectra(300, 24, seed=2)
    values = np.full((800, 24), np.nan)
    values[:500, :8], values[500:] = small[0], large[0]
    return derive(
        {
            "step": np.arange(800),
            "epoch": np.arange(800.0),
            "stands_for": np.ones(800),
            "learning_rate": np.full(800, 0.1),
            "batch_size": np.repeat([8, 24], [500, 300]),
            "eigenvalues": values,
            "mean_entry": np.concatenate([small[1], large[1]]),
        }
    )


def test_a_record_of_several_batch_sizes(record):
    assert "noise_scale" not in record  # none of a single measurement
    found = fisher.noise_scale(record["covariance"], record["signal"])
    np.testing.assert_allclose(found.scale, TRUE, rtol=0.3)
    np.testing.assert_allclose(record["covariance"].mean(), SIZE * NOISE**2, rtol=0.02)


def test_a_report_names_the_pooled_scale_and_how_many_drowned(record):
    fields = {name: record[name] for name in ("c", "l", "effective_rank", "trace", "covariance", "signal")}
    report = Report(record, fields, {0.0: 1.0}, {0.0: 1.0})
    found = fisher.noise_scale(record["covariance"], record["signal"])
    for row in (report.training_row(), report.final_row()):
        assert row["noise_scale"] == found.scale and row["drowned"] == f"{found.drowned} of 800"
    empty = Report({name: values[:0] for name, values in record.items()}, fields, {}, {}).training_row()
    assert empty["measurements"] == 0 and np.isnan(empty["C_K"]) and empty["drowned"] == "0 of 0"
