"""What became of a cell of a sweep: its row, and the named readings of its test points that a row holds."""

import math
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from hardjax._validate import Refusal, first_line
from hardjax.data import Dataset
from hardjax.study.cells import ROW_VERSION, Cell
from hardjax.study.convergence import own_level_epoch
from hardjax.training import files
from hardjax.training.resume import threads
from hardjax.training.run import RunResult

DONE, DIVERGED, FAILED = STATUSES = ("done", "diverged", "failed")
LAST_EPOCHS = 5  # P4: "the median of the final 5 epochs"
_ERRORS = 3.0  # standard errors above chance from which a network has learned
_KEPT = (
    *("epoch", "train_loss", "full_train_loss", "full_train_top1", "validation_loss", "validation_top1"),
    *("test_loss", "test_top1", "C_K", "L_K"),
)


def median_of_last_epochs(epochs: np.ndarray, values: np.ndarray, last: int = LAST_EPOCHS) -> float:
    """P4's figure of a run: the median over its last epochs, one value an epoch.

    Of each of the last `last` epochs its last test point counts, where it has one: tests every round weigh no epoch
    more, tests every second epoch leave two or three of five. A run that ended early ends where it was last tested.

    Args:
        epochs: (points,) rising, above 0.
        values: (points,) such as test accuracies.
        last: epochs.

    Returns:
        The mean of the middle two of an even number; NaN without test points, or where one of them is NaN.
    """
    if len(epochs) == 0:
        return math.nan
    # Epoch k ends at k; an epoch is a quotient turned into a float, so that its end is met to rounding.
    of_epoch = np.ceil(np.asarray(epochs, np.float64) - 1e-6).astype(int)
    final = {number: value for number, value in zip(of_epoch, values, strict=True) if number > of_epoch[-1] - last}
    return float(np.median(list(final.values())))


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


def chance_of(dataset: Dataset) -> tuple[float, int]:
    """(share of the most frequent class of the test split in percent, predictions); NaN where labels are values."""
    labels = np.ravel(dataset.test.labels)
    if not dataset.num_classes:
        return math.nan, len(labels)
    return 100 * float(np.bincount(labels, minlength=dataset.num_classes).max()) / len(labels), len(labels)


def row_of(cell: Cell, result: RunResult, dataset: Dataset, seconds: float, worker: str) -> dict[str, Any]:
    """The row of a run that ended.

    Args:
        seconds: wall time of the cell in the process that ended it, preparing and compiling included.
        worker: who trained it.
    """
    summary = result.summary
    diverged = summary["diverged"] or summary["end"] != "budget spent"
    reason = None
    if diverged:
        bad = summary["first_bad_step"]
        reason = summary["end"] if summary["end"] != "budget spent" else "the last test loss is not finite"
        reason += "" if bad is None else f"; first at step {bad + 1:,}"
    history = {name: values for name in _KEPT if np.isfinite(values := result.history[name]).any()}
    return _frame(cell, DIVERGED if diverged else DONE, reason, seconds, worker) | {
        "metrics": _metrics(result, *chance_of(dataset), dataset.train.num_samples),
        "history": history,
        "train_seconds": summary["train_seconds"],
        "compile_seconds": summary["compile_seconds"],
        "resumed_at": summary["resumed_at"],
    }


def failed_row(cell: Cell, error: BaseException | str, seconds: float, worker: str) -> dict[str, Any]:
    """The row of a cell that could not be trained; a fault of ours keeps its traceback."""
    if isinstance(error, str):
        reason, trace = error, None
    else:
        known = isinstance(error, Refusal)
        reason = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        trace = None if known else "".join(traceback.format_exception(error))
    return _frame(cell, FAILED, " ".join(reason.split()), seconds, worker) | {"metrics": {}, "traceback": trace}


def _frame(cell: Cell, status: str, reason: str | None, seconds: float, worker: str) -> dict[str, Any]:
    return {
        "row_version": ROW_VERSION,
        "key": cell.key,
        "status": status,
        "reason": reason,
        "config": cell.config.to_dict(),
        "data": cell.data,
        "network": cell.network,
        "seconds": seconds,
        "worker": worker,
        "threads": threads(),
        "commit": files.commit(),
        **files.environment(),
    }


def _metrics(result: RunResult, chance: float, predictions: int, samples: int) -> dict[str, Any]:
    history, summary, config = result.history, result.summary, result.config
    epochs, points = history["epoch"], len(history["epoch"])
    median = median_of_last_epochs(epochs, history["test_top1"])
    size = config.batch_sizes[0]
    found = {
        "median_test_top1": median,
        "median_test_error": 100 - median,
        "median_validation_top1": median_of_last_epochs(epochs, history["validation_top1"]),
        **{name: value for name, value in summary.items() if name.startswith("final_")},
        "final_test_error": 100 - summary["final_test_top1"],
        "final_train_error": 100 - summary["final_full_train_top1"],
        "convergence_epoch": own_level_epoch(epochs, history["full_train_loss"]),
        "converged": has_converged(history, chance, predictions),
        "chance_top1": chance,
        **{name: float(history[name][-1]) if points else math.nan for name in ("C_K", "L_K")},
        "backprops": summary["backprops"],
        "num_batches": summary["num_batches"],
        "surplus_percent": 100 * (summary["num_batches"] * size / samples - 1),
        "bad_steps": summary["bad_steps"],
        "first_bad_step": summary["first_bad_step"],
    }
    return found
