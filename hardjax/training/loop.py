"""`run`: a configuration in, history and final state out; the one place where the engine meets clock, files, screen."""

import dataclasses
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

from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.engine.plan import Dispatch, Facts, Position, RunPlan, learning_rate, next_dispatch, step_inputs
from hardjax.engine.state import TrainState
from hardjax.fisher.gram import memory_advice
from hardjax.training import checkpoint, files
from hardjax.training.progress import ProgressBar, Silent
from hardjax.training.record import History, Record
from hardjax.training.setting import DISPATCH_SECONDS, Setting, prepare


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
    """
    plain = setting.config.to_dict()
    folder = None if output is None else files.claim_folder(output, overwrite)
    if folder is not None:
        files.write_json(folder / "config.json", plain)
    bar = ProgressBar(setting.config.epochs) if progress else Silent()
    with bar, _interruptible() as interrupted:
        result = _train(setting, bar, interrupted, folder)
    if folder is not None:
        files.write_json(folder / "summary.json", result.summary)
        np.savez_compressed(
            folder / "replays.npz",
            counts=result.replay_counts,
            drops=result.drop_counts,
            **({} if result.replays is None else {"by_round": result.replays}),
        )
        checkpoint.save(folder, result.state)
    return result


class _Run:
    """One run under way: what is on the device, what is on the host, and how long it took.

    Between decision points one dispatch is in flight while the report of the one before is read. At them everything is
    read first, so that testing is not timed as training and every decision sees the same facts, however the run was cut
    into dispatches.
    """

    def __init__(self, setting: Setting, bar: Any, folder: Path | None) -> None:
        self.setting, self.bar, self.folder = setting, bar, folder
        self.plan = setting.plan
        self.seconds = 0.0
        self.compiled_before = setting.programs.compile_seconds
        self.state = setting.init_state()
        self.position = Position()
        self.record = Record(setting.plan, self.state.table.shape[0])
        self._in_flight: tuple[Dispatch, Any] | None = None
        self._window: tuple[float, float, int] | None = (
            None  # clock, compile seconds and back-propagations at its start
        )

    def go(self, interrupted: threading.Event) -> str:
        """Train to the end; returns why it ended."""
        facts = Facts()
        while (dispatch := next_dispatch(self.plan, self.position, facts)) is not None:
            self._issue(dispatch)
            if dispatch.test:
                self._decide()
                facts = Facts("spectrum not finite" if self._spectrum_ends_it() else None)
            elif self._window is not None and dispatch.before.backprops == 0 and dispatch.trained:
                self._read()  # the first steps are timed at once: how many fit a dispatch follows from them
                self._rebound()
            if interrupted.is_set() and self.position.backprops and self.position.backprops < self.plan.steps:
                if not dispatch.test:
                    self._decide()
                facts = Facts("interrupted")
        return facts.stop or "budget spent"

    def _issue(self, dispatch: Dispatch) -> None:
        """Hand a dispatch to the device, then read what the one before it reported."""
        programs, donate = self.setting.programs, self.setting.performance.donate
        train, hyper = self.setting.splits["train"], self.setting.hyper
        if self._window is None:
            self._window = (time.perf_counter(), programs.compile_seconds, self.position.backprops)
        report = None
        if dispatch.kind == "plan":
            self.state = programs.plan(dispatch.spec, donate, self.state)
        elif dispatch.kind == "look":
            unit = self.setting.sizes.unit
            with self._explained_memory():
                report = programs.look(self.setting.observer, unit, self.state, train)
        else:
            call = programs.rounds if dispatch.kind == "rounds" else programs.segment
            inputs = jax.device_put(step_inputs(self.plan, dispatch))
            self.state, report = call(dispatch.spec, donate, self.state, train, hyper, inputs)
        before, self.position = self._in_flight, dispatch.after
        self._in_flight = (dispatch, report)
        self._take(before)

    def _read(self) -> None:
        """Everything that was handed out."""
        before, self._in_flight = self._in_flight, None
        self._take(before)

    def _take(self, flown: tuple[Dispatch, Any] | None) -> None:
        if flown is None or flown[1] is None:
            return
        dispatch, report = flown
        if dispatch.kind == "look":
            with self._explained_memory():
                self.record.looked(dispatch, jax.device_get(report))
            return
        info = jax.device_get(report)
        self.record.trained(dispatch, info)
        epoch = float(self.plan.epoch(dispatch.after.backprops))
        self.bar.update(epoch, float(info.loss.mean()), 100 * float(info.top1.mean()))

    def _rebound(self) -> None:
        """Fewer steps a dispatch where they take much longer than was expected of the network."""
        if self.setting.performance.steps_per_dispatch is not None or self._window is None:
            return
        started, compiled, backprops = self._window
        spent = time.perf_counter() - started - (self.setting.programs.compile_seconds - compiled)
        affordable = int(DISPATCH_SECONDS * (self.position.backprops - backprops) / max(spent, 1e-9))
        if affordable < self.plan.bound / 4:
            self.plan = dataclasses.replace(self.plan, bound=max(1, affordable))

    def _decide(self) -> None:
        """Drain, stop the clock, test, write."""
        self._read()
        jax.block_until_ready(self.state)
        started, compiled, _ = self._window
        self.seconds += time.perf_counter() - started - (self.setting.programs.compile_seconds - compiled)
        self._window = None
        config, measure = self.setting.config, self.setting.config.measure
        entry = _test_point(self.setting, self.plan, self.state, self.position.backprops) | self.record.take_means()
        entry |= self.record.spectra.latest(measure.tolerance) if measure else {}
        entry = self.record.history.add(**entry, batch_size=config.batch_size, seconds=self.seconds)
        self.bar.tested(entry)
        if self.folder is not None:
            files.append_line(self.folder / "history.jsonl", entry)
            if measure is not None:
                self.record.spectra.save(self.folder)

    def _spectrum_ends_it(self) -> bool:
        measure = self.setting.config.measure
        return measure is not None and measure.stop_when_not_finite and not self.record.spectra.all_finite

    @contextmanager
    def _explained_memory(self) -> Iterator[None]:
        """Out of memory while spectra are measured: say what to set."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            measure, batch = self.setting.config.measure, self.setting.config.batch_size
            advice = memory_advice(measure.rows, measure.method, self.setting.performance.gram_chunk, batch)
            raise MemoryError(f"Out of memory while measuring batches of {batch}: {advice}.") from error


def _train(setting: Setting, bar: Any, interrupted: threading.Event, folder: Path | None) -> RunResult:
    run = _Run(setting, bar, folder)
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


def _test_point(setting: Setting, plan: RunPlan, state: TrainState, done: int) -> dict[str, float]:
    entry = {
        "epoch": float(plan.epoch(done)),
        "backprops": done,
        "table_loss": float(state.table.mean()),
        "learning_rate": learning_rate(plan, done - 1),
    }
    names = {"train": "full_train", "validation": "validation", "test": "test"}
    size = setting.performance.eval_batch_size
    for split, name in names.items():
        if split not in setting.splits or (split == "train" and not setting.config.evaluate_train):
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
