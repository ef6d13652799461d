"""The picture of the C_K-L_K plane, from beacons alone."""

import dataclasses
import json

import numpy as np
import pytest

import hardjax as hj
from hardjax.plots.plane import SHARES, plane
from hardjax.study import beacon_file, beacons
from hardjax.study.beacons import Trail
from hardjax.training.lines import encode


def trail(batches, rate, condition, energy, error, *, diverged=False, epochs=20, shares=None):
    epoch = np.arange(1.0, epochs + 1) if shares is None else np.array(shares) * epochs
    fields = {name: np.full(len(epoch), condition) for name in beacons.FIELDS}
    fields |= {name: energy * epoch / epochs for name in fields if name.startswith("L")}
    nothing = np.full(len(epoch), np.nan)
    return Trail(
        run="run",
        batches=batches,
        learning_rate=rate,
        seed=0,
        diverged=diverged,
        test_error=error,
        train_error=error / 10,
        epoch=epoch,
        measures=dict.fromkeys(beacons.TOLERANCES, fields),
        errors={"test": nothing, "train": nothing, "validation": nothing},
    )


GRID = [
    trail(size, rate, 3.0 + size, 50 * rate / size, 1 + abs(np.log2(size / 16)) + 3 * abs(rate - 0.1))
    for size in (8, 16, 32, 64, 128)
    for rate in (0.05, 0.1, 0.2)
]


def found(trails, tolerance=0.0, reading="measurement"):
    return beacons.configurations(trails, tolerance, reading)


