"""What a run needs before its first step: configuration, data on the device, model and programs, checked together."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal, shown
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, load
from hardjax.data.source import decoded_bytes
from hardjax.engine import devices, memory
from hardjax.engine.ahead import Wanted, compile_run, stage_programs
from hardjax.engine.memory import Need, check_network
from hardjax.engine.norm_statistics import RE_ESTIMATED, check_statistics
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Position, RunPlan
from hardjax.engine.programs import Programs, programs_for
from hardjax.engine.recipe import (
    batch_sizes,
    functions_named,
    functions_of,
    make_hyper,
    make_recipe,
    make_run_plan,
    splits_on_device,
    table_slots,
)
from hardjax.engine.state import Recipe, Sizes, TrainData, TrainState, replace
from hardjax.engine.trials import check_parts
from hardjax.fisher.observe import SpectrumObserver
from hardjax.training.probe import ModelFacts, check_model, check_observer

# How long one call of the device should last: Ctrl-C is heard, and progress seen, between two of them.
DISPATCH_SECONDS = 1.0
# What a step is expected to take before one has been timed. On 2 CPU cores ResNet-20 makes 8e10 operations a second,
# small networks less; a step of the smallest perceptron takes 0.2 ms. An accelerator is bound by its launches first.
_OPERATIONS_PER_SECOND = {"cpu": 5e10}
_LEAST_STEP_SECONDS = 5e-4
# Single steps cost 19 % more than one round of eight, fours 1 % (ResNet-20, batch 32; docs/speed.md).
LEAST_BOUND = 4
_STREAMED_BYTES = 1 << 27  # of images in one dispatch; two are on the device at a time
_START = Position()


@dataclass(frozen=True)
class Setting:
    """A configuration with its data on the device and its programs.

    Attributes:
        config: as given, with the names of the data and the model that are really used.
        performance: as given, with the number of devices and whether images are streamed.
        whole, dataset: the data as given, and of that the samples that are trained on, less the validation share.
        recipe: what shapes the traces.
        plan: what is trained, tested and measured when.
        programs: compiled ones, shared by equal recipes.
        hyper: traced numbers.
        splits: "train", "test" and perhaps "validation" on the device.
        observer: what measures spectra, or None.
        network: a fingerprint of its programs.
        start: variables to start from; None draws them.
        population: how it is trained together with others, where that rounds otherwise ("vmap of 8"), or None.
    """

    config: TrainConfig
    performance: Performance
    whole: Dataset
    dataset: Dataset
    recipe: Recipe
    plan: RunPlan
    programs: Programs
    hyper: Hyper
    splits: dict[str, TrainData]
    observer: SpectrumObserver | None
    network: str
    start: Any = None
    population: str | None = None

    @property
    def sizes(self) -> Sizes:
        """Shapes of the first stage."""
        return self.plan.stages[0].sizes

    def state_shapes(self, at: Position = _START) -> TrainState:
        """The state as shapes and dtypes, where a run stands; nothing is computed."""
        plan = self.plan.following(at.decided)
        sizes = plan.stages[plan.state_stage(at)].sizes
        return self.programs.state_shapes(sizes, self.hyper, jax.eval_shape(lambda: self._empty_table(sizes)))

    def init_state(self) -> TrainState:
        state = self.programs.init(self.sizes, self.config.seed, self.hyper, self._empty_table(self.sizes))
        if self.start is None:
            return state
        # Copies: a donated state would take the caller's arrays with it.
        given = jax.tree.map(lambda new, old: jnp.array(new, old.dtype), self.start, state.variables)
        return replace(state, **devices.put(given, self.recipe.mesh))

    def restage(self, state: TrainState, sizes: Sizes) -> TrainState:
        """The state as a stage of these sizes begins with it."""
        return self.programs.restage(sizes, state, self._empty_table(sizes))

    def warm(self, sizes: Sizes) -> None:
        """Make a stage's empty table once, outside of programs: jax compiles it for each shape."""
        jax.block_until_ready(self._empty_table(sizes))

    def _empty_table(self, sizes: Sizes) -> Array:
        return self.config.selection.init(table_slots(self.recipe, sizes))

    def compile(self, saved: bool, at: Position = _START, state: TrainState | None = None) -> Need:
        """Compile what the run begins with, before anything is allocated for it; see `engine.ahead.compile_run`.

        Raises:
            OutOfMemory: the device has no room for the run.
        """
        left_out = () if self.config.evaluate_train else ("train",)
        return compile_run(
            self.programs,
            self.plan,
            self.hyper,
            self.splits,
            observer=self.observer,
            evaluated=[name for name in self.splits if name not in left_out],
            eval_batch_size=self.performance.eval_batch_size,
            donate=self.performance.donate,
            saved=saved,
            statistics=self._statistics,
            everything=self.performance.compile_ahead == "first",
            at=at,
            state=state,
        )

    def stage_programs(self, plan: RunPlan, index: int) -> Iterator[Wanted]:
        """What a stage asks for from its beginning on, see `engine.ahead.stage_programs`."""
        train, observer, donate = self.splits["train"], self.observer, self.performance.donate
        return stage_programs(
            self.programs,
            plan,
            index,
            self.hyper,
            train,
            observer=observer,
            donate=donate,
            statistics=self._statistics,
        )

    @property
    def _statistics(self) -> int | None:
        """Samples at a time where batch statistics are estimated anew for testing."""
        return self.performance.eval_batch_size if self.config.norm_statistics == RE_ESTIMATED else None

    def tested(self, state: TrainState) -> Any:
        """The variables that a state is tested with; the state itself stays as it is."""
        if self._statistics is None:
            return state.variables
        stats = self.programs.statistics(self._statistics, state, self.splits["train"])
        return {**state.variables, "batch_stats": stats}


