"""Pictures of a comparison: curves of all arms with their intervals, what was replayed, what trimming kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hardjax.plots.canvas import figure, floored, headline, say
from hardjax.study.compare import Comparison
from hardjax.study.statistics import interval
from hardjax.training.run import RunResult

_STYLES = {"hard-batches": "-", "random-batches": "--", "all-batches": "-", "fixed-batches": ":"}
_LOSS = "loss of the whole training split (nats)"


def comparison(result: Comparison) -> Figure:
    """Training loss and test accuracy over back-propagations, differences, and which batches were replayed when."""
    replayed = [i for i, arm in enumerate(result.arms) if arm.delta < 1 and result.results[i][0].replays is not None]
    hard = [i for i in replayed if result.arms[i].name == "hard-batches"]
    random = [i for i in replayed if result.arms[i].name == "random-batches"]
    maps = [chosen[-1] for chosen in (hard, random) if chosen]
    drawn = figure(15, 5 if not maps else 9.2)
    rows: Any = drawn.subfigures(2, 1, height_ratios=[1.15, 1]) if maps else [drawn]
    loss, accuracy, sooner = rows[0].subplots(1, 3, width_ratios=[1, 1, 0.75])
    loss.set(yscale="log", xlabel="epochs of back-propagations", ylabel=_LOSS)
    # One colour a share, one style a strategy: an arm and its control differ in style alone.
    shares = sorted({arm.delta for arm in result.arms}, reverse=True)
    for axes, field in ((loss, "full_train_loss"), (accuracy, "test_top1")):
        for arm, runs in zip(result.arms, result.results, strict=True):
            curve(axes, runs, field, arm.label, f"C{shares.index(arm.delta)}", _STYLES.get(arm.name, "-."))
        _frame(axes)
    _levels(loss, result.thresholds)
    accuracy.set(xlabel="epochs of back-propagations", ylabel="test accuracy (%)")
    accuracy.legend(fontsize=8, loc="lower right", ncols=2)
    _differences(sooner, result.rows, "common_threshold_epochs_sooner")
    seeds = len(result.results[0])
    told = "paired by seed, 95 % intervals" if seeds > 1 else "one seed: no intervals"
    sooner.set(xlabel="epochs sooner at the common level", title=told)
    headline(rows[0], _title(result))
    if maps:
        panels = rows[1].subplots(1, len(maps), squeeze=False)[0]
        for panel, i in zip(panels, maps, strict=True):
            _replay_map(panel, result.results[i][0].replays, result.arms[i].label)
    return drawn


def trimming(result: Comparison) -> Figure:
    """Test error and training loss over epochs with 95 % bands, and what trimming kept and dropped."""
    drawn = figure(15, 4.6)
    error, loss, parts = drawn.subplots(1, 3)
    for axes, field, scale in ((error, "test_error", "linear"), (loss, "full_train_loss", "log")):
        axes.set(yscale=scale, xlabel="epoch")
        for i, (arm, runs) in enumerate(zip(result.arms, result.results, strict=True)):
            curve(axes, runs, field, arm.label, f"C{i}", "-")
        _frame(axes)
    error.set(ylabel="test error (%)")
    loss.set(ylabel=_LOSS)
    error.legend(fontsize=9)
    parts.set(xlabel="epoch", ylabel="training loss in the batch, first seed (nats)", yscale="log")
    for i, (arm, runs) in enumerate(zip(result.arms, result.results, strict=True)):
        history = runs[0].history
        if (history["keep_fraction"] == 1).all():
            continue
        for field, style in (("kept_loss", "-"), ("dropped_loss", ":")):
            label = f"{arm.label}: {field.removesuffix('_loss')}"
            parts.plot(history["epoch"], floored(history[field], parts), style, color=f"C{i}", label=label)
    if parts.lines:
        parts.legend(fontsize=9)
    else:
        say(parts, "nothing was trimmed")
    headline(drawn, _title(result))
    return drawn


def curve(axes: Any, runs: Sequence[RunResult], field: str, label: str, color: str, style: str) -> None:
    """Mean over seeds with its 95 % band (both of the logarithm on a logarithmic axis).

    Runs may have ended early or be not finite at their ends: a point is the mean of those that are still there, and a
    cross marks where one left.

    Args:
        field: of the history, or "test_error".
    """
    logarithmic = axes.get_yscale() == "log"
    curves = [_values(run, field) for run in runs]
    curves = [(epochs, floored(values, axes)) for epochs, values in curves]
    # Averaged as it is drawn: the mean of losses on a logarithmic axis would follow the worst seed alone.
    curves = [(epochs, np.log(values) if logarithmic else values) for epochs, values in curves]
    grid = np.unique(np.concatenate([epochs for epochs, _ in curves]))
    rows = np.stack([_resampled(grid, *one) for one in curves])
    back = np.exp if logarithmic else np.asarray
    found = [interval(column) for column in rows.T]
    mean, width = (np.array([getattr(one, name) for one in found]) for name in ("mean", "half_width"))
    axes.plot(grid, back(mean), style, color=color, label=label, linewidth=1.4)
    axes.fill_between(grid, back(mean - width), back(mean + width), color=color, alpha=0.1, linewidth=0)
    for run, (epochs, values) in zip(runs, curves, strict=True):
        # An epoch is a quotient turned into a float: the end of a whole run is met to rounding.
        if len(epochs) and epochs[-1] < run.config.epochs - 1e-6:
            axes.plot(epochs[-1:], back(values[-1:]), "x", color=color, markersize=7)


def _values(run: RunResult, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the test points at which the value is finite."""
    values = 100 - run.history["test_top1"] if field == "test_error" else run.history[field]
    # The accuracy of a network that is not finite is that of one class, and no part of the curve.
    finite = np.isfinite(values) & np.isfinite(run.history["test_loss"])
    return run.history["epoch"][finite], values[finite]


