"""Rows of a sweep as P4 reads them: curves of test performance over base learning rates, one for each batch size."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardjax.choose.batch_plan import BatchPlan
from hardjax.config import DEFAULT_LEARNING_RATE
from hardjax.study.outcomes import DIVERGED, FAILED
from hardjax.training.resume import with_defaults

Row = Mapping[str, Any]

TEST, VALIDATION = "median_test_top1", "median_validation_top1"
_VARIED = ("batch_size", "batch_plan", "learning_rate", "base_learning_rate", "seed", "data_dir")
_DEFAULTS_SHOWN = 3  # settings in a label
_DIGITS = 8  # of a fingerprint


@dataclass(frozen=True)
class Point:
    """The runs of one batch size and base rate that differ in nothing but their seed.

    Attributes:
        rate: base learning rate, of the peak rate.
        rows: in the order of their seeds; those that failed are left out.
        failed: how many did.
    """

    rate: float
    rows: tuple[Row, ...]
    failed: int = 0

    def values(self, name: str = TEST) -> np.ndarray:
        """(seeds,) of one metric; NaN where a row has none."""
        found = [row["metrics"].get(name) for row in self.rows]
        return np.array([math.nan if value is None else value for value in found], np.float64)

    @property
    def seeds(self) -> list[int]:
        """Of the rows."""
        return [row["config"]["seed"] for row in self.rows]

    @property
    def mean(self) -> float:
        """Over seeds, of the median test accuracy of the last five epochs; a run that diverged counts with the accuracy
        of what it predicts, as published."""
        return float(self.values().mean()) if self.rows else math.nan

    @property
    def diverged(self) -> int:
        return sum(row["status"] == DIVERGED for row in self.rows)


@dataclass(frozen=True)
class Curve:
    """All points of one batch size.

    Attributes:
        size: m, or the first one of a plan.
        batches: how a reader calls it: "32", or the plan.
        points: rates rising.
    """

    size: int
    batches: str
    points: tuple[Point, ...]

    def best(self, by: str) -> Point | None:
        """The point of the highest mean of a metric over its seeds, the lower rate of equal ones; None without one.

        A rate at which a run diverged or failed is none. Means are over the seeds that all the others have: one of what
        happened to end so far would be none over seeds.
        """
        whole = [point for point in self.points if point.rows and not point.failed and not point.diverged]
        shared = set.intersection(*(set(point.seeds) for point in whole)) if whole else set()
        if not shared:
            return None
        scored = [(float(point.values(by)[np.isin(point.seeds, list(shared))].mean()), point) for point in whole]
        scored = [(score, point) for score, point in scored if math.isfinite(score)]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None


@dataclass(frozen=True)
class Grid:
    """Curves that share everything but batch size, rate and seed.

    Attributes:
        label: network and data, and what tells the grid from the others.
        curves: batch sizes rising.
        config, data: of one of its cells, of failed ones too: as JSON, and the checksum of its data.
    """

    label: str
    curves: tuple[Curve, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""

    @property
    def chosen_by(self) -> str:
        """The metric that best rates are chosen by: of the validation share where every run has one, else, as
        published, of the test split that is reported too."""
        points = [point for curve in self.curves for point in curve.points if point.rows]
        seen = all(np.isfinite(point.values(VALIDATION)).all() for point in points)
        return VALIDATION if points and seen else TEST

    @property
    def by_peak_rates(self) -> bool:
        """Whether every cell was given a peak rate: then one of them at several sizes is several base rates."""
        rows = [row for curve in self.curves for point in curve.points for row in point.rows]
        return bool(rows) and all(row["config"]["base_learning_rate"] is None for row in rows)

    def shown_rate(self, curve: Curve, rate: float) -> float:
        """A base rate of a curve as the cells were given it: itself, or the peak rate at the curve's batch size."""
        return rate * curve.size if self.by_peak_rates else rate

    @property
    def chance(self) -> float:
        """Accuracy in percent without learning; NaN where labels are no classes."""
        found = [row["metrics"].get("chance_top1") for curve in self.curves for p in curve.points for row in p.rows]
        return next((value for value in found if value is not None), math.nan)


def reliable_rates(grid: Grid, curve: Curve, share: float = 0.5) -> list[float]:
    """Base rates at which training converges reliably (P4, figure 16, which prints no criterion; this is ours).

    Every seed converged (`outcomes.has_converged`), and reached at least `share` of the way from chance to the best
    mean accuracy of the whole grid, whatever its batch size: a batch size at which nothing learns has no such rate.

    Args:
        share: in (0, 1].

    Returns:
        Rates rising; a range of them may have holes.
    """
    means = [point.mean for one in grid.curves for point in one.points]
    best = max((mean for mean in means if math.isfinite(mean)), default=math.nan)
    level = grid.chance + share * (best - grid.chance)
    if not math.isfinite(level):
        return []
    return [point.rate for point in curve.points if _all_converged(point) and (point.values() >= level).all()]


