"""What became of a cell of a sweep: its row, and the named readings of its test points that a row holds."""

import dataclasses
import math
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hardjax._validate import Refusal, first_line
from hardjax.data import Dataset
from hardjax.engine.plan import dispatches
from hardjax.engine.stages import RunPlan
from hardjax.study.cells import ROW_VERSION, Cell
from hardjax.study.convergence import own_level_epoch
from hardjax.study.trails import trail_of
from hardjax.training import files
from hardjax.training.resume import threads
from hardjax.training.run import RunResult

DONE, DIVERGED, FAILED = STATUSES = ("done", "diverged", "failed")
ALONE = {"mode": "workers", "members": 1}  # how a run was trained that is no member of a population
LAST_EPOCHS = 5  # P4: "the median of the final 5 epochs"
_NEAR = 1e-6  # epochs
FIRST_CLASS = {"test": "first_class_top1", "full_train": "first_class_train_top1"}  # split -> name of a metric
_ERRORS = 3.0  # standard errors above chance from which a network has learned
_KEPT = (
    *("epoch", "seconds", "train_loss", "full_train_loss", "full_train_top1", "validation_loss"),
    *("validation_top1", "test_loss", "test_top1", "C_K", "L_K"),
)


def median_of_last_epochs(epochs: np.ndarray, values: np.ndarray, last: int = LAST_EPOCHS) -> float:
    """P4's figure of a run: the median over its last epochs, one value an epoch.

    The values are those of the last test point and of the first ones at or after one epoch before it, two epochs, and
    so on: tests every round weigh no epoch more, rounds that end behind an epoch are that epoch's, and tests every
    second epoch leave three of five. A run that ended early ends where it was last tested.

    Args:
        epochs: (points,) rising, above 0.
        values: (points,) such as test accuracies.
        last: epochs.

    Returns:
        The mean of the middle two of an even number; NaN without test points, or where one of them is NaN.
    """
    if len(epochs) == 0:
        return math.nan
    ends = epochs[-1] - np.arange(last)
    # An epoch is a quotient turned into a float, so that its end is met to rounding.
    points = np.unique(np.searchsorted(epochs, ends[ends > _NEAR] - _NEAR))
    return float(np.median(values[points]))


def has_converged(history: Mapping[str, np.ndarray], chance: float, samples: int) -> bool:
    """Whether one run converged. P4 speaks of "reliable convergence" and prints no criterion; this is ours.

    Every loss, of training and of testing, was finite at every test point, and the network has learned: the median test
    accuracy of the last five epochs lies more than three standard errors above chance (those of a share of so many test
    samples, for a network that always names the most frequent class). Where nothing is predicted that is right or
    wrong, the last test loss lies below the first one. `grids.reliable_rates` asks more of all seeds of a rate.

    Args:
        history: of the run, see `record.History`.
        chance: share of the most frequent class of the test split in percent; NaN where labels are no classes.
        samples: predictions of the test split.
    """
    losses = np.concatenate([history["train_loss"], history["test_loss"]])
    if len(history["test_loss"]) == 0 or not np.isfinite(losses).all():
        return False
    if math.isnan(chance):
        return bool(history["test_loss"][-1] < history["test_loss"][0])
    error = math.sqrt(chance * (100 - chance) / samples)
    return median_of_last_epochs(history["epoch"], history["test_top1"]) > chance + _ERRORS * error


def published_top1(history: Mapping[str, np.ndarray], first_class: float, split: str = "test") -> np.ndarray:
    """(points,) accuracies as published figures show runs that diverged; NaN where none was found.

    A sample whose loss is NaN is counted as wrong in the history. Where nothing is finite any more, published figures
    show the accuracy of what is predicted all the same: the largest of outputs that are NaN is the first.

    Args:
        history: of the run.
        first_class: share of the first class of the split in percent.
        split: "test" or "full_train".
    """
    finite, top1 = np.isfinite(history[f"{split}_loss"]), history[f"{split}_top1"]
    return np.where(finite, top1, np.maximum(top1, first_class))


