"""What a run leaves on the host: one entry a test point, which slots were trained in which round, raw spectra."""

from typing import Any

import numpy as np

from hardjax.engine.plan import Dispatch, RunPlan, learning_rate
from hardjax.engine.rounds import RoundInfo
from hardjax.training.spectra import Spectra

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
    "c",
    "l",
    "C_K",
    "L_K",
    "seconds",
)


class History:
    """Entries by test point; fields that were not measured are NaN.

    Losses are in nats, accuracies in percent, `seconds` of training so far (planning and dispatch included, compilation
    and testing not). `train_loss` is the mean over what was trained since the test point before, so replay of hard
    batches biases it upwards; `table_loss` is the mean of the loss table; `full_train_*` evaluate the whole training
    split and are what arms are compared by. `keep_fraction` is trimming's share in the epoch before the test point,
    `kept_loss` and `dropped_loss` the mean losses of the samples kept and dropped since the test point before. `c`, `l`
    are those of the last batch measured, `C_K`, `L_K` of all so far (`fisher.Trajectory`).
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def add(self, **entry: float) -> dict[str, float]:
        self.entries.append({name: entry.get(name, float("nan")) for name in FIELDS})
        return self.entries[-1]

    def arrays(self) -> dict[str, np.ndarray]:
        """Field -> (test points,) array."""
        whole = ("backprops", "batch_size")
        return {
            name: np.asarray([entry[name] for entry in self.entries], np.int64 if name in whole else np.float64)
            for name in FIELDS
        }


class Record:
    """What the dispatches of a run report, in their order.

    Args:
        plan: of the run.
        num_slots: entries of the loss table.

    Attributes:
        history: of test points.
        spectra: measured so far.
    """

    def __init__(self, plan: RunPlan, num_slots: int) -> None:
        self.history = History()
        self.spectra = Spectra(plan.measure_every or 1)
        self._plan = plan
        self._num_slots = num_slots
        # Of a run over samples, rounds times n counts would outgrow everything else.
        self._rounds: list[np.ndarray] | None = [] if plan.selection.unit == "batch" else None
        self._recent: dict[str, list[np.ndarray]] = {"train_loss": [], "kept_loss": [], "dropped_loss": []}
        self._share = 1.0

    def trained(self, dispatch: Dispatch, info: RoundInfo) -> None:
        """A segment or rounds; NumPy leaves."""
        self._share = dispatch.share
        self._recent["train_loss"].append(np.ravel(info.loss))
        self._recent["kept_loss"].append(np.ravel(info.loss if info.kept_loss is None else info.kept_loss))
        if info.dropped_loss is not None:
            self._recent["dropped_loss"].append(np.ravel(info.dropped_loss))
        if self._rounds is None:
            return
        goes_on = dispatch.before.cursor > 0
        for row in info.slots.reshape(dispatch.spec.rounds, -1):
            counts = np.bincount(row, minlength=self._num_slots)
            # A round that was cut is one row, whatever its segments: no `Performance` setting shows in the record.
            if goes_on:
                counts += self._rounds.pop()
            # Nearly all counts are 0 or 1, but a strategy may train one batch as often as it likes in a round.
            self._rounds.append(counts.astype(np.min_scalar_type(counts.max(initial=0))))

    def looked(self, dispatch: Dispatch, seen: tuple[Any, np.ndarray]) -> None:
        """A measurement."""
        (values, mean_entry), slot = seen
        step = dispatch.before.backprops
        rate = learning_rate(self._plan, step)
        self.spectra.add(step, float(self._plan.epoch(step)), rate, values, mean_entry, int(slot))

    def take_means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {
            name: float(np.concatenate(rows).mean()) if rows else float("nan") for name, rows in self._recent.items()
        }
        self._recent = {name: [] for name in self._recent}
        return means | {"keep_fraction": self._share}

    @property
    def replays(self) -> np.ndarray | None:
        """(rounds, slots) times trained in each round; None where slots are samples."""
        return None if self._rounds is None else np.stack(self._rounds)
