"""What the engine's functions pass to each other: the recipe of a trace, the state of a run, batches and their data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from hardjax.choose.losses import Loss
from hardjax.data import Split
from hardjax.data.augment import Augmentation, output_shape
from hardjax.engine import devices
from hardjax.engine.optimizers import Hyper, make_optimizer

# Every random draw is a function of (state.key, purpose, counter): nothing else decides the future.
PARTITION, PLAN, AUGMENT, DROPOUT, TRIM, NORM = range(6)
# Odd, with bits all over (golden ratio and primes of xxHash): of `hash_samples`.
_MIX, _BASES = 0x9E3779B1, (0x85EBCA77, 0xC2B2AE3D)


@dataclass(frozen=True)
class Recipe:
    """What shapes the traces of a run beside the sizes of its arrays; equal recipes share compiled programs.

    Attributes:
        init_variables: (key, image shape) -> {"params", "batch_stats"}.
        apply: (variables, images, train, key) -> (logits, new batch_stats).
        loss: of each sample.
        optimizer: name for `make_optimizer`.
        augmentation: as in `TrainConfig`, resolved; what is done on the device.
        precision: of matrix products and convolutions.
        on_nan: as in `TrainConfig`; under "record" no program looks for bad steps.
        num_samples: n of the training split.
        image_shape: (H, W, C) as stored.
        mesh: devices that share each batch; None: one device.
        micro_batch: samples of a batch that are differentiated at a time; None: all.
    """

    init_variables: Callable
    apply: Callable
    loss: Loss
    optimizer: str
    augmentation: Augmentation
    precision: str
    on_nan: str
    num_samples: int
    image_shape: tuple[int, ...]
    mesh: Mesh | None = None
    micro_batch: int | None = None


class TrainData(NamedTuple):
    """A split on the device with the statistics of the training split; see `data.Split`, for its `rows` too.

    Of streamed data `images` hold none (0, H, W, C), or those of the steps that a program trains, (steps, B, H, W, C).
    """

    images: Array
    labels: Array
    mean: Array
    std: Array
    rows: Array | None = None

    def take(self, indices: Any) -> Array:
        """Stored images (k, H, W, C) of these samples of the split, which are here."""
        assert not self.elsewhere, "an index into no images would be answered without a word"
        return Split(self.images, self.labels, self.rows).take(indices)

    @property
    def elsewhere(self) -> bool:
        """Whether the images are read when they are needed; all the rest is here."""
        return self.images.shape[0] == 0

    def of_steps(self, steps: int, batch_size: int, mesh: Mesh | None) -> "TrainData":
        """With the shapes of the images of so many steps in place of those that are elsewhere."""
        shape = (steps, batch_size, *self.images.shape[1:])
        placed = None if mesh is None else devices.over_axis(mesh, 1)
        return self._replace(images=jax.ShapeDtypeStruct(shape, self.images.dtype, sharding=placed))

    def where(self, indices: Array) -> Array:
        """Rows (k,) of `images` that these samples are."""
        return indices if self.rows is None else self.rows[indices]


class Batch(NamedTuple):
    """images (B, H, W, C) float32 as the model takes them, labels (B, ...) int32 or float32."""

    images: Array
    labels: Array


class StepInputs(NamedTuple):
    """Numbers that change with time, one a step, computed on the host from integers (`plan.step_inputs`).

    Attributes:
        learning_rate: (steps,) float32 of the batch's mean loss.
        keep: (steps,) int32 samples of the batch that are trained; read under trimming alone.
    """

    learning_rate: Array
    keep: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Every array that decides the future of a run, or is counted in it; shapes and dtypes never change.

    A state may stand in the middle of a round: `slots` and `cursor` say what of it is left.

    Attributes:
        params, batch_stats: the model's variables.
        opt_state: optax state.
        table: (slots,) nats, the loss of each slot as last seen in training; slots are N batches or n samples.
        partition: (N, B) int32 sample indices.
        slots: (rows,) or, where slots are samples, (rows, B) int32: the round under way, padded at the end.
        cursor: () int32, steps done of the round under way.
        key: base key of the run, never advanced.
        step: () int32, back-propagations done.
        round: () int32, rounds begun.
        visits: (slots,) int32, times each slot was trained.
        seen: (n,) int32, times each sample was in a batch that was trained.
        drops: (n,) int32, times trimming then left it out.
        samples_hash: (2,) uint32, of the sample indices in the order in which they were trained, see `hash_samples`.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    table: Array
    partition: Array
    slots: Array
    cursor: Array
    key: Array
    step: Array
    round: Array
    visits: Array
    seen: Array
    drops: Array
    samples_hash: Array

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


@dataclass(frozen=True)
class Sizes:
    """Shapes of a stage: they follow from the batch size, not from the recipe.

    Attributes:
        batch_size: B.
        num_batches: N = ceil(n / B).
        slot_rows: steps of the longest round.
        unit: "batch" or "sample", see `choose.selection`.
    """

    batch_size: int
    num_batches: int
    slot_rows: int
    unit: str


def make_partition(key: Array, num_samples: int, batch_size: int) -> Array:
    """(N, B) int32: a permutation of all samples cut into batches, the last filled by wrapping round to its start."""
    num_batches = -(-num_samples // batch_size)
    order = jax.random.permutation(key, num_samples).astype(jnp.int32)
    # Every batch has B samples: a shorter last one would be another shape, and every program twice.
    return order[jnp.arange(num_batches * batch_size) % num_samples].reshape(num_batches, batch_size)


def make_init(recipe: Recipe, sizes: Sizes) -> Callable[[Array, Hyper, Array], TrainState]:
    """`init(seed, hyper, table) -> TrainState`, pure; `table` is the strategy's empty one, the seed is traced."""
    model_shape = output_shape(recipe.augmentation, recipe.image_shape)
    row = () if sizes.unit == "batch" else (sizes.batch_size,)

    def init(seed: Array, hyper: Hyper, table: Array) -> TrainState:
        # The seed is traced: another seed compiles nothing.
        init_key, key = jax.random.split(jax.random.key(seed))
        variables = recipe.init_variables(init_key, model_shape)
        return TrainState(
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            # No state of an optimiser depends on the rate, so any will do.
            opt_state=make_optimizer(recipe.optimizer, hyper, jnp.float32(0)).init(variables["params"]),
            table=table,
            partition=make_partition(draw(key, PARTITION, 0), recipe.num_samples, sizes.batch_size),
            slots=jnp.zeros((sizes.slot_rows, *row), jnp.int32),
            cursor=jnp.zeros((), jnp.int32),
            key=key,
            step=jnp.zeros((), jnp.int32),
            round=jnp.zeros((), jnp.int32),
            visits=jnp.zeros(table.shape[:1], jnp.int32),
            seen=jnp.zeros(recipe.num_samples, jnp.int32),
            drops=jnp.zeros(recipe.num_samples, jnp.int32),
            samples_hash=jnp.zeros(2, jnp.uint32),
        )

    return init


