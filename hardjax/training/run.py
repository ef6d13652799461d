"""`run`: a configuration in, history and final state out."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import OutOfMemory, ran_out_of_memory
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.state import TrainState
from hardjax.training import checkpoint, files
from hardjax.training.loop import Loop
from hardjax.training.progress import ProgressBar, Silent
from hardjax.training.record import History
from hardjax.training.setting import Setting, prepare


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        config: as given, with the names of the data and the model that were used.
        history: field -> (test points,) NumPy array, see `record.History`.
        state: final `TrainState` on the device.
        summary: final figures, as in summary.json; accuracies in percent.
        replays: (rounds, N) times each batch was trained in each round, or None where slots are samples.
        replay_counts: (N,) or (n,) times each slot was trained.
        drop_counts: (n,) times trimming dropped each sample of a batch that was trained.
        measurements: field -> (measurements, ...) of the spectra measured, see `fisher.derive`; empty without.
    """

    config: TrainConfig
    history: dict[str, np.ndarray]
    state: TrainState = field(repr=False)
    summary: dict[str, Any]
    replays: np.ndarray | None = field(repr=False)
    replay_counts: np.ndarray = field(repr=False)
    drop_counts: np.ndarray = field(repr=False)
    measurements: dict[str, np.ndarray] = field(repr=False)


def run(
    config: TrainConfig,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    variables: Any = None,
    performance: Performance | None = None,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> RunResult:
    """Train as configured: exactly epochs * N back-propagations, tested once per N by default.

    Args:
        config: everything that decides the result.
        dataset: one's own data; None loads `config.dataset`.
        model: one's own Linen module (`module(images, train) -> logits`); None creates `config.model`.
        variables: {"params", "batch_stats"} to start from, such as `hj.models.from_torch` gives; None draws them.
        performance: speed and memory only.
        output, overwrite, progress: as in `train`.

    Ctrl-C ends the run after the dispatch under way, with what was reached; pressed twice it raises.

    Raises:
        ValueError: data, model and configuration do not fit, in one line.
    """
    return train(prepare(config, dataset, model, performance, variables), output, overwrite, progress)


def train(
    setting: Setting, output: str | os.PathLike | None = None, overwrite: bool = False, progress: bool = True
) -> RunResult:
    """`run` of what `setting.prepare` made.

    Args:
        output: folder for config.json, history.jsonl, summary.json and the checkpoint; None writes nothing.
        overwrite: let `output` hold another run already.
        progress: a progress bar on standard error.

    Raises:
        ValueError: the folder holds another run, or cannot be written.
        OutOfMemory: (a ValueError and a MemoryError) of the device.
    """
    # Before the folder is cleared: what is no JSON (a strategy of one's own may hold anything) is refused here.
    plain = setting.config.to_dict()
    folder = None if output is None else files.claim_folder(output, overwrite)
    if folder is not None:
        files.write_json(folder / "config.json", plain)
    bar = ProgressBar(setting.config.epochs, steps=setting.plan.steps) if progress else Silent()
    with bar, _interruptible() as interrupted:
        try:
            result = _train(setting, bar, interrupted, folder)
        except jax.errors.JaxRuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"Out of memory in training {setting.config.model} on batches of {setting.config.batch_size}: take a"
                " smaller batch, network, image size or Performance.eval_batch_size."
            ) from error
    if folder is not None:
        files.write_json(folder / "summary.json", result.summary)
        files.save_arrays(
            folder / "replays.npz",
            counts=result.replay_counts,
            drops=result.drop_counts,
            **({} if result.replays is None else {"by_round": result.replays}),
        )
        checkpoint.save(folder, result.state)
    return result


def _train(setting: Setting, bar: Any, interrupted: threading.Event, folder: Path | None) -> RunResult:
    run = Loop(setting, bar, folder)
    end = run.go(interrupted)
    record, measure = run.record, setting.config.measure
    summary = _summarise(setting, record.history, run.seconds, setting.programs.compile_seconds - run.compiled_before)
    return RunResult(
        config=setting.config,
        history=record.history.arrays(),
        state=run.state,
        summary=summary | {"interrupted": interrupted.is_set(), "end": end},
        replays=record.replays,
        replay_counts=np.asarray(run.state.visits),
        drop_counts=np.asarray(run.state.drops),
        measurements=record.spectra.derived(measure.tolerance) if measure else {},
    )


def _summarise(setting: Setting, history: History, seconds: float, compile_seconds: float) -> dict[str, Any]:
    last = history.entries[-1]
    return {
        "dataset": setting.dataset.name,
        "backprops": last["backprops"],
        "num_batches": setting.sizes.num_batches,
        "seconds_per_step": seconds / last["backprops"],
        "train_seconds": seconds,
        "compile_seconds": compile_seconds,
        **{f"final_{name}": last[name] for name in ("test_top1", "test_loss", "full_train_top1", "full_train_loss")},
        "diverged": not bool(np.isfinite(last["test_loss"])),
        **files.environment(),
    }


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that it never hits between a donated state and its successor."""
    event = threading.Event()
    # Python lets the main thread alone set handlers; elsewhere (a server, a notebook's worker) Ctrl-C is not ours.
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
