"""Pictures of what a comparison may hold: arms of different length, curves that are not finite, one seed."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from made_up import EPOCHS, comparison, falling, made_up
from matplotlib.figure import Figure

import hardjax as hj
from hardjax.plots import arms, fisher, published, samples
from hardjax.plots.published import lowest_ratios
from hardjax.study.arms import make_methods
from hardjax.study.compare import summarise

NAN = float("nan")
RAGGED = {
    "three lengths": [[falling(), falling()[:3]], [falling()[:5], falling()], [falling()[:1]] * 2],
    "NaN from the third on": [[falling(), falling()], [[2.0, 1.9, *[NAN] * (EPOCHS - 2)], falling(0.4)]],
    "an arm of NaN": [[falling(), falling()], [[NAN] * EPOCHS] * 2],
    "nothing finite": [[[NAN]], [[NAN]]],
    "never tested": [[falling()], [[]]],
    "one seed": [[falling()], [falling(0.4)]],
    "losses of 0": [[falling(0.5) * (np.arange(EPOCHS) < 4)] * 2, [falling()] * 2],
    "infinite": [[falling(), falling()], [[2.0, np.inf, 1.0, np.inf], falling()]],
}


def _drawn(figure, path):
    figure.savefig(path, dpi=40)
    assert path.stat().st_size > 5_000
    return figure


@pytest.mark.parametrize("curves", RAGGED.values(), ids=RAGGED.keys())
def test_ragged_arms_of_replay_are_drawn(tmp_path, curves):
    controls = ("random",) if len(curves) > 2 else ()
    _drawn(arms.comparison(comparison(curves, controls=controls)), tmp_path / "comparison.png")


@pytest.mark.parametrize("name", ["three lengths", "NaN from the third on", "never tested"])
def test_ragged_arms_of_trimming_are_drawn(tmp_path, name):
    methods = make_methods(("trimmed", "random-trimmed"), hj.trimming.Trimming())
    results = tuple(
        tuple(made_up(one, seed, keep_fraction=1.0 - 0.5 * (i > 0), dropped_loss=0.1) for seed, one in enumerate(row))
        for i, row in enumerate(RAGGED[name])
    )
    result = summarise(hj.TrainConfig(epochs=EPOCHS), methods[: len(results)], results)
    _drawn(arms.trimming(result), tmp_path / "comparison.png")


def test_a_curve_goes_on_with_the_runs_that_are_left_and_a_cross_marks_the_one_that_went():
    figure = arms.comparison(comparison([[falling(), falling()[:3]], [falling()] * 2], controls=()))
    lines = figure.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), falling())  # means of equal runs, also of the one left
    (cross,) = [line for line in lines if line.get_marker() == "x"]
    assert cross.get_xdata()[0] == 3 and cross.get_ydata()[0] == pytest.approx(falling()[2])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_spectra_of_any_number_are_drawn(tmp_path, count):
    values = np.abs(np.random.default_rng(0).normal(size=(count, 6)))
    record = {
        name: np.arange(1.0, count + 1) for name in ("step", "epoch", "c", "C_K", "L_K", "learning_rate", "stands_for")
    } | {"eigenvalues": values}
    diverged = record | {"eigenvalues": values * NAN, "c": values[:, 0] * NAN, "C_K": values[:, 0] * NAN}
    _drawn(fisher.measures({"finite": record, "diverged": diverged}), tmp_path / "measures.png")


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_samples_of_any_channels_are_drawn(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, channels)).astype(np.uint8)
    data = hj.data.Dataset.from_arrays(images, np.arange(10) % 3, images, np.arange(10) % 3)
    figure = samples.hardest(data, np.arange(9), np.arange(9), np.full(9, NAN), np.arange(9) % 2)
    _drawn(figure, tmp_path / "hardest.png")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-backend", "TkAgg", ""])
def test_the_backend_of_a_notebook_does_not_matter(tmp_path, backend):
    code = (
        "import os\nfrom hardjax.plots.canvas import figure\n"
        f"figure(2, 2).savefig({str(tmp_path / 'a.png')!r})\nassert os.environ['MPLBACKEND'] == {backend!r}"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MPLBACKEND": backend}, check=True)
    assert (tmp_path / "a.png").exists()


def test_the_place_where_errors_turn_is_that_of_the_five_lowest():
    points = {8: [(0.1, 5.0), (0.01, 1.0), (0.001, 3.0)], 32: [(0.02, 0.9), (0.005, 1.2), (0.0025, 2.0), (0.0006, 4.0)]}
    assert lowest_ratios(points) == (0.001, 0.02)  # 0.9, 1.0, 1.2, 2.0 and 3.0
    assert lowest_ratios({8: points[8]}) is None


def test_an_error_of_zero_is_an_error():
    arms = {"s32-lr0.1": [0.0, 0.0, 0.02], "s32-lr0.2": [None, math.nan, 4.0], "s32-lr0.4": [None]}
    assert published._by_size(arms) == {32: [(0.1 / 32, pytest.approx(0.02 / 3)), (0.2 / 32, 4.0)]}


def test_errors_of_training_that_collapsed_are_counted_and_not_shown():
    axes = Figure().subplots()
    axes.plot([1, 2, 3], [0.5, 0.9, 88.65])
    published._cut(axes, [0.0, 0.5, 0.9, 88.65])
    assert axes.get_ylim()[1] == 10 and axes.texts[0].get_text() == "1 above 10 %"


def test_a_legend_of_many_arms_has_a_line_a_batch_size():
    few = ["s8-lr0.1", "s8-lr0.2", "s8-to-16"]
    colors, legend = published._colors(few)
    assert len(set(colors)) == 3 and [line.get_label() for line in legend] == few
    many = [f"grid: s{size}-lr{rate}" for rate in range(13) for size in (128, 32)]
    colors, legend = published._colors(many)
    assert [line.get_label() for line in legend] == ["s32, a curve a rate", "s128, a curve a rate"]
    assert colors[0] == colors[2] == legend[1].get_color() != colors[1]


def test_trainings_of_very_different_length_are_drawn_along_a_logarithmic_axis():
    for longest, scale in ((30, "linear"), (300, "log")):
        axes = Figure().subplots()
        axes.plot([1, 10], [1, 2])
        axes.plot([1, longest], [1, 2])
        published._widen(axes)
        assert axes.get_xscale() == scale


def test_the_mean_of_published_curves_says_where_a_run_went():
    axes = Figure().subplots()
    rows = [
        {"config": {"epochs": 3}, "history": {"epoch": [1, 2, 3], "full_train_loss": losses}}
        for losses in ([2.0, 1.0, 0.5], [2.0, 8.0, None])
    ]
    published._curve(axes, rows, "full_train_loss", "epochs", "an arm", "k")
    mean, cross = axes.lines
    assert mean.get_ydata().tolist() == [2.0, 4.5, 0.5]
    assert cross.get_marker() == "x" and (cross.get_xdata()[0], cross.get_ydata()[0]) == (2, 8.0)
