"""Compiled programs of a recipe, shared by every run of it in this process: a new seed or rate compiles nothing."""

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.engine.evaluate import Evaluation, make_evaluate, make_predict
from hardjax.engine.optimizers import Hyper
from hardjax.engine.rounds import RoundInfo, RoundSpec, make_rounds
from hardjax.engine.step import Recipe, TrainData, TrainState, make_init


class Programs:
    """Builds, compiles ahead of time, keeps and calls the programs of one recipe.

    Attributes:
        compile_seconds: spent tracing and compiling so far.
        traces: number of programs compiled so far, by kind ("init", "round", "evaluate", "predict").
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.compile_seconds = 0.0
        self.traces: dict[str, int] = {}
        self._executables: dict[Hashable, Callable] = {}

    def init(self, seed: int, hyper: Hyper, table: Array) -> TrainState:
        """A fresh state with this empty loss table; the seed is traced."""
        return self._call("init", None, functools.partial(make_init, self.recipe), jnp.uint32(seed), hyper, table)

    def rounds(
        self,
        spec: RoundSpec,
        donate: bool,
        state: TrainState,
        data: TrainData,
        hyper: Hyper,
        count: int,
        phase: int = 0,
    ) -> tuple[TrainState, RoundInfo]:
        """`count` rounds in one dispatch; see `rounds.make_rounds`."""
        build = functools.partial(make_rounds, self.recipe, spec)
        return self._call("round", spec, build, state, data, hyper, jnp.int32(count), jnp.int32(phase), donate=donate)

    def evaluate(self, batch_size: int, variables: Any, split: TrainData) -> Evaluation:
        """Loss and accuracy over a whole split."""
        build = functools.partial(make_evaluate, self.recipe, batch_size)
        return self._call("evaluate", batch_size, build, variables, split)

    def predict(self, variables: Any, images: Array, mean: Array, std: Array) -> Array:
        """Logits of stored images."""
        return self._call("predict", None, functools.partial(make_predict, self.recipe), variables, images, mean, std)

    def _call(self, kind: str, key: Hashable, build: Callable, *args: Any, donate: bool = False) -> Any:
        leaves, structure = jax.tree.flatten(args)
        signature = (kind, key, donate, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        executable = self._executables.get(signature)
        if executable is None:
            started = time.perf_counter()
            jitted = jax.jit(build(), donate_argnums=(0,) if donate else ())
            executable = jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - started
            self.traces[kind] = self.traces.get(kind, 0) + 1
            self._executables[signature] = executable
        return executable(*args)


@functools.lru_cache(maxsize=16)
def programs_for(recipe: Recipe) -> Programs:
    """The programs of a recipe; equal recipes get the same object."""
    return Programs(recipe)
