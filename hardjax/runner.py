"""`run`: a configuration in, history and final state out; the one place where the engine meets clock, files, screen."""

import dataclasses
import functools
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
import jax.numpy as jnp
import numpy as np

from hardjax import checkpoint, data, models, results, trimming
from hardjax.budget import Dispatch, dispatches
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, Split
from hardjax.data.augment import Augmentation, named
from hardjax.fisher.observe import Spectra, SpectrumObserver, make_observer
from hardjax.history import History, TrainLog
from hardjax.models.apply import init_variables, make_apply
from hardjax.optimizers import Hyper
from hardjax.programs import Programs, programs_for
from hardjax.progress import ProgressBar, Silent
from hardjax.rounds import RoundInfo, RoundSpec, check_observer
from hardjax.schedules import make_schedule
from hardjax.train import Recipe, TrainData, TrainState, check_model, exact_trim_paths, replace
from hardjax.trimming import TrimPlan


@dataclass(frozen=True)
class RunResult:
    """What `run` returns.

    Attributes:
        config: as given.
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
        output: folder for config.json, history.jsonl, summary.json and the checkpoint; None writes nothing.
        overwrite: let `output` hold another run already.
        progress: a progress bar on standard error.

    Ctrl-C ends the run after the dispatch under way, with what was reached; pressed twice it raises.

    Raises:
        ValueError: data, model and configuration do not fit, in one line.
    """
    performance = performance or Performance()
    setting = prepare(config, dataset, model, performance, variables)
    folder = None if output is None else results.claim_folder(output, overwrite)
    if folder is not None:
        results.write_json(folder / "config.json", config.to_dict())
    bar = ProgressBar(config.epochs) if progress else Silent()
    with bar, _interruptible() as interrupted:
        result = _train(setting, bar, interrupted, folder)
    if folder is not None:
        results.write_json(folder / "summary.json", result.summary)
        np.savez_compressed(
            folder / "replays.npz",
            counts=result.replay_counts,
            drops=result.drop_counts,
            **({} if result.replays is None else {"by_round": result.replays}),
        )
        checkpoint.save(folder, result.state)
    return result


@dataclass(frozen=True)
class Setting:
    """A configuration with its data on the device and its programs."""

    config: TrainConfig
    performance: Performance
    dataset: Dataset
    recipe: Recipe
    programs: Programs
    hyper: Hyper
    splits: dict[str, TrainData]
    trims: TrimPlan | None
    observer: SpectrumObserver | None
    start: Any = None

    def init_state(self) -> TrainState:
        selection = self.config.selection
        slots = self.recipe.num_batches if selection.unit == "batch" else self.recipe.num_samples
        state = self.programs.init(self.config.seed, self.hyper, selection.init(slots))
        if self.start is None:
            return state
        # Copies: a donated state would take the caller's arrays with it.
        given = jax.tree.map(lambda new, old: jnp.array(new, old.dtype), self.start, state.variables)
        return replace(state, params=given["params"], batch_stats=given["batch_stats"])

    def at(self, dispatch: Dispatch, done: int) -> tuple[RoundSpec, Hyper, float]:
        """(program, traced numbers, share of each batch) of a dispatch that starts after `done` back-propagations."""
        selection = self.config.selection.first_round() if dispatch.first else self.config.selection
        spec = RoundSpec(selection, dispatch.steps, dispatch.max_rounds, observer=self.observer)
        if self.trims is None:
            return spec, self.hyper, 1.0
        trimming, epochs = self.config.trimming, self.config.epochs
        epoch = done // self.recipe.num_batches
        keep = trimming.keep_count(epoch, epochs, self.recipe.batch_size)
        spec = dataclasses.replace(spec, trim=self.trims.trim(keep))
        return spec, self.hyper._replace(keep=jnp.int32(keep)), trimming.share(epoch, epochs)


def prepare(
    config: TrainConfig,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    variables: Any = None,
) -> Setting:
    """Everything that a run needs before its first step.

    Raises:
        ValueError: data, model and configuration do not fit.
    """
    dataset = dataset if dataset is not None else data.load(config.dataset, config.data_dir)
    dataset = dataset.with_validation(config.validation)
    num_samples = len(dataset.train.labels)
    if config.batch_size > num_samples:
        raise ValueError(f"Expected batch_size={config.batch_size} to be at most the {num_samples} training samples.")
    if model is None:
        model = models.create(config.model, num_classes=dataset.num_classes, **config.model_options)
    init, apply = _functions(model)
    recipe = Recipe(
        init_variables=init,
        apply=apply,
        optimizer=config.optimizer,
        schedule=config.schedule,
        augmentation=config.augmentation
        if isinstance(config.augmentation, Augmentation)
        else named(config.augmentation, dataset.train.images.shape[1:], dataset.flip),
        precision=config.precision,
        batch_size=config.batch_size,
        num_samples=num_samples,
        image_shape=tuple(dataset.train.images.shape[1:]),
    )
    expected = check_model(recipe, dataset.num_classes)
    if variables is not None:
        _check_variables(variables, expected)
    performance = performance or Performance()
    trims = config.trimming and trimming.make_plan(
        config.trimming,
        config.epochs,
        config.batch_size,
        exact_trim_paths(recipe),
        performance.trim_path,
        performance.trim_programs,
    )
    hyper = Hyper(
        learning_rate=jnp.float32(config.peak_learning_rate),
        weight_decay=jnp.float32(config.weight_decay),
        momentum=jnp.float32(config.momentum),
        total_steps=jnp.int32(config.epochs * recipe.num_batches),
        keep=jnp.int32(config.batch_size),
    )
    observer = config.measure and make_observer(config.measure, performance.gram_chunk)
    if observer is not None:
        check_observer(recipe, observer)
    splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    splits = {name: _on_device(split, dataset) for name, split in splits.items() if split is not None}
    return Setting(
        config, performance, dataset, recipe, programs_for(recipe), hyper, splits, trims, observer, variables
    )


