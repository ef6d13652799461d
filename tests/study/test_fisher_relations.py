"""P3, section 4: how the measures depend on batch size and learning rate, on a real data set."""

import itertools

import numpy as np
import pytest
from shared import shared

import hardjax as hj
from hardjax.fisher import FisherMeasure
from hardjax.fisher.observe import derive

BATCHES = (32, 128, 512)
RATES = (0.025, 0.05, 0.1)
ITERATIONS = 1800  # about what one epoch of batch 32 takes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(batch size, rate) -> the record of about as many iterations, of P3's perceptron on MNIST."""
    data_dir = shared("tfds/mnist").parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        dataset = hj.data.load("mnist", data_dir)
    found = {}
    for batch, rate in itertools.product(BATCHES, RATES):
        config = hj.TrainConfig(
            model="mlp",
            batch_size=batch,
            learning_rate=rate,
            optimizer="nesterov",
            weight_decay=1e-4,
            epochs=round(ITERATIONS * batch / 60_000),
            augmentation=hj.Augmentation(frame=32),
            evaluate_train=False,
            measure=FisherMeasure(every=50),
        )
        found[batch, rate] = hj.run(config, dataset=dataset, progress=False).measurements
    return found


def _at_the_end(records, name):
    """(batches, rates) at the same iteration, the last one that all runs measured."""
    step = min(record["step"][-1] for record in records.values())
    rows = [[records[batch, rate] for rate in RATES] for batch in BATCHES]
    return np.array([[record[name][record["step"] <= step][-1] for record in row] for row in rows])


@pytest.mark.slow
def test_c_k_is_ordered_by_batch_size_whatever_the_learning_rate(records):
    c_k = _at_the_end(records, "C_K")
    assert (c_k[:-1].max(1) < c_k[1:].min(1)).all(), c_k


@pytest.mark.slow
def test_l_k_is_ordered_by_learning_rate_and_falls_with_the_batch_size(records):
    l_k = _at_the_end(records, "L_K")
    assert (l_k[:, :-1] < l_k[:, 1:]).all(), l_k
    assert (l_k[:-1] > l_k[1:]).all(), l_k


@pytest.mark.slow
def test_l_falls_as_the_batch_grows(records):
    """l = rate / B * sqrt(trace), and the trace of B rows of like length is proportional to B: l goes as 1 / sqrt(B) at
    the same weights."""
    first = np.array([[records[batch, rate]["l"][0] for rate in RATES] for batch in BATCHES])
    constant = first * np.sqrt(np.array(BATCHES))[:, None] / RATES
    np.testing.assert_allclose(constant, constant[0, 0], rtol=0.1)
    # Batch 32 at rate 0.1 diverges late, as the published runs of small batches do: what is not finite is left out.
    mean = np.array([[np.nanmean(records[batch, rate]["l"]) for rate in RATES] for batch in BATCHES])
    assert (mean[:-1] > mean[1:]).all(), mean


@pytest.mark.slow
def test_whether_c_k_follows_the_rate_is_decided_by_what_counts_as_non_zero(records):
    """The paper says both (4.1: proportional, 4.2: independent). With a tolerance C_K clusters by batch size; without
    one, its published reading, the smallest eigenvalue above zero falls as training goes on, the faster the higher the
    rate, and C_K rises by orders of magnitude. Batch 32 at rate 0.1 diverges and is left out."""
    kept = {key: record for key, record in records.items() if key[0] > BATCHES[0]}
    with_tolerance = {key: record["C_K"][-1] for key, record in kept.items()}
    without = {key: derive(record, 0.0)["C_K"][-1] for key, record in kept.items()}
    for batch in BATCHES[1:]:
        clustered = [with_tolerance[batch, rate] for rate in RATES]
        rising = [without[batch, rate] for rate in RATES]
        assert max(clustered) / min(clustered) < 1.1, clustered
        assert rising[0] * 5 < rising[1] and rising[1] * 5 < rising[2], rising
