"""What the rows of published experiments are compared by."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hardjax.study import convergence
from hardjax.study.outcomes import ALONE, FIRST_CLASS, shown_top1, was_lost

Row = Mapping[str, Any]

_LOWEST = 22 / 40, 25 / 40  # shares of training at which P3 finds the lowest test errors of SVHN


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    Attributes:
        read: (row, rows of the same seed that it is compared with) -> value; NaN where there is none.
        higher: the higher the better; None where neither is.
        form: of its numbers, as in `format`.
        early: row -> the same at its test points, for comparisons at equal time; None where that says nothing.
        may_miss: how long it took to a target, infinity where it was missed.
        timed: of the clock, so that only rows that were `trained_alike` can be compared.
    """

    read: Callable[[Row, Sequence[Row]], float]
    higher: bool | None
    form: str = ".2f"
    early: Callable[[Row], np.ndarray] | None = None
    may_miss: bool = False
    timed: bool = False


def trained_alike(rows: Iterable[Row]) -> bool:
    """Whether times of rows say something of their arms: of one device, of as many threads (where that is known), and
    alone or in populations alike, whose members each have their share of the time."""
    rows = list(rows)
    ways = {(row.get("device"), json.dumps(row.get("population") or ALONE, sort_keys=True)) for row in rows}
    threads = {row["threads"] for row in rows if row.get("threads") is not None}
    return len(ways) == 1 and len(threads) <= 1


def value(name: str, row: Row, peers: Sequence[Row] = ()) -> float:
    """Of a row; NaN where there is none."""
    return METRICS[name].read(row, peers)


def value_within(name: str, row: Row, seconds: float) -> float:
    """A metric at the last test point within a training time; NaN before the first one, or where it is not known.

    Where a row keeps no seconds of its test points, its epochs are taken to be alike, which those of a plan are not.
    """
    early, total = METRICS[name].early, row.get("train_seconds")
    timed = "seconds" in row["history"]
    if early is None or total is None or not (timed or row["config"].get("batch_plan") is None):
        return math.nan
    epochs, values = column(row, "epoch"), early(row)
    passed = column(row, "seconds") if timed else total * epochs / epochs[-1]
    within = np.flatnonzero(passed <= seconds * (1 + 1e-9))
    return float(values[within[-1]]) if len(within) else math.nan


def column(row: Row, name: str) -> np.ndarray:
    """(points,) of a row's history; NaN where it is not kept, or was null."""
    history = row["history"]
    values = history.get(name, [None] * len(history["epoch"]))
    return np.array([math.nan if one is None else one for one in values], np.float64)


def _kept(name: str) -> Callable[[Row, Sequence[Row]], float]:
    def read(row: Row, peers: Sequence[Row]) -> float:
        found = row["metrics"].get(name)
        return math.nan if found is None else float(found)

    return read


def _final_top1(split: str) -> Callable[[Row, Sequence[Row]], float]:
    """Accuracy at the end; of a loss that is not finite that of what is predicted, as published tables have it."""
    kept, loss, first_class = f"final_{split}_top1", f"final_{split}_loss", FIRST_CLASS[split]

    def read(row: Row, peers: Sequence[Row]) -> float:
        metrics = row["metrics"]
        found = _kept(kept)(row, peers)
        lost = loss in metrics and metrics[loss] is None and metrics.get(first_class) is not None
        return float(np.maximum(found, metrics[first_class])) if lost else found

    return read


def _final_error(split: str, kept: str) -> Callable[[Row, Sequence[Row]], float]:
    """Error at the end likewise; rows of earlier scripts have no more than it.

    Args:
        kept: its name in a row.
    """

    def read(row: Row, peers: Sequence[Row]) -> float:
        top1 = _final_top1(split)(row, peers)
        return _kept(kept)(row, peers) if math.isnan(top1) else 100 - top1

    return read


def _own_epoch(row: Row, peers: Sequence[Row]) -> float:
    """Its own level is missed by a run that has not settled, or blew up."""
    found = convergence.own_level_epoch(column(row, "epoch"), column(row, "full_train_loss"))
    return math.inf if math.isnan(found) else found


def _common_epoch(row: Row, peers: Sequence[Row]) -> float:
    """The level that all runs of the seed reached; missed by those that blew up, which set none.

    Where all of them blew up every one missed it, whatever it was; NaN without peers, or where no loss is kept.
    """
    losses = [column(one, "full_train_loss") for one in peers]
    if not any(np.isfinite(one).any() for one in losses):
        return math.nan
    level = convergence.common_threshold(losses)
    found = convergence.threshold_epoch(column(row, "epoch"), column(row, "full_train_loss"), level)
    return math.inf if math.isnan(found) else found


def _common_seconds(row: Row, peers: Sequence[Row]) -> float:
    """Training time until `_common_epoch`; NaN where a row keeps no seconds of its test points."""
    epoch = _common_epoch(row, peers)
    if not math.isfinite(epoch):
        return epoch
    return float(column(row, "seconds")[np.flatnonzero(column(row, "epoch") == epoch)[0]])


def _step_milliseconds(row: Row, peers: Sequence[Row]) -> float:
    seconds, steps = row.get("train_seconds"), row["metrics"].get("backprops")
    # The steps of a row are all of its plan's, of which one that was lost made the first ones alone.
    return 1e3 * seconds / steps if seconds is not None and steps and not was_lost(row) else math.nan


