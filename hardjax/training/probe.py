"""What is found out about a network before it is trained: does it fit, can it be measured."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardjax import fisher
from hardjax._validate import Refusal
from hardjax.data.augment import output_shape
from hardjax.engine.rounds import Observer
from hardjax.engine.state import Recipe
from hardjax.fisher.observe import FisherMeasure

_COVERED = 0.05  # lets bfloat16 pass; a layer left out, or used behind its back, is further off


class ModelFacts(NamedTuple):
    """variables: shapes of {"params", "batch_stats"}; flops: floating-point operations of one batch's forward pass."""

    variables: Any
    flops: float


def check_model(recipe: Recipe, batch_size: int, num_classes: int) -> ModelFacts:
    """Whether the model takes the batches of training; traces and lowers the forward pass, computes nothing.

    Raises:
        ValueError: it does not, or gives no (B, `num_classes`) logits.
    """
    model_shape, variables = output_shape(recipe.augmentation, recipe.image_shape), _variable_shapes(recipe)
    images = jax.ShapeDtypeStruct((batch_size, *model_shape), jnp.float32)

    def forward(variables: Any, images: Any) -> Any:
        return recipe.apply(variables, images, True, jax.random.key(0))[0]

    lowered = jax.jit(forward).lower(variables, images)
    logits = lowered.out_info
    if len(logits.shape) != 2 or logits.shape[0] != batch_size or logits.shape[1] < num_classes:
        raise Refusal(
            f"Expected logits of shape ({batch_size}, {num_classes}) from the model for images of"
            f" {images.shape}; it gives {logits.shape}."
        )
    return ModelFacts(variables, float((lowered.cost_analysis() or {}).get("flops", 0.0)))


def check_observer(recipe: Recipe, batch_size: int, observer: Observer) -> None:
    """Trace the observer on this network, so that what it refuses is refused before a run begins.

    Raises:
        ValueError: from the observer.
    """
    shape = output_shape(recipe.augmentation, recipe.image_shape)
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    variables = jax.eval_shape(lambda key: recipe.init_variables(key, shape), key)
    jax.eval_shape(observer.make(recipe.apply), variables, images, labels, key)


def check_rows(recipe: Recipe, batch_size: int, measure: FisherMeasure) -> None:
    """Rows of per-sample gradients of a network that no test has seen, on one made-up batch.

    Raises:
        ValueError: they do not add up to the gradient.
    """
    shape = output_shape(recipe.augmentation, recipe.image_shape)
    keys = jax.random.split(jax.random.key(0), 3)
    variables = jax.jit(lambda key: recipe.init_variables(key, shape))(keys[0])
    images = jax.random.normal(keys[1], (batch_size, *shape))
    labels = jnp.zeros(batch_size, jnp.int32)
    fisher.coverage(
        recipe.apply, variables, images, labels, measure.rows, measure.method, tolerance=_COVERED, key=keys[2]
    )


def _variable_shapes(recipe: Recipe) -> Any:
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    return jax.eval_shape(lambda key: recipe.init_variables(key, model_shape), jax.random.key(0))
