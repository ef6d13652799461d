import math

import numpy as np
import pytest

from hardjax.study import convergence

EPOCHS = np.arange(1.0, 11.0)


def test_own_level_by_hand():
    losses = np.array([2.0, 1.5, 1.0, 0.52, 0.6, 0.55, 0.53, 0.51, 0.5, 0.5])
    # Level 0.5, fall 1.5, tolerance 5 % = 0.075: 0.52 is inside, but 0.6 leaves again, so epoch 6.
    assert convergence.own_level_epoch(EPOCHS, losses) == 6.0


def test_own_level_of_a_run_that_has_not_settled():
    epochs, losses = np.arange(1.0, 21.0), np.linspace(4.0, 2.1, 20)
    losses[-2:] = 0.5, 0.9  # level 0.7
    assert math.isnan(convergence.own_level_epoch(epochs, losses))


def test_own_level_of_runs_that_do_not_fall():
    assert math.isnan(convergence.own_level_epoch(EPOCHS, np.linspace(1, 2, 10)))
    assert math.isnan(convergence.own_level_epoch(EPOCHS, np.full(10, np.nan)))
    assert convergence.own_level_epoch(EPOCHS[:1], np.array([1.0])) == 1.0


def test_common_threshold_is_reached_by_all():
    curves = [np.array([2.0, 1.0, 0.4]), np.array([2.0, 0.9, 0.7]), np.array([np.nan, np.nan, np.nan])]
    threshold = convergence.common_threshold(curves)
    assert threshold == 0.7
    epochs = np.arange(1.0, 4.0)
    assert convergence.threshold_epoch(epochs, curves[0], threshold) == 3.0
    assert math.isnan(convergence.threshold_epoch(epochs, curves[2], threshold))


@pytest.mark.parametrize("baseline, epoch, printed", [(80, 74, 8.1), (80, 77, 3.9), (43, 34, 26.5), (43, 47, -8.5)])
def test_change_has_the_papers_formula_and_a_sign(baseline, epoch, printed):
    assert convergence.change_percent(baseline, epoch) == pytest.approx(printed, abs=0.05)
