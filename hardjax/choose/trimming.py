"""Training on the largest losses of every mini-batch (P2, mini-batch trimming), and its control.

Exact ways to a trimmed step with one meaning:

- `plain`: one pass over the whole batch, the gradient of the trimmed mean; right for every network, saves nothing.
- `masked`: the same in two passes, with copies of a kept sample in the places of the dropped ones. For samples dropped
  at random, whatever their losses are, from networks without batch statistics: a dropped sample that overflows must not
  reach the gradient as 0 * inf.
- `gather`: score all samples forward only, then differentiate on the kept ones alone; the least memory.
- `reuse`: one forward pass, whose residuals are cut down to the kept samples before the backward pass; the least time.

The last two hold where samples do not influence each other (no batch statistics): the dropped ones need no backward
pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax import _settings, _validate
from hardjax._axis import Axis
from hardjax._validate import Refusal

SCHEDULES = ("linear", "cosine")
KEEPS = ("hardest", "random")
PATHS = ("auto", "plain", "gather", "reuse")
# Measured on ResNet-8 and AlexNet without batch norm, 2 CPU cores: at a share of 0.2 a step takes 0.2 to 0.4 of an
# untrimmed one, and from about two thirds on two forward passes cost more than they save.
# Shares up to which each path beats the plain one (a forward pass costs about a third of a step), and up to which a
# second forward pass costs little more time than keeping all residuals does, and much less memory.
_WORTH = {"gather": 0.66, "reuse": 0.9}
_LEAN = 0.3


@dataclass(frozen=True)
class Trimming:
    """The share of each mini-batch that is trained, falling over the epochs (P2: linearly from 1.0 to 0.2).

    Attributes:
        start: share in the first epoch, in (0, 1].
        end: share in the last epoch, in (0, start].
        schedule: "linear" or "cosine" between them, by epoch.
        keep: "hardest" (P2) or "random": the control, the same share without regard to the losses.

    Raises:
        ValueError: a share outside (0, 1], end above start, an unknown word.
    """

    start: float = 1.0
    end: float = 0.2
    schedule: str = "linear"
    keep: str = "hardest"

    def __post_init__(self) -> None:
        _settings.settle(self)
        _validate.in_half_open_unit(start=self.start, end=self.end)
        if self.end > self.start:
            raise Refusal(f"Expected end={self.end!r} to be at most start={self.start!r}: the share does not grow.")
        _validate.one_of(SCHEDULES, **{"trimming schedule": self.schedule})
        _validate.one_of(KEEPS, keep=self.keep)

    def share(self, epoch: int, epochs: int) -> float:
        """p of an epoch in 0..epochs-1: exactly `start` in the first and `end` in the last; one epoch has `start`."""
        # P2's p = 1.0 - 0.8 * epoch / (E - 1) is 0 / 0 for a single epoch.
        passed = epoch / (epochs - 1) if epochs > 1 else 0.0
        if self.schedule == "cosine":
            passed = (1 - np.cos(np.pi * passed)) / 2
        return float(self.start * (1 - passed) + self.end * passed)

    def keep_count(self, epoch: int, epochs: int, batch_size: int) -> int:
        """k = max(1, round(p * B)), Python's rounding (halves to even)."""
        return max(1, round(self.share(epoch, epochs) * batch_size))


def trimmed_mean(losses: Array, keep_count: int) -> Array:
    """Mean of the `keep_count` largest losses; among equal ones the lower index is kept (`lax.top_k`).

    Args:
        losses: (B,) nats, one a sample, unweighted; NaN counts as largest.
        keep_count: k in 1..B, static.

    Returns:
        () nats; the gradient reaches the kept losses alone, 1 / k each.

    Raises:
        ValueError: losses of another rank, k outside 1..B.
    """
    if losses.ndim != 1:
        raise Refusal(f"Expected losses of shape (B,), got {losses.shape}.")
    if not isinstance(keep_count, int | np.integer):
        _validate.at_least(1, keep_count=keep_count)
    if not 1 <= keep_count <= len(losses):
        raise Refusal(f"Expected keep_count={keep_count!r} in 1..{len(losses)}, the size of the batch.")
    return lax.top_k(_nan_is_largest(losses), keep_count)[0].mean()