class Labels(NamedTuple):
    """What naming one class alone would score, on the test split if nothing else is said.

    Attributes:
        chance, first_class: shares of the most frequent and of the first class in percent; NaN where labels are values.
        predictions: how many are right or wrong.
        first_class_train, first_class_validation: as `first_class`, of the training split and the validation share.
    """

    chance: float
    first_class: float
    predictions: int
    first_class_train: float
    first_class_validation: float


def labels_of(dataset: Dataset) -> Labels:
    """Of a data set."""
    test = np.ravel(dataset.test.labels)
    if not dataset.num_classes:
        return Labels(math.nan, math.nan, len(test), math.nan, math.nan)
    shares = 100 * np.bincount(test, minlength=dataset.num_classes) / len(test)
    others = (
        math.nan if split is None else 100 * float((np.ravel(split.labels) == 0).mean())
        for split in (dataset.train, dataset.validation)
    )
    return Labels(float(shares.max()), float(shares[0]), len(test), *others)


def row_of(
    cell: Cell, result: RunResult, dataset: Dataset, seconds: float, worker: str, plan: RunPlan | None = None
) -> dict[str, Any]:
    """The row of a run that ended.

    Args:
        dataset: what it was trained on, its validation share aside.
        seconds: wall time of the cell in the process that ended it, preparing and compiling included.
        worker: who trained it.
        plan: of the run; where it ended early, since no step could bring it back, the row has later test points too.
    """
    reason, labels = _why_diverged(result), labels_of(dataset)
    trained = float(result.history["epoch"][-1]) if _was_lost(result) else None
    if trained is not None:
        assert plan is not None
        result = to_the_end(result, plan)
    summary = result.summary
    history = {name: values for name in _KEPT if np.isfinite(values := result.history[name]).any()}
    return (
        _frame(cell, DONE if reason is None else DIVERGED, reason, seconds, worker)
        | {
            "metrics": _metrics(result, labels, dataset.train.num_samples, reason is not None),
            "history": history,
            "population": summary.get("population", ALONE),
            "train_seconds": summary["train_seconds"],
            "compile_seconds": summary["compile_seconds"],
            "resumed_at": summary["resumed_at"],
        }
        | ({} if trained is None else {"trained_epochs": trained})
        | ({"trail": trail_of(_as_published(result, labels))} if result.measurements else {})
    )


def failed_row(cell: Cell, error: BaseException | str, seconds: float, worker: str) -> dict[str, Any]:
    """The row of a cell that could not be trained; a fault of ours keeps its traceback."""
    if isinstance(error, str):
        reason, trace = error, None
    else:
        reason = reason_of(error)
        trace = None if isinstance(error, Refusal) else "".join(traceback.format_exception(error))
    return _frame(cell, FAILED, " ".join(reason.split()), seconds, worker) | {"metrics": {}, "traceback": trace}


def reason_of(error: BaseException) -> str:
    """Why a cell could not be trained, in one line."""
    if isinstance(error, Refusal):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"


def _why_diverged(result: RunResult) -> str | None:
    """None where a run did not diverge."""
    summary = result.summary
    bad = summary["first_bad_step"]
    if _was_lost(result):
        what = f"parameters were not finite after epoch {result.history['epoch'][-1]:g}"
    elif _ended_early(summary):
        what = "a spectrum was not finite" if bad is None else "a loss or gradient was not finite"
    elif summary["diverged"]:
        what = "the last test loss is not finite"
    else:
        return None
    return what if bad is None else f"{what}; first at step {bad + 1:,}"


def _ended_early(summary: Mapping[str, Any]) -> bool:
    """At something that was not finite (`TrainConfig.on_nan`, or parameters that will stay so)."""
    return summary["end"] != "budget spent"


def _was_lost(result: RunResult) -> bool:
    """Whether it ended because no step could bring it back (`training.points.is_lost`)."""
    return _ended_early(result.summary) and result.config.on_nan != "stop"


