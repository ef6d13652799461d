"""Cells of a grid: configurations, what tells two of them apart, and the order in which they are trained."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardjax._validate import Refusal, one_of, shown
from hardjax.config import TrainConfig
from hardjax.engine.population import DIFFERING
from hardjax.training.resume import with_defaults

ROW_VERSION = 1  # of what a row says; another one means other figures under the same names

# What a compiled program takes as an input, so that cells that differ in nothing else share their programs.
_TRACED = (*DIFFERING, "data_dir")


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid.

    Attributes:
        config: what is trained.
        data: checksum of its data set.
        network: fingerprint of the program of one's own network or loss, of which the name tells nothing; None of ours.
        rate_from: where its rate was taken from, see `best_rates`, for its row; it names no cell.
    """

    config: TrainConfig
    data: str
    network: str | None = None
    rate_from: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for another process."""
        named = {name: getattr(self, name) for name in ("data", "network", "rate_from")}
        return {"config": self.config.to_dict()} | named

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Cell":
        """The cell that `to_dict` wrote.

        Raises:
            ValueError: a strategy of one's own, which has no name that another process would find.
        """
        return cls(**{**plain, "config": TrainConfig.from_dict(plain["config"])})

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits that name the cell, see `key_of`."""
        return key_of(self.config.to_dict(), self.data, self.network)

    @functools.cached_property
    def shape(self) -> str:
        """Equal for cells that share their compiled programs."""
        plain = self.config.to_dict()
        # The stages of a multi-step plan begin where the rate falls.
        traced = _TRACED if self.config.batch_plan is None else tuple(set(_TRACED) - {"schedule"})
        kept = {name: value for name, value in plain.items() if name not in traced}
        return json.dumps(kept | {"data": self.data, "network": self.network}, sort_keys=True)


def key_of(config: Mapping[str, Any], data: str, network: str | None = None) -> str:
    """16 hex digits of a configuration (where its data lies aside), its data and the version of rows.

    `Performance` is no part of it, nor is where or when a cell is trained. A setting that a row of an earlier version
    does not name held its default.

    Args:
        config: as `TrainConfig.to_dict` gives it.
        data: checksum of the data set.
        network: as in `Cell`.
    """
    plain = {name: value for name, value in with_defaults(config).items() if name != "data_dir"}
    content = {"config": plain, "data": data, "network": network, "row_version": ROW_VERSION}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def grid(base: TrainConfig, **axes: Iterable[Any]) -> tuple[TrainConfig, ...]:
    """Every combination of values of some settings, all else as in `base`.

    Args:
        base: what all cells share; it gives neither rate where an axis does.
        axes: setting of `TrainConfig` -> its values, such as `batch_size=[8, 32], base_learning_rate=[2**-8],
            seed=range(3)`. Values of `model_options` are merged into those of `base`; None leaves an option out.

    Raises:
        ValueError: an unknown setting, an axis without a value or with one twice, what `TrainConfig` refuses.
    """
    values = {name: list(given) for name, given in axes.items()}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name, given in values.items():
        one_of(names, setting=name)
        if not given:
            raise Refusal(f"Expected {name} with a value at least, got none.")
    cells = []
    for point in itertools.product(*values.values()):
        settings = dict(zip(values, point, strict=True))
        if "model_options" in settings:
            merged = dict(base.model_options) | dict(settings["model_options"])
            settings["model_options"] = {name: value for name, value in merged.items() if value is not None}
        cells.append(dataclasses.replace(base, **settings))
    return distinct(cells)


def distinct(configs: Sequence[TrainConfig]) -> tuple[TrainConfig, ...]:
    """The configurations as they are.

    Raises:
        ValueError: one of them twice.
    """
    seen: set[str] = set()
    for config in configs:
        if not isinstance(config, TrainConfig):
            raise Refusal(f"Expected configs of TrainConfig, got {shown(config)}.")
        text = json.dumps(config.to_dict(), sort_keys=True)
        if text in seen:
            raise Refusal(
                f"Expected every cell of a grid once; {config.title}, {config.batches}, rate"
                f" {config.peak_learning_rate:g}, seed {config.seed} is there twice."
            )
        seen.add(text)
    return tuple(configs)


def told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The cells as they are.

    Raises:
        ValueError: two of them are one, for configurations that differ in what one's own network or data replace.
    """
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.key in seen:
            raise Refusal(
                f"Expected configurations of different cells; two of them train {cell.config.title},"
                f" {cell.config.batches}, seed {cell.config.seed} alike: with model= or dataset= given, the names in"
                " them are not read."
            )
        seen[cell.key] = cell
    return list(cells)


def ordered(cells: Iterable[Cell]) -> list[Cell]:
    """Cells of equal shape one after another, those with the most steps first; within a shape, seed by seed.

    Small batches take longest: begun last, one of them would keep a single worker busy while the others are done. Seed
    by seed, so that a sweep that is looked at early shows the whole range of rates.
    """
    shapes: dict[str, list[Cell]] = {}
    for cell in cells:
        shapes.setdefault(cell.shape, []).append(cell)
    for found in shapes.values():
        found.sort(key=lambda cell: cell.config.seed)
    by_steps = sorted(shapes.values(), key=lambda found: -weight(found[0].config))
    return [cell for found in by_steps for cell in found]


def weight(config: TrainConfig) -> float:
    """Steps of a run for each sample of its data: what its time goes by before anything has been timed."""
    sizes = config.batch_sizes
    return config.epochs * sum(1 / size for size in sizes) / len(sizes)
