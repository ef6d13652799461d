"""Pictures of the Fisher measures of a training: C_K and L_K on P3's time scales, their plane, and the spectra."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hardjax.plots.canvas import figure, say

Record = Mapping[str, np.ndarray]


def measures(runs: Mapping[str, Record]) -> Figure:
    """C_K and L_K over epochs, iterations and summed learning rate; the C_K-L_K plane; every spectrum over training.

    Args:
        runs: name -> record, as `fisher.observe.derive` gives it; the spectra of the first three are shown.
    """
    maps = min(len(runs), 3)
    drawn = figure(15, 10.8)
    halves: Any = drawn.subfigures(2, 1, height_ratios=[2, 1])
    top, bottom = halves
    axes = top.subplots(2, 3)
    scales = {
        "epochs": lambda run: run["epoch"],
        "iterations": lambda run: run["step"],
        "summed learning rate": _summed_rate,
    }
    for row, (field, label) in enumerate((("C_K", "$C_K$ (mean condition number)"), ("L_K", "$L_K$ (energy)"))):
        for column, (name, scale) in enumerate(scales.items()):
            panel = axes[row, column]
            for i, (run_name, run) in enumerate(runs.items()):
                panel.plot(scale(run), run[field], color=f"C{i}", label=run_name, linewidth=1.4)
                if field == "C_K":
                    panel.plot(scale(run), run["c"], ".", color=f"C{i}", markersize=2, alpha=0.4)
            panel.set(xlabel=name, ylabel=label, yscale="log" if field == "C_K" else "linear")
    axes[0, 0].legend(fontsize=8, title="points: single batches", title_fontsize=8)
    panels = bottom.subplots(1, maps + 1, squeeze=False)[0]
    for i, (run_name, run) in enumerate(runs.items()):
        panels[0].plot(run["C_K"], run["L_K"], color=f"C{i}", linewidth=1.2)
        panels[0].plot(run["C_K"][-1:], run["L_K"][-1:], "o", color=f"C{i}", label=run_name)
    panels[0].set(xlabel="$C_K$", ylabel="$L_K$", xscale="log", title="the plane; dots: end of training")
    for panel, (run_name, run) in zip(panels[1:], runs.items(), strict=False):
        _spectrum_map(drawn, panel, run, run_name)
    return drawn


def _summed_rate(run: Record) -> np.ndarray:
    """Learning rates of all steps before each measurement."""
    # Each measurement stands for its whole interval, so that the sum does not depend on how often was measured.
    spent = run["learning_rate"] * run["stands_for"]
    return np.cumsum(spent) - spent


def _spectrum_map(drawn: Figure, axes: Any, run: Record, name: str) -> None:
    """Eigenvalues by rank (largest at the bottom) over iterations, on a logarithmic colour scale of 8 decades."""
    if len(run["step"]) == 0 or not np.isfinite(run["eigenvalues"]).any():
        say(axes, f"{name}: no finite spectrum")
        return
    values = np.maximum(-np.sort(-run["eigenvalues"], axis=1).T, 0)  # NaN, of smaller batches, last
    with np.errstate(divide="ignore"):
        shown = np.log10(values)
    top = np.max(shown[np.isfinite(shown)], initial=-30)
    edges = np.append(run["step"], run["step"][-1] + run["stands_for"][-1])
    ranks = np.arange(len(values) + 1) + 0.5
    # Eight decades: below about 1e-7 of the largest, eigenvalues of a float32 Gram matrix are rounding.
    mesh = axes.pcolormesh(edges, ranks, np.clip(shown, top - 8, top), cmap="viridis", rasterized=True)
    drawn.colorbar(mesh, ax=axes, label="log10 eigenvalue")
    axes.set(xlabel="iterations", ylabel="rank of the eigenvalue", title=f"spectrum: {name}")
