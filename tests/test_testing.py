"""The public checks for people's own strategies: ours pass, and each broken promise is found by its name."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hardjax.choose.selection import AllBatches, HardBatches, HardSamples, RandomBatches
from hardjax.testing import assert_selection_is_sound


@pytest.mark.parametrize(
    "strategy",
    [AllBatches(), AllBatches(fixed=True), HardBatches(0.4), RandomBatches(0.4), HardSamples(0.4), HardSamples(1.0)],
    ids=str,
)
def test_ours_are_sound(strategy):
    assert_selection_is_sound(strategy)
    assert_selection_is_sound(strategy, num_slots=7, batch_size=3, seed=1)


class Unhashable(HardBatches):
    __hash__ = None


class Open:
    """A plain class: everybody may change it."""

    unit, redraws = "batch", False
    first_round = staticmethod(lambda: AllBatches(fixed=True))
    init, update = staticmethod(AllBatches().init), staticmethod(AllBatches.update)
    plan = staticmethod(AllBatches().plan)

    def round_steps(self, num_batches):
        return num_batches

    def __eq__(self, other):
        return isinstance(other, Open)

    def __hash__(self):
        return 1


class ById(HardBatches):
    __eq__, __hash__ = object.__eq__, object.__hash__


@dataclass(unsafe_hash=True)
class Thawed(Open):
    delta: float = 0.4


@dataclass(frozen=True)
class OtherUnit(HardBatches):
    unit: ClassVar[str] = "epoch"


@dataclass(frozen=True)
class Undecided(HardBatches):
    redraws: ClassVar = None


class OfArray(HardBatches):
    def __post_init__(self):
        """Leaves its settings as they were given."""


@dataclass(frozen=True)
class NoSteps(HardBatches):
    def round_steps(self, num_batches):
        return int(self.delta * num_batches)


@dataclass(frozen=True)
class ShortTable(HardBatches):
    def init(self, size):
        return jnp.zeros(size - 1)


@dataclass(frozen=True)
class HalfFirst(HardBatches):
    def first_round(self):
        return RepeatsFirst(1.0)


@dataclass(frozen=True)
class RepeatsFirst(HardBatches):
    def plan(self, table, key, size):
        return jnp.arange(size, dtype=jnp.int32) // 2


@dataclass(frozen=True)
class Floats(HardBatches):
    def plan(self, table, key, size):
        return jnp.arange(size, dtype=jnp.float32)


@dataclass(frozen=True)
class WrongSize(HardBatches):
    def plan(self, table, key, size):
        return jax.lax.top_k(table, len(table))[1].astype(jnp.int32)


@dataclass(frozen=True)
class OneBeyond(HardBatches):
    def plan(self, table, key, size):
        return super().plan(table, key, size) + 1


@dataclass(frozen=True)
class Unkeyed(HardBatches):
    def plan(self, table, key, size):
        return jnp.asarray(np.random.permutation(len(table))[:size], jnp.int32)


@dataclass(frozen=True)
class ReadsTheTable(HardBatches):
    def plan(self, table, key, size):
        return jnp.asarray(np.argsort(-np.asarray(table))[:size], jnp.int32)


class Counts(HardBatches):
    """Another plan when traced: Python sees that, JAX does not."""

    def plan(self, table, key, size):
        shift = 1 if isinstance(table, jax.core.Tracer) else 0
        return (super().plan(table, key, size) + shift) % len(table)


class ByObject(HardBatches):
    """Equal objects, each with a plan of its own."""

    def __post_init__(self):
        """Leaves its settings as they were given."""

    def plan(self, table, key, size):
        return (super().plan(table, key, size) + (0 if self.delta is ORIGINAL else 1)) % len(table)


class Share(float):
    """A number whose copies are told apart by identity."""

    def __deepcopy__(self, memo):
        return Share(self)


ORIGINAL = Share(0.4)


@dataclass(frozen=True)
class Half(HardBatches):
    def update(self, table, slots, losses):
        return super().update(table, slots, losses).astype(jnp.float16)


@dataclass(frozen=True)
class Forgets(HardBatches):
    def update(self, table, slots, losses):
        return (0.9 * table).at[slots].set(losses)


@dataclass(frozen=True)
class StoresAll(HardBatches):
    def update(self, table, slots, losses):
        return table.at[slots].set(losses)


@dataclass(frozen=True)
class PythonUpdate(HardBatches):
    def update(self, table, slots, losses):
        return table.at[slots].set(losses) if (losses < 100).all() else table


@pytest.mark.parametrize(
    "strategy, message",
    [
        (Unhashable(0.4), "hashable: Unhashable cannot be hashed"),
        (Open(), "frozen: '_probe' of .* can be set"),
        (Thawed(), "frozen: 'delta' of .* can be set"),
        (ById(0.4), "equal: a copy of"),
        (OtherUnit(0.4), "unit: expected 'batch' or 'sample', got 'epoch'"),
        (Undecided(0.4), "redraws: expected True or False, got None"),
        (OfArray(np.float32(0.4)), "json: the settings of"),
        (NoSteps(0.1), "round_steps: expected at least 1 of 1 batches, got 0"),
        (ShortTable(0.4), r"init: expected \(12,\), got \(11,\)"),
        (HalfFirst(0.4), "first_round: 6 slots are never trained"),
        (Floats(0.4), r"plan: expected \(1,\) int32, got \(1,\) float32"),
        (WrongSize(0.4), r"plan: expected \(1,\) int32, got \(12,\)"),
        (OneBeyond(0.4), r"plan: expected slots in 0..11, got \[12\]"),
        (Unkeyed(0.4), "plan_(pure|jit|equal): "),
        (ReadsTheTable(0.4), "plan_jit: it cannot be traced"),
        (Counts(0.4), "plan_jit: with and without jit differ"),
        (ByObject(ORIGINAL), "plan_equal: planned by an equal object differ"),
        (Half(0.4), r"update: expected \(12,\) float32, got \(12,\)"),
        (Forgets(0.4), "update_others: entries of other slots differ"),
        (StoresAll(0.4), "update_finite: a loss of nan was stored"),
        (PythonUpdate(0.4), "update_jit: it cannot be traced"),
    ],
    ids=lambda value: type(value).__name__ if dataclasses.is_dataclass(value) else "",
)
def test_a_broken_promise_is_found_by_its_name(strategy, message):
    np.random.seed(0)
    with pytest.raises(AssertionError, match=f"^{message}") as error:
        assert_selection_is_sound(strategy)
    assert "\n" not in str(error.value)


def test_what_is_no_strategy_and_sizes_out_of_range():
    with pytest.raises(AssertionError, match=r"^unit: expected .batch. or .sample., got None"):
        assert_selection_is_sound("hard-batches")
    with pytest.raises(ValueError, match="num_slots=2"):
        assert_selection_is_sound(HardBatches(0.4), num_slots=2)
