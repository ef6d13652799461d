"""Runs that nobody trained: what a comparison reads of a `RunResult`, with curves given by hand."""

import types

import numpy as np

import hardjax as hj
from hardjax.study.arms import make_arms
from hardjax.study.compare import summarise

EPOCHS = 8


def made_up(losses, seed=0, *, top1=97.5, seconds=1e-3, epochs=EPOCHS, **more):
    """A run of `epochs` epochs with this loss of the training split at its test points, one an epoch.

    Args:
        losses: (points,), fewer than `epochs` where the run ended early.
        top1: final test accuracy in percent.
        more: further fields of the history, one number each for all test points.
    """
    losses = np.asarray(losses, np.float64)
    points = len(losses)
    finite = bool(points) and bool(np.isfinite(losses[-1]))
    fields = {"C_K": np.nan, "L_K": np.nan, "keep_fraction": 1.0, "kept_loss": 0.5, "dropped_loss": np.nan} | more
    history = {name: np.full(points, value, np.float64) for name, value in fields.items()}
    history |= {"epoch": np.arange(1.0, points + 1), "full_train_loss": losses, "test_loss": losses.copy()}
    history["test_top1"] = np.linspace(top1 / 2, top1, points) if points > 1 else np.full(points, top1)
    return types.SimpleNamespace(
        config=hj.TrainConfig(seed=seed, epochs=epochs, measure=hj.fisher.FisherMeasure() if "C_K" in more else None),
        history=history,
        summary={
            "final_test_top1": top1,
            "final_test_loss": float(losses[-1]) if points else np.nan,
            "final_full_train_top1": 100.0,
            "seconds_per_step": seconds,
            "backprops": 10 * points,
            "diverged": not finite,
            "interrupted": False,
            "signal": None,
            "end": "budget spent",
        },
        replay_counts=np.zeros(5, np.int32),
        drop_counts=np.zeros(9, np.int32),
        measurements={},
        replays=np.eye(5, dtype=np.uint8)[np.arange(2 * points) % 5],
    )


def falling(rate=0.5, points=EPOCHS, start=2.0):
    """(points,) losses, each `rate` times the one before."""
    return start * rate ** np.arange(points)


def comparison(curves, deltas=(0.5,), controls=("random", "fixed"), **settings):
    """A comparison of replay: `curves[arm][seed]` are losses, or runs."""
    arms = make_arms(deltas, controls)
    results = tuple(
        tuple(one if hasattr(one, "history") else made_up(one, seed, **settings) for seed, one in enumerate(row))
        for row in curves
    )
    return summarise(hj.TrainConfig(epochs=EPOCHS), arms[: len(results)], results)
