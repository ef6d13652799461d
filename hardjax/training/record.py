"""What a run leaves on the host: one entry a test point, which slots were trained in which round, raw spectra.

The files in a run's folder are the record: they are added to, never written anew, and a checkpoint says how much of
each belongs to it. What stands in no file yet (the round under way, means since the last test point) is a few numbers
beside the checkpoint.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hardjax._validate import Refusal
from hardjax.engine.plan import Dispatch, RunPlan, learning_rate
from hardjax.engine.rounds import RoundInfo
from hardjax.training import lines, spectra
from hardjax.training.lines import LineFile, Mark

HISTORY, ROUNDS, DECISIONS = "history.jsonl", "rounds.jsonl", "decisions.jsonl"
FILES = (HISTORY, ROUNDS, spectra.FILE, DECISIONS)

FIELDS = (
    "epoch",
    "backprops",
    "train_loss",
    "table_loss",
    "full_train_loss",
    "full_train_top1",
    "validation_loss",
    "validation_top1",
    "test_loss",
    "test_top1",
    "learning_rate",
    "batch_size",
    "keep_fraction",
    "kept_loss",
    "dropped_loss",
    "skipped",
    "c",
    "l",
    "C_K",
    "L_K",
    "samples_hash",
    "seconds",
)
_TYPES = {"backprops": np.int64, "batch_size": np.int64, "skipped": np.int64, "samples_hash": np.str_}
_LACKING = {"samples_hash": "", "skipped": 0}  # in a record of before they were kept; of the others NaN
_MEANS = ("train_loss", "kept_loss", "dropped_loss")


class History:
    """Entries by test point; fields that were not measured are NaN.

    Losses are in nats, accuracies in percent, `seconds` of training so far (planning and dispatch included, compilation
    and testing not). `train_loss` is the mean loss of the batches trained since the test point before, all of their
    samples, those that trimming drops too; replay of hard batches biases it upwards; `table_loss` is the mean of what
    the loss table knows; `full_train_*` evaluate the whole training split and are what arms are compared by.
    `keep_fraction` is trimming's share in the epoch before the test point, as asked for (of small batches at least one
    sample is kept), `kept_loss` and `dropped_loss` the mean losses of the samples kept and dropped since the test point
    before. `skipped` counts the steps so far that `on_nan="skip-step"` left out. `c`, `l` are those of the last batch
    measured, `C_K`, `L_K` of all so far (`fisher.Trajectory`). `samples_hash` is a running hash of the sample indices
    in the order in which they were trained, 16 hexadecimal digits: equal where two runs saw the same samples.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def add(self, **entry: Any) -> dict[str, Any]:
        # What is lacking, or NaN: one NaN for all of them, whose signs and payloads no file keeps.
        full = {name: entry.get(name) for name in FIELDS}
        nothing = {
            name: _LACKING.get(name, math.nan) for name, value in full.items() if value is None or value != value
        }
        self.entries.append(full | nothing)
        return self.entries[-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Field -> (test points,) array."""
        return {
            name: np.asarray([entry[name] for entry in self.entries], _TYPES.get(name, np.float64)) for name in FIELDS
        }


class _Sum(NamedTuple):
    """A mean under way: (total, count) of float64."""

    total: float = 0.0
    count: int = 0

    def plus(self, values: np.ndarray) -> "_Sum":
        # One after the other: a sum by blocks would depend on where the run was cut into dispatches.
        values = np.ravel(values).astype(np.float64)
        return _Sum(float(np.add.accumulate(np.append(self.total, values))[-1]), self.count + values.size)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan


class Record:
    """What the dispatches of a run report, in their order.

    Args:
        plan: of the run.
        folder: where its files are; None writes none.

    Attributes:
        history: of test points.
        spectra: measured so far.
        decisions: of a controller, in order, as JSON.
        bad_steps: steps whose loss or gradient was not finite (of `on_nan="record"`: whose loss was not).
        first_bad: back-propagations done before the first of them, or None.
        never_finite: batches of the first round whose loss was not finite.
    """

    def __init__(self, plan: RunPlan, folder: Path | None = None) -> None:
        self.history = History()
        self.spectra = spectra.Spectra(plan.measure_every or 1)
        self.decisions: list[dict[str, Any]] = []
        self.bad_steps, self.never_finite = 0, 0
        self.first_bad: int | None = None
        self._plan = plan
        # Of a run over samples, rounds times n counts would outgrow everything else.
        self._rounds: list[np.ndarray] | None = [] if plan.selection.unit == "batch" else None
        self._under_way: np.ndarray | None = None
        self._sums = dict.fromkeys(_MEANS, _Sum())
        self._share = 1.0
        self._files = None if folder is None else {name: LineFile(folder / name) for name in FILES}
        # Lines of the spectra and of the rounds that are in their files.
        self._written = {spectra.FILE: 0, ROUNDS: 0}

    def trained(self, dispatch: Dispatch, info: RoundInfo) -> None:
        """A segment or rounds; NumPy leaves."""
        self._share = dispatch.share
        kept = info.loss if info.kept_loss is None else info.kept_loss
        for name, values in zip(_MEANS, (info.loss, kept, info.dropped_loss), strict=True):
            if values is not None:
                self._sums[name] = self._sums[name].plus(values)
        self._count_bad(dispatch, info)
        if self._rounds is None:
            return
        for row in info.slots.reshape(dispatch.spec.rounds, -1):
            counts = np.bincount(row, minlength=self._plan.stages[dispatch.stage].sizes.num_batches)
            # A round that was cut is one row, whatever its segments: no `Performance` setting shows in the record.
            if self._under_way is not None:
                counts, self._under_way = counts + self._under_way, None
            # Nearly all counts are 0 or 1, but a strategy may train one batch as often as it likes in a round.
            self._rounds.append(counts.astype(np.min_scalar_type(counts.max(initial=0))))
        if dispatch.after.cursor:
            self._under_way = self._rounds.pop()

    def looked(self, dispatch: Dispatch, seen: tuple[Any, np.ndarray]) -> None:
        """A measurement."""
        (values, mean_entry), slot = seen
        step = dispatch.before.backprops
        rate, stage = learning_rate(self._plan, step), self._plan.stages[dispatch.stage]
        # Not what the batch size alone would make of it: steps are whole, and 4/3 epochs of 5 are 7 of them.
        per_epoch = float(stage.steps / stage.epochs)
        self.spectra.add(step, float(self._plan.epoch(step)), rate, values, mean_entry, int(slot), per_epoch)

    def decided(self, line: dict[str, Any], plan: RunPlan) -> None:
        """A decision of the controller, and the plan as it is from there on."""
        self._plan = plan
        self.decisions.append(json.loads(lines.encode(line)))  # as it is read again: without NaN
        if self._files is not None:
            self._files[DECISIONS].append(line)

    def tested(self, **entry: Any) -> dict[str, Any]:
        """A test point: its entry with the means since the last one, written down."""
        means = {name: found.mean for name, found in self._sums.items()}
        self._sums = dict.fromkeys(_MEANS, _Sum())
        entry = self.history.add(**entry, **means, keep_fraction=self._share)
        if self._files is not None:
            self._files[HISTORY].append(entry)
            self._write()
        return entry

    def marks(self) -> dict[str, Any]:
        """Everything about the record that a checkpoint keeps, as JSON; the files are on the disk up to there."""
        if self._files is not None:
            self._write()
            for file in self._files.values():
                if file.mark.size:
                    file.append(durable=True)
        return {
            "files": {} if self._files is None else {name: list(file.mark) for name, file in self._files.items()},
            "sums": {name: list(found) for name, found in self._sums.items()},
            "share": self._share,
            "under_way": None if self._under_way is None else lines.pack(self._under_way),
            "bad_steps": self.bad_steps,
            "first_bad": self.first_bad,
            "never_finite": self.never_finite,
        }

    def restore(self, folder: Path, marks: Mapping[str, Any], writes: bool = True) -> None:
        """Go on from what `marks` gave: files are cut to it and read.

        Args:
            writes: this process writes the files; else it reads of them what `marks` covers, while another one goes on.

        Raises:
            ValueError: a file does not begin with what it held then.
        """
        kept = {name: Mark(*mark) for name, mark in marks["files"].items()}
        for name, mark in kept.items():
            if not (lines.cut if writes else lines.holds)(folder / name, mark):
                raise Refusal(f"{name} in {str(folder)!r} is not as it was when the checkpoint was written.")
        # Before there were controllers a record had no decisions.
        if writes:
            self._files = {name: LineFile(folder / name, kept.get(name, Mark())) for name in FILES}
        held = {name: lines.read_lines(folder / name, kept.get(name, Mark()).size) for name in FILES}
        for entry in held[HISTORY]:
            self.history.add(**entry)
        self.spectra.restore(held[spectra.FILE])
        self.decisions = held[DECISIONS]
        rounds = [lines.unpack(row["counts"]) for row in held[ROUNDS]]
        self._rounds = None if self._rounds is None else rounds
        self._written = {spectra.FILE: len(self.spectra), ROUNDS: len(rounds)}
        # JSON has no NaN: a sum that is not finite came back as nothing.
        self._sums = {
            name: _Sum(math.nan if total is None else total, count) for name, (total, count) in marks["sums"].items()
        }
        self._share = marks["share"]
        self._under_way = None if marks["under_way"] is None else lines.unpack(marks["under_way"])
        self.bad_steps, self.first_bad = marks["bad_steps"], marks["first_bad"]
        self.never_finite = marks["never_finite"]

    @property
    def replays(self) -> np.ndarray | None:
        """(rounds, slots) times trained in each round, the last one perhaps cut short; None where slots are samples.
        Rows of stages with fewer batches are filled up with zeros."""
        if self._rounds is None:
            return None
        rows = self._rounds + ([] if self._under_way is None else [self._under_way])
        width = max(stage.sizes.num_batches for stage in self._plan.stages)
        if not rows:
            return np.zeros((0, width), np.uint8)
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    def _count_bad(self, dispatch: Dispatch, info: RoundInfo) -> None:
        finite = np.isfinite(np.ravel(info.loss))
        bad = ~finite if info.bad is None else np.ravel(info.bad)
        if bad.any():
            self.bad_steps += int(bad.sum())
            if self.first_bad is None:
                self.first_bad = dispatch.before.backprops + int(bad.argmax())
        if dispatch.before.backprops - dispatch.before.cursor == 0:
            first = self._plan.stages[0].sizes.num_batches - dispatch.before.backprops
            self.never_finite += int((~finite[:first]).sum())

    def _write(self) -> None:
        """Spectra and rounds that are in no file yet."""
        assert self._files is not None
        new = {spectra.FILE: self.spectra.entries(self._written[spectra.FILE])}
        if self._rounds is not None:
            new[ROUNDS] = [{"counts": lines.pack(row)} for row in self._rounds[self._written[ROUNDS] :]]
        for name, entries in new.items():
            self._files[name].append(*entries)
            self._written[name] += len(entries)