@dataclass(frozen=True)
class Trim:
    """How a step trims: static, part of its trace; the count kept is traced (`StepInputs.keep`) and at most `capacity`.

    Attributes:
        path: "plain", "masked", "gather" or "reuse".
        capacity: samples that the program has room for; those beyond the count kept weigh nothing.
        keep: as in `Trimming`.
    """

    path: str
    capacity: int
    keep: str = "hardest"

    @jax.named_scope("trimming")
    def choose(self, losses: Array, key: Array) -> Array:
        """(capacity,) positions in the batch; the first `StepInputs.keep` of them are the ones kept."""
        hardest = self.keep == "hardest"
        scores = _nan_is_largest(lax.stop_gradient(losses)) if hardest else jax.random.uniform(key, losses.shape)
        # Sorted, and with a k that is known while tracing: the kept samples are the first ones whatever their count, so
        # that one program serves many counts.
        return lax.top_k(scores, self.capacity)[1]


def _nan_is_largest(losses: Array) -> Array:
    """`lax.top_k` orders NaN by its sign bit (inf - inf has it set on x86): every NaN is made the positive one."""
    return jnp.where(jnp.isnan(losses), jnp.nan, losses)


@jax.named_scope("trimming")
def first_or_copies(order: Array, count: Array) -> Array:
    """`order` with the entries from `count` on replaced by its first one.

    A program has room for more samples than are kept. Those beyond weigh nothing, but zero times what is not finite is
    NaN: in their places stand copies of a sample that is kept.
    """
    return jnp.where(jnp.arange(len(order)) < count, order, order[0])


def mean_of_first(losses: Array, count: Array) -> Array:
    """Mean of the first `count` entries; the others, finite or not, have no part in it nor in its gradient."""
    # A choice, not a product with a mask: 0 * inf is NaN, in the value and in the derivative.
    return jnp.where(jnp.arange(len(losses)) < count, losses, 0).sum() / count


@jax.named_scope("trimming")
def kept_mask(order: Array, count: Array, batch_size: int) -> Array:
    """(B,) bool: the samples at the first `count` positions of `order`."""
    return jnp.zeros(batch_size, bool).at[order].set(jnp.arange(len(order)) < count)


@jax.named_scope("trimming")
def take_samples(pullback: Any, like: Any, order: Array, batch_size: int) -> Any:
    """The pullback of the whole batch, cut down to the samples `order`.

    Args:
        pullback: from `jax.vjp` of a function of (batch_size, ...) samples that do not influence each other.
        like: from `jax.vjp` of the same function on len(order) samples; only its structure and shapes are read.
        order: (capacity,) positions, capacity below batch_size.

    Raises:
        ValueError: residuals that the batch cannot be told apart in.
    """
    whole, part = jax.tree.leaves(pullback), jax.tree.leaves(like)
    if len(whole) != len(part):
        raise Refusal(f"Expected as many residuals for {len(order)} samples as for {batch_size}.")
    cut = [_take(a, b.shape, order, batch_size) for a, b in zip(whole, part, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), cut)


def _take(residual: Array, shape: tuple[int, ...], order: Array, batch_size: int) -> Array:
    """The entries of these samples along the one axis that grows with the batch (perhaps merged with later axes)."""
    # What does not hold the batch (a weight, a transposed kernel) has one shape in both.
    if residual.shape == shape:
        return residual
    axes = [axis for axis, (a, b) in enumerate(zip(residual.shape, shape, strict=True)) if a != b]
    inner, rest = divmod(residual.shape[axes[0]], batch_size)
    if len(axes) != 1 or rest or shape[axes[0]] != inner * len(order):
        raise Refusal(f"Expected one axis of the batch in a residual of shape {residual.shape}.")
    (axis,) = axes
    split = residual.reshape(*residual.shape[:axis], batch_size, inner, *residual.shape[axis + 1 :])
    return jnp.take(split, order, axis).reshape(shape)


