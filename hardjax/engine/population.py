"""Members of a population trained by one program: their states stacked, each step that of a run alone."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax.engine.memory import Temporary
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch, RunPlan, step_inputs
from hardjax.engine.programs import Programs, programs_for
from hardjax.engine.rounds import RoundInfo
from hardjax.engine.state import Recipe, Sizes, StepInputs, TrainData, TrainState

MOST = 32  # members in one program, unless asked for otherwise
# Settings in which members may differ: a compiled program takes them, or what follows from them, as inputs.
DIFFERING = ("seed", "learning_rate", "base_learning_rate", "weight_decay", "momentum", "schedule")


class Members(NamedTuple):
    """What each member has of its own, beside its state and its steps' inputs.

    Attributes:
        hyper: leaves (P,).
        live: (P,) bool; the state of the others stays as it is.
    """

    hyper: Hyper
    live: Array


def by_vmap(kind: str, function: Callable) -> Callable:
    """A program of `Programs` for stacked states, all members at once: equal to that of one up to rounding."""
    if kind in ("plan", "restage"):
        return jax.vmap(function, (0,) if kind == "plan" else (0, None))

    def train(state: TrainState, data: TrainData, members: Members, inputs: StepInputs) -> tuple:
        return jax.vmap(_of_live(function, data))(state, members, inputs)

    return train


def by_map(kind: str, function: Callable) -> Callable:
    """A program of `Programs` for stacked states, one member after the other: on CPU the bits of one alone. Members
    that are not live cost nothing."""
    if kind == "plan":
        return lambda state: lax.map(function, state)
    if kind == "restage":
        return lambda state, table: lax.map(lambda one: function(one, table), state)

    def train(state: TrainState, data: TrainData, members: Members, inputs: StepInputs) -> tuple:
        return lax.map(lambda row: _of_live(function, data)(*row), (state, members, inputs))

    return train


def _of_live(function: Callable, data: TrainData) -> Callable:
    """(state, members, inputs) of one member -> what it trains to; its state and zeros where it is not live."""

    def train(state: TrainState, one: Members, inputs: StepInputs) -> tuple[TrainState, RoundInfo]:
        shapes = jax.eval_shape(function, state, data, one.hyper, inputs)[1]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.cond(one.live, lambda: function(state, data, one.hyper, inputs), lambda: (state, nothing))

    return train


_MAPPED = {"vmap": by_vmap, "map": by_map}


class PopulationPrograms:
    """The programs of a population: first states are drawn by those of one run, and training is mapped over members.

    What is evaluated or measured of a member is so by the programs of one run (`alone`).

    Args:
        recipe: that all members share.
        mode: "vmap" or "map".
    """

    def __init__(self, recipe: Recipe, mode: str) -> None:
        self.recipe, self.alone = recipe, programs_for(recipe)
        self._together: Programs = programs_for(recipe, _MAPPED[mode])
        self.plan, self.segment, self.rounds = self._together.plan, self._together.segment, self._together.rounds
        self.restage = self._together.restage

    def init(self, sizes: Sizes, seeds: Sequence[int], hypers: Sequence[Hyper], table: Array) -> TrainState:
        """Fresh states, stacked."""
        return stack([self.alone.init(sizes, *own, table) for own in zip(seeds, hypers, strict=True)])

    @property
    def compile_seconds(self) -> float:
        return self.alone.compile_seconds + self._together.compile_seconds

    @property
    def wait_seconds(self) -> float:
        return self.alone.wait_seconds + self._together.wait_seconds

    def temporaries(self) -> list[Temporary]:
        """As `Programs.temporaries`."""
        return self.alone.temporaries() + self._together.temporaries()

    @property
    def traces(self) -> dict[str, int]:
        """As `Programs.traces`."""
        return dict(Counter(self.alone.traces) + Counter(self._together.traces))


def population_inputs(plans: Sequence[RunPlan], dispatch: Dispatch) -> StepInputs:
    """The numbers of a dispatch's steps, a row a member, on the host: leaves (P, steps) NumPy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(step_inputs(plan, dispatch) for plan in plans))


def split(count: int, most: int | None) -> tuple[int, list[range]]:
    """(places of each program, members of each chunk): as few chunks as there may be, of sizes one apart at most."""
    chunks = -(-count // (MOST if most is None else most))
    edges = [count * place // chunks for place in range(chunks + 1)]
    return -(-count // chunks), [range(*pair) for pair in itertools.pairwise(edges)]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal shapes as one, with a leading axis of members."""
    return _stacked(tuple(trees))


def member_of(tree: Any, index: int) -> Any:
    """One member of a stacked tree."""
    return _taken(tree, np.int32(index))


@jax.jit
def is_finite(tree: Any) -> Array:
    """() bool, whether all numbers of a tree are."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@jax.jit
def _stacked(trees: tuple) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _taken(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)
