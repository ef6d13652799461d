"""Rows of a sweep: P4's figure of a run, what counts as converged, and what becomes of a cell."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
from made_up import falling, made_up
from sweeps import BASE

import hardjax as hj
from hardjax._validate import Refusal
from hardjax.study.cells import Cell
from hardjax.study.outcomes import (
    failed_row,
    has_converged,
    labels_of,
    median_of_last_epochs,
    published_top1,
    row_of,
)
from hardjax.training import lines

NAN = float("nan")


@pytest.mark.parametrize(
    "epochs, values, expected",
    [
        ([1, 2, 3, 4, 5, 6], [0, 50, 90, 70, 80, 60], 70),  # 50 60 70 80 90
        ([1, 2, 3], [10, 30, 20], 20),  # fewer epochs than five
        ([1, 2, 3, 4], [10, 40, 20, 30], 25),  # the mean of the middle two
        ([2, 4, 6, 8, 10], [0, 0, 60, 90, 70], 70),  # tested every second epoch: 6, 8, 10
        ([0.5, 1, 1.5, 2], [99, 10, 99, 20], 15),  # tested twice an epoch: its last one
        # Replay is tested at the first round that ends in an epoch or after it, and cut at the very end.
        ([1.04, 2.08, 3.04, 4.08, 5.04, 6.08, 7], [1, 2, 30, 50, 40, 70, 60], 50),
        ([1 / 3 * 3, 2.0000000001], [10, 30], 20),  # an end that is met to rounding
        ([1, 2], [10, NAN], NAN),
        ([], [], NAN),
    ],
)
def test_the_median_of_the_last_five_epochs(epochs, values, expected):
    found = median_of_last_epochs(np.array(epochs, float), np.array(values, float))
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def _history(top1, losses=(2.0, 1.0, 0.5)):
    count = len(losses)
    return {
        "epoch": np.arange(1.0, count + 1),
        "train_loss": np.array(losses),
        "test_loss": np.array(losses),
        "test_top1": np.full(count, top1),
    }


def test_what_counts_as_converged():
    # 100 predictions, chance 10 %: a standard error of 3 points, three of them above are 19 %.
    assert not has_converged(_history(19.0), 10.0, 100)
    assert has_converged(_history(19.1), 10.0, 100)
    assert has_converged(_history(11.0), 10.0, 10_000)  # 0.3 points: 10.9 %
    for lost in (NAN, math.inf):
        assert not has_converged(_history(90.0, (2.0, lost, 0.5)), 10.0, 100)
    one = _history(90.0)
    one["train_loss"][0] = NAN
    assert not has_converged(one, 10.0, 100)
    assert not has_converged(_history(90.0, ()), 10.0, 100)
    # Where labels are values.
    assert has_converged(_history(NAN), NAN, 100) and not has_converged(_history(NAN, (1.0, 0.5, 1.0)), NAN, 100)


def test_chance_is_the_most_frequent_class_of_the_test_split():
    images = np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4, 1)
    data = hj.data.Dataset.from_arrays(images, np.arange(8) % 3, images, np.array([0, 1, 1, 1, 2, 1, 0, 1]))
    assert labels_of(data)[:4] == (62.5, 25.0, 8, 37.5) and math.isnan(labels_of(data).first_class_validation)
    values = labels_of(hj.data.Dataset.from_arrays(images, np.arange(8.0), images, np.arange(8.0)))
    assert math.isnan(values.chance) and math.isnan(values.first_class) and values.predictions == 8


def test_what_is_not_finite_counts_with_the_class_that_it_predicts():
    history = {"test_loss": np.array([1.0, NAN, NAN, math.inf]), "test_top1": np.array([5.0, 0.0, 60.0, 30.0])}
    assert published_top1(history, 25.0).tolist() == [5.0, 25.0, 60.0, 30.0]


def _result(losses, **summary):
    result = made_up(losses, top1=80.0)
    points = len(losses)
    more = ("seconds", "train_loss", "full_train_top1", "validation_loss", "validation_top1")
    result.history |= {name: np.full(points, NAN) for name in more} | {"train_loss": np.asarray(losses, float)}
    result.history["test_top1"] = np.full(points, 80.0)
    result.summary |= {
        "final_full_train_loss": 0.1,
        "num_batches": 3,
        "bad_steps": 0,
        "first_bad_step": None,
        "train_seconds": 1.0,
        "compile_seconds": 0.5,
        "resumed_at": [],
    } | summary
    return types.SimpleNamespace(config=BASE, history=result.history, summary=result.summary, measurements={})


def test_the_row_of_a_run_is_strict_json(tiny):
    cell = Cell(BASE, "data")
    row = json.loads(lines.encode(row_of(cell, _result(falling()), tiny, 3.0, "me")))
    assert (row["status"], row["reason"], row["seconds"], row["worker"]) == ("done", None, 3.0, "me")
    metrics = row["metrics"]
    assert metrics["median_test_top1"] == 80 and metrics["median_test_error"] == 20 and metrics["converged"] is True
    assert metrics["median_validation_top1"] is None and metrics["C_K"] is None
    assert metrics["surplus_percent"] == pytest.approx(100 * (3 * 128 / 70 - 1))  # 314 of 384 are there twice
    assert set(row["history"]) == {"epoch", "train_loss", "full_train_loss", "test_loss", "test_top1"}
    assert row["key"] == cell.key and row["config"] == json.loads(lines.encode(BASE.to_dict()))
    assert {"versions", "device", "threads", "commit", "row_version"} <= set(row)


@pytest.mark.parametrize(
    "losses, summary, reason",
    [
        ([2.0, NAN], {"bad_steps": 4, "first_bad_step": 1499}, "the last test loss is not finite; first at step 1,500"),
        ([2.0, 1.0], {"end": "diverged"}, "a spectrum was not finite"),
        (
            [2.0, 1.0],
            {"end": "diverged", "bad_steps": 1, "first_bad_step": 4},
            "a loss or gradient was not finite; first at step 5",
        ),
    ],
)
def test_divergence_is_a_result_with_the_accuracy_of_what_is_predicted(tiny, losses, summary, reason):
    result = _result(losses, **summary)
    result.config = dataclasses.replace(BASE, on_nan="stop")
    row = row_of(Cell(BASE, "data"), result, tiny, 3.0, "me")
    assert (row["status"], row["reason"]) == ("diverged", reason)
    assert row["metrics"]["median_test_top1"] == 80  # some samples alone were lost
    assert row["metrics"]["converged"] is False


def test_a_run_that_ended_early_counts_with_what_it_had_at_its_end(tiny):
    result = _result([2.0, 1.0, 0.5], end="diverged")
    result.config = dataclasses.replace(BASE, on_nan="stop")
    result.history["test_top1"][:] = (90.0, 80.0, 30.0)
    result.history["validation_top1"][:] = (90.0, 80.0, 20.0)
    metrics = row_of(Cell(BASE, "data"), result, tiny, 3.0, "me")["metrics"]
    assert (metrics["median_test_top1"], metrics["median_validation_top1"]) == (30.0, 20.0)
    result.summary["end"] = "budget spent"
    metrics = row_of(Cell(BASE, "data"), result, tiny, 3.0, "me")["metrics"]
    assert (metrics["median_test_top1"], metrics["median_validation_top1"]) == (80.0, 80.0)


def test_the_row_of_a_failure_says_why():
    cell = Cell(BASE, "data")
    refused = failed_row(cell, Refusal("Expected this\n to be that."), 1.0, "me")
    assert (refused["status"], refused["reason"], refused["traceback"]) == ("failed", "Expected this to be that.", None)
    fault = failed_row(cell, ZeroDivisionError("division by zero"), 1.0, "me")
    assert fault["reason"] == "ZeroDivisionError: division by zero" and "ZeroDivisionError" in fault["traceback"]
    assert failed_row(cell, "killed", 0.0, "me")["reason"] == "killed"
