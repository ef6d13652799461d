"""Picture of the C_K-L_K plane (P3, figures 1, 3, 5 and 8): beacons, the error between them, where other runs went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from scipy.spatial import ConvexHull, QhullError

from hardjax.plots.canvas import figure
from hardjax.study import beacons
from hardjax.study.beacons import Configuration

_CELLS = 200  # along each side of the map
_SHOWN = 3.0  # times the lowest error: what is above has one colour
_FAR, _HIGH = 10.0, 10.0  # times the lowest error, and percent: training that collapsed
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_COLOURS = ("C0", "C2", "C4", "C6", "C9", "C5", "C8", "C1")  # red is the level set's
_MULTI_STEP = "-MS"
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)  # of training, where a travelling history has its points (P3, figure 5)


def plane(
    found: Sequence[Configuration],
    trails: Sequence[tuple[str, Configuration]] = (),
    *,
    title: str,
    error: str = "test",
    linear: bool = False,
) -> Figure:
    """The error over the plane from its beacons, both published optimum regions, and travelling histories.

    Args:
        found: beacons, at least five of which have finite measures and errors; the others are not drawn.
        trails: (name, configuration) of other runs, their points being `SHARES` of training. The beacons that train at
            the rate of one of them show where they came from as dotted curves, at those shares that end an epoch.
        error: "test" or "train", which the map is of; the five best are those of the test error in either.
        linear: axes as in figure 8 (b) instead of logarithmic ones.

    Raises:
        ValueError: too few beacons.
    """
    placed = [one for one in found if one.is_placed(error)]
    placed, collapsed = _without_collapsed(placed, error)
    drawn = figure(11.5 if trails else 10, 7.2)
    axes = drawn.subplots()
    axes.set(
        xscale="linear" if linear else "log",
        yscale="linear" if linear else "log",
        xlabel="$C_K$ (mean condition number)",
        ylabel="$L_K$ (energy)",
        title=title,
    )
    _map(drawn, axes, placed, error, linear)
    _beacons(axes, placed)
    _best(axes, placed, linear)
    # By identity: configurations hold arrays.
    _travels(axes, [one for one in found if not any(one is other for other in collapsed)], trails)
    if collapsed:
        named = ", ".join(f"{one.batches} at rate {one.learning_rate:g}" for one in collapsed)
        axes.plot([], [], " ", label=f"left out, as training collapsed: {named}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def _without_collapsed(placed: Sequence[Configuration], error: str) -> tuple[list[Configuration], list[Configuration]]:
    """(those to draw, those left out): C_K of one that predicts a single class lies decades beyond what was trained,
    and would leave a corner of the plane to the others."""
    lowest = min((one.error[error] for one in placed), default=0.0)
    limit = max(_FAR * lowest, _HIGH)
    near = [one for one in placed if one.error[error] <= limit]
    if len(near) < beacons.NEAREST:
        return list(placed), []
    return near, [one for one in placed if one.error[error] > limit]


def _map(drawn: Figure, axes: Any, placed: Sequence[Configuration], error: str, linear: bool) -> None:
    """The surface within the range of the beacons (beyond it nobody was), and its lowest level."""
    places, errors = beacons.positions(placed), np.array([one.error[error] for one in placed])
    low, high = (places.min(0), places.max(0)) if len(places) else (np.zeros(2), np.ones(2))
    # Cells are as even as the axes they are drawn on; distances are logarithmic on either.
    sides = [
        np.linspace(10**a, 10**b, _CELLS) if linear else np.logspace(a, b, _CELLS)
        for a, b in zip(low, high, strict=True)
    ]
    grid = np.stack(np.meshgrid(*(np.log10(side) for side in sides)), -1)
    values = beacons.surface(places, errors, grid.reshape(-1, 2)).reshape(grid.shape[:2])
    # Colours tell the low errors apart: one seed that diverged would make all the rest one colour.
    low, high = values.min(), min(values.max(), _SHOWN * values.min())
    norm = LogNorm(low, high) if 0 < low < high else None
    mesh = axes.pcolormesh(*sides, values, norm=norm, cmap="viridis_r", alpha=0.55, shading="nearest", rasterized=True)
    drawn.colorbar(
        mesh,
        ax=axes,
        location="bottom",
        shrink=0.6,
        aspect=40,
        extend="max" if norm and high < values.max() else "neither",
        format="{x:.3g}",
        label=f"{error} error (%), mean of the five nearest beacons",
    ).minorformatter = "{x:.3g}"
    axes.use_sticky_edges = False
    region = beacons.lowest(values).astype(float)
    if 0 < region.sum() < region.size:
        axes.contour(*sides, region, levels=[0.5], colors="red", linewidths=1.8)
    axes.plot([], [], "-", color="red", linewidth=1.8, label=f"level set of the minimum: {values.min():.3g} %")


def _beacons(axes: Any, placed: Sequence[Configuration]) -> None:
    """A point a configuration, those of one rate on a line with their batch sizes; crosses where a run diverged."""
    rates = sorted({one.learning_rate for one in placed})
    for i, rate in enumerate(rates):
        line = sorted((one for one in placed if one.learning_rate == rate), key=lambda one: one.batches)
        x, y = 10 ** beacons.positions(line).T
        style = dict(color=colormaps["copper"]((i + 0.5) / len(rates)), marker=_MARKERS[i % len(_MARKERS)])
        axes.plot(x, y, "-", linewidth=1.0, markersize=6, markeredgecolor="black", label=f"rate {rate:g}", **style)
        for one, across, up in zip(line, x, y, strict=True):
            axes.annotate(f"{one.batches}", (across, up), (5, 4), textcoords="offset points", fontsize=8)
            if one.diverged:
                axes.plot(across, up, "x", color="black", markersize=11, markeredgewidth=1.6)
    if any(one.diverged for one in placed):
        axes.plot([], [], "x", color="black", label="a seed of it diverged")
    axes.plot([], [], " ", label="numbers: batch size")


def _best(axes: Any, placed: Sequence[Configuration], linear: bool) -> None:
    """Rings around the five lowest test errors, and what lies between them."""
    known = [one for one in placed if np.isfinite(one.error["test"])]
    five = [known[i] for i in beacons.best(np.array([one.error["test"] for one in known]))]
    if not five:
        return
    places = 10 ** beacons.positions(five)
    label = f"five lowest test errors: {five[0].error['test']:.3g} to {five[-1].error['test']:.3g} %"
    style = dict(color="black", linestyle="--", linewidth=1.2)
    axes.plot(*places.T, "o", markersize=14, markerfacecolor="none", markeredgecolor="black", label=label)
    try:
        # Of the places as they are drawn: what is convex on linear axes is not on logarithmic ones.
        hull = places[ConvexHull(places if linear else np.log10(places)).vertices]
    except QhullError:  # fewer than three of them, or all on a line
        return
    axes.add_patch(Polygon(hull, closed=True, fill=False, **style))


def _travels(axes: Any, found: Sequence[Configuration], trails: Sequence[tuple[str, Configuration]]) -> None:
    """Curves of other runs, and dotted ones of the beacons at their rates."""
    rates, drawn = {one.learning_rate for _, one in trails}, set()
    for one in found:
        if one.learning_rate in rates:
            # Shares that are no end of an epoch are left out: nothing is known of the beacon there.
            near = np.isclose(one.epoch / one.epoch[-1], np.array(SHARES)[:, None], rtol=0, atol=1e-9)
            at = np.flatnonzero(near.any(0))
            drawn |= {share for share, ends in zip(SHARES, near, strict=True) if ends.any()}
            axes.plot(one.condition[at], one.energy[at], ":", color="0.25", linewidth=1.0, marker=".", markersize=3)
            axes.annotate(
                f"{one.batches}",
                (one.condition[at[0]], one.energy[at[0]]),
                (-4, -10),
                textcoords="offset points",
                fontsize=8,
                color="0.25",
            )
    if drawn:
        shares = ", ".join(f"{100 * share:.0f}" for share in sorted(drawn))
        axes.plot([], [], ":", color="0.25", label=f"beacons on their way ({shares} % of training)")
    plans = list(dict.fromkeys(name.replace(_MULTI_STEP, "") for name, _ in trails))
    for name, one in trails:
        # A plan and its repetition in every phase of the rate differ in style alone.
        place = plans.index(name.replace(_MULTI_STEP, ""))
        style = dict(color=_COLOURS[place % len(_COLOURS)], linestyle="--" if _MULTI_STEP in name else "-", marker="h")
        label = f"{name}: {one.error['test']:.3g} %" + (" (diverged)" if one.diverged else "")
        axes.plot(one.condition, one.energy, markersize=4, linewidth=1.6, label=label, **style)
        axes.plot(one.condition[-1:], one.energy[-1:], "h", color=style["color"], markersize=9, markeredgecolor="black")
