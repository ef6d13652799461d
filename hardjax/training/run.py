"""`run`: a configuration in, history and final state out."""

import json
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import OutOfMemory, ran_out_of_memory
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine import devices
from hardjax.engine.state import TrainState
from hardjax.training import checkpoint, files, hosts, lines, points
from hardjax.training import resume as resuming
from hardjax.training.ahead import Compiler
from hardjax.training.checkpoint import RunWarning
from hardjax.training.loop import Loop
from hardjax.training.opening import check_output, followed, opened
from hardjax.training.progress import ProgressBar, Silent
from hardjax.training.record import FIELDS
from hardjax.training.setting import Setting, prepare
from hardjax.training.signals import interruptible


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        config: as given, with the names of the data and the model that were used.
        history: field -> (test points,) NumPy array, see `record.History`.
        state: final `TrainState` on the device.
        summary: final figures, as in summary.json; accuracies in percent.
        replays: (rounds, N) times each batch was trained in each round, or None where slots are samples.
        replay_counts: (N,) or (n,) times each slot was trained; under a batch plan in the last stage, whose slots they
            are.
        drop_counts: (n,) times trimming dropped each sample of a batch that was trained.
        measurements: field -> (measurements, ...) of the spectra measured, see `fisher.derive`; empty without.
        decisions: lines of decisions.jsonl, of a controller of the batch size; `batch_plan.replayed` makes the plan of
            them that trains to the same bits.
    """

    config: TrainConfig
    history: dict[str, np.ndarray]
    state: TrainState = field(repr=False)
    summary: dict[str, Any]
    replays: np.ndarray | None = field(repr=False)
    replay_counts: np.ndarray = field(repr=False)
    drop_counts: np.ndarray = field(repr=False)
    measurements: dict[str, np.ndarray] = field(repr=False)
    decisions: list[dict[str, Any]] = field(default_factory=list, repr=False)


def run(
    config: TrainConfig,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    variables: Any = None,
    performance: Performance | None = None,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> RunResult:
    """Train as configured: exactly epochs * N back-propagations, tested once per N by default.

    Args:
        config: everything that decides the result.
        dataset: one's own data; None loads `config.dataset`.
        model: one's own network of any make (see `hj.models.make_apply`); None creates `config.model`.
        variables: {"params", "batch_stats"} to start from, such as `hj.models.from_torch` gives; None draws them.
        performance: speed and memory only.
        output, overwrite, resume, progress: as in `train`.

    Ctrl-C or SIGTERM ends the run after the dispatch under way, saved, with what was reached; a second one at once.

    Of several processes (`jax.distributed`) each makes the same call; process 0 alone writes into `output`, and shows
    progress.

    Raises:
        ValueError: data, model and configuration do not fit, in one line.
    """
    with hosts.together("begin this run"):
        if output is not None and hosts.leads():  # before data is read and a network traced
            check_output(output, overwrite, resume)
        setting = prepare(config, dataset, model, performance, variables)
    return train(setting, output, overwrite, resume, progress)


def train(
    setting: Setting,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    keep: bool = True,
    while_finite: bool = False,
) -> RunResult:
    """`run` of what `setting.prepare` made.

    Args:
        output: folder for config.json, history.jsonl, summary.json and the checkpoints; None writes nothing.
        overwrite: let `output` hold another run already, which is removed.
        resume: go on with the run in `output` from its newest checkpoint, to the same bits as if it had never been
            interrupted; without one it begins anew, and of a finished one the result is read.
        progress: a progress bar on standard error.
        keep: leave the last state, summary.json and replays.npz in the folder; a comparison, which keeps its results
            elsewhere, asks for what an interrupted run needs alone.
        while_finite: end at the first test point at which no step can bring the run back (`points.is_lost`): the result
            is that of a member of a population that diverged.

    Raises:
        ValueError: the folder holds another run, or cannot be written.
        OutOfMemory: (a ValueError and a MemoryError) of the device.
    """
    # Before the folder is cleared: what is no JSON (a strategy of one's own may hold anything) is refused here.
    plain = setting.config.to_dict()
    if hosts.several():
        hosts.check_same(resuming.shared(setting))
    compiled, waited = setting.programs.compile_seconds, setting.programs.wait_seconds
    with ExitStack() as held:
        with hosts.together("write there, as process 0 is to"):
            folder, start, saver = opened(held, setting, output, overwrite, resume)
        start, record = followed(setting, output, resume, start, folder)
        steps, shown = setting.plan.steps, progress and hosts.leads()
        bar = held.enter_context(ProgressBar(setting.config.epochs, steps=steps) if shown else Silent())
        # To the last file: a signal between two of them would leave a run that looks cut short.
        asked = held.enter_context(interruptible())
        if start is not None and start.end is not None:
            bar.say(f"the run in {str(output)!r} is finished: nothing is left to do")
            loop = Loop(setting, bar, compiled, folder, saver, start, record=record)
            result = result_of(setting, loop, start.end, None)
            if folder is not None and not is_told(folder, result):  # killed before its last files, or they were damaged
                write(folder, result)
            return result
        with explained_memory(setting):
            if (visible := len(devices.visible())) > 1:
                among = f" by {jax.process_count()} processes" if hosts.several() else ""
                bar.say(f"training on {setting.performance.devices} of the {visible} devices that are visible{among}")
            if setting.dataset.streamed:
                stored = setting.dataset.train
                shape = "x".join(map(str, stored.image_shape))
                bar.say(f"{stored.num_samples:,} images of {shape} are read while it trains")
            # What the device has no room for is refused before anything that is there is removed.
            with hosts.together("hold this run"):
                setting.compile(output is not None, *((start.position, start.state) if start is not None else ()))
            if folder is not None:
                begin(folder, plain, resume, start)
            if start is not None:
                bar.say(f"going on from {start.position.backprops:,} of {steps:,} back-propagations")
            background = setting.performance.compile_ahead == "background"
            compiler = held.enter_context(Compiler(setting)) if background else None
            loop = Loop(setting, bar, compiled, folder, saver, start, waited, compiler, record, while_finite)
            end = loop.go(asked)
        result = result_of(setting, loop, end, asked.signal)
        if folder is not None and saver is not None and (keep or end == "interrupted"):
            saver.finish(loop.state, loop.facts(None if end == "interrupted" else end))
            write(folder, result)
    if end == "diverged" and hosts.leads():
        warnings.warn(_last_words(loop, folder), RunWarning, stacklevel=2)
    return result


def begin(folder: Path, plain: Mapping[str, Any], resume: bool, start: resuming.Start | None) -> None:
    """The folder as it is while a run is under way."""
    if start is not None:
        checkpoint.forget(folder, start.position.backprops)
    else:
        if resume:
            said = f"Nothing to go on from in {str(folder)!r}: the run begins at its start."
            warnings.warn(said, RunWarning, stacklevel=3)
        files.clear(folder)
    (folder / "summary.json").unlink(missing_ok=True)
    files.write_json(folder / "config.json", plain)


def write(folder: Path, result: RunResult) -> None:
    """The last files of a run."""
    files.save_arrays(
        folder / "replays.npz",
        counts=result.replay_counts,
        drops=result.drop_counts,
        **({} if result.replays is None else {"by_round": result.replays}),
    )
    # Last: where it is, everything is.
    files.write_json(folder / "summary.json", result.summary)


def is_told(folder: Path, result: RunResult) -> bool:
    """Whether summary.json says what the run came to, wherever it was trained."""
    try:
        there = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    here = json.loads(lines.encode(result.summary))
    clocks = ("compile_seconds", "compile_wait_seconds", "input_wait_seconds")
    where = (*clocks, "interrupted", "signal", "devices", "processes", *files.environment())
    return isinstance(there, dict) and all(there.get(name) == here[name] for name in here if name not in where)


def _last_words(loop: Loop, folder: Path | None) -> str:
    """Of a run that diverged: when, and what is left of before."""
    bad = loop.record.first_bad
    said = "The run diverged: a spectrum was not finite" if bad is None else f"The run diverged at step {bad + 1:,}"
    kept = [] if folder is None else [one for one in checkpoint.kept(folder) if one.facts.get("finite")]
    return f"{said}; the last checkpoint before that is {str(kept[-1].path)!r}." if kept else f"{said}."


def result_of(setting: Setting, loop: Any, end: str, asked: signal.Signals | None) -> RunResult:
    """What a run, or a member of a population, that ended gives.

    Args:
        loop: as `points.Run`, with its state.
        end: why it ended.
        asked: by which signal.
    """
    record, measure = loop.record, setting.config.measure
    return RunResult(
        config=setting.config,
        history=record.history.arrays(),
        state=loop.state,
        summary=_summarise(setting, loop)
        | {"interrupted": asked is not None, "end": end, "signal": None if asked is None else asked.name},
        replays=record.replays,
        replay_counts=np.asarray(loop.state.visits),
        drop_counts=np.asarray(loop.state.drops),
        measurements=record.spectra.derived(measure.tolerance) if measure else {},
        decisions=record.decisions,
    )


@contextmanager
def explained_memory(setting: Setting) -> Iterator[None]:
    """Out of memory in training: say what to set."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"Out of memory in training {setting.config.model} on batches of {max(setting.config.batch_sizes)}: take a"
            " smaller batch, network, image size or Performance.eval_batch_size."
        ) from error


