"""What is found out about a network by trying it: in which ways its steps can be trimmed, or taken in parts."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal
from hardjax.choose.trimming import take_samples
from hardjax.data.augment import output_shape
from hardjax.engine.state import Recipe
from hardjax.models.apply import OTHERS, samples_are_independent


class TrimPaths(NamedTuple):
    """How a network's steps can be trimmed.

    Attributes:
        exact: paths that leave the result as it is, the fastest first.
        isolated: one sample's logits in training do not depend on the other samples (they may depend on its place in
            the batch, as a dropout mask does).
        residuals: numbers that a backward pass keeps of each sample.
        parameters: numbers that the network learns.
    """

    exact: tuple[str, ...]
    isolated: bool = False
    residuals: int = 0
    parameters: int = 0

    def lean(self, batch_size: int) -> bool:
        """Whether a second forward pass for few samples is worth the memory that it saves: the residuals of a batch
        outweigh the parameters."""
        return self.residuals * batch_size > self.parameters


@functools.lru_cache(maxsize=16)
def trim_paths(recipe: Recipe) -> TrimPaths:
    """Tried out on four made-up images where the network has no batch statistics: the logits of some of them, and the
    residuals of their backward pass, must be the same with and without the others."""
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    variables = jax.eval_shape(lambda key: recipe.init_variables(key, model_shape), jax.random.key(0))
    if set(variables["batch_stats"]) - {OTHERS}:
        return TrimPaths(("plain",))
    keys = jax.random.split(jax.random.key(0), 4)
    isolated = bool(_isolated(recipe, model_shape)(keys))
    # Shapes do not show it: a network that subtracts the batch's mean had passed, and one with time on its first axis
    # was given wrong gradients.
    if not samples_are_independent(recipe.apply, variables, model_shape):
        return TrimPaths(("plain",), isolated)
    # Neither in order nor side by side: a path that took the first three would be found out.
    order = jnp.array([2, 0, 3])

    def passes(keys: Array) -> tuple:
        """(logits, pullback) of four images, the same of some of them, and the parameters."""
        variables, images = _made_up(recipe, model_shape, keys)

        def logits_of(images: Array) -> Callable:
            return lambda params: recipe.apply({**variables, "params": params}, images, True, None)[0]

        params = variables["params"]
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
        return TrimPaths(("plain",), isolated)
    (_, pullback), (_, like), params = jax.eval_shape(passes, keys)
    pairs = zip(jax.tree.leaves(pullback), jax.tree.leaves(like), strict=False)
    of_sample = sum(whole.size for whole, part in pairs if whole.shape != part.shape) // 4
    # In parts nothing is kept of a first pass that a second one could take up.
    exact = ("reuse", "gather", "plain") if residuals and recipe.micro_batch is None else ("gather", "plain")
    if recipe.mesh is not None and "reuse" in exact:
        # Between devices the images of the kept samples are fewer bytes than all that a backward pass keeps of them.
        exact = ("gather", "reuse", "plain")
    return TrimPaths(exact, isolated, of_sample, sum(leaf.size for leaf in jax.tree.leaves(params)))


@functools.lru_cache(maxsize=16)
def exact_in_parts(recipe: Recipe, size: int) -> bool:
    """Whether training on two parts of `size` samples, one after the other, gives the logits and the statistics of both
    together: no batch statistics over more samples than a part, nothing drawn for the batch as a whole."""
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)

    @jax.jit
    def agree(keys: Array) -> Array:
        variables, images = _made_up(recipe, model_shape, keys, 2 * size)
        # Parts that nobody takes for each other: statistics of many pixels are nearly those of any other part.
        images = images.at[size:].multiply(3) + 1
        each = images, images[:size], images[size:]
        whole, *parts = (recipe.apply(variables, some, True, keys[3]) for some in each)
        logits = jnp.concatenate([part[0] for part in parts])
        stats = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
        pairs = zip(jax.tree.leaves((logits, stats)), jax.tree.leaves(tuple(whole)), strict=True)
        return jnp.stack([_close(a, b) for a, b in pairs]).all()

    try:
        return bool(agree(jax.random.split(jax.random.key(0), 4)))
    except Refusal:  # sub-batches that do not divide a part, or both
        return False


def check_parts(recipe: Recipe, sizes: Iterable[int]) -> None:
    """Look whether every batch can be cut into the recipe's parts, and whether that changes nothing.

    Raises:
        ValueError: it cannot, or it would.
    """
    part = recipe.micro_batch
    if part is None or all(size <= part for size in sizes):
        return
    if uneven := [size for size in sizes if size > part and size % part]:
        raise Refusal(f"Expected micro_batch={part} to divide the batch of {uneven[0]} samples that it cuts.")
    if not exact_in_parts(recipe, part):
        raise Refusal(
            f"Expected micro_batch={part} to leave the result as it is: this network trains a part of a batch otherwise"
            " than the whole (batch statistics over more samples than a part, or dropout). Take norm=group or none, a"
            " norm_batch_size that divides it, or no micro_batch."
        )


def _isolated(recipe: Recipe, model_shape: tuple[int, int, int]) -> Callable[[Array], Array]:
    """(keys) -> () bool: exchanging two of four images, under the same draws, leaves the logits of the others alone."""

    @jax.jit
    def alone(keys: Array) -> Array:
        variables, images = _made_up(recipe, model_shape, keys)
        others = images.at[jnp.array([1, 3])].set(images[0])
        logits = [recipe.apply(variables, batch, True, keys[3])[0] for batch in (images, others)]
        return _close(logits[0][::2], logits[1][::2])

    return alone


def _made_up(recipe: Recipe, model_shape: tuple[int, int, int], keys: Array, count: int = 4) -> tuple[Any, Array]:
    """(variables at generic parameters, images): a scale or head that starts at zero would hide everything."""
    variables = recipe.init_variables(keys[0], model_shape)
    noise = jax.random.normal(keys[1], (1000,))
    params = jax.tree.map(lambda leaf: leaf + 0.01 * jnp.resize(noise, leaf.shape), variables["params"])
    return {**variables, "params": params}, jax.random.normal(keys[2], (count, *model_shape))


def _close(a: Array, b: Array) -> Array:
    """Equal to rounding where they are finite, and not finite in the same places: made-up images may overflow."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    finite = jnp.isfinite(a) & jnp.isfinite(b)
    apart = jnp.where(finite, jnp.abs(a - b), 0).max(initial=0)
    same = (jnp.isfinite(a) == jnp.isfinite(b)).all()
    return same & (apart <= 1e-3 * jnp.where(finite, jnp.abs(b), 0).max(initial=0))
