"""Where the batch lies in the axes of a traced value, followed through one equation at a time.

A network is traced at two batch sizes, and the axis whose length changes holds the batch: a sequence that happens to be
as long as the batch is never taken for it. The batch may be merged with other axes (outer x B x inner, which their
lengths do not tell apart) or cut in two (sub-batches of a fixed size); which it is follows from the equations.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Part(NamedTuple):
    """A factor of the batch index in one axis, whose length is outer * size * inner."""

    axis: int
    outer: int
    size: int
    inner: int


# Of the whole batch, from the slowest factor to the fastest; with fewer factors, a value that belongs to sub-batches
# alone. Empty: the batch is in there, but nobody can say how (pairs of samples, an order that was changed).
Layout = tuple[Part, ...]
LOST: Layout = ()


class Sizes(NamedTuple):
    """The two batch sizes of a trace; layouts are those of the first."""

    batch: int
    other: int


class Aval(NamedTuple):
    """Shapes at both sizes, and the type."""

    shape: tuple[int, ...]
    other: tuple[int, ...]
    dtype: Any

    @property
    def inexact(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.inexact)


ELEMENTWISE = frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "add",
        "add_any",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "ceil",
        "clamp",
        "complex",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "optimization_barrier",
        "or",
        "pow",
        "real",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
_REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
    ]
)
_CUMULATIVE = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])


def complete(layout: Layout | None, sizes: Sizes) -> bool:
    return bool(layout) and math.prod(part.size for part in layout or ()) == sizes.batch


def follow(eqn: Any, given: Sequence[Layout | None], avals: Sequence[Aval], out: Aval, sizes: Sizes) -> Layout | None:
    """The layout of an equation's output; None where its shape does not depend on the batch size.

    Args:
        given, avals: of the equation's inputs.
    """
    changed = [axis for axis, (a, b) in enumerate(zip(out.shape, out.other, strict=True)) if a != b]
    if not changed:
        return None
    layout = _followed(eqn, given, avals, out, changed, sizes)
    return layout if layout and _fits(layout, changed, out, sizes) else LOST


def _followed(
    eqn: Any, given: Sequence[Layout | None], avals: Sequence[Aval], out: Aval, changed: list[int], sizes: Sizes
) -> Layout:
    name, params = eqn.primitive.name, eqn.params
    if LOST in given:
        return LOST
    known = [layout for layout in given if layout]
    first = given[0] if given else None
    if name in ELEMENTWISE:
        longest = max(known, key=len, default=LOST)
        if all(set(layout) <= set(longest) for layout in known):
            return longest or _plain(out, changed, sizes)
        return LOST
    if name in ("reshape", "transpose", "broadcast_in_dim", "squeeze", *_REDUCTIONS) and first is not None:
        if name == "reshape":
            return _reshaped(avals[0].shape, first, out.shape, changed[0]) if params["dimensions"] is None else LOST
        if name == "transpose":
            return tuple(part._replace(axis=params["permutation"].index(part.axis)) for part in first)
        if name == "broadcast_in_dim":
            return tuple(part._replace(axis=params["broadcast_dimensions"][part.axis]) for part in first)
        gone = params["dimensions"] if name == "squeeze" else params["axes"]
        kept = (part for part in first if part.axis not in gone)
        return tuple(part._replace(axis=part.axis - sum(axis < part.axis for axis in gone)) for part in kept)
    if _changes_the_order(eqn, given):
        return LOST
    return _plain(out, changed, sizes, known)


def _plain(out: Aval, changed: list[int], sizes: Sizes, known: Sequence[Layout] = ()) -> Layout:
    """From the shapes alone: one axis that holds the batch, merged as in the inputs."""
    (axis, *more) = changed
    times, rest = divmod(out.shape[axis], sizes.batch)
    if more or rest:
        return LOST
    if times == 1:
        return (Part(axis, 1, sizes.batch, 1),)
    merged = {layout[0][1:] for layout in known if len(layout) == 1 and layout[0].outer * layout[0].inner == times}
    return (Part(axis, *merged.pop()),) if len(merged) == 1 else LOST


def _changes_the_order(eqn: Any, given: Sequence[Layout | None]) -> bool:
    name, params = eqn.primitive.name, eqn.params
    axes = {
        "rev": params.get("dimensions"),
        "sort": (params.get("dimension"),),
        "concatenate": (params.get("dimension"),),
        **dict.fromkeys(_CUMULATIVE, (params.get("axis"),)),
    }.get(name, ())
    return any(part.axis in axes for layout in given if layout for part in layout)


def _fits(layout: Layout, changed: list[int], out: Aval, sizes: Sizes) -> bool:
    """Whether the output's two shapes are those of the layout."""
    axes = [part.axis for part in layout]
    if len(set(axes)) < len(axes) or changed != axes[:1] or axes[0] >= len(out.shape):
        return False
    lengths = all(out.shape[part.axis] == part.outer * part.size * part.inner for part in layout)
    return lengths and out.shape[axes[0]] * sizes.other == out.other[axes[0]] * sizes.batch


