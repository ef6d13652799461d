"""Pictures of what a sweep may hold: half of its cells, runs that diverged, cells that failed, one seed."""

import dataclasses
import math

import numpy as np
import pytest
from sweeps import BASE, row

from hardjax.plots import sweep as plots
from hardjax.study.cells import Cell, grid
from hardjax.study.grids import grids

NAMES = ("performance", "best", "reliable", "curves")
RATES = [2.0**power for power in (-10, -8, -6)]


def _rows(seeds=2, sizes=(8, 64), rates=RATES, **settings):
    """Accuracies fall by 10 points with the rate and by 5 with the batch size; seeds lie 2 points apart."""
    rows = []
    base = dataclasses.replace(BASE, **settings)
    for config in grid(base, batch_size=sizes, base_learning_rate=rates, seed=range(seeds)):
        top1 = 90 - 10 * rates.index(config.base_learning_rate) - 5 * sizes.index(config.batch_size) + 2 * config.seed
        rows.append(row(Cell(config, "data"), top1))
    return rows


def _ragged():
    whole = _rows()
    other = _rows(model_options={"widths": [4], "norm": "batch"})
    failed = [one | {"status": "failed", "metrics": {}} for one in whole]
    nothing = {"history": {"epoch": [1.0]}}
    blank = [one | {"metrics": one["metrics"] | {"median_test_top1": None}} | nothing for one in whole]
    return {
        "whole": whole,
        "half": whole[::3],
        "one cell": whole[:1],
        "one failed": [failed[0], *whole[1:]],
        "all failed": failed,
        "diverged": [one | {"status": "diverged"} for one in whole],
        "two grids": whole + other,
        "four grids": [*whole, *other, *_rows(optimizer="adam"), *_rows(optimizer="adam", model="resnet8")],
        "no accuracies": blank,
    }


# One that is nearly whole is among the fast tests; each picture takes a third of a second.
@pytest.mark.parametrize(
    "case", [name if name == "one failed" else pytest.param(name, marks=pytest.mark.ci) for name in _ragged()]
)
def test_whatever_a_sweep_holds_is_drawn(tmp_path, case):
    found, path = grids(_ragged()[case]), tmp_path / "picture.png"
    for name in NAMES:
        getattr(plots, name)(found).savefig(path, dpi=40)
        assert path.stat().st_size > 2_000


def test_a_sweep_without_rows_is_drawn(tmp_path):
    path = tmp_path / "picture.png"
    for name in NAMES:
        path.unlink(missing_ok=True)
        getattr(plots, name)([]).savefig(path, dpi=40)
        assert path.stat().st_size > 0


def _lines(axes, marker="o"):
    return [line for line in axes.lines if line.get_marker() == marker]


def test_curves_are_means_over_seeds_and_bands_their_range():
    (axes,) = plots.performance(grids(_rows())).axes
    first, second = _lines(axes)
    assert first.get_xdata().tolist() == [-10, -8, -6] and first.get_label() == "m = 8"
    np.testing.assert_allclose(first.get_ydata(), [91, 81, 71])
    np.testing.assert_allclose(second.get_ydata(), [86, 76, 66])
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (70, 92)


def test_a_cross_marks_where_runs_diverged():
    rows = _rows()
    rows[0] |= {"status": "diverged"}
    (axes,) = plots.performance(grids(rows)).axes
    (cross,) = _lines(axes, "x")
    assert cross.get_xdata()[0] == -10 and cross.get_ydata()[0] == 91


def test_the_best_rate_of_each_batch_size_is_named_with_how_it_was_chosen():
    (axes,) = plots.best(grids(_rows())).axes
    (curve,) = _lines(axes)
    assert curve.get_xdata().tolist() == [3, 6] and [label.get_text() for label in axes.get_xticklabels()] == [
        "8",
        "64",
    ]
    np.testing.assert_allclose(curve.get_ydata(), [91, 86])
    assert [text.get_text() for text in axes.texts] == ["2^-10", "2^-10"]
    assert "chosen on the test split, as published" in axes.get_title()
    for one in (rows := _rows()):
        one["metrics"]["median_validation_top1"] = math.log2(one["config"]["base_learning_rate"])
    (axes,) = plots.best(grids(rows)).axes
    assert axes.texts[0].get_text() == "2^-6" and "chosen on the validation share" in axes.get_title()


