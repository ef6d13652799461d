"""Where one run went in the C_K-L_K plane (P3), from its record on disk or in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hardjax.config import TrainConfig
from hardjax.fisher.observe import trajectory_of
from hardjax.study import beacon_file
from hardjax.study.beacons import TOLERANCES, Trail
from hardjax.training.run import RunResult

_TESTED = {"test": "test_top1", "train": "full_train_top1", "validation": "validation_top1"}  # of the history
_POINTS = 40  # most of them in a row: as many as P3's shortest runs have epochs, its shares of training among them


def trail_of(result: RunResult) -> dict[str, Any]:
    """Of a run in memory that measured, plain (`beacon_file.to_plain`): the end of every epoch, or 40 even points."""
    config, history = result.config, result.history
    points = np.linspace(0, config.epochs, min(config.epochs, _POINTS) + 1)[1:]
    entries = [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
    named = f"{config.batches}, rate {config.peak_learning_rate:g}, seed {config.seed}"
    errors = errors_at(points, entries)
    return beacon_file.to_plain(trail_between(config, result.summary, result.measurements, errors, points, run=named))


def trail_between(
    config: TrainConfig,
    summary: Mapping[str, Any],
    raw: Mapping[str, np.ndarray],
    errors: Mapping[str, np.ndarray],
    points: np.ndarray,
    *,
    run: str,
) -> Trail:
    """The trail of a finished run.

    Args:
        raw: columns of its spectra.
        errors: as `errors_at` gives them.
        points: epochs, rising.
        run: what it is called.
    """
    return Trail(
        run=run,
        batches=config.batch_size if config.batch_plan is None else config.batch_plan.text,
        learning_rate=config.peak_learning_rate,
        seed=config.seed,
        # A run that was to stop there ended so; of one that went on the last loss tells.
        diverged=summary["diverged"] or summary["end"] == "diverged",
        test_error=_error(summary["final_test_top1"]),
        train_error=_error(summary["final_full_train_top1"]),
        epoch=points,
        measures={tolerance: measures_at(points, raw, tolerance) for tolerance in TOLERANCES},
        errors=errors,
    )


def errors_at(points: np.ndarray, history: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """ "test", "train", "validation" -> percent at each of these epochs; NaN where the run was not tested then.

    Args:
        history: entries, one a test point.
    """
    return {name: _errors_of(points, history, field) for name, field in _TESTED.items()}


def measures_at(points: np.ndarray, raw: Mapping[str, np.ndarray], tolerance: float) -> dict[str, np.ndarray]:
    """Fields of `beacons.Trail.measures`: of the last measurement of a step before each of these epochs."""
    path, epoch = trajectory_of(raw, tolerance), raw["epoch"]
    ends = np.searchsorted(epoch, points)  # a step at the very end of an epoch is the next one's first
    starts = np.concatenate([[0], ends[:-1]])
    parts = [path.condition_number[start:end] for start, end in zip(starts, ends, strict=True)]
    parts = [part[np.isfinite(part)] for part in parts]
    columns = {
        "C_K": path.running_condition,
        "L_K": path.cumulative_energy,
        "C_K by epoch": path.running_condition_by_epoch,
        "L_K by epoch": path.cumulative_energy_by_epoch,
    }
    # Before the first measurement the place is -1, and the entry added behind the last.
    found = {name: np.append(values, np.nan)[ends - 1] for name, values in columns.items()}
    return {"c": np.array([part.mean() if len(part) else np.nan for part in parts])} | found


def _errors_of(points: np.ndarray, history: Sequence[Mapping[str, Any]], field: str) -> np.ndarray:
    """Percent at each of these epochs; NaN where the run was not tested then."""
    found = np.full(len(points), np.nan)
    for entry in reversed(history):
        # A test waits for the end of its round, which may lie a little behind the end of an epoch.
        at = (points <= entry["epoch"]) & (entry["epoch"] < points + 0.5)
        found[at] = _error(entry.get(field))
    return found


def _error(top1: float | None) -> float:
    return float("nan") if top1 is None else 100 - top1