def _all_converged(point: Point) -> bool:
    return (
        bool(point.rows)
        and not point.failed
        and not point.diverged
        and all(row["metrics"]["converged"] for row in point.rows)
    )


def grids(rows: Iterable[Row]) -> list[Grid]:
    """The rows of a sweep, sorted into grids; cells that failed have no part in any."""
    groups: dict[str, list[Row]] = {}
    for row in [{**row, "config": with_defaults(row["config"])} for row in rows]:
        name = json.dumps([shared_settings(row["config"]), row["data"], row.get("network")], sort_keys=True)
        groups.setdefault(name, []).append(row)
    labels = labels_of([group[0] for group in groups.values()])
    return [
        Grid(label, curves_of(group), group[0]["config"], group[0]["data"])
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a configuration as JSON all but what varies within a grid."""
    return {name: value for name, value in config.items() if name not in _VARIED}


def base_rate(config: Mapping[str, Any]) -> float:
    """Peak learning rate over the (first) batch size, of a configuration as JSON."""
    if config["base_learning_rate"] is not None:
        return config["base_learning_rate"]
    rate = config["learning_rate"]
    return (DEFAULT_LEARNING_RATE if rate is None else rate) / _size(config)


def rate_text(rate: float) -> str:
    """A rate as a power of two where it is one, as P4 names them, else as a number."""
    exponent = math.log2(rate)
    return f"2^{exponent:.0f}" if math.isclose(exponent, round(exponent), abs_tol=1e-9) else f"{rate:.4g}"


def _size(config: Mapping[str, Any]) -> int:
    plan = config.get("batch_plan")
    return config["batch_size"] if plan is None else BatchPlan(plan["text"]).sizes[0]


def batches_of(config: Mapping[str, Any]) -> tuple[int, str]:
    """`Curve.size` and `Curve.batches` of a configuration as JSON."""
    plan = config.get("batch_plan")
    return _size(config), str(config["batch_size"]) if plan is None else plan["text"]


def curves_of(rows: Sequence[Row]) -> tuple[Curve, ...]:
    """The curves of rows of one grid."""
    found: dict[tuple[int, str], dict[float, list[Row]]] = {}
    for row in rows:
        config = row["config"]
        points = found.setdefault(batches_of(config), {})
        # 0.16 / 8 and 0.02 are one rate.
        rate = next((one for one in points if math.isclose(one, base_rate(config), rel_tol=1e-9)), base_rate(config))
        points.setdefault(rate, []).append(row)
    return tuple(
        Curve(*batches, tuple(_point(rate, points[rate]) for rate in sorted(points)))
        for batches, points in sorted(found.items())
    )


def _point(rate: float, rows: Sequence[Row]) -> Point:
    # A rate may be said in two ways: of one seed it is one run all the same, the first that did not fail.
    seeds: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row["status"] == FAILED):
        seeds.setdefault(row["config"]["seed"], row)
    trained = [seeds[seed] for seed in sorted(seeds) if seeds[seed]["status"] != FAILED]
    return Point(rate, tuple(trained), len(seeds) - len(trained))


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Of grids, by a row of each: network and data, and the settings in which they differ, unlike one another."""
    flat = [
        _flat(shared_settings(row["config"]))
        # Two networks, or data sets, of one's own may have one name.
        | {"program": str(row.get("network"))[:_DIGITS], "data": row["data"][:_DIGITS]}
        for row in rows
    ]
    names = dict.fromkeys(name for one in flat for name in one)
    title = ("model", "dataset")
    differ = [name for name in names if len({json.dumps(one.get(name)) for one in flat}) > 1 and name not in title]
    titles = [f"{one['model']} on {one['dataset']}" for one in flat]
    # Fingerprints say nothing to a reader: only where nothing else tells two grids apart.
    plain = [name for name in differ if name not in ("program", "data")]
    for chosen, most in ((plain, _DEFAULTS_SHOWN), (plain, len(plain)), (differ, len(differ))):
        labels = [_label(head, one, chosen, most) for head, one in zip(titles, flat, strict=True)]
        if len(set(labels)) == len(labels):
            break
    return labels


def _label(head: str, settings: Mapping[str, Any], names: Sequence[str], most: int) -> str:
    shown = [f"{name.rpartition('.')[2]} {settings.get(name, 'default')}" for name in names[:most]]
    return ", ".join([head, *shown, *(["..."] if len(names) > most else [])])


def _flat(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found
