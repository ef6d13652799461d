"""Rows of published experiments: `results/NAME.jsonl`, a line a run, sorted to the arms that ask for them."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardjax._validate import Refusal
from hardjax.study.experiments import PAPER, SCALES, SMOKE, Experiment, Published, identity
from hardjax.study.outcomes import DIVERGED, DONE
from hardjax.training import files, lines
from hardjax.training.resume import with_defaults

Row = dict[str, Any]

_HISTORY = ("epoch", "seconds", "full_train_loss", "full_train_top1", "test_loss", "test_top1")
_KEPT = (
    *("row_version", "key", "config", "data", "network", "status", "reason", "metrics", "seconds", "train_seconds"),
    *("compile_seconds", "threads", "population", "commit", "versions", "device", "trail", "trained_epochs"),
)
_DIGITS = 6  # of a number in a row: nothing is known more exactly, and a row stays small


@dataclass(frozen=True)
class Found:
    """The rows of an experiment at one scale.

    Attributes:
        experiment, scale: whose.
        arms: label -> seed -> row; arms without a row are there too.
        wanted: runs that the scale asks for.
        others: rows of the experiment's own file, of configurations that the scale does not ask for (any more).
        printed: what was printed of its arms; of those whose rows are another experiment's, where they have one.
    """

    experiment: Experiment
    scale: str
    arms: Mapping[str, Mapping[int, Row]]
    wanted: int
    others: int = 0
    printed: tuple[Published, ...] = ()

    @property
    def rows(self) -> list[Row]:
        return [row for those in self.arms.values() for row in those.values()]


def kept(row: Mapping[str, Any], experiment: str, scale: str, arm: str) -> Row:
    """What is kept of a sweep's row: no pictures of memory, no traceback, and columns of its history that are read."""
    own = {"experiment": experiment, "scale": scale, "arm": arm, "seed": row["config"]["seed"]}
    plain = own | {name: row[name] for name in _KEPT if name in row}
    plain["history"] = {name: row["history"][name] for name in _HISTORY if name in row["history"]}
    short = json.loads(lines.encode(plain), parse_float=lambda text: float(f"{float(text):.{_DIGITS}g}"))
    # To the last digit, or it would be another configuration; where its data lay says nothing elsewhere.
    return short | {"config": json.loads(lines.encode(dict(row["config"]) | {"data_dir": None}))}


def read(experiment: Experiment, results: Path) -> list[Row]:
    """The rows in an experiment's own files.

    Raises:
        ValueError: a file is damaged, or holds rows of two versions of one data set.
    """
    rows: list[Row] = []
    for path, converted in [(results / f"{experiment.name}.jsonl", None), *_others(experiment, results)]:
        for line in lines.read_lines(path):
            row = line if converted is None else converted(line)
            if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or "arm" not in row:
                raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: a line is no row of an experiment.")
            rows.append(row)
    versions(experiment, rows)
    return rows


def _others(experiment: Experiment, results: Path) -> Iterable[tuple[Path, Any]]:
    return [(results / name, converted) for name, converted in experiment.also_in.items()]


def versions(experiment: Experiment, rows: Iterable[Row]) -> dict[str, str]:
    """Data set -> checksum of the one version that rows were trained on; rows that name none say nothing.

    Raises:
        ValueError: they are two.
    """
    met: dict[str, str] = {}
    for row in rows:
        data, name = row.get("data"), row.get("config", {}).get("dataset")
        if data is not None and met.setdefault(name, data) != data:
            raise Refusal(
                f"The rows of {experiment.name} were trained on two versions of {name!r} ({met[name][:8]},"
                f" {data[:8]}): differences between them would be no differences of arms."
            )
    return met