def test_convergence_is_shown_at_the_rate_that_is_chosen_as_the_title_says():
    for by, shown in ((lambda rate: 0.0, "2^-10"), (math.log2, "2^-6")):
        for one in (rows := _rows()):
            if shown == "2^-6":
                one["metrics"]["median_validation_top1"] = by(one["config"]["base_learning_rate"])
        drawn = plots.curves(grids(rows))
        assert f"base rate {shown}" in drawn.axes[0].get_title()
        assert ("validation share" in drawn.get_suptitle()) == (shown == "2^-6")


def test_reliable_rates_are_filled_and_tried_ones_open():
    rows = _rows()
    rows[-1]["metrics"] |= {"converged": False}
    (axes,) = plots.reliable(grids(rows)).axes
    filled = [line for line in _lines(axes) if line.get_markerfacecolor() != "white"]
    assert [list(line.get_ydata()) for line in filled] == [[-10, -8, -6], [-10, -8]]
    tried = [line for line in _lines(axes) if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in tried] == [[-10, -8, -6]] * 2


def test_a_title_counts_the_seeds_that_ended():
    rows = _rows(seeds=3)
    assert "mean of 3 seeds" in plots.performance(grids(rows)).get_suptitle()
    rows[0] |= {"status": "failed", "metrics": {}}
    assert "mean of 2 to 3 seeds" in plots.performance(grids(rows)).get_suptitle()


def test_a_rate_without_accuracies_is_not_the_common_one():
    rows = _rows()
    for one in rows[:2]:
        one["metrics"]["median_test_top1"] = None
    (axes,) = plots.curves(grids(rows)).axes
    assert "base rate 2^-8" in axes.get_title()


def test_what_diverged_converges_to_what_it_predicts():
    (one,) = _rows(seeds=1, sizes=(8,), rates=RATES[:1])
    one["metrics"]["first_class_top1"] = 12.0
    for losses, expected in (([1.0, None], [45.0, 12.0]), (None, [45.0, 12.0])):
        history = {"epoch": [1.0, 2.0], "test_top1": [45.0, 0.0]} | ({"test_loss": losses} if losses else {})
        drawn = plots.curves(grids([one | {"history": history}]))
        assert drawn.axes[0].lines[0].get_ydata().tolist() == expected
        assert "count with what they predict" in drawn.get_suptitle()


def test_rates_are_shown_as_they_were_given():
    """A peak rate at several batch sizes is several base rates; and rates need be no powers of two."""
    rows = [
        row(Cell(config, "data"), 50 + 100 * config.learning_rate)
        for config in grid(BASE, batch_size=(8, 64), learning_rate=(0.1, 0.3))
    ]
    (axes,) = plots.performance(grids(rows)).axes
    assert axes.get_xlabel() == "log2 of the peak learning rate"
    for line in _lines(axes):
        np.testing.assert_allclose(line.get_xdata(), np.log2([0.1, 0.3]))
    (axes,) = plots.best(grids(rows)).axes
    assert [text.get_text() for text in axes.texts] == ["0.3", "0.3"]
    (axes,) = plots.curves(grids(rows)).axes
    assert "peak rate 0.3" in axes.get_title() and len(axes.lines) == 3  # that of chance among them
    (axes,) = plots.reliable(grids(rows)).axes
    for line in _lines(axes):
        assert set(np.round(line.get_ydata(), 3)) <= set(np.round(np.log2([0.1, 0.3]), 3))


def test_convergence_is_shown_at_one_rate_for_all_batch_sizes():
    left_out = {"batch_size": 64, "base_learning_rate": 2**-10}
    rows = [one for one in _rows() if not left_out.items() <= one["config"].items()]
    (axes,) = plots.curves(grids(rows)).axes
    assert "base rate 2^-8" in axes.get_title()  # 2^-10 was not tried at every size
    first, second, chance = axes.lines
    np.testing.assert_allclose(first.get_ydata(), [40.5, 81])
    np.testing.assert_allclose(second.get_ydata(), [38, 76])
    assert chance.get_ydata()[0] == 10
