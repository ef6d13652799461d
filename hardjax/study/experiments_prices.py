"""What runs of published experiments would cost, by the rows that there are: of the same configuration, of the same
network at other batch sizes, else of any network by its operations."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from hardjax._validate import Refusal
from hardjax.config import TrainConfig
from hardjax.data import augment, catalog
from hardjax.models import zoo
from hardjax.models.summary import size_of
from hardjax.study.experiments import Experiment, Planned, identity
from hardjax.study.experiments_metrics import Row
from hardjax.study.experiments_rows import Found, Results
from hardjax.study.experiments_rows import read as read_rows
from hardjax.study.outcomes import was_lost
from hardjax.training.resume import with_defaults

FILE = "operations.json"  # beside the experiments: network -> multiply-adds, which take seconds to find
_BACKWARD = 2  # passes over a network that a gradient costs besides the forward one


class Work(NamedTuple):
    """Of a run.

    Attributes:
        network: what times of other batch sizes tell of it: network, options, images, whether spectra are measured.
        convolutional: whether its kind is that of networks of convolutions.
        steps: back-propagations.
        operations: multiply-adds, of training and of testing.
    """

    network: str
    convolutional: bool
    steps: float
    operations: float


class Price(NamedTuple):
    """Of runs, one after another on the device that most rows are of.

    Attributes:
        seconds: NaN where no row tells.
        by_operations: some of them are of a network that no row is of.
    """

    seconds: float
    by_operations: bool = False

    def __mul__(self, count: int) -> "Price":  # type: ignore[override]
        return Price(self.seconds * count, self.by_operations)

    def __add__(self, other: "Price") -> "Price":  # type: ignore[override]
        return Price(self.seconds + other.seconds, self.by_operations or other.by_operations)


NOTHING = Price(0.0)


class Prices:
    """By rows of any experiments. Rows of another device than most are of tell nothing.

    Args:
        rows: that were timed or not.
        folder: of the experiments, with `FILE`; None: of no network are the operations known beforehand.
    """

    def __init__(self, rows: Iterable[Row], folder: Path | None = None) -> None:
        self._found: dict[tuple[str, str], Price] = {}
        self._operations = Operations({} if folder is None else known_operations(folder))
        timed = [row for row in rows if row.get("seconds") is not None and not was_lost(row) and "config" in row]
        devices = Counter(row.get("device") for row in timed)
        own = [row for row in timed if row.get("device") == devices.most_common(1)[0][0]]
        found: dict[str, list[Row]] = {}
        for row in own:
            found.setdefault(identity(with_defaults(row["config"])), []).append(row)
        self._known = {name: float(np.median([row["seconds"] for row in rows])) for name, rows in found.items()}
        works = [
            (work, self._known[name])
            for name, rows in found.items()
            if (work := self._operations.work(TrainConfig.from_dict(rows[0]["config"]))) is not None
        ]
        self._a_step: dict[bool, float] = {}
        self._an_operation: dict[str, float] = {}
        self._of_kind: dict[bool, float] = {}
        for kind in {work.convolutional for work, _ in works}:
            of_kind = [pair for pair in works if pair[0].convolutional == kind]
            self._a_step[kind], by_network = _fit(of_kind)
            self._an_operation |= by_network
            self._of_kind[kind] = float(np.median([seconds / work.operations for work, seconds in of_kind]))

    def of(self, found: Found) -> Price:
        """Of the runs of an experiment's own scale that have no row."""
        if (found.experiment.name, found.scale) not in self._found:
            self._found[found.experiment.name, found.scale] = sum(
                (self.of_run(config) * count for config, count in left(found)), NOTHING
            )
        return self._found[found.experiment.name, found.scale]

    def of_run(self, config: TrainConfig) -> Price:
        """Of one run, whatever its seed."""
        known = self._known.get(identity(config.to_dict()))
        if known is not None:
            return Price(known)
        if (work := self._operations.work(config)) is None:
            return Price(math.nan)
        if work.network in self._an_operation:
            return Price(
                self._a_step[work.convolutional] * work.steps + self._an_operation[work.network] * work.operations
            )
        return Price(self._of_kind.get(work.convolutional, math.nan) * work.operations, by_operations=True)


