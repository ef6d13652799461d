"""A run under way at one of its points: what a test there finds, and what is saved beside its state."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from hardjax.choose.selection import table_mean
from hardjax.engine.plan import Position, RunPlan, learning_rate
from hardjax.engine.population import is_finite
from hardjax.engine.state import TrainState
from hardjax.training import resume
from hardjax.training.feed import Feed, evaluated
from hardjax.training.record import Record
from hardjax.training.setting import Setting


class Run(Protocol):
    """What is told of a run under way, or of one member of a population; the attributes are those of `Loop`."""

    setting: Setting
    position: Position
    record: Record
    seconds: float
    compile_seconds: float
    compile_wait_seconds: float
    input_wait_seconds: float | None
    resumed_at: tuple[int, ...]


def facts(run: Run, end: str | None) -> dict[str, Any]:
    """What is saved beside a state; everything has been read by then.

    Args:
        end: why the run ended, None where it goes on.
    """
    setting, record = run.setting, run.record
    last = record.history.entries[-1:]
    scored = bool(last) and last[0]["backprops"] == run.position.backprops and "validation" in setting.splits
    return resume.facts(
        setting,
        run.position,
        record=record.marks(),
        seconds=run.seconds,
        compile_seconds=run.compile_seconds,
        compile_wait_seconds=run.compile_wait_seconds,
        input_wait_seconds=run.input_wait_seconds,
        resumed_at=list(run.resumed_at),
        end=end,
        # A step that was skipped left nothing behind.
        finite=setting.config.on_nan == "skip-step" or record.bad_steps == 0,
        validation={"top1": last[0]["validation_top1"], "loss": last[0]["validation_loss"]} if scored else None,
    )


def test(run: Run, plan: RunPlan, state: TrainState, feed: Feed | None = None) -> dict[str, Any]:
    """A test point, written down; returns its entry.

    Args:
        feed: of the images that are not on the device.
    """
    config, measure = run.setting.config, run.setting.config.measure
    entry = _test_point(run.setting, plan, state, run.position.backprops, feed)
    entry |= run.record.spectra.latest(measure.tolerance) if measure else {}
    skipped = run.record.bad_steps if config.on_nan == "skip-step" else 0
    size = plan.batch_size(run.position.backprops)
    return run.record.tested(**entry, batch_size=size, skipped=skipped, seconds=run.seconds)


_LOSSES = ("train_loss", "full_train_loss", "validation_loss", "test_loss")
_TOP1 = ("full_train_top1", "validation_top1")


def is_lost(entry: Mapping[str, Any], state: TrainState) -> bool:
    """Whether no step can bring a run back: parameters are no numbers, and neither is a loss, of any sample.

    Parameters alone do not say so: behind a weight of minus infinity a rectifier is 0, and the others train on. Where
    nothing is predicted that is right or wrong nobody knows of all samples, and the run goes on.

    Args:
        entry: of the test point at hand; a sample whose loss is no number counts as wrong there.
    """
    if any(math.isfinite(entry[name]) for name in _LOSSES) or entry["test_top1"] != 0:
        return False
    if any(entry[name] > 0 for name in _TOP1):  # NaN where it was not evaluated
        return False
    return not bool(is_finite(state.params))


def _test_point(setting: Setting, plan: RunPlan, state: TrainState, done: int, feed: Feed | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "epoch": float(plan.epoch(done)),
        "backprops": done,
        "table_loss": table_mean(state.table),
        "learning_rate": learning_rate(plan, done - 1),
        "samples_hash": "".join(f"{word:08x}" for word in jax.device_get(state.samples_hash).tolist()),
    }
    variables = setting.tested(state)
    names = {"train": "full_train", "validation": "validation", "test": "test"}
    for split, name in names.items():
        if split not in setting.splits or (split == "train" and not setting.config.evaluate_train):
            continue
        measured = evaluated(setting, variables, split, feed)
        correct = float("nan") if measured.correct is None else measured.correct.item()
        top1 = 100 * correct / len(setting.splits[split].labels)
        entry |= {f"{name}_loss": float(measured.loss), f"{name}_top1": top1}
    return entry
