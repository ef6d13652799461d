"""What a run leaves on the host: one entry a test point, and which slots were trained when."""

import numpy as np

from hardjax.engine.rounds import RoundInfo

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


class TrainLog:
    """What the rounds report, on the host.

    Attributes:
        done: back-propagations so far.
        replays: which slots were trained when.
        drops: (n,) times each sample was dropped by trimming.
    """

    def __init__(self, num_slots: int, num_samples: int, by_round: bool) -> None:
        self.done = 0
        self.replays = ReplayLog(num_slots, by_round)
        self.drops = np.zeros(num_samples, np.int64)
        self._recent: dict[str, list[np.ndarray]] = {"train_loss": [], "kept_loss": [], "dropped_loss": []}
        self._share = 1.0

    def add(self, info: RoundInfo, share: float) -> None:
        """Rounds of one dispatch, NumPy leaves (rounds, ...), trained on this share of each batch."""
        self.done += info.loss.size
        self.replays.add(info.slots)
        self._share = share
        self._recent["train_loss"].append(info.loss.ravel())
        if info.trim is None:
            self._recent["kept_loss"].append(info.loss.ravel())
            return
        self._recent["kept_loss"].append(info.trim.kept_loss.ravel())
        self._recent["dropped_loss"].append(info.trim.dropped_loss.ravel())
        self.drops += info.trim.dropped.sum(0)

    def take(self) -> dict[str, float]:
        """Means since the last call."""
        means = {
            name: float(np.concatenate(rows).mean()) if rows else float("nan") for name, rows in self._recent.items()
        }
        self._recent = {name: [] for name in self._recent}
        return means | {"keep_fraction": self._share}


class ReplayLog:
    """How often each slot was trained, and in which round where slots are batches."""

    def __init__(self, num_slots: int, by_round: bool) -> None:
        self._counts = np.zeros(num_slots, np.int64)
        self._rounds: list[np.ndarray] | None = [] if by_round else None

    def add(self, slots: np.ndarray) -> None:
        """slots: (rounds, ...) as a dispatch reports them."""
        for row in slots.reshape(len(slots), -1):
            counts = np.bincount(row, minlength=len(self._counts))
            self._counts += counts
            if self._rounds is not None:
                self._rounds.append(counts.astype(np.uint8))

    @property
    def counts(self) -> np.ndarray:
        """(slots,) times trained."""
        return self._counts.copy()

    @property
    def by_round(self) -> np.ndarray | None:
        """(rounds, slots) times trained in each round; None where slots are samples."""
        return None if self._rounds is None else np.stack(self._rounds)
