"""Compiled programs of a recipe, shared by every run of it in this process: a new seed or rate compiles nothing."""

import functools
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hardjax.data import Dataset
from hardjax.engine import devices, memory
from hardjax.engine.evaluate import Evaluation, make_evaluate, make_evaluate_part, make_predict
from hardjax.engine.jax_settings import shaping
from hardjax.engine.memory import Need, Temporary
from hardjax.engine.norm_statistics import RE_ESTIMATED, make_statistics
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch, dispatches, step_inputs
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

# Dispatch.kind, or "restage" -> builder of the function that changes the state so.
_BUILDERS = {"plan": make_plan, "segment": make_segment, "rounds": make_rounds, "restage": make_restage}


class Programs:
    """Builds, compiles ahead of time, keeps and calls the programs of one recipe; several threads may ask for them.

    No program is compiled twice: who asks for one that another thread is at waits for it. An error is told to whoever
    asks for the program, once; the next one to ask compiles again. A program that its device has no room for is refused
    (`OutOfMemory`) before it is called.

    Args:
        recipe: of the run.
        mapped: (kind, function of one state) -> that of stacked ones, see `engine.population`; None: of one run.

    Attributes:
        compile_seconds: of the clock, spent tracing and compiling so far, by any thread.
        wait_seconds: of these, what callers stood still for: programs that were not ready when they were asked for.
        traces: number of programs compiled so far, by kind ("init", "restage", "plan", "segment", "rounds", "look",
            "evaluate", "evaluate part", "statistics", "predict").
    """

    def __init__(self, recipe: Recipe, mapped: Callable[[str, Callable], Callable] | None = None) -> None:
        self.recipe, self._mapped = recipe, mapped
        self.compile_seconds, self.wait_seconds = 0.0, 0.0
        self.traces: dict[str, int] = {}
        self._lock = threading.Lock()  # of all that follows; never held while something is compiled
        self._compiled: dict[Hashable, Future[_Program]] = {}
        self._weighed: set[Hashable] = set()  # those that are known to have room
        self._shapes: dict[Hashable, TrainState] = {}

    def init(self, sizes: Sizes, seed: int, hyper: Hyper, table: Array) -> TrainState:
        """A fresh state with this empty loss table; the seed is traced."""
        return self._call("init", sizes, jnp.uint32(seed), hyper, table)

    def restage(self, sizes: Sizes, state: TrainState, table: Array) -> TrainState:
        """A state at another batch size, with this empty loss table."""
        return self._call("restage", sizes, state, table)

    def state_shapes(self, sizes: Sizes, hyper: Hyper, table: Any) -> TrainState:
        """Shapes and dtypes of a state; traced once for sizes and a table, of which the shape is read."""
        name = (sizes, table.shape, table.dtype, shaping())
        if name not in self._shapes:
            found = jax.eval_shape(make_init(self.recipe, sizes), jnp.uint32(0), hyper, table)
            self._shapes[name] = devices.shapes(found, self.recipe.mesh)
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

    def evaluate_part(self, batch_size: int, variables: Any, part: TrainData, real: Array) -> Evaluation:
        """Sums of each batch of a part of a split, of which the first `real` samples count."""
        return self._call("evaluate part", batch_size, variables, part, real)

    def statistics(self, batch_size: int, state: TrainState, data: TrainData) -> Any:
        """Batch statistics estimated anew on the training split."""
        return self._call("statistics", batch_size, state, data)

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
        signature = _signature(kind, key, args, donate)
        program = self._wanted(signature, args)
        self._weighed.add(signature)  # by the caller
        return program.temporary

    def temporaries(self) -> list[Temporary]:
        """What the programs compiled so far take beside their arguments, as far as the back end says."""
        with self._lock:
            done = [future for future in self._compiled.values() if future.done() and future.exception() is None]
        return [found for future in done if (found := future.result().temporary) is not None]

    def begin(self, kind: str, key: Hashable, *args: Any, donate: bool = False) -> None:
        """`ahead` for a thread of its own: nothing where another thread has begun it, and no error is raised; whoever
        asks for the program gets it."""
        signature = _signature(kind, key, args, donate)
        self._begun(signature, args)

    def _call(self, kind: str, key: Hashable, *args: Any, donate: bool = False) -> Any:
        signature = _signature(kind, key, args, donate)
        program = self._wanted(signature, args)
        if signature not in self._weighed:
            if program.temporary is not None:
                data = [arg for arg in args if isinstance(arg, TrainData)]
                need = Need(memory.size_of(data), memory.size_of(args) - memory.size_of(data))
                memory.check(need.adding([program.temporary]), args)
            self._weighed.add(signature)
        return program.executable(*args)

    def _wanted(self, signature: "_Signature", args: tuple) -> "_Program":
        """The program, which the caller waits for where it is not ready."""
        with self._lock:
            future = self._compiled.get(signature)
        if future is not None and future.done() and future.exception() is None:
            return future.result()
        started = time.perf_counter()
        try:
            future = self._begun(signature, args)
            return future.result()
        finally:
            with self._lock:
                self.wait_seconds += time.perf_counter() - started
                told = self._compiled.get(signature)
                if told is not None and told is future and told.done() and told.exception() is not None:
                    del self._compiled[signature]  # the next one to ask tries again

    def _begun(self, signature: "_Signature", args: tuple) -> "Future[_Program]":
        """The program's future: another thread's, or one that is filled here, with what was raised where that is so."""
        # Made before anyone can find it: who waits for a future that an interrupt left open would wait for ever.
        own: Future[_Program] = Future()
        try:
            with self._lock:
                future = self._compiled.setdefault(signature, own)
            if future is own:
                own.set_result(self._compile(signature, args))
            return future
        except BaseException as error:
            if own.done():  # an interrupt after all was done
                raise
            own.set_exception(error)
            return own

    def _compile(self, signature: "_Signature", args: tuple) -> "_Program":
        # Ahead of time, not by calling the jitted function: compilation is not timed as training, and jax settings that
        # live in thread-local contexts would make jit trace once more.
        started = time.perf_counter()
        kind, key, donate = signature.kind, signature.key, signature.donate
        # A NumPy view of a donated array that is still alive (np.asarray of a leaf, on CPU) disables the donation
        # without a word.
        placed = devices.placement(args, self.recipe.mesh)
        jitted = jax.jit(self._function(kind, key), donate_argnums=(0,) if donate else (), **placed)
        executable = jitted.lower(*args).compile()
        program = _Program(executable, memory.temporary(kind, executable, _advice(kind, key, args)))
        with self._lock:
            self.compile_seconds += time.perf_counter() - started
            self.traces[kind] = self.traces.get(kind, 0) + 1
        return program

    def _function(self, kind: str, key: Any) -> Callable:
        if kind == "init":
            return make_init(self.recipe, key)
        if kind == "look":
            return make_look(self.recipe, *key)
        if kind == "statistics":
            return make_statistics(self.recipe, key)
        if kind.startswith("evaluate"):
            return (make_evaluate if kind == "evaluate" else make_evaluate_part)(self.recipe, key)
        function = make_predict(self.recipe) if kind == "predict" else _BUILDERS[kind](self.recipe, key)
        return function if self._mapped is None else self._mapped(kind, function)


