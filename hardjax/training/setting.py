"""What a run needs before its first step: configuration, data on the device, model and programs, checked together."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hardjax import data, models
from hardjax._validate import Refusal
from hardjax.choose import trimming
from hardjax.choose.trimming import TrimPlan
from hardjax.config import Performance, TrainConfig
from hardjax.data import Dataset, Split
from hardjax.data.augment import resolve
from hardjax.engine.optimizers import Hyper
from hardjax.engine.plan import Dispatch
from hardjax.engine.programs import Programs, programs_for
from hardjax.engine.rounds import RoundSpec
from hardjax.engine.step import Recipe, TrainData, TrainState, replace
from hardjax.fisher.observe import SpectrumObserver, make_observer
from hardjax.models.apply import init_variables, make_apply
from hardjax.training.probe import check_model, check_observer, trim_paths


@dataclass(frozen=True)
class Setting:
    """A configuration with its data on the device and its programs.

    Attributes:
        config: as given, with the names of the data and the model that are really used.
        performance: as given.
        whole, dataset: the data before and after its validation share was split off.
        recipe: what shapes the traces.
        programs: compiled ones, shared by equal recipes.
        hyper: traced numbers.
        splits: "train", "test" and perhaps "validation" on the device.
        trims: programs of a trimmed run, or None.
        observer: what measures spectra, or None.
        start: variables to start from; None draws them.
    """

    config: TrainConfig
    performance: Performance
    whole: Dataset
    dataset: Dataset
    recipe: Recipe
    programs: Programs
    hyper: Hyper
    splits: dict[str, TrainData]
    trims: TrimPlan | None
    observer: SpectrumObserver | None
    start: Any = None

    def init_state(self) -> TrainState:
        selection = self.config.selection
        slots = self.recipe.num_batches if selection.unit == "batch" else self.recipe.num_samples
        state = self.programs.init(self.config.seed, self.hyper, selection.init(slots))
        if self.start is None:
            return state
        # Copies: a donated state would take the caller's arrays with it.
        given = jax.tree.map(lambda new, old: jnp.array(new, old.dtype), self.start, state.variables)
        return replace(state, **given)

    def at(self, dispatch: Dispatch, done: int) -> tuple[RoundSpec, Hyper, float]:
        """(program, traced numbers, share of each batch) of a dispatch that starts after `done` back-propagations."""
        first = self.config.selection.first_round()
        selection = first if dispatch.first else self.config.selection
        # Replayed batches come hardest first: of a short round the one in the middle is measured.
        position = 0 if selection == first else dispatch.steps // 2
        spec = RoundSpec(selection, dispatch.steps, dispatch.max_rounds, observer=self.observer, position=position)
        if self.trims is None:
            return spec, self.hyper, 1.0
        trimming, epochs = self.config.trimming, self.config.epochs
        epoch = done // self.recipe.num_batches
        keep = trimming.keep_count(epoch, epochs, self.recipe.batch_size)
        spec = dataclasses.replace(spec, trim=self.trims.trim(keep))
        return spec, self.hyper._replace(keep=jnp.int32(keep)), trimming.share(epoch, epochs)


def prepare(
    config: TrainConfig,
    dataset: Dataset | None = None,
    model: Any = None,
    performance: Performance | None = None,
    variables: Any = None,
) -> Setting:
    """Everything that a run needs before its first step.

    Raises:
        ValueError: data, model and configuration do not fit.
    """
    dataset = dataset if dataset is not None else data.load(config.dataset, config.data_dir)
    own_model = model is not None
    names = {"dataset": dataset.name, "model": type(model).__name__ if own_model else config.model}
    config, performance = dataclasses.replace(config, **names), performance or Performance()
    whole, dataset = dataset, dataset.with_validation(config.validation)
    _check_options(config.model_options)
    if model is None:
        model = models.create(config.model, num_classes=dataset.num_classes, **config.model_options)
    recipe = _recipe(config, dataset, model)
    expected = check_model(recipe, dataset.num_classes)
    if variables is not None:
        variables = {"batch_stats": {}, **variables}
        _check_variables(variables, expected)
    trims, observer = _trim_plan(config, performance, recipe), _observer(config, performance, recipe)
    splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    splits = {name: _on_device(split, dataset) for name, split in splits.items() if split is not None}
    hyper = Hyper(
        learning_rate=jnp.float32(config.peak_learning_rate),
        weight_decay=jnp.float32(config.weight_decay),
        momentum=jnp.float32(config.momentum),
        total_steps=jnp.int32(config.epochs * recipe.num_batches),
        keep=jnp.int32(config.batch_size),
    )
    return Setting(
        config, performance, whole, dataset, recipe, programs_for(recipe), hyper, splits, trims, observer, variables
    )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what is settled elsewhere."""
    for name in ("name", "num_classes"):
        if name in options:
            raise Refusal(f"Expected model_options without {name}={options[name]!r}, which is not theirs.")


def _recipe(config: TrainConfig, dataset: Dataset, model: Any) -> Recipe:
    """What shapes the traces; refuses more samples or steps than there can be."""
    num_samples = len(dataset.train.labels)
    if config.batch_size > num_samples:
        raise Refusal(f"Expected batch_size={config.batch_size} to be at most the {num_samples} training samples.")
    init, apply = _functions(model)
    recipe = Recipe(
        init_variables=init,
        apply=apply,
        optimizer=config.optimizer,
        schedule=config.schedule,
        augmentation=resolve(config.augmentation, dataset),
        precision=config.precision,
        batch_size=config.batch_size,
        num_samples=num_samples,
        image_shape=tuple(dataset.train.images.shape[1:]),
    )
    if config.epochs * recipe.num_batches >= 2**31:
        raise Refusal(
            f"Expected epochs={config.epochs} of {recipe.num_batches} batches to be fewer than 2^31 steps in all."
        )
    return recipe


def _trim_plan(config: TrainConfig, performance: Performance, recipe: Recipe) -> TrimPlan | None:
    """The programs of a trimmed run, by what the network allows."""
    if config.trimming is None:
        return None
    paths, wanted = trim_paths(recipe), (performance.trim_path, performance.trim_programs)
    return trimming.make_plan(config.trimming, config.epochs, config.batch_size, paths.exact, *wanted, paths.lean)


def _observer(config: TrainConfig, performance: Performance, recipe: Recipe) -> SpectrumObserver | None:
    """What measures spectra, tried on the network."""
    if config.measure is None:
        return None
    observer = make_observer(config.measure, performance.gram_chunk)
    check_observer(recipe, observer)
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


def _on_device(split: Split, dataset: Dataset) -> TrainData:
    return TrainData(*(jnp.asarray(leaf) for leaf in (split.images, split.labels, dataset.mean, dataset.std)))


def _functions(module: Any) -> tuple:
    """(init, apply) of a module, the same objects for equal modules, so that equal recipes share programs."""
    try:
        return _cached_functions(module)
    except TypeError:  # a module with unhashable fields has programs of its own
        return _cached_functions.__wrapped__(module)


@functools.lru_cache(maxsize=64)
def _cached_functions(module: Any) -> tuple:
    return functools.partial(init_variables, module), make_apply(module)