def _check_variables(given: Any, expected: Any) -> None:
    """Raises ValueError listing what is missing, unexpected or of another shape."""

    def shapes(tree: Any) -> dict[str, tuple]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, wanted = shapes(dict(given)), shapes(expected)
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and found[name] != wanted[name]]
    faults += [f"{name} {found[name]} instead of {wanted[name]}" for name in both]
    if faults:
        raise ValueError(f"The variables do not fit the model: {'; '.join(faults)}.")


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
    for dispatch in plan:
        spec, hyper, share = setting.at(dispatch, log.done)
        phase = _phase(spec, log.done, spectra.last_step)
        compiled, started = programs.compile_seconds, time.perf_counter()
        with _explained_memory(config):
            state, info = programs.rounds(
                spec, performance.donate, state, setting.splits["train"], hyper, dispatch.rounds, phase
            )
            info = _first_rounds(jax.device_get(info), dispatch.rounds)
        seconds += time.perf_counter() - started - (programs.compile_seconds - compiled)
        _record_spectra(spectra, setting, spec, info, log.done, phase)
        log.add(info, share)
        bar.update(log.done / recipe.num_batches, float(info.loss.mean()), 100 * float(info.top1.mean()))
        stop = interrupted.is_set() or (
            config.measure is not None and config.measure.stop_when_not_finite and not spectra.last_is_finite()
        )
        if dispatch.test or stop:
            entry = _test_point(setting, state, log.done) | log.take() | spectra.latest(log.done, config.measure)
            entry = history.add(**entry, seconds=seconds)
            bar.tested(entry)
            if folder is not None:
                results.append_line(folder / "history.jsonl", entry)
            if folder is not None and config.measure is not None:
                spectra.save(folder, log.done)
        if stop:
            break
    summary = _summarise(setting, history, seconds, programs.compile_seconds - compiled_before)
    replays = log.replays
    measured = spectra.derived(log.done, config.measure) if config.measure else {}
    return RunResult(config, history.arrays(), state, summary, replays.by_round, replays.counts, log.drops, measured)


def _phase(spec: RoundSpec, done: int, last: int | None) -> int:
    """The `phase` of `make_rounds` with which rounds go on being observed about every `every` steps."""
    if spec.observer is None or last is None:
        return 0
    wait = round(max(0, spec.observer.every - (done - last)) / spec.steps)
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
            spectra.add(step, rate, values[i, j], mean_entries[i, j])


@contextmanager
def _explained_memory(config: TrainConfig) -> Iterator[None]:
    """Out of memory while spectra are measured: say what to set."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if config.measure is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"Out of memory while measuring batches of {config.batch_size}: set Performance.gram_chunk="
            f"{max(1, config.batch_size // 4)} (--gram-chunk), or a smaller batch_size."
        ) from error


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
    budget = setting.config.epochs * setting.recipe.num_batches
    return {
        "dataset": setting.dataset.name,
        "backprops": last["backprops"],
        "num_batches": setting.recipe.num_batches,
        "seconds_per_step": seconds / last["backprops"],
        "train_seconds": seconds,
        "compile_seconds": compile_seconds,
        **{f"final_{name}": last[name] for name in ("test_top1", "test_loss", "full_train_top1", "full_train_loss")},
        "diverged": not bool(np.isfinite(last["train_loss"])),
        "interrupted": last["backprops"] < budget,
        **results.environment(),
    }


def _on_device(split: Split, dataset: Dataset) -> TrainData:
    return TrainData(*(jnp.asarray(leaf) for leaf in (split.images, split.labels, dataset.mean, dataset.std)))


def _functions(module: Any) -> tuple:
    """(init, apply) of a module, the same objects for equal modules, so that equal recipes share programs."""
    try:
        return _cached_functions(module)
    except TypeError:  # a module with unhashable fields has programs of its own
        return _cached_functions.__wrapped__(module)


@functools.lru_cache(maxsize=64)
def _cached_functions(module: Any) -> tuple:
    return functools.partial(init_variables, module), make_apply(module)


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
