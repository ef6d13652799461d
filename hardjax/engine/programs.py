"""Compiled programs of a recipe, shared by every run of it in this process: a new seed or rate compiles nothing."""

import functools
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.choose.trimming import Trim
from hardjax.data import Dataset
from hardjax.engine import memory
from hardjax.engine.evaluate import Evaluation, make_evaluate, make_predict
from hardjax.engine.memory import Need, Temporary
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch, Position, RunPlan, dispatches, step_inputs
from hardjax.engine.recipe import (
    functions_named,
    functions_of,
    make_hyper,
    make_recipe,
    make_run_plan,
    splits_on_device,
    table_slots,
)
from hardjax.engine.rounds import Observer, RoundInfo, RoundSpec, make_look, make_plan, make_rounds, make_segment
from hardjax.engine.state import Recipe, Sizes, StepInputs, TrainData, TrainState, make_init, make_restage

# Dispatch.kind -> builder of the function that trains or plans it.
_BUILDERS = {"plan": make_plan, "segment": make_segment, "rounds": make_rounds}
_START = Position()


class Programs:
    """Builds, compiles ahead of time, keeps and calls the programs of one recipe.

    A program that its device has no room for is refused when it is compiled (`OutOfMemory`), before it is called.

    Attributes:
        compile_seconds: spent tracing and compiling so far.
        traces: number of programs compiled so far, by kind ("init", "restage", "plan", "segment", "rounds", "look",
            "evaluate", "predict").
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.compile_seconds = 0.0
        self.traces: dict[str, int] = {}
        self._compiled: dict[Hashable, _Program] = {}
        self._shapes: dict[Hashable, TrainState] = {}

    def init(self, sizes: Sizes, seed: int, hyper: Hyper, table: Array) -> TrainState:
        """A fresh state with this empty loss table; the seed is traced."""
        return self._call("init", sizes, jnp.uint32(seed), hyper, table)

    def restage(self, sizes: Sizes, state: TrainState, table: Array) -> TrainState:
        """A state at another batch size, with this empty loss table."""
        return self._call("restage", sizes, state, table)

    def state_shapes(self, sizes: Sizes, hyper: Hyper, table: Any) -> TrainState:
        """Shapes and dtypes of a state; traced once for sizes and a table, of which the shape is read."""
        name = (sizes, table.shape, table.dtype)
        if name not in self._shapes:
            self._shapes[name] = jax.eval_shape(make_init(self.recipe, sizes), jnp.uint32(0), hyper, table)
        return self._shapes[name]

    def plan(self, spec: RoundSpec, donate: bool, state: TrainState) -> TrainState:
        """Begins a round that will be trained in segments."""
        return self._call("plan", spec, state, donate=donate)

    def segment(
        self, spec: RoundSpec, donate: bool, state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs
    ) -> tuple[TrainState, RoundInfo]:
        """The next steps of the round under way."""
        return self._call("segment", spec, state, data, hyper, inputs, donate=donate)

    def rounds(
        self, spec: RoundSpec, donate: bool, state: TrainState, data: TrainData, hyper: Hyper, inputs: StepInputs
    ) -> tuple[TrainState, RoundInfo]:
        """Whole rounds."""
        return self._call("rounds", spec, state, data, hyper, inputs, donate=donate)

    def look(self, observer: Observer, unit: str, state: TrainState, data: TrainData) -> Any:
        """What the observer sees of the batch that comes next."""
        return self._call("look", (observer, unit), state, data)

    def evaluate(self, batch_size: int, variables: Any, split: TrainData) -> Evaluation:
        """Loss and accuracy over a whole split."""
        return self._call("evaluate", batch_size, variables, split)

    def predict(self, variables: Any, images: Array, mean: Array, std: Array) -> Array:
        """Logits of stored images."""
        return self._call("predict", None, variables, images, mean, std)

    def ahead(self, kind: str, key: Hashable, *args: Any, donate: bool = False) -> Temporary | None:
        """Compile without calling; the call that follows finds the program.

        Args:
            kind, key: of the method: ("segment", spec), ("look", (observer, unit)), ("evaluate", batch size) ...
            args: its arrays, of which shapes and dtypes are enough.

        Returns:
            What the program will take beside its arguments; None where the back end does not say.
        """
        return self._find(kind, key, args, donate, checked=False).temporary

    def _call(self, kind: str, key: Hashable, *args: Any, donate: bool = False) -> Any:
        return self._find(kind, key, args, donate, checked=True).executable(*args)

    def _find(self, kind: str, key: Hashable, args: tuple, donate: bool, checked: bool) -> "_Program":
        leaves, structure = jax.tree.flatten(args)
        signature = (kind, key, donate, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        program = self._compiled.get(signature)
        if program is None:
            # Ahead of time, not by calling the jitted function: compilation is not timed as training, and jax settings
            # that live in thread-local contexts would make jit trace once more.
            started = time.perf_counter()
            # A NumPy view of a donated array that is still alive (np.asarray of a leaf, on CPU) disables the donation
            # without a word.
            jitted = jax.jit(self._function(kind, key), donate_argnums=(0,) if donate else ())
            executable = jitted.lower(*args).compile()
            program = _Program(executable, memory.temporary(kind, executable, _advice(kind, key, args)))
            self.compile_seconds += time.perf_counter() - started
            self.traces[kind] = self.traces.get(kind, 0) + 1
            self._compiled[signature] = program
            if checked and program.temporary is not None:
                data = [arg for arg in args if isinstance(arg, TrainData)]
                need = Need(memory.size_of(data), memory.size_of(args) - memory.size_of(data))
                memory.check(need.adding([program.temporary]), args)
        return program

    def _function(self, kind: str, key: Any) -> Callable:
        if kind == "init":
            return make_init(self.recipe, key)
        if kind == "restage":
            return make_restage(self.recipe, key)
        if kind == "look":
            return make_look(self.recipe, *key)
        if kind == "evaluate":
            return make_evaluate(self.recipe, key)
        return make_predict(self.recipe) if kind == "predict" else _BUILDERS[kind](self.recipe, key)


class _Program(NamedTuple):
    executable: Callable
    temporary: Temporary | None


def _advice(kind: str, key: Any, args: tuple) -> str | None:
    """What an observer says to set; of other kinds the usual."""
    return key[0].advice(args[0].partition.shape[1]) if kind == "look" else None


def compile_run(
    programs: Programs,
    plan: RunPlan,
    hyper: Hyper,
    splits: Mapping[str, TrainData],
    *,
    observer: Observer | None,
    evaluated: Iterable[str],
    eval_batch_size: int,
    donate: bool,
    saved: bool,
    at: Position = _START,
    state: TrainState | None = None,
) -> Need:
    """Compile what a run begins with: first state, first training, evaluation, look; nothing is called or allocated.

    What it compiles the run finds again. Programs that come later are estimated, and looked at again when they are
    compiled.

    Args:
        observer: what measures spectra, or None.
        evaluated: names of the splits that test points evaluate.
        saved: whether checkpoints are written.
        at, state: where a run goes on; None: the state is still to be drawn.

    Returns:
        What the whole run needs.

    Raises:
        OutOfMemory: the device has no room for it; after the first program that shows it.
    """
    index = plan.stage_of(at.backprops)
    (device,) = jnp.zeros(()).devices()
    sizes, recipe, train = plan.stages[index].sizes, programs.recipe, splits["train"]
    table = jax.eval_shape(lambda: plan.selection.init(table_slots(recipe, sizes)))
    first = jax.ShapeDtypeStruct((), jnp.uint32), hyper, table
    shapes = programs.state_shapes(sizes, hyper, table)
    # A copy for a checkpoint is the host's, which on CPU is the device.
    copies = memory.size_of(shapes) if saved and device.platform == "cpu" else 0
    need = Need(memory.size_of(splits), memory.size_of(shapes), copies)

    def fits(*found: Temporary | None) -> Need:
        more = need.adding(program for program in found if program is not None)
        memory.check(more, splits, state)
        return more

    need = fits()
    if state is None:
        drawn = programs.ahead("init", sizes, *first)
        # Its results are the state, which is counted; and no checkpoint is written before it has run.
        need = fits(drawn and drawn._replace(size=max(0, drawn.size - need.state - need.copies)))
    for call in dispatches(plan, at):
        if call.kind == "look":
            continue
        rest = () if call.kind == "plan" else (train, hyper, step_inputs(plan, call))
        found = programs.ahead(call.kind, call.spec, shapes, *rest, donate=donate)
        need = fits(found)
        if call.trained:
            need = fits(*_later(plan, call, found, memory.size_of(shapes.params)))
            break
    due = plan.measured_step(at.measured)
    if observer is not None and due is not None and due < plan.steps:
        need = fits(programs.ahead("look", (observer, sizes.unit), shapes, train))
    for name in evaluated:
        need = fits(programs.ahead("evaluate", eval_batch_size, shapes.variables, splits[name]))
    return need


def _later(plan: RunPlan, call: Dispatch, found: Temporary | None, gradient: int) -> Iterator[Temporary]:
    """Estimates of the training programs after the first where they take more: larger batches, or more of them kept."""

    def differentiated(trim: Trim | None, batch_size: int) -> int:
        # The other paths run a whole batch through both passes.
        return trim.capacity if trim is not None and trim.path == "gather" else batch_size

    if found is None:
        return
    now = differentiated(call.spec.trim, plan.stages[call.stage].sizes.batch_size)
    for index in range(call.stage, len(plan.stages)):
        stage, began = plan.stages[index], plan.start_of(index)[1]
        size, trims = stage.sizes.batch_size, {None}
        if plan.trimming is not None and stage.trims is not None:
            epochs = range(math.floor(began), math.ceil(began + stage.epochs))
            keeps = {plan.trimming.keep_count(epoch, math.ceil(plan.epochs), size) for epoch in epochs}
            trims = {stage.trims.trim(keep) for keep in keeps}
        most = max(differentiated(trim, size) for trim in trims)
        if most > now:
            yield memory.scaled(found, gradient, most / now, f"later training, of {most} samples at a time,")


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
        functions = functions_named(config.model, dataset.num_outputs, config.model_options)
    else:
        functions = functions_of(model)
    recipe = make_recipe(config, dataset, functions)
    plan = make_run_plan(config, recipe, bound=bound, trim_path=trim_path, trim_programs=trim_programs)
    hyper, data = _shapes((make_hyper(config), splits_on_device(dataset)))
    programs, states = {}, []
    for index, stage in enumerate(plan.stages):
        table = jax.eval_shape(lambda stage=stage: plan.selection.init(table_slots(recipe, stage.sizes)))
        init = make_init(recipe, stage.sizes), (jax.ShapeDtypeStruct((), jnp.uint32), hyper, table)
        states.append(jax.eval_shape(init[0], *init[1]))
        if index == 0:
            programs["init"] = init
        else:
            programs[f"restage to {index}"] = make_restage(recipe, stage.sizes), (states[-2], table)
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