@dataclass(frozen=True)
class TrimPlan:
    """Which program trains which count.

    Attributes:
        plain: for counts above the capacity of all others.
        programs: rising in capacity.
    """

    plain: Trim
    programs: tuple[Trim, ...]

    def trim(self, keep_count: int) -> Trim | None:
        """The program for this count; None, ordinary training, where all samples are kept."""
        if keep_count == self.plain.capacity:
            return None
        return next((trim for trim in self.programs if keep_count <= trim.capacity), self.plain)


def make_plan(
    trimming: Trimming,
    epochs: int,
    batch_size: int,
    allowed: Sequence[str],
    path: str = "auto",
    most_programs: int = 5,
    lean: bool = True,
    isolated: bool = False,
) -> TrimPlan:
    """At most `most_programs` trimmed programs for the counts of a run.

    Args:
        allowed: paths that leave this network's result as it is, the fastest first, "plain" the last.
        path: one of them, or "auto": for each count the fastest one, the leaner one where they are about as fast.
        lean: whether a second forward pass saves memory worth mentioning.
        isolated: one sample's logits do not depend on the other samples.

    Raises:
        ValueError: a path that would change the result, or a batch of 1.
    """
    _validate.one_of(PATHS, trim_path=path)
    if batch_size < 2:
        raise Refusal(f"Expected batch_size={batch_size} of at least 2 with trimming: one sample leaves no choice.")
    if path not in ("auto", *allowed):
        raise Refusal(
            f"trim_path={path!r} would change the result of this network (batch statistics over the kept samples only, "
            f"or dropout drawn anew); allowed here: auto, {', '.join(allowed)}."
        )
    # The hardest samples hold every one that is not finite: they are kept, and the step is as bad as it should be.
    plain = Trim("masked" if trimming.keep == "random" and isolated else "plain", batch_size, trimming.keep)
    chosen = allowed[0] if path == "auto" else path
    if chosen == "plain":
        return TrimPlan(plain, ())
    counts = {trimming.keep_count(epoch, epochs, batch_size) for epoch in range(epochs)}
    # A batch of one has residuals of another structure (an axis of length 1 is no axis): there is room for two.
    counts = sorted({max(2, count) for count in counts} - {batch_size})
    if path == "auto":
        # Counts that no path is worth it for take the plain program, which is one of the programs too.
        worth = [count for count in counts if count <= _WORTH[chosen] * batch_size]
        counts, most_programs = worth, most_programs - (len(worth) < len(counts))
    if most_programs < 1:
        return TrimPlan(plain, ())
    few = [count for count in counts if path == "auto" and lean and count <= _LEAN * batch_size]
    rest = counts[len(few) :]
    # Each path gets programs in proportion to the counts that it serves, and one at least.
    share = round(most_programs * len(few) / max(1, len(counts)))
    most_few = min(max(1, share), most_programs - bool(rest)) if few else 0
    programs = [Trim("gather", size, trimming.keep) for size in _buckets(few, most_few)]
    programs += [Trim(chosen, size, trimming.keep) for size in _buckets(rest, most_programs - most_few)]
    return TrimPlan(plain, tuple(programs))


def _buckets(counts: Sequence[int], most: int) -> tuple[int, ...]:
    """Capacities that share the counts out evenly: each count a program of its own where they are few."""
    # A capacity is the largest count of its part: room beyond the count costs time and changes no result.
    parts = np.array_split(counts, min(len(counts), most)) if counts and most else []
    return tuple(int(part[-1]) for part in parts)


def _columns(trimming: Trimming, history: Mapping[str, Any]) -> dict[str, str]:
    first, last = (history["keep_fraction"][at] for at in (0, -1))
    return {"kept, first to last epoch": f"{first:g} to {last:g}"}


AXIS = Axis(
    Trimming,
    flags={"trim_end": "end", "trim_start": "start", "trim_schedule": "schedule", "trim_keep": "keep"},
    switch="trim_end",
    least_batch_size=2,  # one sample leaves no choice
    columns=_columns,
)
