"""Published tables, figures and claims as data: what was printed, what we run in its place, and what would be shown.

A folder of experiments holds modules that name `EXPERIMENTS`, a tuple of `Experiment`; nothing of the library imports
them. Their rows lie beside them (`experiments_rows`), and verdicts follow from rows alone (`experiments_report`).
"""

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal, first_line, shown
from hardjax.config import TrainConfig
from hardjax.study.cells import grid
from hardjax.study.experiments_metrics import METRICS

SCALES = PAPER, REDUCED, SMOKE = ("paper", "reduced", "smoke")
_KINDS = ("table", "figure", "grid", "dynamic", "relation", "claim", "extra")
_NAMES_EXPERIMENTS = re.compile(r"^EXPERIMENTS\b", re.MULTILINE)


@dataclass(frozen=True)
class Published:
    """A printed number.

    Attributes:
        arm: that it is of, as in `Scale.arms` at the paper's scale.
        metric: a name of `experiments_metrics.METRICS`.
        value: in its unit; None where it was printed but is not in the stored text.
        spread: printed beside it, whatever that is there (a deviation, half an interval); None without one.
    """

    arm: str
    metric: str
    value: float | None
    spread: float | None = None


@dataclass(frozen=True)
class Statement:
    """What is claimed of some arms against others; the rule that judges it is in `experiments/README.md`.

    Attributes:
        says: the claim, in a few words.
        arms, against: labels; of several the best one is taken, chosen for each seed by the other seeds, or their mean.
            Nothing in `against` sets the arms against 0.
        metric: a name of `experiments_metrics.METRICS`.
        smallest: smallest difference of interest in the metric's unit, above 0; stated before the runs.
        runs: n, the seeds that the comparison is to have; stated before the runs.
        higher: the arms' values are claimed to be the higher ones; None: to be better, as the metric says.
        of_several: "best" or "mean": what stands for several arms.
        family: statements of an experiment that share it are judged together (Holm's correction over the arms).
        late: it was stated after rows that it judges, which its verdict says beside it.
    """

    says: str
    arms: tuple[str, ...]
    against: tuple[str, ...]
    metric: str
    smallest: float
    runs: int
    higher: bool | None = None
    of_several: str = "best"
    family: str = ""
    late: bool = False

    def __post_init__(self) -> None:
        _validate.one_of(METRICS, metric=self.metric)
        _validate.one_of(("best", "mean"), of_several=self.of_several)
        if self.higher is None and METRICS[self.metric].higher is None:
            raise Refusal(f"Expected higher for {shown(self.says)}: neither way is better of {shown(self.metric)}.")
        _validate.positive(smallest=self.smallest)
        _validate.at_least(1, runs=self.runs)


@dataclass(frozen=True)
class Planned:
    """One run of an experiment."""

    arm: str
    config: TrainConfig


@dataclass(frozen=True)
class Scale:
    """A size at which an experiment can be run.

    Attributes:
        base: what all arms share.
        arms: label -> settings of `TrainConfig` that it replaces (`model_options` are merged).
        runs: seeds of each arm, from that of `base` on.
        fewer: label -> seeds, of arms that have fewer of them.
        departs: in what it departs from the paper, in words.
    """

    base: TrainConfig
    arms: Mapping[str, Mapping[str, Any]]
    runs: int
    fewer: Mapping[str, int] = field(default_factory=dict)
    departs: str = ""

    @property
    def count(self) -> int:
        """Runs in all."""
        return sum(map(self.runs_of, self.arms))

    def runs_of(self, arm: str) -> int:
        """Seeds of an arm."""
        return self.fewer.get(arm, self.runs)

    def planned(self, seeds: Iterable[int] | None = None) -> Iterator[Planned]:
        """The runs, seed by seed, so that what there is at any time compares all arms.

        Args:
            seeds: places from 0 on; None takes all.
        """
        for place in range(self.runs) if seeds is None else seeds:
            for arm in self.arms:
                if place < self.runs_of(arm):
                    yield Planned(arm, self.config(arm, place))

    def config(self, arm: str, place: int = 0) -> TrainConfig:
        """Of an arm's run."""
        axes = {name: [value] for name, value in self.arms[arm].items()}
        (config,) = grid(self.base, **axes, seed=[self.base.seed + place])
        return config