def _resampled(grid: np.ndarray, epochs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at all test points of the arm: between a run's own ones on a line, NaN after it left."""
    if len(epochs) == 0:
        return np.full(len(grid), np.nan)
    return np.interp(grid, epochs, values, left=np.nan, right=np.nan)


def _levels(axes: Any, thresholds: Sequence[float]) -> None:
    """The common level of each seed: a line where they are one, else the range."""
    finite = [level for level in thresholds if np.isfinite(level)]
    if not finite:
        return
    low, high = (float(floored(end(finite), axes)) for end in (min, max))
    axes.axhspan(low, high, facecolor="0.6", edgecolor="0.6", alpha=0.3, linewidth=0.8)
    text = "common level of each seed" if len(finite) > 1 else "common level"
    axes.annotate(text, (0.01, high), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")


def _differences(axes: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """One line for each arm and reference: the mean difference with its interval; filled where it differs."""
    shown = [
        (f"{row['label']}\nagainst {label}", those[name])
        for row in rows
        for label, those in row["differences"].items()
        if those[name]["count"]
    ]
    axes.axvline(0, color="0.5", linewidth=0.8)
    for place, (_, found) in enumerate(shown):
        color = "C0" if found["differs"] else "0.45"
        filled = color if found["differs"] else "white"
        axes.plot(found["mean"], -place, "o", color=color, markerfacecolor=filled)
        axes.hlines(-place, found["low"], found["high"], color=color, linewidth=1.4)
    axes.set_yticks([-place for place in range(len(shown))], [text for text, _ in shown], fontsize=7.5)
    if not shown:
        axes.set_xticks([])
        say(axes, "no pairs of runs")


def _title(result: Comparison) -> str:
    config, seeds = result.config, len(result.results[0])
    text = f"{config.title}, {config.batches}, {config.epochs} epochs; mean of {seeds} seed{'s' * (seeds > 1)}"
    text += ", 95 % confidence bands" if seeds > 1 else ""
    return text + (f"; crosses: {len(result.left_out)} runs left" if result.left_out else "")


def _frame(axes: Any) -> None:
    """Limits from the curves, not from their bands, which few seeds make wide."""
    lines = [line.get_ydata() for line in axes.lines]
    lines = [values[np.isfinite(values)] for values in lines]
    lines = [values for values in lines if len(values)]
    values = np.concatenate(lines) if lines else np.zeros(0)
    if len(values) == 0 or values.min() == values.max():
        return
    if axes.get_yscale() == "log":
        axes.set_ylim(values.min() / 1.6, values.max() * 1.6)
    else:
        # Arms are told apart near the end, and the first test points lie tens of points away: they may be cut off.
        low = min(np.quantile(values, 0.15), *(values[-1] for values in lines))
        room = 0.25 * (values.max() - low)
        axes.set_ylim(low - room, min(100.5, values.max() + room))


def _replay_map(axes: Any, replays: np.ndarray, label: str) -> None:
    """Which mini-batches were trained in which round, those trained most at the bottom."""
    if len(replays) == 0:
        say(axes, f"{label}: no round was trained")
        return
    order = np.argsort(-replays.sum(0), kind="stable")
    shown = replays[:, order].T > 0
    axes.imshow(shown, aspect="auto", interpolation="nearest", cmap=ListedColormap(["white", "C0"]), origin="lower")
    share = shown.mean(1)
    axes.set(
        xlabel="round",
        ylabel="mini-batch (most replayed at the bottom)",
        title=f"{label}, first seed: replayed in {share[-1]:.0%} to {share[0]:.0%} of rounds",
    )
