"""What is found out about a network before it is trained: does it fit, can it be measured."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardjax._validate import OutOfMemory, Refusal
from hardjax.data.augment import output_shape
from hardjax.engine.state import Recipe
from hardjax.fisher import check
from hardjax.fisher.observe import SpectrumObserver


class ModelFacts(NamedTuple):
    """variables: shapes of {"params", "batch_stats"}; flops: floating-point operations of one batch's forward pass;
    fingerprint: a hash of its program, the same for the same network under one version of jax."""

    variables: Any
    flops: float
    fingerprint: str


def check_model(recipe: Recipe, batch_size: int, num_classes: int) -> ModelFacts:
    """Whether the model takes the batches of training; traces and lowers the forward pass, computes nothing.

    Raises:
        ValueError: it does not, or gives no (B, `num_classes`) logits.
    """
    model_shape, variables = output_shape(recipe.augmentation, recipe.image_shape), _variable_shapes(recipe)
    images = jax.ShapeDtypeStruct((batch_size, *model_shape), jnp.float32)

    def forward(variables: Any, images: Any) -> Any:
        return recipe.apply(variables, images, True, jax.random.key(0))[0]

    # Beyond 64 bits XLA fails with an error of its own; nothing of that size fits anywhere.
    if (count := sum(leaf.size for leaf in jax.tree.leaves(variables))) >= 2**58:
        raise OutOfMemory(f"Expected a network that some memory holds, got one of {count:.3g} parameters.")
    # Lowered, not compiled: it takes a trace, where compiling takes half a minute for the largest networks.
    lowered = jax.jit(forward).lower(variables, images)
    logits = lowered.out_info
    if len(logits.shape) != 2 or logits.shape[0] != batch_size or logits.shape[1] < num_classes:
        raise Refusal(
            f"Expected logits of shape ({batch_size}, {num_classes}) from the model for images of"
            f" {images.shape}; it gives {logits.shape}."
        )
    # Some back ends tell no costs.
    flops = float((lowered.cost_analysis() or {}).get("flops", 0.0))
    return ModelFacts(variables, flops, hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16])


def check_observer(recipe: Recipe, batch_size: int, observer: SpectrumObserver) -> None:
    """Trace the observer on this network, so that what it refuses is refused before a run begins; the rows of a network
    that no test has seen are first compared with the network's own gradient.

    Raises:
        ValueError: from the observer.
    """
    shape = output_shape(recipe.augmentation, recipe.image_shape)
    images = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    if check.needed(recipe.apply, observer.rows, observer.method):
        variables = jax.jit(lambda key: recipe.init_variables(key, shape))(jax.random.key(0))
        check.ensure(recipe.apply, observer.rows, observer.method, variables, images, traced=False)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(observer.make(recipe.apply), _variable_shapes(recipe), images, labels, key)


def _variable_shapes(recipe: Recipe) -> Any:
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    return jax.eval_shape(lambda key: recipe.init_variables(key, model_shape), jax.random.key(0))
