"""Rows of sweeps over batch-norm sub-batches, sorted into the form of figures 13 and 14; worked by hand."""

import dataclasses

import numpy as np
from sweeps import BASE, row

from hardjax.plots import sweep as plots
from hardjax.study.cells import Cell, grid
from hardjax.study.norm_grids import norm_grids

NORMED = dataclasses.replace(BASE, model_options={"widths": [4], "norm": "batch"})


def rows(parts=(None, 4, 8), sizes=(8, 32), rates=(2**-8,), base=NORMED):
    """Accuracy falls by 10 with the batch size, by 1 a sample of a part, and by 2 from one rate to the next."""
    options = [{"norm_batch_size": part} for part in parts]
    found = []
    for config in grid(base, model_options=options, batch_size=sizes, base_learning_rate=rates, seed=range(2)):
        part = config.model_options.get("norm_batch_size", config.batch_size)
        rate = rates.index(config.base_learning_rate)
        top1 = 90 - 10 * sizes.index(config.batch_size) - part - 2 * rate + config.seed
        found.append(row(Cell(config, "data"), top1))
    return found


def test_a_curve_a_batch_size_over_the_sizes_of_parts():
    (found,) = norm_grids(rows())
    assert found.label == "mlp on digits" and [curve.size for curve in found.curves] == [8, 32]
    # The whole batch is a part of its own size: of 8 both say the same.
    assert [curve.parts for curve in found.curves] == [(4, 8), (4, 8, 32)]
    assert [point.mean for point in found.curves[1].points] == [76.5, 72.5, 48.5]
    assert [len(point.rows) for point in found.curves[0].points] == [2, 2]


def test_the_best_of_several_rates_is_shown_and_what_diverged_where_all_did():
    found = rows(rates=(2**-8, 2**-6), sizes=(16,), parts=(4, 8))
    found[0] |= {"status": "diverged"}
    (one,) = norm_grids(found)
    assert [point.rate for point in one.curves[0].points] == [2**-6, 2**-8]
    (one,) = norm_grids([row | {"status": "diverged"} for row in found])
    assert [point.rate for point in one.curves[0].points] == [2**-8, 2**-8]
    assert [point.diverged for point in one.curves[0].points] == [2, 2]
    (one,) = norm_grids([row | {"status": "failed", "metrics": {}} for row in found[:4]] + found[4:])
    assert [curve.parts for curve in one.curves] == [(8,)]


def test_rows_that_do_not_differ_in_their_parts_make_no_such_grid():
    assert norm_grids([]) == [] and norm_grids(rows(parts=(None,))) == [] and norm_grids(rows(parts=(4,))) == []
    other = rows(base=dataclasses.replace(NORMED, optimizer="adam"))
    assert [one.label for one in norm_grids(rows() + other)] == [
        "mlp on digits, optimizer sgd",
        "mlp on digits, optimizer adam",
    ]


def test_the_picture_has_a_line_a_batch_size_and_crosses_where_runs_diverged(tmp_path):
    found = rows()
    found[-1] |= {"status": "diverged"}
    drawn = plots.norm_batches(norm_grids(found))
    (axes,) = drawn.axes
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_label() for line in lines] == ["m = 8", "m = 32"]
    np.testing.assert_allclose(lines[1].get_xdata(), [2, 3, 5])
    np.testing.assert_allclose(lines[1].get_ydata(), [76.5, 72.5, 48.5])
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (3, 72.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "32"]
    assert "chosen on the test split, as published" in drawn.get_suptitle()
    drawn.savefig(tmp_path / "picture.png", dpi=40)
