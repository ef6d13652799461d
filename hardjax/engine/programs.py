"""Compiled programs of a recipe, shared by every run of it in this process: a new seed or rate compiles nothing."""

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.data import Dataset
from hardjax.engine.evaluate import Evaluation, make_evaluate, make_predict
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch, dispatches, step_inputs
from hardjax.engine.recipe import (
    functions_of,
    make_hyper,
    make_recipe,
    make_run_plan,
    splits_on_device,
    table_slots,
    zoo_functions,
)
from hardjax.engine.rounds import Observer, RoundInfo, RoundSpec, make_look, make_plan, make_rounds, make_segment
from hardjax.engine.state import Recipe, Sizes, StepInputs, TrainData, TrainState, make_init

# Dispatch.kind -> builder of the function that trains or plans it.
_BUILDERS = {"plan": make_plan, "segment": make_segment, "rounds": make_rounds}


class Programs:
    """Builds, compiles ahead of time, keeps and calls the programs of one recipe.

    Attributes:
        compile_seconds: spent tracing and compiling so far.
        traces: number of programs compiled so far, by kind ("init", "plan", "segment", "rounds", "look", "evaluate",
            "predict").
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.compile_seconds = 0.0
        self.traces: dict[str, int] = {}
        self._executables: dict[Hashable, Callable] = {}

    def init(self, sizes: Sizes, seed: int, hyper: Hyper, table: Array) -> TrainState:
        """A fresh state with this empty loss table; the seed is traced."""
        build = functools.partial(make_init, self.recipe, sizes)
        return self._call("init", sizes, build, jnp.uint32(seed), hyper, table)

    def plan(self, spec: RoundSpec, donate: bool, state: TrainState) -> TrainState:
        """Begins a round that will be trained in segments."""
        return self._call("plan", spec, functools.partial(make_plan, self.recipe, spec), state, donate=donate)

    def segment(
        self, spec: RoundSpec, donate: bool, state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs
    ) -> tuple[TrainState, RoundInfo]:
        """The next steps of the round under way."""
        build = functools.partial(make_segment, self.recipe, spec)
        return self._call("segment", spec, build, state, data, hyper, inputs, donate=donate)

    def rounds(
        self, spec: RoundSpec, donate: bool, state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs
    ) -> tuple[TrainState, RoundInfo]:
        """Whole rounds."""
        build = functools.partial(make_rounds, self.recipe, spec)
        return self._call("rounds", spec, build, state, data, hyper, inputs, donate=donate)

    def look(self, observer: Observer, unit: str, state: TrainState, data: TrainData) -> Any:
        """What the observer sees of the batch that comes next."""
        build = functools.partial(make_look, self.recipe, observer, unit)
        return self._call("look", (observer, unit), build, state, data)

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
            # Ahead of time, not by calling the jitted function: compilation is not timed as training, and jax settings
            # that live in thread-local contexts would make jit trace once more.
            started = time.perf_counter()
            # A NumPy view of a donated array that is still alive (np.asarray of a leaf, on CPU) disables the donation
            # without a word.
            jitted = jax.jit(build(), donate_argnums=(0,) if donate else ())
            executable = jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - started
            self.traces[kind] = self.traces.get(kind, 0) + 1
            self._executables[signature] = executable
        return executable(*args)


# Bounded: executables live as long as what holds them.
@functools.lru_cache(maxsize=16)
def programs_for(recipe: Recipe) -> Programs:
    """The programs of a recipe; equal recipes get the same object. Recipes of people's own networks are equal within
    one call of `run` or `compare` alone: their functions are made anew each time, see `recipe.functions_of`."""
    return Programs(recipe)


def lowerable(
    config: Any,
    dataset: Dataset,
    *,
    model: Any = None,
    bound: int = 64,
    eval_batch_size: int = 500,
    trim_path: str = "auto",
    trim_programs: int = 5,
    gram_chunk: int | None = None,
) -> dict[str, tuple[Callable, tuple]]:
    """Every program of a run as {name: (function, arguments)}, for `jax.jit(function).lower(*arguments)` anywhere.

    Arguments are shapes and dtypes: nothing is computed (but for what trimming tries out) and no device is needed.
    Names are such as "init", "rounds first 1x9", "rounds 4x2", "plan 97", "segment 16", "look", "evaluate" and
    "predict"; of trimmed programs and later stages with what tells them apart.

    Args:
        config: a `TrainConfig`.
        dataset: the data, of which the shapes are read.
        model: one's own network; None creates `config.model`.
        bound: steps in a dispatch; the other settings as in `Performance`.

    Raises:
        ValueError: data, model and configuration do not fit.
    """
    dataset = dataset.with_validation(config.validation)
    if model is None:
        functions = zoo_functions(config.model, dataset.num_classes, config.model_options)
    else:
        functions = functions_of(model)
    recipe = make_recipe(config, dataset, functions)
    plan = make_run_plan(config, recipe, bound=bound, trim_path=trim_path, trim_programs=trim_programs)
    hyper, data = _shapes((make_hyper(config), splits_on_device(dataset)))
    programs, states = {}, []
    for index, stage in enumerate(plan.stages):
        table = jax.eval_shape(lambda stage=stage: plan.selection.init(table_slots(recipe, stage.sizes)))
        init = make_init(recipe, stage.sizes), (jax.ShapeDtypeStruct((), jnp.uint32), hyper, table)
        programs["init" if index == 0 else f"init of stage {index}"] = init
        states.append(jax.eval_shape(init[0], *init[1]))
    for call in dispatches(plan):
        if _name(call) in programs:
            continue
        state, train = states[call.stage], data["train"]
        if call.kind == "look":
            observer = config.measure.observer(gram_chunk)
            programs[_name(call)] = make_look(recipe, observer, plan.stages[call.stage].sizes.unit), (state, train)
        else:
            args = () if call.kind == "plan" else (train, hyper, _shapes(step_inputs(plan, call)))
            programs[_name(call)] = _BUILDERS[call.kind](recipe, call.spec), (state, *args)
    test = data["test"]
    images = jax.ShapeDtypeStruct((eval_batch_size, *recipe.image_shape), test.images.dtype)
    programs["evaluate"] = make_evaluate(recipe, eval_batch_size), (states[0].variables, test)
    programs["predict"] = make_predict(recipe), (states[0].variables, images, test.mean, test.std)
    return programs


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _name(call: Dispatch) -> str:
    spec, stage = call.spec, f" of stage {call.stage}" if call.stage else ""
    if call.kind == "look":
        return "look" + stage
    size = f"{spec.rounds}x{spec.steps}" if call.kind == "rounds" else f"{spec.steps}"
    trim = f" {spec.trim.path} {spec.trim.capacity}" if spec.trim else ""
    first = " first" if call.kind != "segment" and call.before.backprops == 0 else ""
    return f"{call.kind}{first} {size}{trim}{stage}"