def prepare(
    config: TrainConfig,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    variables: Any = None,
) -> Setting:
    """Everything that a run needs before its first step.

    Args:
        model: one's own network, or the `engine.recipe.Functions` of one, which several runs share programs by.

    Raises:
        ValueError: data, model and configuration do not fit.
    """
    performance = Performance() if performance is None else performance
    _check_kinds(config, dataset, performance, variables)
    whole, performance = _data_of(config, dataset, performance)
    dataset = whole.with_train_samples(config.train_samples).with_validation(config.validation)
    if model is not None:
        functions = functions_of(model)
        config = dataclasses.replace(config, model=functions.name)
    else:
        functions = functions_named(config.model, dataset.num_outputs, config.model_options)
    config = dataclasses.replace(config, dataset=dataset.name)
    # Of the parts as well, or some devices would wait at every one of them.
    micro = () if performance.micro_batch is None else (performance.micro_batch,)
    taken = devices.count_for(performance.devices, *batch_sizes(config), *micro)
    performance = dataclasses.replace(performance, devices=taken)
    recipe = make_recipe(config, dataset, functions, devices.make_mesh(taken), performance.micro_batch)
    facts = _checked_network(config, recipe, dataset)
    if variables is not None:
        # Networks without statistics come without the key.
        variables = {"batch_stats": {}, **variables}
        _check_variables(variables, facts.variables)
    expected = min(_expected_bound(facts.flops), _bound_of_images(dataset, batch_sizes(config)[0]))
    bound = performance.steps_per_dispatch or expected
    return Setting(
        config=config,
        performance=performance,
        whole=whole,
        dataset=dataset,
        recipe=recipe,
        plan=run_plan(config, recipe, performance, bound),
        programs=programs_for(recipe),
        hyper=make_hyper(config),
        splits=splits_on_device(dataset, recipe.mesh, performance.shard_data),
        observer=_observer(config, performance, recipe, dataset),
        network=facts.fingerprint,
        start=variables,
    )


def _check_kinds(config: Any, dataset: Any, performance: Any, variables: Any) -> None:
    """Raises ValueError for what is of another kind, or cannot be known before a controller decides."""
    for name, given, kind in (
        ("config", config, TrainConfig),
        ("dataset", dataset, Dataset),
        ("performance", performance, Performance),
        ("variables", variables, Mapping),
    ):
        if given is not None and not isinstance(given, kind):
            raise Refusal(f"Expected {name}={shown(given)} to be a {kind.__name__}.")
    if config.batch_plan is not None and (controller := config.batch_plan.controller) is not None:
        controller.check_epochs(config.epochs)
        if performance.compile_ahead == "first":
            raise Refusal(
                "Expected compile_ahead='background' or 'off' with a controlled batch_plan: what it will need is not"
                " known before it trains."
            )


def _data_of(config: TrainConfig, dataset: Dataset | None, performance: Performance) -> tuple[Dataset, Performance]:
    """(all of the data, settings that say whether it is streamed)."""
    if dataset is None:
        dataset = load(config.dataset, config.data_dir, stream=must_stream(config, performance))
    elif performance.stream:
        dataset = dataset.on_host()
    if dataset.streamed and performance.stream is False:
        raise Refusal(f"Expected stream=True or None with {dataset.name}: its images are not held by any device.")
    return dataset, dataclasses.replace(performance, stream=dataset.streamed)


