"""How far training was at the points of a row: in epochs, iterations, or learning rates added up (P3, supplement)."""

import numpy as np

from hardjax.choose.batch_plan import BatchPlan
from hardjax.config import TrainConfig
from hardjax.engine.rates import Schedule, factors
from hardjax.study import experiments_metrics
from hardjax.study.experiments_metrics import Row
from hardjax.study.outcomes import shown_top1

AXES = {"epochs": "epoch", "iterations": "iteration k", "cumulative": "sum of the learning rates up to k"}
_PIECES = 4000  # of training, over which rates are added up
_ERRORS = {"test_error": "test", "full_train_error": "full_train"}  # column -> split


def column(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values) of a column of a row's history, an error, or c, C_K and L_K at tolerance 0; empty without."""
    if name in ("c", "C_K", "L_K"):
        trail = row.get("trail")
        if trail is None:
            return np.zeros(0), np.zeros(0)
        values = trail["measures"]["0"][name]
        return np.array(trail["epoch"], np.float64), np.array([np.nan if v is None else v for v in values], np.float64)
    epochs = experiments_metrics.column(row, "epoch")
    if name in _ERRORS:
        return epochs, 100 - shown_top1(row, _ERRORS[name])
    return epochs, shown_top1(row) if name == "test_top1" else experiments_metrics.column(row, name)


def along(row: Row, epochs: np.ndarray, axis: str) -> np.ndarray:
    """Where these epochs are on one of `AXES`."""
    if axis == "epochs":
        return epochs
    config = TrainConfig.from_dict(row["config"])
    edges = np.linspace(0, config.epochs, _PIECES + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    steps = 1 / _sizes(config, middles)
    # By its share of all back-propagations, which the row knows.
    steps *= row["metrics"]["backprops"] / steps.sum()
    if axis == "cumulative":
        assert isinstance(config.schedule, Schedule)
        steps = steps * config.peak_learning_rate * factors(config.schedule, middles / config.epochs)
    return np.interp(epochs, edges, np.concatenate([[0.0], np.cumsum(steps)]))


def _sizes(config: TrainConfig, epochs: np.ndarray) -> np.ndarray:
    """Batch sizes at these epochs."""
    plan: BatchPlan | None = config.batch_plan
    if plan is None:
        return np.full(len(epochs), float(config.batch_size))
    assert isinstance(config.schedule, Schedule)
    spans = plan.spans(config.epochs, config.schedule.decay_at if config.schedule.kind == "step" else ())
    ends = np.cumsum([float(span.epochs) for span in spans])
    sizes = np.array([span.size for span in spans], np.float64)
    return sizes[np.minimum(np.searchsorted(ends, epochs), len(sizes) - 1)]