def _summarise(setting: Setting, loop: points.Run) -> dict[str, Any]:
    entries, done = loop.record.history.entries, loop.position.backprops
    # A run that was cut short before its first test point has no figures yet.
    last = entries[-1] if entries else dict.fromkeys(FIELDS, float("nan"))
    return {
        "dataset": setting.dataset.name,
        "backprops": done,
        "num_batches": setting.sizes.num_batches,
        "seconds_per_step": loop.seconds / done if done else float("nan"),
        "train_seconds": loop.seconds,
        "compile_seconds": loop.compile_seconds,
        "compile_wait_seconds": loop.compile_wait_seconds,
        **{f"final_{name}": last[name] for name in ("test_top1", "test_loss", "full_train_top1", "full_train_loss")},
        "diverged": bool(entries) and not np.isfinite(last["test_loss"]),
        "bad_steps": loop.record.bad_steps,
        "first_bad_step": loop.record.first_bad,
        "never_finite_batches": loop.record.never_finite,
        "resumed_at": list(loop.resumed_at),
        "devices": setting.performance.devices,
        **({"processes": jax.process_count()} if hosts.several() else {}),
        **({} if loop.input_wait_seconds is None else {"input_wait_seconds": loop.input_wait_seconds}),
        **files.environment(),
    }
