"""Base learning rates taken from another sweep: those of its best cells at the same batch size (P4, figures 13, 14)."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hardjax._validate import Refusal, local_folder
from hardjax.study.cells import Cell
from hardjax.study.grids import Curve, Grid, Point, base_rate, batches_of, grids, shared_settings
from hardjax.study.sweep_rows import read_rows


def with_best_rates(cells: Sequence[Cell], folder: str | os.PathLike, output: Path) -> list[Cell]:
    """The cells with the base rate of the best cell of another sweep at the same batch size (or plan).

    Best is the highest mean over seeds, by validation where every run of the source has one and else on the test split,
    as its own figures choose; a rate at which a run diverged is none. Of several grids in the source, the one is read
    that has the cell's network and data, and where several have, its other settings (`norm_batch_size` aside). Where a
    rate came from is no part of a cell's key: the same choice again finds the same rows.

    Args:
        cells: without a rate of their own.
        folder: of the source.
        output: of the sweep that the cells are of.

    Raises:
        ValueError: a cell with a rate, a source that is no sweep or this very one, no finished cell in it at that batch
            size, or several grids that fit.
    """
    folder = local_folder(rates_from=folder)
    if folder.resolve() == output.resolve():
        raise Refusal(f"Expected rates_from={str(folder)!r} of another sweep than the one that is trained.")
    found = grids(read_rows(folder))
    chosen: dict[str, _Best] = {}
    taken = []
    for cell in cells:
        if (cell.config.learning_rate, cell.config.base_learning_rate) != (None, None):
            raise Refusal(
                f"Give rates_from={str(folder)!r} or rates, not both; got a base rate of"
                f" {base_rate(cell.config.to_dict()):g}."
            )
        alike = dataclasses.replace(cell.config, seed=0).to_dict()
        name = json.dumps([alike, cell.data], sort_keys=True)
        if name not in chosen:
            chosen[name] = _best(found, cell, folder)
        taken.append(_with_rate(cell, folder, chosen[name]))
    return taken


class _Best(NamedTuple):
    grid: Grid
    curve: Curve
    point: Point


def _best(found: Sequence[Grid], cell: Cell, folder: Path) -> _Best:
    config = cell.config.to_dict()
    where = f"{cell.config.model} on {cell.config.dataset}, {cell.config.batches}, in {str(folder)!r}"
    batches = batches_of(config)
    fitting = [
        (grid, curve)
        for grid in found
        for curve in grid.curves
        if (curve.size, curve.batches) == batches
        and (grid.config["model"], grid.data) == (cell.config.model, cell.data)
    ]
    # Whether it has a best cell or not: another network's rate would be no answer to that it has none.
    if len(fitting) > 1:
        settings = _compared(config)
        fitting = [one for one in fitting if _compared(one[0].config) == settings] or fitting
    if len(fitting) > 1:
        labels = "; ".join(grid.label for grid, _ in fitting)
        raise Refusal(f"Expected one grid of {where}, to take its best base rate; {len(fitting)} fit: {labels}.")
    best = [_Best(grid, curve, point) for grid, curve in fitting if (point := curve.best(grid.chosen_by))]
    if not best:
        raise Refusal(f"Expected a base rate of {where}, at which every seed is done and none diverged; there is none.")
    return best[0]


def _with_rate(cell: Cell, folder: Path, best: _Best) -> Cell:
    grid, curve, point = best
    said = {
        "sweep": str(folder),
        "grid": grid.label,
        "batches": curve.batches,
        "base_learning_rate": point.rate,
        "chosen_by": grid.chosen_by,
        "value": float(point.values(grid.chosen_by).mean()),
        "seeds": len(point.rows),
        "rates": len(curve.points),
    }
    return dataclasses.replace(
        cell, config=dataclasses.replace(cell.config, base_learning_rate=point.rate), rate_from=said
    )


def _compared(config: Mapping[str, Any]) -> str:
    """What the source may not differ in where it holds several grids."""
    settings = shared_settings(config)
    options = {name: value for name, value in settings["model_options"].items() if name != "norm_batch_size"}
    return json.dumps(settings | {"model_options": options}, sort_keys=True)


def told(choice: Mapping[str, Any]) -> str:
    """A choice in one line, for a screen."""
    by = "validation" if "validation" in choice["chosen_by"] else "test"
    what = f"the best of {choice['rates']} by {by}: {choice['value']:.2f} % over {choice['seeds']} seeds"
    rate = f"base rate {choice['base_learning_rate']:g}"
    return f"batch {choice['batches']}: {rate} of {choice['sweep']} ({choice['grid']}), {what}"
