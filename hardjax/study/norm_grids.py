"""Rows of a sweep over batch-norm sub-batches: test performance by their size, a curve a batch size (P4, figure 13)."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from hardjax.study.grids import Curve, Grid, Point, Row, curves_of, labels_of, shared_settings
from hardjax.training.resume import with_defaults

_OPTION = "norm_batch_size"


@dataclass(frozen=True)
class NormCurve:
    """All sub-batches that one batch size was trained with.

    Attributes:
        size: m, of the weight update.
        batches: the same as text.
        parts: samples that share batch statistics, rising; the whole batch counts as m.
        points: of each, that of its best rate where several were tried; where all diverged, the highest mean.
    """

    size: int
    batches: str
    parts: tuple[int, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class NormGrid:
    """Curves that share everything but batch size, sub-batch, rate and seed.

    Attributes:
        label: network and data, and what tells the grid from the others.
        curves: batch sizes rising.
        chosen_by, chance: as of `Grid`.
    """

    label: str
    curves: tuple[NormCurve, ...]
    chosen_by: str
    chance: float


def norm_grids(rows: Iterable[Row]) -> list[NormGrid]:
    """The grids of the rows that differ in `norm_batch_size`; none where none do. Batch plans, whose sizes change, and
    cells that failed are left out."""
    groups: dict[str, list[Row]] = {}
    for row in [{**row, "config": with_defaults(row["config"])} for row in rows]:
        if row["config"].get("batch_plan") is None:
            name = json.dumps([shared_settings(_without(row)), row["data"], row.get("network")], sort_keys=True)
            groups.setdefault(name, []).append(row)
    several = [group for group in groups.values() if len({_part(row, None) for row in group}) > 1]
    labels = labels_of([{**group[0], "config": _without(group[0])} for group in several])
    return [_grid(label, group) for label, group in zip(labels, several, strict=True)]


def _grid(label: str, rows: list[Row]) -> NormGrid:
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        size = row["config"]["batch_size"]
        cells.setdefault((size, _part(row, size)), []).append(row)
    tried: dict[tuple[int, int], Curve] = {place: curves_of(found)[0] for place, found in sorted(cells.items())}
    whole = Grid(label, tuple(tried.values()))
    curves = []
    for size in dict.fromkeys(size for size, _ in tried):
        points = {part: _shown(curve, whole.chosen_by) for (own, part), curve in tried.items() if own == size}
        there = {part: point for part, point in points.items() if point is not None}
        curves.append(NormCurve(size, str(size), tuple(there), tuple(there.values())))
    return NormGrid(label, tuple(curves), whole.chosen_by, whole.chance)


def _shown(curve: Curve, by: str) -> Point | None:
    trained = [point for point in curve.points if point.rows]
    best = curve.best(by)
    if best is None and trained:  # what diverged is shown with what it predicts
        best = max(trained, key=lambda point: -math.inf if math.isnan(point.mean) else point.mean)
    return best


def _part(row: Row, whole: int | None) -> int | None:
    """Samples that share statistics; `whole` where that is the batch."""
    given = row["config"]["model_options"].get(_OPTION)
    return whole if given is None else given


def _without(row: Row) -> dict:
    """The configuration of a row but for its sub-batches."""
    options = {name: value for name, value in row["config"]["model_options"].items() if name != _OPTION}
    return {**row["config"], "model_options": options}
