"""From a configuration to what the engine runs: the recipe of the traces, and the plan of the run.

`config` is a `TrainConfig`, of which only the fields are read.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hardjax import _by_name
from hardjax._validate import Refusal, first_line, shown
from hardjax.choose import losses, trimming
from hardjax.choose.batch_plan import BatchPlan, Span, rate_scale, steps_of
from hardjax.choose.selection import AllBatches
from hardjax.choose.trimming import TrimPlan
from hardjax.data import Dataset, Split
from hardjax.data.augment import on_device, resolve
from hardjax.engine import devices
from hardjax.engine.optimizers import Hyper
from hardjax.engine.stages import RunPlan, Stage
from hardjax.engine.state import Recipe, Sizes, TrainData
from hardjax.engine.trials import trim_paths
from hardjax.models import named, zoo
from hardjax.models.apply import make_apply


@dataclass(frozen=True, eq=False)
class Functions:
    """A network as two pure functions; equal to itself alone, so that no other network's programs are found for it.

    Attributes:
        init: (key, image shape) -> {"params", "batch_stats"}.
        apply: (variables, images, train, key) -> (logits, new batch_stats).
        name: for titles.
    """

    init: Callable
    apply: Callable
    name: str


def functions_of(model: Any) -> Functions:
    """The functions of a network of one's own; made once for all runs that are to share programs.

    Never found again by equality: `Net(k=1) == Net(k=True)`, and a module does not know that a helper which it calls
    was redefined since.
    """
    if isinstance(model, Functions):
        return model
    network = make_apply(model)
    return Functions(network.init, network, network.name)


def functions_named(name: str, num_outputs: int, options: Mapping[str, Any]) -> Functions:
    """The functions of a network of the zoo, or of one's own by `package.module:Name` (made anew at every call).

    Args:
        num_outputs: classes, or numbers of a sample (`Dataset.num_outputs`).

    Raises:
        ValueError: as `zoo_functions` and `models.named.create`.
    """
    if not _by_name.is_own(name):
        return zoo_functions(name, num_outputs, options)
    network = named.create(name, num_outputs, options)
    return Functions(network.init, network, name)


def zoo_functions(name: str, num_classes: int, options: Mapping[str, Any]) -> Functions:
    """The functions of a network of the zoo, the same ones for the same name and options, types included.

    Raises:
        ValueError: unknown name or option (the closest one is offered), or a value out of range.
    """
    for given in ("name", "num_classes"):
        if given in options:
            raise Refusal(f"Expected model_options without {given}={options[given]!r}, which is not theirs.")
    # By their JSON text, which tells 1 from true; as values of a dictionary they are equal, and one's programs would be
    # taken for the other's.
    return _zoo_functions(name, num_classes, json.dumps(dict(options), sort_keys=True))


@functools.lru_cache(maxsize=64)
def _zoo_functions(name: str, num_classes: int, options: str) -> Functions:
    return functions_of(zoo.create(name, num_classes=num_classes, **json.loads(options)))


def make_recipe(
    config: Any, dataset: Dataset, functions: Functions, mesh: Mesh | None = None, micro_batch: int | None = None
) -> Recipe:
    """What shapes the traces of a run.

    Args:
        mesh: devices that share each batch, see `devices.make_mesh`.
        micro_batch: samples that are differentiated at a time, or None.

    Raises:
        ValueError: more samples in a batch than there are, or an augmentation that does not fit.
    """
    num_samples = dataset.train.num_samples
    if (largest := max(batch_sizes(config))) > num_samples:
        raise Refusal(f"Expected batch_size={largest} to be at most the {num_samples} training samples.")
    return Recipe(
        init_variables=functions.init,
        apply=functions.apply,
        loss=losses.resolve(config.loss),
        optimizer=config.optimizer,
        augmentation=on_device(resolve(config.augmentation, dataset), dataset),
        precision=config.precision,
        on_nan=config.on_nan,
        num_samples=num_samples,
        image_shape=dataset.train.image_shape,
        mesh=mesh,
        micro_batch=micro_batch,
    )


def make_run_plan(
    config: Any,
    recipe: Recipe,
    *,
    bound: int = 64,
    bound_by_time: bool = False,
    trim_path: str = "auto",
    trim_programs: int = 5,
    streamed: bool = False,
) -> RunPlan:
    """The plan of a run; tries the network out where batches are trimmed.

    Raises:
        ValueError: more steps than are counted, a round of no steps, or a trim path that would change the result.
    """
    selection, spans = config.selection, _spans(config)
    steps = steps_of(spans, recipe.num_samples)
    # Steps, visits and drops are int32 on the device.
    # A controller may go down to its least size.
    most = max(sum(steps), *(sum(steps_of([span], recipe.num_samples)) for span in _ladder(config, recipe)), 0)
    if most >= 2**31:
        raise Refusal(f"Expected epochs={config.epochs} to be fewer than 2^31 steps in all, got {most}.")
    paths = None if config.trimming is None else trim_paths(recipe)

    def trims(size: int) -> TrimPlan | None:
        return paths and trimming.make_plan(
            config.trimming,
            config.epochs,
            size,
            paths.exact,
            trim_path,
            trim_programs,
            lean=paths.lean(size),
            isolated=paths.isolated,
        )

    def stage(span: Span, count: int, before: Span | None) -> Stage:
        anew = before is None or before.size != span.size
        return _stage(config, recipe, span, count, trims(span.size), anew)

    before = [None, *spans[:-1]]
    return RunPlan(
        stages=tuple(stage(*found) for found in zip(spans, steps, before, strict=True)),
        selection=selection,
        schedule=config.schedule,
        trimming=config.trimming,
        measure_every=config.measure.every if config.measure else None,
        measure_spread=not (isinstance(selection, AllBatches) and selection.redraws),
        test_every=1 if config.test_every == "epoch" else config.test_every,
        bound=bound,
        bound_by_time=bound_by_time,
        streamed=streamed,
        control_every=None if config.batch_plan is None else config.batch_plan.every,
        ladder=tuple(stage(span, *steps_of([span], recipe.num_samples), None) for span in _ladder(config, recipe)),
    )


def _ladder(config: Any, recipe: Recipe) -> list[Span]:
    """The whole training at each size that a controller may choose; empty without one.

    Raises:
        ValueError: a strategy that makes no table of one of these sizes.
    """
    controller = None if config.batch_plan is None else config.batch_plan.controller
    sizes = () if controller is None else controller.sizes
    for size in sizes:
        slots = -(-recipe.num_samples // size) if config.selection.unit == "batch" else recipe.num_samples
        try:
            shape = jax.eval_shape(lambda slots=slots: config.selection.init(slots)).shape
        except (TypeError, ValueError) as error:
            shape = first_line(error)
        if shape[:1] != (slots,):
            raise Refusal(
                f"Expected a selection that makes its table anew at every size of batch_plan="
                f"{config.batch_plan.title!r}; {shown(config.selection)} gives {shape} for {slots} slots."
            )
    return [Span(Fraction(config.epochs), size) for size in sizes]


def _stage(config: Any, recipe: Recipe, span: Span, steps: int, trims: TrimPlan | None, anew: bool) -> Stage:
    size, num_batches, selection = span.size, -(-recipe.num_samples // span.size), config.selection
    if steps < 1:
        raise Refusal(
            f"Expected batch_plan={config.batch_plan.text!r} with stages of a step at least; {float(span.epochs):g}"
            f" epochs of {num_batches} batches of {size} are none."
        )
    round_steps = selection.round_steps(num_batches)
    if isinstance(round_steps, bool) or not isinstance(round_steps, int) or round_steps < 1:
        raise Refusal(f"Expected round_steps({num_batches}) of {selection!r} to be at least 1, got {round_steps!r}.")
    scale = rate_scale(config.rate_scaling, size, batch_sizes(config)[0])
    return Stage(
        # Room for the longest round, though most are shorter: shapes of a stage's state never change.
        sizes=Sizes(size, num_batches, max(num_batches, round_steps), selection.unit),
        epochs=span.epochs,
        steps=steps,
        round_steps=round_steps,
        # In this order, as a controller's changes are made: a product is rounded by its order.
        learning_rate=config.peak_learning_rate * scale * span.rate,
        trims=trims,
        anew=anew,
    )


def batch_sizes(config: Any) -> tuple[int, ...]:
    """Of the stages of a run, in order, neighbours of one size and rate as one; under a controller all that may come,
    the first one first."""
    if config.batch_plan is not None and config.batch_plan.controller is not None:
        return config.batch_plan.sizes
    return tuple(span.size for span in _spans(config))


def _spans(config: Any) -> tuple[Span, ...]:
    plan = BatchPlan.constant(config.batch_size) if config.batch_plan is None else config.batch_plan
    return plan.spans(config.epochs, config.schedule.decay_at)


def make_hyper(config: Any) -> Hyper:
    """The traced numbers of a run that stay while it goes on."""
    return Hyper(jnp.float32(config.weight_decay), jnp.float32(config.momentum))


def table_slots(recipe: Recipe, sizes: Sizes) -> int:
    """Entries of the loss table: one a batch, or one a sample."""
    return sizes.num_batches if sizes.unit == "batch" else recipe.num_samples


def splits_on_device(dataset: Dataset, mesh: Mesh | None = None, shard_data: bool = False) -> dict[str, TrainData]:
    """Split name -> its arrays with the statistics of the training split.

    Args:
        mesh: devices, each of which gets all of them.
        shard_data: each gets its part of the images alone.
    """
    splits = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    found = {name: _on_device(split, dataset) for name, split in splits.items() if split is not None}
    # Each array once: training and validation may be shares of the same images.
    images = {id(split.images): split.images for split in found.values()}
    place = devices.put_shares if shard_data else devices.put
    images = {name: place(array, mesh) for name, array in images.items()}
    rest = {name: devices.put(split._replace(images=None), mesh) for name, split in found.items()}
    return {name: rest[name]._replace(images=images[id(split.images)]) for name, split in found.items()}


def _on_device(split: Split, dataset: Dataset) -> TrainData:
    images = split.images[:0] if split.streamed else split.images  # none of them, of their shape
    arrays = (jnp.asarray(leaf) for leaf in (images, split.labels, dataset.mean, dataset.std))
    return TrainData(*arrays, rows=None if split.rows is None else jnp.asarray(split.rows))