def _seconds(row: Row, peers: Sequence[Row]) -> float:
    found = row.get("train_seconds")
    return math.nan if found is None or was_lost(row) else found


def _steps(row: Row, peers: Sequence[Row]) -> float:
    """One that diverged was not trained to the end, which makes it no cheaper."""
    return math.nan if was_lost(row) else _kept("backprops")(row, peers)


def _measured(name: str, tolerance: str, share: float = 1.0) -> Callable[[Row, Sequence[Row]], float]:
    """Decimal logarithm of a measure after a share of training; NaN of a run that diverged, whose measures stand still
    where they were."""

    def read(row: Row, peers: Sequence[Row]) -> float:
        trail = row.get("trail")
        if trail is None or row["status"] == "diverged":
            return math.nan
        epochs = np.array(trail["epoch"], np.float64)
        at = int(np.searchsorted(epochs, share * epochs[-1] - 1e-9))
        found = trail["measures"][tolerance][name][at]
        return math.log10(found) if found is not None and found > 0 else math.nan

    return read


def _at_iterations_of(size: int, share: float) -> Callable[[Row, Sequence[Row]], float]:
    """Decimal logarithm of L_K after as many iterations as a batch size has in a share of its training.

    Between two points of the trail it is interpolated; before its first one there is none, nor of a run that diverged.
    """

    def read(row: Row, peers: Sequence[Row]) -> float:
        trail, config = row.get("trail"), row["config"]
        if trail is None or row["status"] == "diverged" or config.get("batch_plan") is not None:
            return math.nan
        at = share * config["epochs"] * config["batch_size"] / size
        energy = np.array([math.nan if one is None else one for one in trail["measures"]["0"]["L_K"]], np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = np.interp(at, np.array(trail["epoch"], np.float64), np.log10(energy), left=math.nan, right=math.nan)
        return float(found)

    return read


def _growth(row: Row, peers: Sequence[Row]) -> float:
    """Decimal logarithm of L_K's growth in the first half of training over that in the second."""
    trail = row.get("trail")
    if trail is None:
        return math.nan
    half = 10 ** _measured("L_K", "0", 0.5)(row, peers)
    rest = 10 ** _measured("L_K", "0")(row, peers) - half
    return math.log10(half / rest) if rest > 0 else math.nan


def _second_half(row: Row, peers: Sequence[Row]) -> float:
    """By how much C_K is multiplied in the second half of training, as a decimal logarithm."""
    return _measured("C_K", "0")(row, peers) - _measured("C_K", "0", 0.5)(row, peers)


def _test_error_early(row: Row) -> np.ndarray:
    return 100 - shown_top1(row)


def _late_rise(row: Row, peers: Sequence[Row]) -> float:
    """Final test error less its mean over `_LOWEST`: less the lowest one it could not but rise."""
    shares, errors = column(row, "epoch") / row["config"]["epochs"], _test_error_early(row)
    there = errors[(shares >= _LOWEST[0] - 1e-9) & (shares <= _LOWEST[1] + 1e-9)]
    return float(errors[-1] - there.mean()) if len(there) else math.nan


METRICS = {
    "test error": Metric(_final_error("test", "final_test_error"), False, ".2f", _test_error_early),
    "test top-1": Metric(_final_top1("test"), True, ".2f", shown_top1),
    "train error": Metric(_final_error("full_train", "final_train_error"), False, ".2f"),
    "train top-1": Metric(_final_top1("full_train"), True, ".2f"),
    "median test top-1": Metric(_kept("median_test_top1"), True, ".2f", shown_top1),
    "converged": Metric(_kept("converged"), True, ".2f"),
    "epochs to converge": Metric(_own_epoch, False, ".1f", may_miss=True),
    "epochs to a common level": Metric(_common_epoch, False, ".1f", may_miss=True),
    "seconds to a common level": Metric(_common_seconds, False, ".3g", may_miss=True, timed=True),
    "late rise of the test error": Metric(_late_rise, False, ".2f"),
    "steps": Metric(_steps, False, ",.0f"),
    "seconds": Metric(_seconds, False, ",.3g", timed=True),
    "ms a step": Metric(_step_milliseconds, False, ".3g", timed=True),
    "log10 C_K": Metric(_measured("C_K", "0"), None, ".2f"),
    "log10 C_K at 1e-6": Metric(_measured("C_K", "1e-06"), None, ".2f"),
    "log10 L_K": Metric(_measured("L_K", "0"), None, ".2f"),
    "log10 L_K at half": Metric(_measured("L_K", "0", 0.5), None, ".2f"),
    "log10 L_K at half of the iterations of batch 512": Metric(_at_iterations_of(512, 0.5), None, ".2f"),
    "log10 growth of L_K, first half over second": Metric(_growth, None, ".2f"),
    "log10 growth of C_K in the second half": Metric(_second_half, None, ".2f"),
    # Found without training, by `Experiment.computed`.
    "parameters (million)": Metric(_kept("parameters (million)"), None, ".4g"),
    "operations (giga)": Metric(_kept("operations (giga)"), None, ".4g"),
    "value": Metric(_kept("value"), None, ".4g"),
}
