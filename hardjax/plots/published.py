"""Pictures of published experiments in the layout of their figures, from rows alone."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hardjax._validate import Refusal
from hardjax.plots import progress
from hardjax.plots import sweep as grids_of_rates
from hardjax.plots.canvas import figure, headline, say
from hardjax.plots.plane import SHARES, plane
from hardjax.study import beacon_file, beacons, statistics, verdict
from hardjax.study.experiments_metrics import METRICS, Row, value
from hardjax.study.experiments_rows import Found
from hardjax.study.grids import grids

_COLUMNS = 3  # of a picture of several planes
_TALL = 60  # arms of a picture
_NAMED = 24  # arms that a legend holds
_LEAST_ERROR = 0.01  # percent, above 0, that P3 prints
_CUT, _HIGH = 20.0, 10.0  # times the lowest error, and percent: what is above both is counted, and not shown
_WIDE = 20.0  # from the shortest to the longest training: along a logarithmic axis


def draw(found: Found) -> Figure:
    """An experiment as its layout says.

    Raises:
        ValueError: too few rows for it.
    """
    return LAYOUTS[found.experiment.layout](found)


def _rates(name: str) -> Callable[[Found], Figure]:
    """P4's figures, see `plots.sweep`."""
    return lambda found: getattr(grids_of_rates, name)(grids(found.rows))


def _arms(found: Found) -> Figure:
    """Ours with 95 % intervals beside what is printed with its spread, a line an arm and a panel a metric."""
    experiment = found.experiment
    printed = {(one.arm, one.metric): one for one in found.printed if one.value is not None}
    run = [arm for arm, rows in found.arms.items() if rows]
    shown = run[:_TALL]
    columns = min(len(experiment.metrics), _COLUMNS)
    rows = -(-len(experiment.metrics) // columns)
    drawn = figure(2.5 + 3.4 * columns, 1.2 + rows * (0.8 + 0.24 * len(shown)))
    panels: Any = drawn.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, metric in itertools.zip_longest(panels.flat, experiment.metrics):
        if metric is None:
            axes.set_axis_off()
            continue
        for place, arm in enumerate(shown):
            _arm(axes, -place, metric, found.arms[arm].values())
            if one := printed.get((arm, metric)):
                spread = one.spread or 0.0
                axes.errorbar(one.value, -place - 0.25, xerr=spread, fmt="D", color="C3", markersize=4, linewidth=1)
        axes.set_xlabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if METRICS[metric].higher is not None and axes.get_xlim()[0] < 0:
            # An interval of a few runs may go below what there is.
            axes.set_xlim(left=min(0.0, *(line.get_xdata().min() for line in axes.lines if len(line.get_xdata()))))
    panels[0][0].set_yticks([-place for place in range(len(shown))], shown)
    for row in panels:
        row[0].tick_params(axis="y", labelsize=7.5)
    handles = [Line2D([], [], color="C0", marker="o", label="ours: mean or median of the runs (dots), 95 % interval")]
    if any((arm, metric) in printed for arm in shown for metric in experiment.metrics):
        handles.append(Line2D([], [], color="C3", marker="D", markersize=4, label="published, with its spread"))
    drawn.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles))
    headline(drawn, _title(found) + f", the first {_TALL} of {len(run)} arms" * (len(run) > _TALL), fontsize=10)
    return drawn


def _arm(axes: Any, at: float, metric: str, rows: Iterable[Row]) -> None:
    """Runs of an arm on a line, and their mean; where a target may be missed their median, which counts misses."""
    values = np.array([value(metric, row) for row in rows])
    values = values[~np.isnan(values)]
    finite, own = values[np.isfinite(values)], statistics.interval(values)
    middle, low, high = own.mean, own.low, own.high
    if METRICS[metric].may_miss:
        middle, (low, high) = verdict.median(values), verdict.median_interval(values)
    axes.plot(finite, [at] * len(finite), ".", color="0.6", markersize=4)
    axes.plot(middle, at, "o", color="C0", markersize=6)
    if math.isfinite(low) and math.isfinite(high):
        axes.hlines(at, low, high, color="C0", linewidth=1.6)
    if missed := len(values) - len(finite):
        axes.annotate(f"{missed} missed", (1, at), xycoords=("axes fraction", "data"), fontsize=6.5, ha="right")


