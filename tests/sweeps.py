"""Cells and rows of sweeps that nobody trained."""

import dataclasses

import numpy as np

import hardjax as hj
from hardjax.study.cells import ROW_VERSION, Cell
from hardjax.study.outcomes import DIVERGED, DONE, FAILED

BASE = hj.TrainConfig(model_options={"widths": [4]}, epochs=2, optimizer="sgd")


def cells(count=4, **settings):
    """Cells that differ in their seeds."""
    base = dataclasses.replace(BASE, **settings)
    return [Cell(dataclasses.replace(base, seed=seed), "data") for seed in range(count)]


def history_of(row):
    """What a row says of its test points, their time aside."""
    return {name: values for name, values in row["history"].items() if name != "seconds"}


def row(cell, top1=90.0, *, status=DONE, converged=True, validation=None, worker="somebody"):
    """What became of a cell: a history that rises to this accuracy in percent."""
    frame = {
        "row_version": ROW_VERSION,
        "key": cell.key,
        "status": status,
        "reason": None if status == DONE else "made up",
        "config": cell.config.to_dict(),
        "data": cell.data,
        "network": cell.network,
        "seconds": 2.0,
        "worker": worker,
    }
    if status == FAILED:
        return frame | {"metrics": {}}
    epochs = np.arange(1.0, cell.config.epochs + 1)
    return frame | {
        "metrics": {
            "median_test_top1": top1,
            "median_validation_top1": validation,
            "converged": converged and status != DIVERGED,
            "chance_top1": 10.0,
        },
        "history": {"epoch": epochs.tolist(), "test_top1": (top1 * epochs / epochs[-1]).tolist()},
    }