def make_restage(recipe: Recipe, sizes: Sizes) -> Callable[[TrainState, Array], TrainState]:
    """`restage(state, table) -> TrainState` at another batch size, pure: batches are drawn anew and the loss table is
    the empty one given; parameters, statistics, optimiser and what is counted of samples go on. Visits of batches begin
    anew with the batches."""

    def restage(state: TrainState, table: Array) -> TrainState:
        row = () if sizes.unit == "batch" else (sizes.batch_size,)
        # Of the round that comes: the draws of another stage, also where a strategy keeps its batches.
        key = draw(state.key, PARTITION, state.round)
        return replace(
            state,
            table=table,
            partition=make_partition(key, recipe.num_samples, sizes.batch_size),
            slots=jnp.zeros((sizes.slot_rows, *row), jnp.int32),
            cursor=jnp.zeros_like(state.cursor),
            visits=jnp.zeros(table.shape[:1], jnp.int32) if sizes.unit == "batch" else state.visits,
        )

    return restage


def hash_samples(before: Array, schedule: Array) -> Array:
    """The running hash with the samples of some more steps: equal for equal sequences, however they are cut.

    Two polynomials modulo 2^32 in the indices, h -> h * a + mix(index) from sample to sample, all steps at once.

    Args:
        before: (2,) uint32.
        schedule: (steps, B) int32 indices.
    """
    steps, batch_size = schedule.shape
    mixed = (schedule.astype(jnp.uint32) + 1) * jnp.uint32(_MIX)
    mixed = mixed ^ (mixed >> 15)

    def powers(base: int, count: int) -> list[int]:
        return [pow(base, count - 1 - place, 2**32) for place in range(count)]

    inside = jnp.asarray([powers(a, batch_size) for a in _BASES], jnp.uint32)
    across = jnp.asarray([powers(pow(a, batch_size, 2**32), steps) for a in _BASES], jnp.uint32)
    whole = jnp.asarray([pow(a, batch_size * steps, 2**32) for a in _BASES], jnp.uint32)
    rows = (mixed[None] * inside[:, None]).sum(-1, dtype=jnp.uint32)
    return before * whole + (rows * across).sum(-1, dtype=jnp.uint32)


def draw(key: Array, purpose: int, counter: Array | int) -> Array:
    """The key of one draw, by its purpose and counter."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), counter)


def replace(state: TrainState, **changes: Any) -> TrainState:
    """The state with these fields changed."""
    return TrainState(**{**state.__dict__, **changes})
