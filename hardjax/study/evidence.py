"""What the runs of a comparison say: a row an arm, with its paired differences from ordinary training and controls."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hardjax.study import convergence, statistics
from hardjax.study.arms import Arm, references
from hardjax.study.statistics import Interval
from hardjax.training.run import RunResult

Readings = dict[str, np.ndarray]

# The same difference in the paper's unit: it is shown with its interval, and is no further test.
RESTATED = ("convergence_change_percent", "common_threshold_change_percent")


def make_rows(
    arms: Sequence[Arm], results: Sequence[Sequence[RunResult]]
) -> tuple[list[dict[str, Any]], tuple[float, ...], tuple[str, ...]]:
    """Rows with the columns of P1's Tables 3 to 5 and P2's Table 1, and what may be claimed about each arm.

    Args:
        arms: the first one is the baseline.
        results: (arms, seeds) runs, the same seeds for every arm.

    Returns:
        rows: plain data. Means over seeds, epochs and spectra over the runs that are not left out; accuracies in
            percent; `test_top1_ci95` is the half width of that mean's own interval. `differences` maps the label of
            each reference to quantity -> `Interval.to_dict`, with `holds_corrected`: the difference is claimed
            also when all those of the table are judged together (`statistics.holm`). Epochs are reference less arm
            (positive: sooner), all else arm less reference, times their ratio.
        thresholds: (seeds,) nats.
        left_out: a line for each run that is left out.
    """
    reasons = [[_left_out(run) for run in runs] for runs in results]
    # A level for each seed: seeds differ in speed, and one level for all would be that of the slowest.
    thresholds = tuple(
        convergence.common_threshold(
            [
                runs[seed].history["full_train_loss"]
                for runs, why in zip(results, reasons, strict=True)
                if why[seed] is None
            ]
        )
        for seed in range(len(results[0]))
    )
    readings = [_readings(runs, thresholds, why) for runs, why in zip(results, reasons, strict=True)]
    found = [
        {arms[j].label: _differences(readings[i], readings[j]) for j in references(arms, i)} for i in range(len(arms))
    ]
    tests = _tests(found)
    held = dict(zip(tests, statistics.holm([one.p_value for one in tests.values()]).tolist(), strict=True))
    rows = []
    for i, arm in enumerate(arms):
        differences = {
            label: {
                name: one.to_dict() | {"holds_corrected": held.get((i, label, name), False)}
                for name, one in those.items()
            }
            for label, those in found[i].items()
        }
        first = found[i][arms[0].label] if i else {}
        rows.append(_row(arm, results[i], readings[i], first) | {"differences": differences})
    named = tuple(
        f"{arm.label}, seed {run.config.seed}: {reason}"
        for arm, runs, why in zip(arms, results, reasons, strict=True)
        for run, reason in zip(runs, why, strict=True)
        if reason is not None
    )
    return rows, thresholds, named


def _left_out(run: RunResult) -> str | None:
    """Why a run says nothing about epochs and spectra, or None.

    Its accuracy counts all the same: that a way of choosing diverges is a result, and leaving it out would flatter it.
    """
    epochs, losses = run.history["epoch"], run.history["full_train_loss"]
    if len(losses) == 0:
        return "never tested"
    if not convergence.ends_finite(losses):
        return f"not finite from epoch {epochs[_last_finite(losses)]:g} on"
    if run.summary.get("diverged", False):
        return f"not finite at its end, epoch {epochs[-1]:g}"
    if epochs[-1] < run.config.epochs - 1e-6:
        return f"ended after {epochs[-1]:g} of {run.config.epochs} epochs"
    return None


def _last_finite(losses: np.ndarray) -> int:
    """The first of the points at the end that are not finite."""
    finite = np.flatnonzero(np.isfinite(losses))
    return int(finite[-1]) + 1 if len(finite) else 0


def _readings(runs: Sequence[RunResult], thresholds: Sequence[float], reasons: Sequence[str | None]) -> Readings:
    """Quantity -> (seeds,), NaN where a run is left out."""
    kept = np.array([reason is None for reason in reasons])
    curves = [(run.history["epoch"], run.history["full_train_loss"]) for run in runs]
    own = [convergence.own_level_epoch(*curve) for curve in curves]
    common = [convergence.threshold_epoch(*curve, level) for curve, level in zip(curves, thresholds, strict=True)]
    spectra = {name: [run.history[name][-1] if len(run.history[name]) else np.nan for run in runs] for name in _SPECTRA}
    of_kept = {"convergence_epoch": own, "common_threshold_epoch": common, **spectra}
    of_all = {name: [run.summary[field] for run in runs] for name, field in _SUMMARIES.items()}
    return {name: np.array(values, np.float64) for name, values in of_all.items()} | {
        name: np.where(kept, np.array(values, np.float64), np.nan) for name, values in of_kept.items()
    }


_SPECTRA = ("C_K", "L_K")
_SUMMARIES = {
    "train_top1": "final_full_train_top1",
    "test_top1": "final_test_top1",
    "test_loss": "final_test_loss",
    "seconds_per_step": "seconds_per_step",
}


def _differences(arm: Readings, reference: Readings) -> dict[str, Interval]:
    found = {}
    for name in ("convergence", "common_threshold"):
        epoch, first = arm[f"{name}_epoch"], reference[f"{name}_epoch"]
        found[f"{name}_epochs_sooner"] = statistics.paired(first, epoch)
        change = convergence.change_percent(first, epoch)
        # Rounding is judged on the scale of percentages: changes that are all near 0 have no scale of their own.
        found[f"{name}_change_percent"] = statistics.interval(np.asarray(change), scale=100.0)
    # Accuracy where predictions are right or wrong; one of the two, as each more is one more test.
    test = "test_top1" if np.isfinite(arm["test_top1"]).any() else "test_loss"
    found[test] = statistics.paired(arm[test], reference[test])
    found["time_ratio"] = statistics.paired_ratio(arm["seconds_per_step"], reference["seconds_per_step"])
    for name in _SPECTRA:
        if np.isfinite(arm[name]).any() and np.isfinite(reference[name]).any():
            found[name] = statistics.paired(arm[name], reference[name])
    return found


def _tests(found: Sequence[dict[str, dict[str, Interval]]]) -> dict[tuple[int, str, str], Interval]:
    """(arm, label of the reference, quantity) -> the difference, of all that are tests of their own."""
    return {
        (i, label, name): one
        for i, row in enumerate(found)
        for label, those in row.items()
        for name, one in those.items()
        if name not in RESTATED
    }


def _row(arm: Arm, runs: Sequence[RunResult], readings: Readings, first: dict[str, Interval]) -> dict[str, Any]:
    changes = {name: first[name].mean if first else 0.0 for name in RESTATED}
    keep = runs[0].history["keep_fraction"]
    return {
        "selection": arm.name,
        "delta": arm.delta,
        "label": arm.label,
        "seeds": len(runs),
        "train_top1": _mean(readings["train_top1"]),
        "test_top1": _mean(readings["test_top1"]),
        "test_top1_ci95": statistics.half_width_95(readings["test_top1"]),
        "test_error": 100 - _mean(readings["test_top1"]),
        "test_loss": _mean(readings["test_loss"]),
        "test_loss_ci95": statistics.half_width_95(readings["test_loss"]),
        "convergence_epoch": _mean(readings["convergence_epoch"]),
        "convergence_runs": int(np.isfinite(readings["convergence_epoch"]).sum()),
        "common_threshold_epoch": _mean(readings["common_threshold_epoch"]),
        "common_threshold_runs": int(np.isfinite(readings["common_threshold_epoch"]).sum()),
        **changes,
        # Equal for all but a run that ended early; the least is what the table can vouch for.
        "backprops": min(int(run.summary["backprops"]) for run in runs),
        # The median: one run beside a busy neighbour should not speak for the arm.
        "seconds_per_step": float(np.median(readings["seconds_per_step"])),
        "time_ratio": first["time_ratio"].mean if first else 1.0,
        "keep_first": float(keep[0]) if len(keep) else float("nan"),
        "keep_last": float(keep[-1]) if len(keep) else float("nan"),
        "diverged": sum(bool(run.summary["diverged"]) for run in runs),
        **{name: _mean(readings[name]) for name in _SPECTRA},
        "columns": _axis_columns(runs),
    }


def _axis_columns(runs: Sequence[RunResult]) -> dict[str, Any]:
    """What the axes that are on show of these runs: the mean of numbers, the first of texts."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        if _left_out(run) is None:
            for name, value in run.config.columns(run.history).items():
                found.setdefault(name, []).append(value)
    return {name: those[0] if isinstance(those[0], str) else _mean(np.array(those)) for name, those in found.items()}


def _mean(values: np.ndarray) -> float:
    """Over what is finite; NaN, without a warning, where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