def _grid(found: Found) -> Figure:
    """Test and training error over rate / batch size, a colour a batch size; what is printed is hollow (P3)."""
    drawn = figure(12, 5)
    panels: Any = drawn.subplots(1, 2)
    errors = {
        metric: (
            _by_size({arm: [value(metric, row) for row in rows.values()] for arm, rows in found.arms.items()}),
            _by_size({p.arm: [p.value] for p in found.printed if p.metric == metric}),
        )
        for metric in ("test error", "train error")
    }
    sizes = sorted({size for both in errors.values() for one in both for size in one})
    colors = {size: colormaps["viridis"](0.92 * place / max(len(sizes) - 1, 1)) for place, size in enumerate(sizes)}
    for axes, (metric, (ours, printed)) in zip(panels, errors.items(), strict=True):
        for size, color in colors.items():
            for points, style in ((printed.get(size, []), "o:"), (ours.get(size, []), "o-")):
                at, middle = ([point[i] for point in points] for i in (0, 1))
                fill = color if style == "o-" else "white"
                label = f"m = {size}" if style == "o-" and points else None
                axes.plot(
                    at, middle, style, color=color, markerfacecolor=fill, markersize=4.5, linewidth=1, label=label
                )
        if span := lowest_ratios(ours):
            label = f"five lowest of ours: {span[0]:.2g} to {span[1]:.2g}"
            axes.axvspan(*span, color="0.5", alpha=0.15, linewidth=0, label=label)
        # Training errors of 0 are printed, and met: below the least that is printed the axis is linear.
        axes.set_yscale("symlog", linthresh=_LEAST_ERROR)
        axes.set(xscale="log", xlabel="rate / batch size", ylabel=f"{metric} (%)")
        _cut(axes, [middle for one in (ours, printed) for points in one.values() for _, middle in points])
        axes.legend(fontsize=7.5)
    headline(drawn, f"{_title(found)}\nfilled: ours, mean over seeds; hollow: published", fontsize=10)
    return drawn


def _cut(axes: Any, errors: Sequence[float]) -> None:
    """End the axis of errors below those of training that collapsed: the others would lie on one another."""
    lowest = min((error for error in errors if error > 0), default=math.nan)
    limit = max(_CUT * lowest, _HIGH)
    if above := sum(error > limit for error in errors):
        axes.set_ylim(top=limit)
        axes.text(
            0.99, 0.98, f"{above} above {limit:.2g} %", transform=axes.transAxes, fontsize=8, ha="right", va="top"
        )


