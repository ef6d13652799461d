"""`run`: a configuration in, history and final state out; the one place where the engine meets clock, files, screen."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hardjax._validate import OutOfMemory
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.plan import dispatches
from hardjax.engine.rates import make_schedule
from hardjax.engine.rounds import RoundInfo, RoundSpec
from hardjax.engine.step import TrainState
from hardjax.fisher.gram import memory_advice
from hardjax.fisher.observe import Spectra
from hardjax.training import checkpoint, files
from hardjax.training.progress import ProgressBar, Silent
from hardjax.training.record import History, TrainLog
from hardjax.training.setting import Setting, prepare


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        config: as given, with the names of the data and the model that were used.
        history: field -> (test points,) NumPy array, see `history.History`.
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
    """
    plain = setting.config.to_dict()
    folder = None if output is None else files.claim_folder(output, overwrite)
    if folder is not None:
        files.write_json(folder / "config.json", plain)
    bar = ProgressBar(setting.config.epochs, num_batches=setting.recipe.num_batches) if progress else Silent()
    with bar, _interruptible() as interrupted:
        result = _train(setting, bar, interrupted, folder)
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
    config, recipe, programs, performance = setting.config, setting.recipe, setting.programs, setting.performance
    compiled_before = programs.compile_seconds
    state = setting.init_state()
    steps_per_round = config.selection.round_steps(recipe.num_batches)
    history, spectra = History(), Spectra(recipe.num_batches)
    log = TrainLog(state.table.shape[0], recipe.num_samples, by_round=config.selection.unit == "batch")
    seconds = 0.0
    plan = dispatches(
        recipe.num_batches, steps_per_round, config.epochs, config.test_every, performance.steps_per_dispatch
    )
    end = "budget spent"
    for dispatch in plan:
        spec, hyper, share = setting.at(dispatch, log.done)
        phase = _phase(spec, log.done, spectra.last_step)
        compiled, started = programs.compile_seconds, time.perf_counter()
        with _explained_memory(setting):
            state, info = programs.rounds(
                spec, performance.donate, state, setting.splits["train"], hyper, dispatch.rounds, phase
            )
            info = _first_rounds(jax.device_get(info), dispatch.rounds)
        _record_spectra(spectra, setting, spec, info, log.done, phase)
        seconds += time.perf_counter() - started - (programs.compile_seconds - compiled)
        log.add(info, share)
        bar.update(log.done / recipe.num_batches, float(info.loss.mean()), 100 * float(info.top1.mean()))
        if interrupted.is_set() and log.done < config.epochs * recipe.num_batches:
            end = "interrupted"
        elif config.measure is not None and config.measure.stop_when_not_finite and not spectra.all_finite:
            end = "spectrum not finite"
        stop = end != "budget spent"
        if dispatch.test or stop:
            entry = _test_point(setting, state, log.done) | log.take() | spectra.latest(log.done, config.measure)
            entry = history.add(**entry, seconds=seconds)
            bar.tested(entry)
            if folder is not None:
                files.append_line(folder / "history.jsonl", entry)
            if folder is not None and config.measure is not None:
                spectra.save(folder, log.done)
        if stop:
            break
    summary = _summarise(setting, history, seconds, programs.compile_seconds - compiled_before)
    summary |= {"interrupted": interrupted.is_set(), "end": end}
    replays = log.replays
    measured = spectra.derived(log.done, config.measure) if config.measure else {}
    return RunResult(config, history.arrays(), state, summary, replays.by_round, replays.counts, log.drops, measured)


def _phase(spec: RoundSpec, done: int, last: int | None) -> int:
    """The `phase` of `make_rounds` with which rounds go on being observed about every `every` steps."""
    if spec.observer is None or last is None:
        return 0
    wait = round(max(0, spec.observer.every - (done + spec.observed_steps[0] - last)) / spec.steps)
    return -min(wait, spec.stride - 1) % spec.stride


def _record_spectra(
    spectra: Spectra, setting: Setting, spec: RoundSpec, info: RoundInfo, done: int, phase: int
) -> None:
    if spec.observer is None:
        return
    config = setting.config
    factor, total = make_schedule(config.schedule), int(setting.hyper.total_steps)
    values, mean_entries = info.observed
    for i in range(len(values)):
        if (phase + i) % spec.stride and spec.steps < spec.observer.every:
            continue
        for j, position in enumerate(spec.observed_steps):
            step = done + i * spec.steps + position
            rate = config.peak_learning_rate * float(factor(step / total))
            slot = int(info.slots[i, position]) if config.selection.unit == "batch" else -1
            spectra.add(step, rate, values[i, j], mean_entries[i, j], slot)


@contextmanager
def _explained_memory(setting: Setting) -> Iterator[None]:
    """Out of memory while spectra are measured: say what to set."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        measure = setting.config.measure
        if measure is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        batch = setting.recipe.batch_size
        advice = memory_advice(measure.rows, measure.method, setting.performance.gram_chunk, batch)
        raise OutOfMemory(f"Out of memory while measuring batches of {batch}: {advice}.") from error


def _first_rounds(info: RoundInfo, rounds: int) -> RoundInfo:
    return jax.tree.map(lambda leaf: leaf[:rounds], info)


def _test_point(setting: Setting, state: TrainState, done: int) -> dict[str, float]:
    config = setting.config
    factor = make_schedule(config.schedule)((done - 1) / (config.epochs * setting.recipe.num_batches))
    entry = {
        "epoch": done / setting.recipe.num_batches,
        "backprops": done,
        "table_loss": float(state.table.mean()),
        "learning_rate": config.peak_learning_rate * float(factor),
        "batch_size": config.batch_size,
    }
    names = {"train": "full_train", "validation": "validation", "test": "test"}
    size = setting.performance.eval_batch_size
    for split, name in names.items():
        if split not in setting.splits or (split == "train" and not config.evaluate_train):
            continue
        measured = setting.programs.evaluate(size, state.variables, setting.splits[split])
        top1 = 100 * int(measured.correct) / len(setting.splits[split].labels)
        entry |= {f"{name}_loss": float(measured.loss), f"{name}_top1": top1}
    return entry


def _summarise(setting: Setting, history: History, seconds: float, compile_seconds: float) -> dict[str, Any]:
    last = history.entries[-1]
    return {
        "dataset": setting.dataset.name,
        "backprops": last["backprops"],
        "num_batches": setting.recipe.num_batches,
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
