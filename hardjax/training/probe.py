"""What is found out about a network before it is trained: does it fit, can it be measured, how can it be trimmed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal
from hardjax.choose.trimming import take_samples
from hardjax.data.augment import output_shape
from hardjax.engine.step import Recipe
from hardjax.fisher import check
from hardjax.fisher.observe import SpectrumObserver
from hardjax.models.apply import samples_are_independent


def check_model(recipe: Recipe, num_classes: int) -> Any:
    """Shapes of the model's variables {"params", "batch_stats"}; only traces.

    Raises:
        ValueError: the model does not take the batches of training, or gives no (B, `num_classes`) logits.
    """
    model_shape, variables = output_shape(recipe.augmentation, recipe.image_shape), _variable_shapes(recipe)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *model_shape), jnp.float32)
    logits, _ = jax.eval_shape(
        lambda variables, images: recipe.apply(variables, images, True, jax.random.key(0)), variables, images
    )
    if logits.ndim != 2 or logits.shape[0] != recipe.batch_size or logits.shape[1] < num_classes:
        raise Refusal(
            f"Expected logits of shape ({recipe.batch_size}, {num_classes}) from the model for images of"
            f" {images.shape}; it gives {logits.shape}."
        )
    return variables


def check_observer(recipe: Recipe, observer: SpectrumObserver) -> None:
    """Trace the observer on this network, so that what it refuses is refused before a run begins; the rows of a network
    that no test has seen are first compared with the network's own gradient.

    Raises:
        ValueError: from the observer.
    """
    shape = output_shape(recipe.augmentation, recipe.image_shape)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *shape), jnp.float32)
    if check.needed(recipe.apply, observer.rows, observer.method):
        variables = jax.jit(lambda key: recipe.init_variables(key, shape))(jax.random.key(0))
        check.ensure(recipe.apply, observer.rows, observer.method, variables, images, traced=False)
    labels = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(observer.make(recipe.apply), _variable_shapes(recipe), images, labels, key)


class TrimPaths(NamedTuple):
    """How a network's steps can be trimmed.

    Attributes:
        exact: paths that leave the result as it is, the fastest first.
        lean: a second forward pass for few samples is worth the memory of the residuals that it saves: those of a batch
            outweigh the parameters.
    """

    exact: tuple[str, ...]
    lean: bool


@functools.lru_cache(maxsize=16)
def trim_paths(recipe: Recipe) -> TrimPaths:
    """Tried out on four made-up images where the network has no batch statistics and draws nothing: the logits of some
    of them, and the residuals of their backward pass, must be the same with and without the others."""
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    if not samples_are_independent(recipe.apply, _variable_shapes(recipe), model_shape):
        return TrimPaths(("plain",), False)
    keys = jax.random.split(jax.random.key(0), 3)
    order = jnp.array([2, 0, 3])

    def passes(keys: Array) -> tuple:
        """(logits, pullback) of four images, the same of some of them, and the parameters."""
        variables = recipe.init_variables(keys[0], model_shape)
        noise = jax.random.normal(keys[1], (1000,))
        params = jax.tree.map(lambda leaf: leaf + 0.01 * jnp.resize(noise, leaf.shape), variables["params"])
        images = jax.random.normal(keys[2], (4, *model_shape))

        def logits_of(images: Array) -> Callable:
            return lambda params: recipe.apply({**variables, "params": params}, images, True, None)[0]

        return jax.vjp(logits_of(images), params), jax.vjp(logits_of(images[order]), params), params

    @jax.jit
    def agree(keys: Array) -> tuple[Array, Array]:
        (logits, pullback), (some, like), _ = passes(keys)
        alone = _close(logits[order], some)
        try:
            cut = take_samples(pullback, like, order, len(logits))
        except ValueError:
            return alone, jnp.array(False)
        pairs = zip(jax.tree.leaves(cut), jax.tree.leaves(like), strict=True)
        return alone, jnp.stack([_close(a, b) for a, b in pairs]).all()

    alone, residuals = agree(keys)
    if not alone:
        return TrimPaths(("plain",), False)
    (_, pullback), (_, like), params = jax.eval_shape(passes, keys)
    pairs = zip(jax.tree.leaves(pullback), jax.tree.leaves(like), strict=False)
    of_batch = sum(whole.size for whole, part in pairs if whole.shape != part.shape) * recipe.batch_size / 4
    lean = of_batch > sum(leaf.size for leaf in jax.tree.leaves(params))
    return TrimPaths(("reuse", "gather", "plain") if residuals else ("gather", "plain"), lean)


def _close(a: Array, b: Array) -> Array:
    """Equal to rounding."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.abs(a - b).max(initial=0) <= 1e-3 * jnp.abs(b).max(initial=0)


def _variable_shapes(recipe: Recipe) -> Any:
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    return jax.eval_shape(lambda key: recipe.init_variables(key, model_shape), jax.random.key(0))