def lowest_ratios(points: Mapping[int, Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """Where errors turn over rate / batch size: the range of that ratio in the five lowest of them, which P3 finds
    to be similar (section 4.1); None for five or fewer.

    Args:
        points: batch size -> (rate / size, error).
    """
    every = sorted((error, ratio) for of_size in points.values() for ratio, error in of_size)
    if len(every) <= beacons.NEAREST:
        return None
    ratios = [ratio for _, ratio in every[: beacons.NEAREST]]
    return min(ratios), max(ratios)


def _by_size(arms: Mapping[str, Sequence[float | None]]) -> dict[int, list[tuple[float, float]]]:
    """Batch size -> (rate / size, mean), of arms named s32-lr0.1."""
    found: dict[int, list[tuple[float, float]]] = {}
    for arm, values in arms.items():
        size, _, rate = arm.partition("-lr")
        known = [one for one in values if one is not None and not math.isnan(one)]
        if rate and size[1:].isdigit() and known:
            found.setdefault(int(size[1:]), []).append((float(rate) / int(size[1:]), float(np.mean(known))))
    return {size: sorted(points) for size, points in found.items()}


def _plane_pictures(
    found: Found, linear: Sequence[bool] = (False,), travels: bool = False, errors: Sequence[str] = ("test",)
) -> list[Figure]:
    """The C_K-L_K plane of each network and data set, an error in it; with where plans went.

    Raises:
        ValueError: too few measured rows of every network.
    """
    pictures, names = [], _named_plans(found)
    for title, trails in _trails(found).items():
        fixed = [trail for trail in trails if isinstance(trail.batches, int)]
        plans = [_at_shares(trail) for trail in trails if isinstance(trail.batches, str)]
        known = beacons.configurations(fixed, 0.0, "measurement")
        if sum(one.is_placed("test") for one in known) < beacons.NEAREST:
            continue
        went = [
            (names[str(one.batches), one.learning_rate], one)
            for one in beacons.configurations(plans, 0.0, "measurement")
        ]
        pictures += [
            plane(known, went if travels else (), title=title, linear=axes, error=error)
            for axes in linear
            for error in errors
        ]
    if not pictures:
        least = f"{beacons.NEAREST} measured batch sizes and rates of one network"
        raise Refusal(f"Expected rows of at least {least} to draw {found.experiment.name}.")
    return pictures


def _planes(**how: Any) -> Callable[[Found], Figure]:
    return lambda found: _tiled(_plane_pictures(found, **how))


def _trails(found: Found) -> dict[str, list[beacons.Trail]]:
    """Network and data -> trails of its runs."""
    trails: dict[str, list[beacons.Trail]] = {}
    for row in found.rows:
        if row.get("trail") is not None:
            options = "".join(f" {name}={option}" for name, option in row["config"]["model_options"].items())
            title = f"{row['config']['model']}{options} on {row['config']['dataset']}"
            trails.setdefault(title, []).append(beacon_file.from_plain(row["trail"]))
    return trails


def _named_plans(found: Found) -> dict[tuple[str, float], str]:
    """A plan and rate as a trail has them -> as the paper calls it."""
    names = {}
    for arm, rows in found.arms.items():
        for row in rows.values():
            if row.get("trail") is not None:
                names[str(row["trail"]["batches"]), row["trail"]["learning_rate"]] = arm.rpartition(": ")[2]
    return names


def _at_shares(trail: beacons.Trail) -> beacons.Trail:
    """At P3's shares of training, or the first points behind them."""
    at = np.searchsorted(trail.epoch, np.array(SHARES) * trail.epoch[-1] - 1e-9)
    measures = {key: {name: column[at] for name, column in one.items()} for key, one in trail.measures.items()}
    errors = {name: column[at] for name, column in trail.errors.items()}
    return beacons.Trail(**vars(trail) | {"epoch": trail.epoch[at], "measures": measures, "errors": errors})


def _tiled(pictures: Sequence[Figure]) -> Figure:
    """Several pictures as one."""
    if len(pictures) == 1:
        return pictures[0]
    columns = 2 if len(pictures) <= 4 else _COLUMNS
    rows = -(-len(pictures) // columns)
    drawn = figure(10 * columns, 6.5 * rows)
    panels: Any = drawn.subplots(rows, columns, squeeze=False)
    for axes, one in itertools.zip_longest(panels.flat, pictures):
        axes.set_axis_off()
        if one is not None:
            one.set_dpi(150)
            one.canvas.draw()
            axes.imshow(np.asarray(one.canvas.buffer_rgba()))
    return drawn


def _together(*parts: Callable[[Found], list[Figure]]) -> Callable[[Found], Figure]:
    """Several pictures as the panels of one; those that the rows are too few for are left out."""

    def draw_together(found: Found) -> Figure:
        pictures: list[Figure] = []
        refused: Refusal | None = None
        for part in parts:
            try:
                pictures += part(found)
            except Refusal as refusal:
                refused = refusal
        if refused is not None and not pictures:
            raise refused
        return _tiled(pictures)

    return draw_together


def _curves(columns: Sequence[tuple[str, str, bool]], x: str, most: float | None = None) -> Callable[[Found], Figure]:
    """Columns of a history over training, mean over seeds, a curve an arm.

    Args:
        columns: (column, label, whether its axis is logarithmic).
        x: one of `progress.AXES`.
        most: where the axis of x ends; None: where training does.
    """

    def draw_curves(found: Found) -> Figure:
        drawn = figure(6 * len(columns) + 2, 5)
        panels: Any = drawn.subplots(1, len(columns), squeeze=False)
        arms = {arm: list(rows.values()) for arm, rows in found.arms.items() if rows}
        colors, legend = _colors(list(arms))
        for axes, (column, label, logarithmic) in zip(panels[0], columns, strict=True):
            axes.set(xlabel=progress.AXES[x], ylabel=label, yscale="log" if logarithmic else "linear")
            for (arm, rows), color in zip(arms.items(), colors, strict=True):
                _curve(axes, rows, column, x, arm, color)
            if not axes.lines:
                say(axes, "no run of these was measured")
            elif most is not None:
                axes.set_xlim(0, most)
            else:
                _widen(axes)
        panels[0][-1].legend(handles=legend, fontsize=6.5, loc="upper left", bbox_to_anchor=(1, 1))
        headline(drawn, _title(found), fontsize=10)
        return drawn

    return draw_curves


def _colors(arms: Sequence[str]) -> tuple[list[Any], list[Line2D]]:
    """(a colour each, lines for a legend): one an arm or, of more than a legend holds, one a batch size or plan."""
    names = list(arms)
    if len(arms) > _NAMED:
        names = [arm.partition("-lr")[0] for arm in arms]
        if len({name.rpartition(": ")[0] for name in names}) == 1:  # of one experiment
            names = [name.rpartition(": ")[2] for name in names]
    groups = list(dict.fromkeys(names))
    if sizes := all(name.removeprefix("s").isdigit() for name in groups):
        groups.sort(key=lambda name: int(name.removeprefix("s")))
    palette = colormaps["viridis" if sizes and len(arms) > _NAMED else "turbo"]
    of = {name: palette(0.05 + 0.87 * place / max(len(groups) - 1, 1)) for place, name in enumerate(groups)}
    grouped = [f"{name}, a curve a rate" if names.count(name) > 1 else name for name in groups]
    lines = [Line2D([], [], color=of[name], label=label) for name, label in zip(groups, grouped, strict=True)]
    return [of[name] for name in names], lines


def _widen(axes: Any) -> None:
    """Of trainings of very different length along an axis, the short ones would be a line at its beginning."""
    # Crosses are where a seed ended, not where its arm did.
    ends = [line.get_xdata()[-1] for line in axes.lines if line.get_marker() != "x" and len(line.get_xdata())]
    if ends and min(ends) > 0 and max(ends) > _WIDE * min(ends):
        axes.set_xscale("log")


def _curve(axes: Any, rows: Sequence[Row], column: str, x: str, label: str, color: Any) -> None:
    found = [progress.column(row, column) for row in rows]
    curves = [(progress.along(row, epochs, x), values) for row, (epochs, values) in zip(rows, found, strict=True)]
    curves = [(at, values) for at, values in curves if len(at) and np.isfinite(values).any()]
    if not curves:
        return
    # Seeds of an arm are tested at the same points; one that ended early, or is not finite from some on, has fewer:
    # a cross is where it was last, and the mean is that of the others from there.
    longest = max(curves, key=lambda curve: len(curve[0]))[0]
    table = np.full((len(curves), len(longest)), np.nan)
    for place, (at, values) in enumerate(curves):
        table[place, : len(at)] = values
    known = np.isfinite(table).any(0)
    axes.plot(longest[known], np.nanmean(table[:, known], axis=0), "-", color=color, label=label, linewidth=1.3)
    final = np.flatnonzero(known)[-1]
    for values in table:
        last = np.flatnonzero(np.isfinite(values))[-1]
        if last < final:
            axes.plot(longest[last], values[last], "x", color=color, markersize=6)


def _title(found: Found) -> str:
    experiment = found.experiment
    return f"{experiment.name}: {experiment.title} ({len(found.rows)} runs, {found.scale} scale)"


_MEASURES = (("C_K", "$C_K$", True), ("L_K", "$L_K$", True))
_FIRST = 320 * 50  # iterations of P3's first 320 spectra
_ERRORS = (("full_train_error", "training error (%)", False), ("test_error", "test error (%)", False))
LAYOUTS: Mapping[str, Callable[[Found], Figure]] = {
    "arms": _arms,
    "grid": _grid,
    "curves": _curves(
        (("full_train_loss", "training loss (nats)", True), ("test_top1", "test top-1 (%)", False)), "epochs"
    ),
    "performance": _rates("performance"),
    "best": _rates("best"),
    "reliable": _rates("reliable"),
    "progress": _rates("curves"),
    "plane": _planes(),
    "planes of both errors": _planes(errors=("train", "test")),
    "linear": _planes(linear=(False, True)),
    "travels": _planes(travels=True),
    "epochs": _curves(_MEASURES, "epochs"),
    "epochs of each": _curves((("c", "$c$, mean of the epoch", True), *_MEASURES), "epochs"),
    "iterations": _curves(_MEASURES, "iterations"),
    "cumulative": _curves(_MEASURES, "cumulative"),
    "errors": _curves(_ERRORS, "epochs"),
    "errors by iteration": _curves(_ERRORS, "iterations"),
    "errors by rate": _curves(_ERRORS, "cumulative"),
    # Of several panels.
    "characterised": _together(
        lambda found: [_grid(found)], _plane_pictures, lambda found: [_curves(_MEASURES, "epochs", 10)(found)]
    ),
    "perceptron": _together(
        lambda found: _plane_pictures(found, errors=("train", "test")),
        lambda found: _plane_pictures(found, travels=True),
        lambda found: [_curves(_MEASURES, "epochs")(found)],
    ),
    "first iterations and rates": _together(
        lambda found: [_curves(_MEASURES, "iterations", _FIRST)(found)],
        lambda found: [_curves(_MEASURES, "cumulative")(found)],
    ),
    "iterations and rates": _together(
        lambda found: [_curves(_MEASURES, "iterations")(found)],
        lambda found: [_curves(_MEASURES, "cumulative")(found)],
    ),
}
