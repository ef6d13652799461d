"""Pictures of a sweep in the form of P4, drawn from the rows of its sweep.jsonl alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from hardjax.plots.canvas import figure, headline, say
from hardjax.study.grids import TEST, VALIDATION, Curve, Grid, Point, rate_text, reliable_rates
from hardjax.study.norm_grids import NormCurve, NormGrid
from hardjax.study.outcomes import shown_top1

_TEST_LABEL = "test accuracy (%), median of the last 5 epochs"
_FLAT = 0.2  # share of the height below which curves are shown once more, closer
_RATES = {True: "peak learning rate", False: "base learning rate (rate / batch size)"}
_BY = {TEST: "best rate chosen on the test split, as published", VALIDATION: "best rate chosen on the validation share"}
_COLUMNS = 3


def performance(grids: Sequence[Grid]) -> Figure:
    """Test accuracy over learning rates, one curve for each batch size (P4, figures 1 to 3, 5 to 12, 17, 18).

    Here and in the others rates are shown as they were given: base rates, as published, or peak rates.
    """

    def draw(axes: Any, grid: Grid) -> None:
        for curve, color in zip(grid.curves, _colors(grid.curves), strict=True):
            points = [point for point in curve.points if point.rows]
            places = _places(grid, curve, points)
            _band(axes, places, points, f"m = {curve.batches}", color)
            _crosses(axes, places, points, color)
        _chance(axes, grid)
        axes.set(xlabel=_rate_label(grid), ylabel=_TEST_LABEL)
        axes.legend(fontsize=8, loc="upper right")
        _closer(axes, grid)

    return _panels(grids, draw, f"{_over_seeds(grids)}; crosses: runs diverged, which count with what they predict")


def _closer(axes: Any, grid: Grid) -> None:
    """What converged reliably once more, where it fills so little of the height that nothing is to be seen of it."""
    rates = [set(reliable_rates(grid, curve)) for curve in grid.curves]
    found = [[p for p in curve.points if p.rate in kept] for curve, kept in zip(grid.curves, rates, strict=True)]
    means = [point.mean for points in found for point in points]
    bottom, top = axes.get_ylim()
    if not means or max(means) - min(means) > _FLAT * (top - bottom):
        return
    inset = axes.inset_axes((0.07, 0.14, 0.42, 0.62))
    for curve, points, color in zip(grid.curves, found, _colors(grid.curves), strict=True):
        if points:
            _band(inset, _places(grid, curve, points), points, f"m = {curve.batches}", color)
    inset.set_title("converged reliably", fontsize=9)
    inset.tick_params(labelsize=8)


def best(grids: Sequence[Grid]) -> Figure:
    """Best test accuracy by batch size (P4, figure 15), one curve for each grid."""
    drawn = figure(8, 5)
    axes: Any = drawn.subplots()
    for index, grid in enumerate(grids):
        found = [(curve, curve.best(grid.chosen_by)) for curve in grid.curves]
        found = [(curve, point) for curve, point in found if point is not None]
        if found:
            places = [math.log2(curve.size) for curve, _ in found]
            _band(axes, places, [point for _, point in found], grid.label, f"C{index}")
            for place, (curve, point) in zip(places, found, strict=True):
                text = rate_text(grid.shown_rate(curve, point.rate))
                # Beside the curve, not on it: grids that do as well lie on one another.
                above = (0, 7 + 9 * (index // 2)) if index % 2 == 0 else (0, -14 - 9 * (index // 2))
                style = {"fontsize": 7.5, "ha": "center", "color": f"C{index}"}
                axes.annotate(text, (place, point.mean), above, textcoords="offset points", **style)
    _sizes(axes.xaxis, grids)
    axes.set(xlabel="batch size", ylabel=_TEST_LABEL)
    _finish(axes, f"{_chosen(grids)} (beside each point)\n{_over_seeds(grids)}")
    return drawn


def reliable(grids: Sequence[Grid]) -> Figure:
    """Base learning rates at which training converges reliably, by batch size (P4, figure 16)."""

    def draw(axes: Any, grid: Grid) -> None:
        for curve, color in zip(grid.curves, _colors(grid.curves), strict=True):
            reached = set(reliable_rates(grid, curve))
            place, tried = math.log2(curve.size), _places(grid, curve, curve.points)
            rates = _places(grid, curve, [point for point in curve.points if point.rate in reached])
            axes.plot([place] * len(tried), tried, "o", color="0.7", markerfacecolor="white", markersize=4)
            if rates:
                axes.vlines(place, min(rates), max(rates), color=color, linewidth=5, alpha=0.35)
            axes.plot([place] * len(rates), rates, "o", color=color, markersize=6)
        _sizes(axes.xaxis, [grid])
        axes.set(xlabel="batch size", ylabel=_rate_label(grid))

    return _panels(
        grids,
        draw,
        "filled: every seed stayed finite, learned, and came half the way from chance to the grid's best"
        " on the test split; open: tried",
    )


def curves(grids: Sequence[Grid]) -> Figure:
    """Test accuracy over epochs for each batch size at one learning rate (P4, figure 4): the one with the highest
    mean over batch sizes of those that all of them were tried at."""

    def draw(axes: Any, grid: Grid) -> None:
        rate = _common_rate(grid)
        if rate is None:
            say(axes, "no rate was tried at every batch size")
            return
        for curve, color in zip(grid.curves, _colors(grid.curves), strict=True):
            for point in curve.points:
                # Rates that are no powers of two were rounded, to be found equal at several sizes.
                if math.isclose(grid.shown_rate(curve, point.rate), rate, rel_tol=1e-5):
                    _progress(axes, point, f"m = {curve.batches}", color)
        _chance(axes, grid)
        axes.set(xlabel="epoch", ylabel="test accuracy (%)")
        axes.set_title(f"{axes.get_title()}\n{_rate_name(grid)} {rate_text(rate)}", fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)

    title = f"{_over_seeds(grids)}; {_chosen(grids)}: that of the highest mean over batch sizes"
    return _panels(grids, draw, f"{title}\nruns that diverged count with what they predict")


def norm_batches(grids: Sequence[NormGrid]) -> Figure:
    """Test accuracy by the size of batch-norm sub-batches, one curve for each batch size (P4, figures 13 and 14)."""

    def draw(axes: Any, grid: NormGrid) -> None:
        for curve, color in zip(grid.curves, _colors(grid.curves), strict=True):
            places = [math.log2(part) for part in curve.parts]
            _band(axes, places, curve.points, f"m = {curve.batches}", color)
            _crosses(axes, places, curve.points, color)
        _chance(axes, grid)
        parts = sorted({part for curve in grid.curves for part in curve.parts})
        axes.xaxis.set_ticks([math.log2(part) for part in parts], [str(part) for part in parts])
        axes.set(xlabel="samples that share batch statistics", ylabel=_TEST_LABEL)
        axes.legend(fontsize=8)

    rates = f"where several rates were tried: {_chosen(grids)}"
    return _panels(
        grids, draw, f"{_over_seeds(grids)}; crosses: runs diverged, which count with what they predict\n{rates}"
    )


def _panels(grids: Sequence[Any], draw: Callable[[Any, Any], None], title: str) -> Figure:
    columns = min(len(grids), _COLUMNS) or 1
    rows = -(-len(grids) // columns) or 1
    drawn = figure(max(6.5 * columns, 8), 4.8 * rows)
    panels: Any = drawn.subplots(rows, columns, squeeze=False)
    for axes, grid in zip(panels.flat, grids, strict=False):
        axes.set_title(grid.label, fontsize=10)
        if any(point.rows for curve in grid.curves for point in curve.points):
            draw(axes, grid)
        else:
            say(axes, "no run ended")
    for axes in panels.flat[len(grids) :]:
        axes.set_axis_off()
    headline(drawn, title, fontsize=9)
    return drawn


def _band(axes: Any, places: Sequence[float], points: Sequence[Point], label: str, color: Any) -> None:
    """Means over seeds, and a band from the lowest to the highest seed."""
    values = [point.values() for point in points]
    axes.plot(places, [row.mean() for row in values], "o-", color=color, label=label, markersize=4, linewidth=1.4)
    low, high = [row.min() for row in values], [row.max() for row in values]
    axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


def _crosses(axes: Any, places: Sequence[float], points: Sequence[Point], color: Any) -> None:
    """Where runs diverged."""
    for place, point in zip(places, points, strict=True):
        if point.diverged:
            axes.plot(place, point.mean, "x", color=color, markersize=8, markeredgewidth=1.6)


def _progress(axes: Any, point: Point, label: str, color: Any) -> None:
    """Test accuracy over epochs: the mean over the seeds that were tested at an epoch, and their band."""
    found: dict[float, list[float]] = {}
    for row in point.rows:
        for epoch, value in zip(row["history"]["epoch"], shown_top1(row), strict=True):
            if not np.isnan(value):
                found.setdefault(epoch, []).append(value)
    epochs = sorted(found)
    if not epochs:
        return
    axes.plot(epochs, [np.mean(found[epoch]) for epoch in epochs], color=color, label=label, linewidth=1.4)
    low, high = ([end(found[epoch]) for epoch in epochs] for end in (min, max))
    axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)


def _common_rate(grid: Grid) -> float | None:
    ended = [(curve, [point for point in curve.points if point.rows]) for curve in grid.curves]
    tried = [dict(zip(np.round(_places(grid, *one), 6).tolist(), one[1], strict=True)) for one in ended]
    shared = set.intersection(*map(set, tried)) if tried else set()
    by = grid.chosen_by
    means = {place: np.mean([points[place].values(by).mean() for points in tried]) for place in sorted(shared)}
    means = {place: mean for place, mean in means.items() if np.isfinite(mean)}
    return 2.0 ** max(means, key=lambda place: means[place]) if means else None


def _places(grid: Grid, curve: Curve, points: Sequence[Point]) -> list[float]:
    """log2 of rates, as the cells were given them."""
    return [math.log2(grid.shown_rate(curve, point.rate)) for point in points]


def _rate_name(grid: Grid) -> str:
    return "peak rate" if grid.by_peak_rates else "base rate"


def _rate_label(grid: Grid) -> str:
    return f"log2 of the {_RATES[grid.by_peak_rates]}"


def _colors(found: Sequence[Curve | NormCurve]) -> list[Any]:
    """One a batch size, in the order of sizes."""
    return [colormaps["viridis"](0.92 * place / max(len(found) - 1, 1)) for place in range(len(found))]


def _chance(axes: Any, grid: Grid | NormGrid) -> None:
    if math.isfinite(grid.chance):
        axes.axhline(grid.chance, color="0.6", linewidth=0.8, linestyle=":")


def _sizes(axis: Any, grids: Sequence[Grid]) -> None:
    named = {curve.size: str(curve.size) for grid in grids for curve in grid.curves}
    axis.set_ticks([math.log2(size) for size in sorted(named)], [named[size] for size in sorted(named)])


def _over_seeds(grids: Sequence[Any]) -> str:
    counts = sorted({len(p.rows) for grid in grids for curve in grid.curves for p in curve.points if p.rows})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0]) if counts else "no"
    return f"mean of {seeds} seed{'' if seeds == '1' else 's'}, bands from the lowest to the highest of them"


def _chosen(grids: Sequence[Any]) -> str:
    return "; ".join(dict.fromkeys(_BY[grid.chosen_by] for grid in grids))


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, wrap=True)
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        say(axes, "no run ended")
