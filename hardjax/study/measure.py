"""Fisher measures of a finished run: what it recorded, with any tolerance, where it went, and its final state."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hardjax.fisher as fisher
from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.data.augment import preprocess
from hardjax.engine.plan import learning_rate
from hardjax.engine.state import TrainState
from hardjax.fisher.measures import TOLERANCE
from hardjax.fisher.observe import FisherMeasure, derive
from hardjax.study.beacons import Trail
from hardjax.study.trails import errors_at, trail_between
from hardjax.training import checkpoint, files, lines, lock, record, spectra
from hardjax.training.probe import check_observer
from hardjax.training.resume import check_network, placed, shapes_of
from hardjax.training.setting import Setting, prepare

_FINAL = ("final_test_top1", "final_full_train_top1")  # of a summary


@dataclass(frozen=True)
class Report:
    """Measures of one run.

    Attributes:
        recorded: the record of the training, as `fisher.observe.derive` gives it; empty if it measured none.
        final: measures of the final state, field -> (batches,), with raw "eigenvalues" (batches, B); empty for none.
        recorded_sensitivity, final_sensitivity: C_K, or the mean c, for each tolerance (`fisher.sensitivity`).
    """

    recorded: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    recorded_sensitivity: dict[float, float]
    final_sensitivity: dict[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return dataclasses.asdict(self)

    def training_row(self) -> dict[str, Any]:
        """C_K, L_K at the end (both readings), the noise scale of all measurements together, the sensitivity of C_K."""
        row = {"measurements": len(self.recorded["step"])}
        row |= {
            name: float(self.recorded[name][-1]) if row["measurements"] else float("nan")
            for name in ("C_K", "L_K", "C_K by epoch", "L_K by epoch")
        }
        row |= _noise(self.recorded)
        return row | {f"C_K at {tolerance:g}": value for tolerance, value in self.recorded_sensitivity.items()}

    def final_row(self) -> dict[str, Any]:
        """Means over the batches measured, and the noise scale of all of them together."""
        row = {name: float(np.mean(self.final[name])) for name in ("c", "l", "effective_rank", "trace")}
        row |= _noise(self.final)
        return row | {f"c at {tolerance:g}": value for tolerance, value in self.final_sensitivity.items()}


def measure_run(
    folder: str | os.PathLike,
    batches: int = 8,
    rows: str | None = None,
    tolerance: float = TOLERANCE,
    data_dir: str | None = None,
    gram_chunk: int | None = None,
    *,
    float64: bool = False,
    dataset: Dataset | None = None,
    model: Any = None,
    loss: Callable | None = None,
) -> Report:
    """Measures of the run in `folder`, as `run(output=...)` or `hardjax train` left it (or of its checkpoint folder).

    Args:
        batches: mini-batches of the final partition to measure, without augmentation, at the learning rate of the last
            step; 0 for none, which needs no data.
        rows: see `fisher.gram`; None takes those that the run measured, else "contribution".
        tolerance: see `fisher.measures`.
        data_dir: where the data is now, if not where the run found it.
        gram_chunk: see `Performance`.
        float64: of the network and its Gram matrices at the final state (the weights are what training left).
        dataset, model: as given to `run`.
        loss: as given in its configuration, where that is a function which is not found by its name.

    Raises:
        ValueError: no run in the folder, or what `fisher.gram` refuses.
    """
    _validate.at_least(0, batches=batches)
    config, folder = _configured(folder)
    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir, loss=loss or config.loss)
    recorded = derive(spectra.load(folder), tolerance) if config.measure else {}
    final = {}
    if batches:
        setting = prepare(config, dataset, model, Performance(gram_chunk=gram_chunk))
        kept, state = checkpoint.newest(folder, lambda one: shapes_of(setting, one))
        check_network(folder, kept, setting)
        setting = placed(setting, kept)
        rows = rows or (config.measure.rows if config.measure else "contribution")
        final = _measure_state(setting, state, FisherMeasure(rows=rows, tolerance=tolerance), batches, float64)
    return Report(
        recorded=recorded,
        final=final,
        recorded_sensitivity=dict(fisher.sensitivity(recorded["eigenvalues"])) if recorded else {},
        final_sensitivity=dict(fisher.sensitivity(final["eigenvalues"])) if batches else {},
    )


def read_trail(folder: str | os.PathLike, shares: Sequence[float] | None = None) -> tuple[Trail, dict[str, Any]]:
    """Where the finished run in `folder` went in the C_K-L_K plane, and its settings (`TrainConfig.to_dict`).

    Args:
        shares: of the run's epochs, rising; None takes the end of every epoch.

    Raises:
        ValueError: no run in the folder, one that is not finished, or one without spectra.
    """
    config, folder = _configured(folder)
    summary = _finished(folder)
    raw, history = spectra.load(folder), lines.read_lines(folder / record.HISTORY)
    points = np.arange(1.0, config.epochs + 1) if shares is None else np.asarray(shares, np.float64) * config.epochs
    try:
        errors = errors_at(points, history)
    except (AttributeError, KeyError, TypeError) as error:
        raise Refusal(f"Damaged {record.HISTORY} in {str(folder)!r}: {_validate.first_line(error)}.") from None
    trail = trail_between(config, summary, raw, errors, points, run=str(folder))
    return trail, config.to_dict()


def _finished(folder: Path) -> dict[str, Any]:
    """The summary of a run that is, with what is read of it."""
    summary = files.read_summary(folder)
    if lock.is_being_written(folder) or not summary or summary.get("interrupted", True):
        raise Refusal(f"The run in {str(folder)!r} is not finished; `hardjax show` says how far it is.")
    try:
        if lacking := [name for name in ("end", "diverged", *_FINAL) if name not in summary]:
            raise Refusal(f"it lacks {', '.join(lacking)}.")
        _validate.boolean(diverged=summary["diverged"])
        if not isinstance(end := summary["end"], str):
            raise Refusal(f"Expected end={_validate.shown(end)} to be text.")
        for name in _FINAL:
            value = summary[name]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise Refusal(f"Expected {name}={_validate.shown(value)} to be a number or null.")
    except Refusal as refusal:
        raise Refusal(f"Damaged summary.json in {str(folder)!r}: {refusal}") from None
    return summary


def _configured(folder: str | os.PathLike) -> tuple[TrainConfig, Path]:
    """The configuration of a run and its folder, given that or its checkpoint folder."""
    plain, folder = files.read_config(folder), _validate.local_folder(run=folder)
    return TrainConfig.from_dict(plain), folder.parent if folder.name == "checkpoint" else folder


def _noise(fields: dict[str, np.ndarray]) -> dict[str, Any]:
    found = fisher.noise_scale(fields["covariance"], fields["signal"])
    return {"noise_scale": found.scale, "drowned": f"{found.drowned} of {found.batches}"}


def _measure_state(
    setting: Setting, state: TrainState, measure: FisherMeasure, batches: int, float64: bool
) -> dict[str, np.ndarray]:
    recipe, train = setting.recipe, setting.splits["train"]
    observer = measure.observer(setting.performance.gram_chunk)
    check_observer(recipe, state.partition.shape[1], observer, setting.dataset)
    with jax.enable_x64(float64):
        observe = jax.jit(observer.make(recipe.apply, recipe.loss))
        variables = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.variables) if float64 else state.variables
        )
        found = []
        for indices in state.partition[:batches]:
            # Preprocessed in float32 as in training; float64 from there on shows what the network's own rounding does.
            images = preprocess(setting.dataset.train.take(indices), train.mean, train.std, recipe.augmentation)
            images = np.asarray(images, np.float64) if float64 else images
            found.append(observe(variables, images, train.labels[indices], state.key))
    values, entries = (np.stack([np.asarray(row[i]) for row in found]) for i in (0, 1))
    # The final state has no next step: the rate is that of its last one.
    rate = learning_rate(setting.plan, max(0, int(state.step) - 1))
    measured = fisher.measures(values, rate, state.partition.shape[1], tolerance=measure.tolerance, mean_entry=entries)
    fields = {name: np.asarray(value) for name, value in measured._asdict().items()}
    return {"c": fields.pop("condition_number"), "l": fields.pop("energy"), **fields, "eigenvalues": values}