def _reshaped(shape: Sequence[int], layout: Layout, new: Sequence[int], changed: int) -> Layout:
    """Through a reshape: the old axes as a list of factors, dealt out to the new; `changed` grows with the batch."""
    at = {part.axis: part for part in layout}
    # (length, whether of the batch), neighbours of one kind as one factor
    factors: list[tuple[int, bool]] = []
    for axis, length in enumerate(shape):
        part = at.get(axis)
        several = [(length, False)] if part is None else [(part.outer, False), (part.size, True), (part.inner, False)]
        for size, of_batch in several:
            if size != 1 and factors and factors[-1][1] == of_batch:
                factors[-1] = (factors[-1][0] * size, of_batch)
            elif size != 1:
                factors.append((size, of_batch))
    found = []
    for axis, length in enumerate(new):
        left, taken = length, []
        while left > 1 and factors:
            size, of_batch = factors.pop(0)
            if left % size == 0:
                piece = size
            elif size % left == 0:
                piece = left
                factors.insert(0, (size // left, of_batch))
            else:
                return LOST
            left //= piece
            taken.append((piece, of_batch))
        of_batch = [index for index, (_, own) in enumerate(taken) if own]
        if len(of_batch) > 1:
            return LOST
        for index in of_batch:
            outer, inner = (math.prod(size for size, _ in some) for some in (taken[:index], taken[index + 1 :]))
            found.append(Part(axis, outer, taken[index][0], inner))
    if new[changed] == 1 and found:  # sub-batches, of which this batch is one
        found.insert(0, Part(changed, 1, 1, 1))
    return tuple(found)


def front(value: Array, layout: Layout) -> Array:
    """(B, *shape) with the batch taken out of the other axes, which keep outer * inner entries where it was."""
    at = {part.axis: part for part in layout}
    split, batch, rest, order = [], [], [], {}
    for axis, length in enumerate(value.shape):
        part = at.get(axis)
        pieces = [length] if part is None else [part.outer, part.size, part.inner]
        if part is not None:
            order[layout.index(part)] = len(split) + 1
        rest.append(length if part is None else part.outer * part.inner)
        batch += [False] if part is None else [False, True, False]
        split += pieces
    leading = [order[index] for index in range(len(layout))]
    behind = [index for index, own in enumerate(batch) if not own]
    size = math.prod(part.size for part in layout)
    return value.reshape(split).transpose(*leading, *behind).reshape(size, *rest)


def front_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Of `front`, without the batch."""
    at = {part.axis: part.outer * part.inner for part in layout}
    return tuple(at.get(axis, length) for axis, length in enumerate(shape))


def sample_of(shape: Sequence[int], layout: Layout) -> Array:
    """The sample that each entry of a value belongs to, as an array that spreads to the shape."""
    index = jnp.zeros((), jnp.int32)
    for part in layout:
        along = jax.lax.iota(jnp.int32, shape[part.axis]) // part.inner % part.size
        index = index * part.size + along.reshape([-1 if axis == part.axis else 1 for axis in range(len(shape))])
    return index