def _checked_network(config: TrainConfig, recipe: Recipe, dataset: Dataset) -> ModelFacts:
    """What is known of the network; raises ValueError where it does not fit the data and the configuration."""
    first, *others = dict.fromkeys(batch_sizes(config))
    facts = check_model(recipe, first, dataset)
    for size in others:
        check_model(recipe, size, dataset)  # sub-batches may divide one size and not another
    # Before anything of the network's size is made: trimming tries it out.
    check_network(recipe, facts.variables, dataset, make_hyper(config))
    check_parts(recipe, batch_sizes(config))
    _check_controller(config, facts.variables)
    if config.norm_statistics == RE_ESTIMATED:
        if dataset.streamed:
            raise Refusal(
                f"Expected resident data with norm_statistics={RE_ESTIMATED!r}, got {dataset.name} streamed: the"
                " training split would be read once more before every test."
            )
        check_statistics(recipe, facts.variables, first)
    return facts


def _check_controller(config: TrainConfig, variables: Any) -> None:
    """Raises ValueError for a controller by a noise scale that has no meaning.

    What a sample adds to the gradient of a batch is not independent of the others under batch statistics: the squared
    mean that follows from it as if it were came out below zero in every state of a ResNet-8 and a perceptron that was
    looked at (`experiments/noise_scale.py`), which would double the batch for ever.
    """
    controller = None if config.batch_plan is None else config.batch_plan.controller
    if controller is None or controller.rule != "noise-scale" or config.measure is None:
        return
    if jax.tree.leaves(variables["batch_stats"]) and config.measure.rows != "frozen":
        raise Refusal(
            f"Expected measure rows 'frozen', or a network without batch statistics, with the controller's rule"
            f" 'noise-scale', got rows {config.measure.rows!r}: samples of a batch are not independent under batch"
            " statistics. The rules 'trajectory' and 'growth' take them."
        )


def run_plan(config: TrainConfig, recipe: Recipe, performance: Performance, bound: int) -> RunPlan:
    """The plan of a run, with so many steps a dispatch."""
    return make_run_plan(
        config,
        recipe,
        bound=bound,
        streamed=bool(performance.stream),
        bound_by_time=performance.steps_per_dispatch is None,
        trim_path=performance.trim_path,
        trim_programs=performance.trim_programs,
    )


def must_stream(config: TrainConfig, performance: Performance) -> bool:
    """Whether named data is to be left on the disk: as asked, or where its images would take more than half of what the
    device has left; of several processes as asked alone.

    Raises:
        DataNotPrepared: no prepared data.
    """
    if performance.stream is not None:
        return performance.stream
    if jax.process_count() > 1:  # the memory of two machines might say otherwise
        return False
    room = memory.available(devices.visible()[0])
    return room is not None and 2 * decoded_bytes(config.dataset, config.data_dir) > room


def _bound_of_images(dataset: Dataset, batch_size: int) -> int:
    """Steps whose streamed images a dispatch may be given."""
    if not dataset.streamed:
        return 2**31
    images = dataset.train.images
    return max(1, _STREAMED_BYTES // (batch_size * math.prod(images.shape[1:]) * images.dtype.itemsize))


def _expected_bound(forward_flops: float) -> int:
    """Steps that a dispatch may hold: a step takes three times the operations of its forward pass."""
    speed = _OPERATIONS_PER_SECOND.get(jax.default_backend(), 1e13)
    # A backward pass is two of a forward pass's products for each of its own.
    return max(LEAST_BOUND, int(DISPATCH_SECONDS / max(3 * forward_flops / speed, _LEAST_STEP_SECONDS)))


def _observer(
    config: TrainConfig, performance: Performance, recipe: Recipe, dataset: Dataset
) -> SpectrumObserver | None:
    """What measures spectra, tried on the network."""
    if config.measure is None:
        return None
    observer = config.measure.observer(performance.gram_chunk)
    for size in sorted({*batch_sizes(config)}):
        check_observer(recipe, size, observer, dataset)
    return observer


def _check_variables(given: Any, expected: Any) -> None:
    """Raises ValueError listing what is missing, unexpected or of another shape."""

    def shapes(tree: Any) -> dict[str, tuple]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    found, wanted = shapes(dict(given)), shapes(expected)
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and found[name] != wanted[name]]
    faults += [f"{name} {found[name]} instead of {wanted[name]}" for name in both]
    if faults:
        raise Refusal(f"The variables do not fit the model: {'; '.join(faults)}.")