def prices_of(results: Results, folder: Path) -> Prices:
    """By all rows of a folder.

    Args:
        folder: of the experiments.
    """
    rows: list[Row] = []
    for one in results.experiments.values():
        with suppress(Refusal):  # a damaged file is told of where its own experiment is shown
            rows += read_rows(one, results.folder) if one.scales else []
    return Prices(rows, folder)


def nothing_of(found: Found, scale: str) -> Found:
    """An experiment at a scale of its own of which nothing was run."""
    size = found.experiment.scales[scale]
    return Found(found.experiment, scale, {arm: {} for arm in size.arms}, size.count)


def left(found: Found) -> list[tuple[TrainConfig, int]]:
    """(configuration, runs that have no row) of an experiment's own scale."""
    size = found.experiment.scales.get(found.scale)
    if size is None:
        return []
    counts = {arm: size.runs_of(arm) - len(found.arms[arm]) for arm in size.arms}
    return [(size.config(arm), count) for arm, count in counts.items() if count]


def missing(found: Found) -> list[Planned]:
    """Runs of an experiment's own scale without a row, seed by seed."""
    size = found.experiment.scales.get(found.scale)
    if size is None:
        return []
    return [one for one in size.planned() if one.config.seed not in found.arms[one.arm]]


class Operations:
    """Multiply-adds of networks for one image.

    Args:
        known: name of a network, see `_name` -> multiply-adds; others are traced when they are asked for.
    """

    def __init__(self, known: Mapping[str, int]) -> None:
        self.known = dict(known)

    def work(self, config: TrainConfig) -> Work | None:
        """Of a run; None where the data set or the network is one of one's own."""
        entry = catalog.CATALOG.get(config.dataset)
        if entry is None or config.model not in zoo.ZOO:
            return None
        train, test = entry.counts
        held_out = round(config.validation * (config.train_samples or train))
        samples = (config.train_samples or train) - held_out
        shape = (
            entry.shape
            if isinstance(config.augmentation, str)
            else augment.output_shape(config.augmentation, entry.shape)
        )
        points = math.ceil(config.epochs / config.test_every) if isinstance(config.test_every, int) else config.epochs
        tested = points * (test + held_out + samples * config.evaluate_train)
        sizes = config.batch_sizes
        steps = config.epochs * sum(math.ceil(samples / size) for size in sizes) / len(sizes)
        name = _name(config, shape, entry.classes)
        if name not in self.known:
            module = zoo.create(config.model, entry.classes, **config.model_options)
            self.known[name] = size_of(module, shape).multiply_adds
        images = (1 + _BACKWARD) * samples * config.epochs + tested
        network = f"{name}{', measured' if config.measure is not None else ''}"
        return Work(network, config.model != "mlp", steps, self.known[name] * images)


def known_operations(folder: Path) -> dict[str, int]:
    """What `FILE` holds; nothing where it is not there."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def all_operations(experiments: Iterable[Experiment]) -> dict[str, int]:
    """What `FILE` is to hold: of the networks of all scales."""
    found = Operations({})
    for one in experiments:
        for size in one.scales.values():
            for arm in size.arms:
                found.work(size.config(arm))
    return dict(sorted(found.known.items()))


def _name(config: TrainConfig, shape: tuple[int, ...], classes: int) -> str:
    """Network, what tells its layers, images and classes; the kind of normalisation costs little beside those."""
    options = {name: value for name, value in config.model_options.items() if name in ("widths", "stem")}
    said = "".join(f" {name}={json.dumps(value)}" for name, value in sorted(options.items()))
    return f"{config.model}{said} on {'x'.join(map(str, shape))}, {classes} classes"


def _fit(pairs: Sequence[tuple[Work, float]]) -> tuple[float, dict[str, float]]:
    """(seconds a step, network -> seconds an operation), none below 0, of networks of a kind.

    What a step costs whatever its size is taken to be the same for all of them: one network at two sizes, timed on a
    machine that did other things too, would say anything. Relative errors count alike, or the longest run would be all
    that counts.
    """
    names = sorted({work.network for work, _ in pairs})
    seconds = np.array([took for _, took in pairs])
    steps = np.array([work.steps for work, _ in pairs])
    operations = np.array([[work.operations * (work.network == name) for name in names] for work, _ in pairs])
    scales = np.array([steps.max(), *operations.max(0)])
    found, _ = nnls(np.column_stack([steps, operations]) / scales / seconds[:, None], np.ones(len(pairs)))
    each = found / scales
    return float(each[0]), dict(zip(names, map(float, each[1:]), strict=True))