class Results:
    """The rows of a folder, read once.

    Args:
        experiments: name -> experiment, of all of a folder.
        folder: of their rows.
    """

    def __init__(self, experiments: Mapping[str, Experiment], folder: Path) -> None:
        self.experiments, self.folder = experiments, folder
        self._asked: dict[tuple[str, str], dict[str, str]] = {}
        self._found: dict[tuple[str, str], Found] = {}

    def refresh(self) -> None:
        """Read rows again where they are asked for again."""
        self._found.clear()

    def found(self, experiment: Experiment, scale: str) -> Found:
        """An experiment's rows at a scale, those of the experiments that it reads among them."""
        name = experiment.name, scale
        if name not in self._found:
            make = self._own if experiment.scales else self._computed if experiment.computed else self._joined
            self._found[name] = make(experiment, scale)
        return self._found[name]

    def shown(self, experiment: Experiment) -> list[Found]:
        """At each scale that has rows of its own, the one that is most complete first; smoke runs aside.

        Scales may share rows (fewer runs of the same configurations). Without any row, at the smallest scale there is.
        """
        tried = [self.found(experiment, scale) for scale in SCALES if scale != SMOKE]
        shown: list[Found] = []
        met: set[int] = set()
        for one in sorted(tried, key=lambda one: -len(one.rows) / max(one.wanted, 1)):
            if new := {_run_of(row) for row in one.rows} - met:
                shown.append(one)
                met |= new
        return shown or [next((one for one in reversed(tried) if one.wanted), tried[0])]

    def _computed(self, experiment: Experiment, scale: str) -> Found:
        arms = {row["arm"]: {0: row} for row in read(experiment, self.folder)} if scale == PAPER else {}
        return Found(experiment, scale, arms, int(scale == PAPER), printed=experiment.published)

    def _joined(self, experiment: Experiment, scale: str) -> Found:
        sources = [self.found(self.experiments[name], scale) for name in experiment.reads]

        def label(source: Found, arm: str) -> str:
            return f"{source.experiment.name}: {arm}" if len(sources) > 1 else arm

        arms = {label(source, arm): rows for source in sources for arm, rows in source.arms.items()}
        if experiment.arms:
            arms = {arm: arms[arm] for arm in experiment.arms if arm in arms}
        wanted, printed = 0, list(experiment.published)
        known = {(one.arm, one.metric) for one in printed}
        for source in sources:
            size = source.experiment.scales.get(scale)
            wanted += 0 if size is None else sum(size.runs_of(arm) for arm in size.arms if label(source, arm) in arms)
            theirs = [dataclasses.replace(one, arm=label(source, one.arm)) for one in source.printed]
            printed += [one for one in theirs if arms.get(one.arm) and (one.arm, one.metric) not in known]
        return Found(experiment, scale, arms, wanted, printed=tuple(printed))

    def _own(self, experiment: Experiment, scale: str) -> Found:
        size = experiment.scales.get(scale)
        rows = read(experiment, self.folder)
        if size is None:
            return Found(experiment, scale, {}, 0, sum(_is_own(row, experiment) for row in rows))
        arms: dict[str, dict[int, Row]] = {arm: {} for arm in size.arms}
        if not rows:  # a grid of hundreds of configurations need not be written out
            return Found(experiment, scale, arms, size.count, printed=experiment.published)
        asked = self._asked.setdefault((experiment.name, scale), {})
        if not asked:
            asked |= {identity(size.config(arm).to_dict()): arm for arm in size.arms}
        others = 0
        for row in rows:
            arm = asked.get(_identity_of(row))
            place = row["config"]["seed"] - size.base.seed
            if arm is None:
                others += _is_own(row, experiment)
            elif 0 <= place < size.runs_of(arm):
                arms[arm].setdefault(row["config"]["seed"], row)
        return Found(experiment, scale, arms, size.count, others, experiment.published)


def _is_own(row: Row, experiment: Experiment) -> bool:
    """Of its own file: one that several experiments read has rows that are not for it."""
    return row.get("experiment") == experiment.name


def _run_of(row: Row) -> int:
    return hash((json.dumps(row.get("config"), sort_keys=True), row["arm"], row.get("seed")))


def _identity_of(row: Row) -> str:
    return _written(json.dumps(row["config"], sort_keys=True))


@functools.lru_cache(maxsize=100_000)
def _written(text: str) -> str:
    return identity(with_defaults(json.loads(text)))


def write(experiment: Experiment, results: Path, row: Row) -> None:
    """Append a row.

    Raises:
        ValueError: it cannot be written.
    """
    with lines.refused(results, "to be a folder that can be written to"):
        results.mkdir(parents=True, exist_ok=True)
    lines.append_line(results / f"{experiment.name}.jsonl", row)


def compute(experiment: Experiment, results: Path) -> int:
    """Write the rows of what needs no training; how many there are. Those of before are replaced, all or none."""
    assert experiment.computed is not None
    rows = []
    for one in experiment.computed():
        head = {"experiment": experiment.name, "scale": PAPER, "arm": one["arm"], "status": DONE}
        metrics = {name: value for name, value in one.items() if name != "arm"}
        versions = files.environment()["versions"]
        rows.append(head | {"metrics": metrics, "commit": files.commit(), "versions": versions})
    path = results / f"{experiment.name}.jsonl"
    scratch = path.with_name(path.name + ".part")
    with lines.refused(path, "to be writable"):
        results.mkdir(parents=True, exist_ok=True)
        scratch.write_text("".join(lines.encode(row) + "\n" for row in rows), encoding="utf-8")
        scratch.replace(path)
    return len(rows)


def is_result(row: Mapping[str, Any]) -> bool:
    """Whether a sweep's row says something of its arm: what failed is trained again."""
    return row["status"] in (DONE, DIVERGED)
