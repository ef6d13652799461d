"""What is found out about a network before it is trained: does it fit, can it be measured."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hardjax._validate import OutOfMemory
from hardjax.data import Dataset
from hardjax.data.augment import output_shape
from hardjax.engine.jax_settings import remembered
from hardjax.engine.state import Recipe
from hardjax.fisher import check
from hardjax.fisher.comparison import Subject
from hardjax.fisher.observe import SpectrumObserver

_FEW = 5  # samples that a loss is tried on
_FORM = 2  # of fingerprints: 2 since testing and batch statistics are part of them


class ModelFacts(NamedTuple):
    """variables: shapes of {"params", "batch_stats"}; flops: floating-point operations of one batch's forward pass;
    fingerprint: a hash of its programs, training and testing, and of a loss of one's own, under one version of jax."""

    variables: Any
    flops: float
    fingerprint: str


def check_model(recipe: Recipe, batch_size: int, dataset: Dataset) -> ModelFacts:
    """Whether the model takes the batches of training; traces and lowers the forward pass, computes nothing of it.

    Raises:
        ValueError: it does not, or its outputs, the labels and the loss do not fit; a loss that mixes samples.
    """
    few = dataset.train.labels[:_FEW]
    facts, logits = _facts(recipe, batch_size, (batch_size, *few.shape[1:]), few.dtype, dataset.num_classes)
    for split in (dataset.train, dataset.test, dataset.validation):
        if split is not None:
            recipe.loss.check_labels(split.labels)
    recipe.loss.check_independent(jax.ShapeDtypeStruct((len(few), *logits.shape[1:]), logits.dtype), few)
    return facts


# Of a recipe, so that a second seed traces nothing: those of people's own networks are equal within one call alone.
@remembered
def _facts(
    recipe: Recipe, batch_size: int, label_shape: tuple[int, ...], label_type: Any, classes: int
) -> tuple[ModelFacts, Any]:
    """(facts, shape of the outputs)."""
    variables, images, labels = _shapes(recipe, batch_size, label_shape, label_type)

    def forward(variables: Any, images: Any) -> Any:
        return recipe.apply(variables, images, True, jax.random.key(0))

    def tested(variables: Any, images: Any) -> Any:
        return recipe.apply(variables, images, False, jax.random.key(0))[0]

    # Beyond 64 bits XLA fails with an error of its own; nothing of that size fits anywhere.
    if (count := sum(leaf.size for leaf in jax.tree.leaves(variables))) >= 2**58:
        raise OutOfMemory(f"Expected a network that some memory holds, got one of {count:.3g} parameters.")
    # Lowered, not compiled: it takes a trace, where compiling takes half a minute for the largest networks.
    lowered = jax.jit(forward).lower(variables, images)
    logits = lowered.out_info[0]
    recipe.loss.check(logits, labels, classes)
    # Some back ends tell no costs.
    flops = float((lowered.cost_analysis() or {}).get("flops", 0.0))
    # Networks may differ in their batch statistics or in what is tested alone.
    text = lowered.as_text() + jax.jit(tested).lower(variables, images).as_text()
    if recipe.loss.targets == "any":  # people's own code as well, of which the name tells nothing
        text += jax.jit(recipe.loss).lower(logits, labels).as_text()
    return ModelFacts(variables, flops, f"{_FORM}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"), logits


def check_observer(recipe: Recipe, batch_size: int, observer: SpectrumObserver, dataset: Dataset) -> None:
    """Trace the observer on this network, so that what it refuses is refused before a run begins; the rows of a network
    that no test has seen are first compared with the network's own gradient.

    Raises:
        ValueError: from the observer.
    """
    few = np.asarray(dataset.train.labels[:_FEW])
    _observable(recipe, batch_size, observer, few.tobytes(), few.shape, few.dtype)


@remembered
def _observable(
    recipe: Recipe, batch_size: int, observer: SpectrumObserver, few: bytes, few_shape: tuple[int, ...], few_type: Any
) -> None:
    variables, images, labels = _shapes(recipe, batch_size, (batch_size, *few_shape[1:]), few_type)
    given = np.frombuffer(few, few_type).reshape(few_shape)
    subject = Subject(recipe.apply, recipe.loss, observer.rows, observer.method, variables, images, given)
    if check.needed(subject):
        drawn = jax.jit(lambda key: recipe.init_variables(key, images.shape[1:]))(jax.random.key(0))
        check.ensure(subject._replace(variables=drawn), traced=False)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(observer.make(recipe.apply, recipe.loss), variables, images, labels, key)


@remembered
def _variable_shapes(recipe: Recipe) -> Any:
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    return jax.eval_shape(lambda key: recipe.init_variables(key, model_shape), jax.random.key(0))


def _shapes(recipe: Recipe, batch_size: int, label_shape: tuple[int, ...], label_type: Any) -> tuple[Any, Any, Any]:
    """Of variables, and of a batch of images and labels."""
    images = (batch_size, *output_shape(recipe.augmentation, recipe.image_shape))
    return (
        _variable_shapes(recipe),
        jax.ShapeDtypeStruct(images, jnp.float32),
        jax.ShapeDtypeStruct(label_shape, label_type),
    )
