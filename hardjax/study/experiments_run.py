"""Runs of a published experiment that have no row yet, through the sweep."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hardjax._validate import Refusal
from hardjax.config import Performance
from hardjax.study import experiments_rows
from hardjax.study.experiments import Experiment, Planned, identity, with_data
from hardjax.study.experiments_metrics import METRICS
from hardjax.study.experiments_prices import missing
from hardjax.study.experiments_rows import Found, Results
from hardjax.study.sweep import Progress, Sweep, sweep
from hardjax.study.sweep_rows import read_rows
from hardjax.study.work import Trainer
from hardjax.training import files


@dataclass(frozen=True)
class Outcome:
    """What `run` came to.

    Attributes:
        written: rows that were added.
        left: runs without a row.
        failed: lines on runs that failed; the next call trains them again.
        signal: name of the signal that ended it, if one did.
    """

    written: int
    left: int
    failed: tuple[str, ...] = ()
    signal: str | None = None


def run(
    experiment: Experiment,
    scale: str,
    *,
    results: Results,
    folder: Path,
    data_dir: str | None = None,
    performance: Performance | None = None,
    workers: int | str | None = None,
    max_hours: float | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train what is missing, seed by seed, and write a row for each run the moment it is there.

    Args:
        experiment: with scales of its own; the experiments that one reads are run themselves.
        results: where the rows go.
        folder: of the sweep, which the same call goes on with.
        data_dir: folder of prepared data.
        performance, workers, max_hours, on_progress: as in `sweep`; without a performance runs whose times are compared
            are trained one by one, since a member of a population has a share of its time.

    Raises:
        ValueError: what `sweep` refuses, an experiment without this scale, data of another version than its rows.
    """
    if scale not in experiment.scales:
        raise Refusal(f"{experiment.name} has no scale {scale!r}; it has {', '.join(experiment.scales)}.")
    size = experiment.scales[scale]
    readers = [one for one in results.experiments.values() if experiment.name in one.reads]
    if performance is None and any(map(_is_timed, (experiment, *readers))):
        performance = Performance(population="workers")
    until = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
    written, failed, signal = 0, [], None
    rows = _Writer(experiment, scale, results, folder)
    written += rows.bring()  # of a call that was killed, or of an experiment that shares cells with this one
    for place in range(size.runs):
        left = [one for one in missing(rows.found()) if one.config.seed == size.base.seed + place]
        hours = (until - time.monotonic()) / 3600
        if not left or hours <= 0 or signal:
            continue
        _check_data(rows.versions(), left, data_dir)

        def told(progress: Progress) -> None:
            nonlocal written
            written += rows.bring(progress.rows)
            on_progress(progress)

        swept = sweep(
            [with_data(one.config, data_dir) for one in left],
            output=folder,
            performance=performance,
            workers=workers,
            max_hours=None if hours == math.inf else hours,
            retry_failed=True,
            on_progress=told,
        )
        written += rows.bring()
        failed += _failures(swept, left)
        signal = swept.signal
    return Outcome(written, len(missing(rows.found())), tuple(failed), signal)


def _is_timed(experiment: Experiment) -> bool:
    return any(METRICS[name].timed for name in (*experiment.metrics, *(one.metric for one in experiment.statements)))


def _check_data(known: Mapping[str, str], left: list[Planned], data_dir: str | None) -> None:
    """Raises ValueError before anything is trained on another version of the data than the rows that there are."""
    trainer = Trainer()
    for config in {one.config.dataset: one.config for one in left if one.config.dataset in known}.values():
        data = trainer.dataset(with_data(config, data_dir)).checksum
        if data != known[config.dataset]:
            raise Refusal(
                f"Expected {config.dataset!r} in the version of the rows that there are"
                f" ({known[config.dataset][:8]}), got {data[:8]}; name another folder with --results DIR."
            )


def _failures(swept: Sweep, left: list[Planned]) -> list[str]:
    arms = {identity(one.config.to_dict()): one.arm for one in left}
    return [
        f"{arms.get(identity(row['config']), '?')}, seed {row['config']['seed']}: {row['reason']}"
        for row in swept.failed
    ]


class _Writer:
    """Brings rows of a sweep over into an experiment's own."""

    def __init__(self, experiment: Experiment, scale: str, results: Results, folder: Path) -> None:
        self._experiment, self._scale, self._results, self._folder = experiment, scale, results, folder
        self._seen = -1

    def found(self) -> Found:
        self._results.refresh()
        return self._results.found(self._experiment, self._scale)

    def versions(self) -> dict[str, str]:
        """Data set -> checksum of what the rows that there are were trained on."""
        return experiments_rows.versions(
            self._experiment, experiments_rows.read(self._experiment, self._results.folder)
        )

    def bring(self, count: int | None = None) -> int:
        """How many were added.

        Args:
            count: rows that the sweep has by now; nothing is looked at where it is the one of last time.
        """
        if count is not None and count == self._seen:
            return 0
        self._seen = -1 if count is None else count
        if not (self._folder / files.SWEEP_ROWS).is_file():
            return 0
        asked = {(identity(one.config.to_dict()), one.config.seed): one.arm for one in missing(self.found())}
        added, known = 0, self.versions()
        for row in read_rows(self._folder):
            one = identity(row["config"]), row["config"]["seed"]
            if one in asked and experiments_rows.is_result(row):
                if known.setdefault(row["config"]["dataset"], row["data"]) != row["data"]:
                    continue  # beside the others it would be refused for good
                arm = asked.pop(one)  # once, though it was trained on two versions of its data
                kept = experiments_rows.kept(row, self._experiment.name, self._scale, arm)
                experiments_rows.write(self._experiment, self._results.folder, kept)
                added += 1
        return added
