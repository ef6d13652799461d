"""Which samples `hardest.png` shows."""

import dataclasses

import numpy as np
import pytest

import hardjax as hj
from hardjax.choose.selection import AllBatches, HardBatches, HardSamples
from hardjax.choose.trimming import Trimming
from hardjax.study.hardest import hardest_samples, sample_counts
from hardjax.training.run import train
from hardjax.training.setting import prepare


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": HardBatches(0.3)},
        {"selection": HardSamples(0.3)},
        {"selection": AllBatches(), "trimming": Trimming(1.0, 0.25)},
        {"selection": HardBatches(0.5), "epochs": 1},  # all samples tie on the times that they were trained
    ],
    ids=str,
)
def test_the_samples_trained_most_then_those_of_highest_loss(tiny, changes):
    settings = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, epochs=4, learning_rate=0.1)
    setting = prepare(hj.TrainConfig(**settings | changes), tiny)
    result = train(setting, progress=False)
    images = (np.asarray(tiny.train.images) / 255 - tiny.mean) / tiny.std
    logits = np.asarray(setting.recipe.apply(result.state.variables, images.astype(np.float32), False)[0], np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(70), np.asarray(tiny.train.labels)]

    samples, replays, shown, guesses = hardest_samples(setting, result, count=12)
    times = sample_counts(result.state)
    rank = times / np.asarray(result.state.seen) if setting.config.selection.redraws else times
    expected = np.lexsort((-losses, -rank))[:12]
    np.testing.assert_array_equal(samples, expected)
    np.testing.assert_array_equal(replays, times[expected])
    np.testing.assert_allclose(shown, losses[expected], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(guesses, logits.argmax(-1)[expected])


@pytest.mark.parametrize("selection", [HardBatches(0.3), HardSamples(0.3)], ids=str)
def test_times_trained_follow_from_the_record_of_slots(tiny, selection):
    settings = dict(model="mlp", model_options={"widths": [8]}, batch_size=8, epochs=4, learning_rate=0.1)
    result = train(prepare(hj.TrainConfig(**settings, selection=selection), tiny), progress=False)
    visits = np.zeros(70, int)
    if selection.unit == "sample":
        visits += result.replay_counts
    else:
        for slot, row in enumerate(np.asarray(result.state.partition)):
            for sample in row:
                visits[sample] += result.replay_counts[slot]
    np.testing.assert_array_equal(sample_counts(result.state), visits)


def test_samples_that_were_never_visited_rank_last(tiny):
    """A run that is interrupted within its first epoch."""
    trimming = Trimming(1.0, 0.5)
    setting = prepare(
        hj.TrainConfig(model="mlp", model_options={"widths": [8]}, batch_size=8, epochs=1, trimming=trimming), tiny
    )
    result = train(setting, progress=False)
    state = dataclasses.replace(result.state, seen=result.state.seen.at[:60].set(0), drops=0 * result.state.drops)
    samples, times, *_ = hardest_samples(setting, dataclasses.replace(result, state=state), count=12)
    assert set(range(60, 70)) <= set(samples.tolist()) and times[-2:].tolist() == [0, 0]


def test_more_than_there_are(tiny):
    setting = prepare(hj.TrainConfig(model="mlp", model_options={"widths": [8]}, batch_size=8, epochs=1), tiny)
    assert len(hardest_samples(setting, train(setting, progress=False), count=200)[0]) == 70
