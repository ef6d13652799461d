"""Batch statistics for testing, estimated anew on the training split (P4, section 2.3); pure and compiled.

Running averages forget: at batch size m and momentum 0.9 they rest on about 10 m samples, which is what fails at small
m. Here every batch of the partition counts alike, as in the inference algorithm of Ioffe and Szegedy (2015, algorithm
2): means are averages of the batches' means, variances of their unbiased variances. It is what the running averages
are averages of, so that nothing but the weights of the batches differs. As there, what the means of batches vary by is
no part of a variance.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax._validate import Refusal
from hardjax.data.augment import output_shape, preprocess
from hardjax.engine.devices import spread
from hardjax.engine.jax_settings import remembered
from hardjax.engine.state import NORM, Recipe, TrainData, TrainState, draw
from hardjax.models.apply import OTHERS, is_ours

RUNNING, RE_ESTIMATED = NAMES = ("running", "re-estimated")  # what networks are tested with
_LARGE = 2.0**24  # beside it statistics are rounding, so that the share of it that is kept is read off
_NEAR = 1e-3  # relative


def make_statistics(recipe: Recipe, batch_size: int) -> Callable[[TrainState, TrainData], Any]:
    """`statistics(state, data) -> batch_stats` over the batches of the state's partition, pure; the state stays.

    Each batch is normalised by itself, as in training (by its sub-batches under `norm_batch_size`), and meets the
    images as testing does: in the middle of crops and frames, unflipped. Dropout and stochastic depth draw as in
    training, from keys of their own. The last batch, filled by wrapping round, counts as the others do.

    Args:
        batch_size: samples that pass the network together, rounded down to whole batches, of which there is one at
            least. It changes rounding alone.
    """

    def statistics(state: TrainState, data: TrainData) -> Any:
        count, size = state.partition.shape
        together = min(max(1, batch_size // size), count)

        # The moving averages (float32 or wider) after one batch, where they were all `old` before it.
        def moved(images: Array, key: Array, old: Array) -> Any:
            stats = _filled(state.batch_stats, old)
            _, stats = recipe.apply({"params": state.params, "batch_stats": stats}, images, True, key)
            return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), _moving(stats))

        def load(places: Array) -> tuple[Array, Array]:
            indices = spread(state.partition[places], recipe.mesh, 1)
            images = data.take(indices.ravel())
            images = preprocess(images, data.mean, data.std, recipe.augmentation)
            keys = jax.vmap(lambda place: draw(state.key, NORM, place))(places)
            return spread(images.reshape(*indices.shape, *images.shape[1:]), recipe.mesh, 1), keys

        def add(total: Any, start: Array) -> tuple[Any, None]:
            places = start + jnp.arange(together)
            images, keys = load(jnp.minimum(places, count - 1))
            found = jax.vmap(moved, (0, 0, None))(images, keys, jnp.zeros(()))
            return jax.tree.map(lambda old, new: old + _sum_of(new, places < count), total, found), None

        with jax.default_matmul_precision(recipe.precision):
            images, keys = load(jnp.zeros(1, jnp.int32))
            ends = jax.vmap(moved, (None, None, 0))(images[0], keys[0], jnp.array([0.0, _LARGE]))
            nothing = jax.tree.map(lambda both: jnp.zeros_like(both[0]), ends)
            total, _ = lax.scan(add, nothing, jnp.arange(0, count, together))
            # new = share * old + (1 - share) * batch; at old = 0 the last term is left.
            stats = jax.tree.map(lambda at_zero, both: at_zero / count / (1 - _share(*both)), total, ends)
        return _with_moving(state.batch_stats, stats)

    return statistics


def check_statistics(recipe: Recipe, variables: Any, batch_size: int) -> None:
    """Look whether the statistics of a network can be estimated anew; one's own are tried on made-up images.

    Args:
        variables: their shapes.
        batch_size: of training.

    Raises:
        ValueError: there are none, or they are no moving averages of statistics of the batch.
    """
    if not jax.tree.leaves(_moving(variables["batch_stats"])):
        raise Refusal(
            "Expected a network with batch statistics with norm_statistics='re-estimated', got one without (of the"
            " zoo: norm='batch')."
        )
    if not is_ours(recipe.apply) and not _are_averages(recipe, batch_size):
        raise Refusal(
            "Expected batch statistics that are moving averages, and that no logits in training depend on, with"
            " norm_statistics='re-estimated'; this network's are not."
        )


@remembered
def _are_averages(recipe: Recipe, batch_size: int) -> bool:
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)

    @jax.jit
    def tried(keys: Array) -> tuple[Any, list[Any]]:
        variables = recipe.init_variables(keys[0], model_shape)
        images = jax.random.normal(keys[1], (batch_size, *model_shape))

        def at(old: float) -> tuple[Array, Any]:
            given = {**variables, "batch_stats": _filled(variables["batch_stats"], old)}
            logits, stats = recipe.apply(given, images, True, keys[2])
            return logits, _moving(stats)

        found = [at(old) for old in (0.0, 1.0, _LARGE)]
        return [logits for logits, _ in found], [stats for _, stats in found]

    logits, stats = tried(jax.random.split(jax.random.key(0), 3))
    alike = all(jnp.allclose(logits[0], other, rtol=_NEAR, equal_nan=True) for other in logits[1:])
    return alike and all(_is_average(*leaves) for leaves in zip(*map(jax.tree.leaves, stats), strict=True))


def _is_average(zero: Array, one: Array, large: Array) -> bool:
    """Whether new = share * old + (1 - share) * batch, with one share below 1, of what was found at three olds."""
    if not jnp.issubdtype(zero.dtype, jnp.floating):
        return False
    shares = (large - zero) / _LARGE
    share = shares.mean()
    straight = jnp.allclose(one, zero + share, rtol=_NEAR, atol=_NEAR)
    return bool(straight and jnp.allclose(shares, share, atol=_NEAR * (1 - share)) and 0 <= share < 1 - 1e-5)


def _share(zero: Array, large: Array) -> Array:
    """Of the old value that an average keeps."""
    # Of all channels, which rounding reaches differently.
    return ((large - zero) / _LARGE).mean()


def _sum_of(found: Array, real: Array) -> Array:
    """Over the batches that there are; the others are copies of the last one."""
    return jnp.where(real.reshape(-1, *(1,) * (found.ndim - 1)), found, 0).sum(0)


def _moving(stats: Any) -> dict[str, Any]:
    """Without the constants of a network of one's own."""
    return {name: value for name, value in dict(stats).items() if name != OTHERS}


def _with_moving(stats: Any, moving: Any) -> dict[str, Any]:
    cast = jax.tree.map(lambda old, new: new.astype(old.dtype), _moving(stats), moving)
    return {**dict(stats), **cast}


def _filled(stats: Any, value: Any) -> dict[str, Any]:
    return _with_moving(stats, jax.tree.map(lambda leaf: jnp.full(leaf.shape, value), _moving(stats)))
