"""What became of a cell of a sweep: its row, and the named readings of its test points that a row holds."""

import math
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hardjax._validate import Refusal, first_line
from hardjax.data import Dataset
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


def published_top1(history: Mapping[str, np.ndarray], first_class: float) -> np.ndarray:
    """(points,) test accuracies as published figures show runs that diverged.

    A sample whose loss is NaN is counted as wrong in the history. Where nothing is finite any more, published figures
    show the accuracy of what is predicted all the same: the largest of outputs that are NaN is the first.

    Args:
        history: of the run.
        first_class: share of the first class of the test split in percent.
    """
    finite, top1 = np.isfinite(history["test_loss"]), history["test_top1"]
    return np.where(finite, top1, np.maximum(top1, first_class))


class Labels(NamedTuple):
    """What naming one class alone would score on the test split.

    Attributes:
        chance, first_class: shares of the most frequent and of the first class in percent; NaN where labels are values.
        predictions: how many are right or wrong.
    """

    chance: float
    first_class: float
    predictions: int


def labels_of(dataset: Dataset) -> Labels:
    """Of the test split."""
    labels = np.ravel(dataset.test.labels)
    if not dataset.num_classes:
        return Labels(math.nan, math.nan, len(labels))
    shares = 100 * np.bincount(labels, minlength=dataset.num_classes) / len(labels)
    return Labels(float(shares.max()), float(shares[0]), len(labels))


def row_of(cell: Cell, result: RunResult, dataset: Dataset, seconds: float, worker: str) -> dict[str, Any]:
    """The row of a run that ended.

    Args:
        dataset: what it was trained on, its validation share aside.
        seconds: wall time of the cell in the process that ended it, preparing and compiling included.
        worker: who trained it.
    """
    summary = result.summary
    reason = _why_diverged(result)
    history = {name: values for name in _KEPT if np.isfinite(values := result.history[name]).any()}
    return (
        _frame(cell, DONE if reason is None else DIVERGED, reason, seconds, worker)
        | {
            "metrics": _metrics(result, labels_of(dataset), dataset.train.num_samples, reason is not None),
            "history": history,
            "population": summary.get("population", ALONE),
            "train_seconds": summary["train_seconds"],
            "compile_seconds": summary["compile_seconds"],
            "resumed_at": summary["resumed_at"],
        }
        | ({"trail": trail_of(result)} if result.measurements else {})
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
    if _was_kept(result):
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


def _was_kept(result: RunResult) -> bool:
    """Whether it ended because its parameters were no numbers any more, and would have stayed as they were then."""
    return _ended_early(result.summary) and result.config.on_nan != "stop"


def kept_to_the_end(history: Mapping[str, np.ndarray], epochs: int) -> dict[str, np.ndarray]:
    """The test points of a run that diverged with those that its state would have until the last epoch: one that is
    trained on all the same (`hj.run`), whose parameters stay as little a number, has them in its history."""
    further = np.arange(math.floor(history["epoch"][-1]) + 1, epochs + 1)
    padded = {name: np.append(column, np.full(len(further), column[-1])) for name, column in history.items()}
    return padded | {"epoch": np.append(history["epoch"], further)}


def was_kept(row: Mapping[str, Any]) -> bool:
    """Whether the run of a row ended before its last epoch, since its parameters were no numbers any more."""
    config, epochs = row["config"], row["history"]["epoch"]
    early = row.get("status") == DIVERGED and config.get("on_nan") != "stop"
    return early and len(epochs) > 0 and epochs[-1] < config["epochs"] - _NEAR


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
    lost = _was_kept(result)
    # The epochs before the end of a run that ended early are not its last ones.
    last = 1 if _ended_early(summary) and not lost else LAST_EPOCHS
    read = kept_to_the_end(history, config.epochs) if lost else history
    median = median_of_last_epochs(read["epoch"], published_top1(read, labels.first_class), last)
    size = config.batch_sizes[0]
    return {
        "median_test_top1": median,
        "median_test_error": 100 - median,
        "median_validation_top1": median_of_last_epochs(read["epoch"], read["validation_top1"], last),
        **{name: value for name, value in summary.items() if name.startswith("final_")},
        "final_test_error": 100 - summary["final_test_top1"],
        "final_train_error": 100 - summary["final_full_train_top1"],
        "convergence_epoch": own_level_epoch(epochs, history["full_train_loss"]),
        "converged": not diverged and has_converged(history, labels.chance, labels.predictions),
        "chance_top1": labels.chance,
        "first_class_top1": labels.first_class,
        # What was measured before parameters were no numbers is not that of the end.
        **{name: float(history[name][-1]) if points and not lost else math.nan for name in ("C_K", "L_K")},
        "backprops": summary["backprops"],
        "num_batches": summary["num_batches"],
        "surplus_percent": 100 * (summary["num_batches"] * size / samples - 1),
        "bad_steps": summary["bad_steps"],
        "first_bad_step": summary["first_bad_step"],
    }