def to_the_end(result: RunResult, plan: RunPlan) -> RunResult:
    """A run that ended early, since no step could bring it back, as if it had been trained on.

    No sample has a loss that is a number, so that every later test point has what the last one found, and every later
    step is a bad one. Times are those of the steps that were made.
    """
    done, history = result.summary["backprops"], result.history
    later = [call.after.backprops for call in dispatches(plan) if call.test and call.after.backprops > done]
    further = {name: np.full(len(later), column[-1], column.dtype) for name, column in history.items()}
    further |= {"epoch": np.array([float(plan.epoch(step)) for step in later]), "backprops": np.array(later)}
    further["train_loss"] = np.full(len(later), math.nan)
    whole = {name: np.append(column, further[name]) for name, column in history.items()}
    left = plan.steps - done
    counts = {"backprops": plan.steps, "bad_steps": result.summary["bad_steps"] + left}
    return dataclasses.replace(result, history=whole, summary=result.summary | counts)


def _as_published(result: RunResult, labels: Labels) -> RunResult:
    """With the accuracies of what is predicted where a loss is not finite."""
    summary, history = dict(result.summary), dict(result.history)
    of_splits = labels.first_class, labels.first_class_train, labels.first_class_validation
    for split, first_class in zip(("test", "full_train", "validation"), of_splits, strict=True):
        top1 = published_top1(history, first_class, split)
        history[f"{split}_top1"] = top1
        if len(top1) and f"final_{split}_top1" in summary:
            summary[f"final_{split}_top1"] = float(top1[-1])
    return dataclasses.replace(result, history=history, summary=summary)


def was_lost(row: Mapping[str, Any]) -> bool:
    """Whether the run of a row was trained for a part of its epochs alone, since no step could bring it back."""
    return row.get("trained_epochs") is not None


def shown_top1(row: Mapping[str, Any], split: str = "test") -> np.ndarray:
    """(points,) accuracies of a row as `published_top1` has them; NaN where there is none.

    Args:
        split: "test" or "full_train".
    """
    history, first_class = row["history"], row["metrics"].get(FIRST_CLASS[split])
    nothing = [None] * len(history["epoch"])  # columns are left out where none is finite
    read = {name: np.array(history.get(name, nothing), np.float64) for name in (f"{split}_top1", f"{split}_loss")}
    return read[f"{split}_top1"] if first_class is None else published_top1(read, first_class, split)


def _frame(cell: Cell, status: str, reason: str | None, seconds: float, worker: str) -> dict[str, Any]:
    return {
        "row_version": ROW_VERSION,
        "key": cell.key,
        "status": status,
        "reason": reason,
        "config": cell.config.to_dict(),
        "data": cell.data,
        "network": cell.network,
        **({} if cell.rate_from is None else {"rate_from": cell.rate_from}),
        "seconds": seconds,
        "worker": worker,
        "threads": threads(),
        "commit": files.commit(),
        **files.environment(),
    }


def _metrics(result: RunResult, labels: Labels, samples: int, diverged: bool) -> dict[str, Any]:
    history, summary, config = result.history, result.summary, result.config
    epochs, points = history["epoch"], len(history["epoch"])
    # The epochs before the end of a run that ended early are not its last ones.
    last = 1 if _ended_early(summary) and config.on_nan == "stop" else LAST_EPOCHS
    median = median_of_last_epochs(epochs, published_top1(history, labels.first_class), last)
    size = config.batch_sizes[0]
    return {
        "median_test_top1": median,
        "median_test_error": 100 - median,
        "median_validation_top1": median_of_last_epochs(epochs, history["validation_top1"], last),
        **{name: value for name, value in summary.items() if name.startswith("final_")},
        "final_test_error": 100 - summary["final_test_top1"],
        "final_train_error": 100 - summary["final_full_train_top1"],
        "convergence_epoch": own_level_epoch(epochs, history["full_train_loss"]),
        "converged": not diverged and has_converged(history, labels.chance, labels.predictions),
        "chance_top1": labels.chance,
        "first_class_top1": labels.first_class,
        "first_class_train_top1": labels.first_class_train,
        **{name: float(history[name][-1]) if points else math.nan for name in ("C_K", "L_K")},
        "backprops": summary["backprops"],
        "num_batches": summary["num_batches"],
        "surplus_percent": 100 * (summary["num_batches"] * size / samples - 1),
        "bad_steps": summary["bad_steps"],
        "first_bad_step": summary["first_bad_step"],
    }
