"""Which mini-batches the next round trains: frozen strategies of pure functions over a loss table.

Every strategy has `init(size) -> table`, `plan(table, key, size) -> slots (size,)` and
`update(table, slots, losses) -> table`. A slot is a row of the partition (`unit = "batch"`) or a sample
(`unit = "sample"`). None of them runs a model; the table holds plain mean losses as last seen in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax._validate import Refusal


class Planner(Protocol):
    """What a round asks of a strategy."""

    unit: ClassVar[str]  # "batch": slots are rows of the partition; "sample": slots are samples

    @property
    def redraws(self) -> bool:
        """A fresh partition for every round."""
        ...

    def plan(self, table: Array, key: Array, size: int) -> Array: ...
    def update(self, table: Array, slots: Array, losses: Array) -> Array: ...


@runtime_checkable
class Selection(Planner, Protocol):
    """What a run asks of a strategy; bring your own by writing one (frozen and hashable)."""

    # first_round: the strategy of round 0, which trains N batches and fills the table

    def first_round(self) -> Planner: ...
    def round_steps(self, num_batches: int) -> int: ...
    def init(self, size: int) -> Array: ...


def empty_table(size: int) -> Array:
    """(size,) of minus infinity: a slot without a finite loss yet sorts last, whatever the sign of the others."""
    return jnp.full((size,), -jnp.inf, jnp.float32)


def table_mean(table: Array) -> float:
    """Mean of the finite entries, nats, on the host; NaN where there is none."""
    entries = np.asarray(table, np.float64)
    known = entries[np.isfinite(entries)]
    return float(known.mean()) if known.size else float("nan")


def update_table(table: Array, slots: Array, losses: Array) -> Array:
    """Write the finite losses into their slots; a non-finite loss leaves the old entry.

    Args:
        table: (size,) nats.
        slots: any shape, distinct indices into the table.
        losses: same shape, nats.
    """
    # `lax.top_k` ranks NaN by its sign bit, first or last: a slot whose entry has the sign set would never be replayed
    # again, and never get another entry.
    losses = lax.stop_gradient(losses).astype(table.dtype)
    return table.at[slots].set(jnp.where(jnp.isfinite(losses), losses, table[slots]))


@dataclass(frozen=True)
class AllBatches:
    """Every mini-batch once a round, in the order of the partition: ordinary training.

    Attributes:
        fixed: keep one partition for the whole run (the control for `HardBatches`, whose batches keep their
            members) instead of drawing a fresh one each epoch.
    """

    fixed: bool = False
    unit: ClassVar[str] = "batch"

    def __post_init__(self) -> None:
        _settings.settle(self)

    @property
    def redraws(self) -> bool:
        return not self.fixed

    def first_round(self) -> "AllBatches":
        return self

    def round_steps(self, num_batches: int) -> int:
        return num_batches

    def init(self, size: int) -> Array:
        return empty_table(size)

    def plan(self, table: Array, key: Array, size: int) -> Array:
        # The order of the partition: a fresh one is random by itself, and round 0 of P1 trains the fixed one in order.
        return jnp.arange(size, dtype=jnp.int32)

    update = staticmethod(update_table)


@dataclass(frozen=True)
class _ShareOfBatches:
    """What replaying a share delta of fixed mini-batches has in common, whoever picks them."""

    delta: float
    unit: ClassVar[str] = "batch"
    # P1: a batch keeps its members for the whole run, or its recorded loss would be that of other samples.
    redraws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.in_half_open_unit(delta=self.delta)

    def first_round(self) -> Planner:
        """Round 0 trains all N batches in order and fills the table."""
        return AllBatches(fixed=True)

    def round_steps(self, num_batches: int) -> int:
        """max(1, round(delta * N)), Python's rounding (halves to even)."""
        return max(1, round(self.delta * num_batches))

    def init(self, size: int) -> Array:
        return empty_table(size)

    update = staticmethod(update_table)


@dataclass(frozen=True)
class HardBatches(_ShareOfBatches):
    """Replay the delta * N mini-batches of highest recorded loss, hardest first (P1, Algorithm 2).

    Equal losses keep the order of their slots (`lax.top_k`: the lower slot first). Losses of batches that are
    not replayed stay as they were.

    Attributes:
        delta: share of the mini-batches in a round, in (0, 1].

    Raises:
        ValueError: delta outside (0, 1].
    """

    def plan(self, table: Array, key: Array, size: int) -> Array:
        return lax.top_k(table, size)[1].astype(jnp.int32)


@dataclass(frozen=True)
class RandomBatches(_ShareOfBatches):
    """The control for `HardBatches`: the same rounds over the same fixed batches, picked uniformly at random.

    Attributes:
        delta: share of the mini-batches in a round, in (0, 1]; drawn without replacement within a round.

    Raises:
        ValueError: delta outside (0, 1].
    """

    def plan(self, table: Array, key: Array, size: int) -> Array:
        return jax.random.permutation(key, table.shape[0])[:size].astype(jnp.int32)


@dataclass(frozen=True)
class HardSamples(_ShareOfBatches):
    """Replay single samples of highest recorded loss, shuffled into batches (an extension, in no paper).

    A round holds as many batches as a round of `HardBatches(delta)`. Its samples are the hardest of the table, ties by
    lower index, dealt into batches at random; where a round needs more than there are, they repeat in the same order.

    Attributes:
        delta: share of the samples in a round, in (0, 1].

    Raises:
        ValueError: delta outside (0, 1].
    """

    unit: ClassVar[str] = "sample"

    def first_round(self) -> Planner:
        """Round 0 deals all samples into N batches and fills the table."""
        return _EverySample()

    def plan(self, table: Array, key: Array, size: int) -> Array:
        distinct = min(size, table.shape[0])
        # Shuffled after they were picked: dealt in order, the first batch would hold the hardest samples alone.
        hardest = jax.random.permutation(key, lax.top_k(table, distinct)[1])
        return hardest[jnp.arange(size) % distinct].astype(jnp.int32)


@dataclass(frozen=True)
class _EverySample:
    """Round 0 of `HardSamples`: a permutation of all samples, wrapped round to fill the last batch."""

    unit: ClassVar[str] = "sample"
    redraws: ClassVar[bool] = False

    def plan(self, table: Array, key: Array, size: int) -> Array:
        num_samples = table.shape[0]
        return jax.random.permutation(key, num_samples)[jnp.arange(size) % num_samples].astype(jnp.int32)

    update = staticmethod(update_table)


def writes_at_once(selection: Planner) -> bool:
    """Whether the losses of several steps may be written together: the slots of a round are distinct batches, and an
    entry is the last loss. Of ours alone: one of somebody else's may train a batch twice, or weigh its losses."""
    return type(selection) in (AllBatches, HardBatches, RandomBatches)


STRATEGIES = {
    "all-batches": AllBatches,
    "hard-batches": HardBatches,
    "random-batches": RandomBatches,
    "hard-samples": HardSamples,
}


def to_dict(selection: Selection) -> dict:
    """{"name": ..., its settings} for JSON; a strategy of one's own goes by its class name."""
    return AXIS.write(selection)


def from_dict(settings: dict) -> Selection:
    """The strategy that `to_dict` wrote.

    Raises:
        ValueError: unknown name (the closest one is offered) or setting.
    """
    if not isinstance(settings, Mapping):
        raise Refusal(f"Expected selection={settings!r} to be a JSON object with a name.")
    return AXIS.read(settings, "selection")


AXIS = Axis(
    STRATEGIES,
    flags={"selection": "name", "delta": "delta", "fixed": "fixed"},
    defaults={"delta": 0.2},  # P1's smallest share
)