@dataclass(frozen=True)
class Experiment:
    """A published table, figure or claim.

    Attributes:
        name: such as "p1-table-3", which commands and files go by.
        title: what it shows.
        source: paper and place in it.
        scales: name of `SCALES` -> what is run there; empty where it reads the rows of others.
        reads: names of experiments whose rows it reads; its arms are then theirs, "NAME: ARM" where there are several.
        arms: labels of theirs that it shows; empty takes all.
        published: what was printed.
        metrics: columns, names of `experiments_metrics.METRICS`.
        statements: claims to be judged.
        layout: a name of `plots.published.LAYOUTS`.
        paper_runs: seeds of the paper; None where it does not print them.
        printed: what was printed beside numbers of arms, in words.
        errata: what is wrong or missing in what was printed, in words.
        computed: finds what needs no training; its lines (column -> value) are written as rows.
        also_in: file of `results` -> function from one of its lines to a row, for rows of earlier scripts.
    """

    name: str
    title: str
    source: str
    scales: Mapping[str, Scale] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()
    metrics: tuple[str, ...] = ("test error",)
    statements: tuple[Statement, ...] = ()
    layout: str = "arms"
    paper_runs: int | None = None
    printed: tuple[str, ...] = ()
    errata: tuple[str, ...] = ()
    computed: Callable[[], list[dict[str, Any]]] | None = None
    also_in: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", self.name):
            raise Refusal(f"Expected an experiment's name={shown(self.name)} to be as in p1-table-3.")
        kinds = [bool(self.scales), bool(self.reads), self.computed is not None]
        if sum(kinds) != 1:
            raise Refusal(f"Expected {self.name} to give one of scales, reads and computed.")
        for name in self.scales:
            _validate.one_of(SCALES, scale=name)
        for metric in (*self.metrics, *(one.metric for one in self.published)):
            _validate.one_of(METRICS, metric=metric)


def load(folder: Path) -> dict[str, Experiment]:
    """Name -> experiment, of all modules of a folder that name EXPERIMENTS.

    Raises:
        ValueError: there is none, one that cannot be read, a name twice, rows of an experiment that is not there.
    """
    found: dict[str, Experiment] = {}
    paths = sorted(folder.glob("*.py")) if folder.is_dir() else []
    modules = [path for path in paths if _NAMES_EXPERIMENTS.search(path.read_text(encoding="utf-8"))]
    if not modules:
        raise Refusal(f"No experiments in {str(folder)!r}; name a folder of them with --experiments DIR.")
    for one in itertools.chain.from_iterable(_read(path) for path in modules):
        if one.name in found:
            raise Refusal(f"Expected every experiment of {str(folder)!r} once; {one.name} is there twice.")
        found[one.name] = one
    for one in found.values():
        for name in one.reads:
            _validate.one_of(
                [other.name for other in found.values() if not other.reads], **{f"rows of {one.name}": name}
            )
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple:
    """Of a name in lists: by paper, kind and number."""
    paper, kind, *rest = name.split("-")
    numbers = [int(text) for text in re.findall(r"[0-9]+", "-".join(rest))]
    return paper, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), numbers, name


def _line_in(path: Path, error: Exception) -> str:
    """Where in the file it went wrong, as " line 7"; nothing where that is elsewhere."""
    passed = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if not passed and isinstance(error, SyntaxError) and error.lineno:
        passed = [error.lineno]
    return f" line {passed[-1]}" if passed else ""


def _read(path: Path) -> Sequence[Experiment]:
    name = f"hardjax_experiments_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Refusal as refusal:
        raise Refusal(f"Cannot read the experiments in {str(path)!r}: {refusal}") from None
    except Exception as error:  # the chain holds where in their module it is
        line = _line_in(path, error)
        raise Refusal(
            f"Cannot read the experiments in {str(path)!r}{line}: {type(error).__name__}: {first_line(error)}"
        ) from error
    found = module.EXPERIMENTS
    if not all(isinstance(one, Experiment) for one in found):
        raise Refusal(f"Expected EXPERIMENTS of {str(path)!r} to hold experiments alone.")
    return found


def identity(config: Mapping[str, Any]) -> str:
    """Equal for configurations (as JSON) that differ in nothing but their seed and where their data lies."""
    kept = {name: value for name, value in config.items() if name not in ("seed", "data_dir")}
    return json.dumps(kept, sort_keys=True)


def with_data(config: TrainConfig, data_dir: str | None) -> TrainConfig:
    """The configuration, reading prepared data from a folder."""
    return config if data_dir is None else dataclasses.replace(config, data_dir=data_dir)


def published(module: str, name: str) -> dict[str, Any]:
    """The printed numbers of a paper, from published/NAME.json beside a module of experiments (its `__file__`)."""
    return json.loads((Path(module).parent / "published" / f"{name}.json").read_text(encoding="utf-8"))


def errata(content: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """Those of some names, in words."""
    return tuple(f"{name}: {content['errata'][name]}" for name in names)