class _Signature(NamedTuple):
    kind: str
    key: Any
    donate: bool
    structure: Any
    kinds: tuple  # shape and dtype of each array, and whether devices share it
    settings: tuple  # of jax


class _Program(NamedTuple):
    executable: Callable
    temporary: Temporary | None


def _signature(kind: str, key: Hashable, args: tuple, donate: bool) -> _Signature:
    leaves, structure = jax.tree.flatten(args)
    kinds = tuple((leaf.shape, leaf.dtype, devices.shares(leaf)) for leaf in leaves)
    return _Signature(kind, key, donate, structure, kinds, shaping())


def _advice(kind: str, key: Any, args: tuple) -> str | None:
    """What an observer says to set; of other kinds the usual."""
    return key[0].advice(args[0].partition.shape[1]) if kind == "look" else None


# Bounded: executables live as long as what holds them.
@functools.lru_cache(maxsize=16)
def programs_for(recipe: Recipe, mapped: Callable[[str, Callable], Callable] | None = None) -> Programs:
    """The programs of a recipe; equal recipes get the same object. Recipes of people's own networks are equal within
    one call of `run` or `compare` alone: their functions are made anew each time, see `recipe.functions_of`."""
    return Programs(recipe, mapped)


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
    mesh: Mesh | None = None,
) -> dict[str, tuple[Callable, tuple]]:
    """Every program of a run as {name: (function, arguments)}, for `jax.jit(function).lower(*arguments)` anywhere.

    Arguments are shapes and dtypes: nothing is computed (but for what trimming tries out) and no device is needed.
    Of a controlled batch plan they are those of its first size. Names are such as "init", "rounds first 1x9",
    "rounds 4x2", "plan 97", "segment 16", "look", "evaluate", "statistics" and "predict"; of trimmed programs and later
    stages with what tells them apart.

    Args:
        config: a `TrainConfig`.
        dataset: the data, of which the shapes are read.
        model: one's own network; None creates `config.model`.
        bound: steps in a dispatch; the other settings as in `Performance`.
        mesh: devices that share each batch; `devices.placement` says how their programs are compiled.

    Raises:
        ValueError: data, model and configuration do not fit.
    """
    dataset = dataset.with_train_samples(config.train_samples).with_validation(config.validation)
    if model is None:
        functions = functions_named(config.model, dataset.num_outputs, config.model_options)
    else:
        functions = functions_of(model)
    recipe = make_recipe(config, dataset, functions, mesh)
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
    if config.norm_statistics == RE_ESTIMATED:
        programs["statistics"] = make_statistics(recipe, eval_batch_size), (states[0], data["train"])
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