def texts(axes):
    return [text.get_text() for text in axes.texts], [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(figure, path):
    figure.savefig(path, dpi=40)
    assert path.stat().st_size > 5_000
    return figure.axes[0]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("error", ["test", "train"])
def test_a_file_is_all_that_is_drawn_from(tmp_path, linear, error):
    content = json.loads(encode(beacon_file.to_dict(GRID, hj.TrainConfig().to_dict())))
    again, _ = beacon_file.from_dict(content)
    axes = drawn(plane(found(again), title="title", error=error, linear=linear), tmp_path / "plane.png")
    assert axes.get_xscale() == axes.get_yscale() == ("linear" if linear else "log")
    marks, legend = texts(axes)
    assert sorted(marks, key=int) == [str(size) for size in (8, 16, 32, 64, 128) for _ in range(3)]
    assert {"rate 0.05", "rate 0.1", "rate 0.2"} <= set(legend) and axes.get_title() == "title"
    lowest = beacons.best(np.array([one.test_error for one in GRID]))
    best, worst = (GRID[i].test_error for i in (lowest[0], lowest[-1]))
    assert f"five lowest test errors: {best:.3g} to {worst:.3g} %" in legend
    (rings,) = [line for line in axes.lines if line.get_markersize() == 14 and len(line.get_xdata())]
    five = sorted((GRID[i].batches + 3, 50 * GRID[i].learning_rate / GRID[i].batches) for i in lowest)
    np.testing.assert_allclose(sorted(zip(rings.get_xdata(), rings.get_ydata(), strict=True)), five)
    assert any(text.startswith("level set of the minimum") for text in legend)
    assert plane(found(again), title="", error=error).axes[1].get_xlabel().startswith(f"{error} error (%)")


def test_the_map_is_the_surface_between_the_beacons():
    """Each cell, the corners included, is the mean of five errors; none lies beyond the beacons."""
    axes = plane(found(GRID), title="").axes[0]
    (mesh,) = [one for one in axes.collections if hasattr(one, "get_coordinates")]
    values = np.asarray(mesh.get_array()).reshape(200, 200)
    places = beacons.positions(found(GRID))
    errors = np.array([one.error["test"] for one in found(GRID)])
    (left, bottom), (right, top) = places.min(0), places.max(0)
    corners = np.array([[left, bottom], [right, bottom], [left, top], [right, top]])
    expected = beacons.surface(places, errors, corners)
    assert len(set(expected)) == 4
    np.testing.assert_allclose(values[[0, 0, -1, -1], [0, -1, 0, -1]], expected)


def test_travelling_histories_go_past_the_dotted_curves_of_their_rate(tmp_path):
    runs = [trail(name, 0.1, 30.0, 4.0, 1.5, shares=SHARES) for name in ("16-64", "16-64-MS", "8-128")]
    travels = [(str(one.batches), one) for one in found(runs)]
    axes = drawn(plane(found(GRID), travels, title=""), tmp_path / "plane.png")
    marks, legend = texts(axes)
    assert len(marks) == 15 + 5  # the beacons of rate 0.1 also where they start
    assert {"16-64: 1.5 %", "16-64-MS: 1.5 %", "8-128: 1.5 %"} <= set(legend)
    curves = {line.get_label().split(":")[0]: line for line in axes.lines}
    np.testing.assert_allclose(curves["16-64"].get_ydata(), 4 * np.array(SHARES))
    assert curves["16-64"].get_color() == curves["16-64-MS"].get_color() != curves["8-128"].get_color()
    assert curves["16-64"].get_linestyle() != curves["16-64-MS"].get_linestyle()
    dotted = [line for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert len(dotted) == 5 and all(len(line.get_xdata()) == len(SHARES) for line in dotted)


def test_shares_that_end_no_epoch_are_left_out():
    """Of five epochs 5 % is none; the legend says what is drawn."""
    beacons_of_five = [trail(size, 0.1, 3.0 + size, 5.0, 1.0, epochs=5) for size in (4, 8, 16, 32, 64)]
    travels = [("16-64", one) for one in found([trail("16-64", 0.1, 30.0, 4.0, 1.5, epochs=5, shares=SHARES)])]
    axes = plane(found(beacons_of_five), travels, title="").axes[0]
    dotted = [line for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert len(dotted) == 5
    for line in dotted:
        np.testing.assert_allclose(line.get_ydata(), [1, 2, 3, 4, 5])
    assert "beacons on their way (20, 40, 60, 80, 100 % of training)" in texts(axes)[1]
    elsewhere = [("16-64", dataclasses.replace(travels[0][1], learning_rate=0.7))]  # a rate that no beacon has
    assert not any("on their way" in text for text in texts(plane(found(GRID), elsewhere, title="").axes[0])[1])


def test_a_diverged_beacon_is_crossed_out_and_one_without_a_place_left_out(tmp_path):
    more = [trail(4, 0.1, 9.0, 90.0, 9.0, diverged=True), trail(2, 0.1, np.nan, 1.0, 90.2, diverged=True)]
    axes = drawn(plane(found(GRID + more), title=""), tmp_path / "plane.png")
    marks, legend = texts(axes)
    assert "4" in marks and "2" not in marks and "a seed of it diverged" in legend
    assert sum(line.get_marker() == "x" and len(line.get_xdata()) for line in axes.lines) == 1


def test_training_that_collapsed_is_left_out_and_named():
    """Its place lies decades beyond those of the others."""
    collapsed = trail(256, 0.8, 4e6, 1e4, 88.65, shares=SHARES)
    of_its_rate = [("16-64", found([trail("16-64", 0.8, 20.0, 30.0, 2.0, shares=SHARES)])[0])]
    with_it, without = (plane(found(more), of_its_rate, title="").axes[0] for more in ([*GRID, collapsed], GRID))
    assert with_it.get_xlim() == without.get_xlim() and "256" not in texts(with_it)[0]
    assert "left out, as training collapsed: 256 at rate 0.8" in texts(with_it)[1]
    # Where so few learned that they have no plane of their own, all of them have one.
    few = [*GRID[:4], collapsed]
    assert "256" in texts(plane(found(few), title="").axes[0])[0]


@pytest.mark.parametrize("errors", [[1.0] * 6, [0.0] * 6, [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_planes_without_extent_or_differences_are_drawn(tmp_path, errors, step):
    """All errors alike, errors of 0, all places on a line or one place."""
    line = [trail(8 + i, 0.1, 10.0 * 2 ** (i * step), 3.0 * 2 ** (i * step), error) for i, error in enumerate(errors)]
    drawn(plane(found(line), title=""), tmp_path / "plane.png")


def test_too_few_beacons_have_no_plane():
    with pytest.raises(ValueError, match="at least 5 configurations"):
        plane(found(GRID[:4]), title="")
