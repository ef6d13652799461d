"""Fisher measures of a finished run: what it recorded, with any tolerance, and its final state."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hardjax import _validate, checkpoint, fisher
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset
from hardjax.data.augment import preprocess
from hardjax.fisher.measures import TOLERANCE
from hardjax.fisher.observe import FisherMeasure, derive, load, make_observer
from hardjax.rounds import check_observer
from hardjax.runner import Setting, prepare
from hardjax.train import TrainState


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
        """C_K, L_K at the end and their sensitivity."""
        row = {"measurements": len(self.recorded["step"])}
        row |= {name: float(self.recorded[name][-1]) for name in ("C_K", "L_K")}
        return row | {f"C_K at {tolerance:g}": value for tolerance, value in self.recorded_sensitivity.items()}

    def final_row(self) -> dict[str, Any]:
        """Means over the batches measured."""
        names = ("c", "l", "effective_rank", "trace", "noise_scale")
        row = {name: float(np.mean(self.final[name])) for name in names}
        return row | {f"c at {tolerance:g}": value for tolerance, value in self.final_sensitivity.items()}


def measure_run(
    folder: str | os.PathLike,
    batches: int = 8,
    rows: str = "contribution",
    tolerance: float = TOLERANCE,
    data_dir: str | None = None,
    gram_chunk: int | None = None,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
) -> Report:
    """Measures of the run in `folder`, as `run(output=...)` or `hardjax train` left it.

    Args:
        batches: mini-batches of the final partition to measure, without augmentation; 0 for none.
        rows, tolerance: see `fisher.gram`, `fisher.measures`.
        data_dir: where the data is now, if not where the run found it.
        gram_chunk: see `Performance`.
        dataset, model: as given to `run`.

    Raises:
        ValueError: no run in the folder, or what `fisher.gram` refuses.
    """
    _validate.at_least(0, batches=batches)
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"No run in {str(folder)!r}; `hardjax train --output` writes one.")
    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir)
    setting = prepare(config, dataset, model, Performance(gram_chunk=gram_chunk))
    recorded = derive(load(folder), tolerance) if config.measure else {}
    final = {}
    if batches:
        state = checkpoint.restore(folder, setting.init_state())
        final = _measure_state(setting, state, FisherMeasure(rows=rows, tolerance=tolerance), batches)
    return Report(
        recorded=recorded,
        final=final,
        recorded_sensitivity=dict(fisher.sensitivity(recorded["eigenvalues"])) if recorded else {},
        final_sensitivity=dict(fisher.sensitivity(final["eigenvalues"])) if batches else {},
    )


def _measure_state(setting: Setting, state: TrainState, measure: FisherMeasure, batches: int) -> dict[str, np.ndarray]:
    recipe, train = setting.recipe, setting.splits["train"]
    observer = make_observer(measure, setting.performance.gram_chunk)
    check_observer(recipe, observer)

    @jax.jit
    def observe(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = preprocess(train.images[indices], train.mean, train.std, recipe.augmentation)
        return observer.make(recipe.apply)(state.variables, images, train.labels[indices], state.key)

    found = [observe(indices) for indices in state.partition[:batches]]
    values, entries = (np.stack([np.asarray(row[i]) for row in found]) for i in (0, 1))
    rate = setting.config.peak_learning_rate
    measured = fisher.measures(
        jnp.asarray(values), rate, recipe.batch_size, tolerance=measure.tolerance, mean_entry=jnp.asarray(entries)
    )
    fields = {name: np.asarray(value) for name, value in measured._asdict().items()}
    return {"c": fields.pop("condition_number"), "l": fields.pop("energy"), **fields, "eigenvalues": values}
