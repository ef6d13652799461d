"""What each sample adds to the gradient of a weight-side value, from one use of it, and the Gram matrix of that.

A use is an equation y = f(x, w) of a batched x and a weight-side w. From x and the cotangent of y a rule forms the rows
(B, *shape of w), or their (B, B) products without ever holding more than `chunk` samples' worth of rows. The uses that
matter (products, convolutions, what is spread over the batch) have rules by cost; any other is taken whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.definition import outer
from hardjax.fisher.layouts import Layout, Part, front, front_shape, sample_of
from hardjax.fisher.program import Op, Program, Value, bind

# TF32 or bfloat16 products would decide which eigenvalues count as zero.
_HIGHEST = lax.Precision.HIGHEST
# 6.3 million entries are 24 MiB in float32.
# Patches that are cut and used in one go: the fastest of several sizes on a CPU, or enough to fill an accelerator.
_PATCH_ENTRIES = {"cpu": 3 << 21}

Form = Literal["rows", "pairs"]


@dataclass(frozen=True)
class Cost:
    """How a Gram matrix is formed: form, floating-point operations, and the row entries of one sample."""

    form: Form
    flops: int
    row_size: int


class Rule(Protocol):
    """One use.

    Attributes:
        needs: positions of the inputs of the equation that `rows` and `gram` take.
    """

    needs: tuple[int, ...]

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """For each weight-side operand (B, *its shape)."""
        ...

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        """(B, B), the products of the rows of the only operand."""
        ...

    def cost(self) -> Cost:
        """What `gram` will do."""
        ...


def rule_of(program: Program, op: Op) -> Rule:
    """The rule of a use."""
    ins, outs = ([program.values[key] for key in keys] for keys in (op.ins, op.outs))
    batch, out = program.sizes.batch, outs[0]
    if len(op.operands) == 1 and len(outs) == 1 and out.layout:
        (at,) = op.operands
        weight, name = ins[at], op.eqn.primitive.name
        batched = [i for i, value in enumerate(ins) if value.kind == "batched"]
        if not weight.layout:
            seen, places = _seen_through(op.eqn)
            if seen is not None and len(batched) == 1 and {at, batched[0]} == set(places):
                x = ins[batched[0]]
                made = _RULES[seen.primitive.name](batch, seen, places.index(at), (at, batched[0]), x, weight, out)
                if made is not None:
                    return made
            if name == "broadcast_in_dim":
                return Broadcast(
                    tuple(op.eqn.params["broadcast_dimensions"]), weight.aval.shape, out.aval.shape, out.layout
                )
            if name == "gather" and at == 0 and len(batched) == 1:
                made = Lookup.of(batch, op.eqn, ins[1], weight, out)
                if made is not None:
                    return made
        if name in _ELEMENTWISE and (part := _part(weight.layout)) is not None:
            return Elementwise(op.eqn, at, weight.aval.shape, out.aval.shape, out.layout, part)
    return Whole(op, batch, tuple(ins), tuple(outs))


def _seen_through(eqn: Any) -> tuple[Any, list[int]]:
    """The one product or convolution that an equation computes, perhaps in a form for this platform or with a
    derivative of its own, and which of the equation's inputs it takes."""
    name, places = eqn.primitive.name, list(range(len(eqn.invars)))
    while name not in _RULES:
        if name == "cond" and "branches_platforms" in eqn.params:
            inner, places = eqn.params["branches"][-1], places[1:]
        elif name in ("custom_vjp_call", "custom_jvp_call", "jit", "pjit"):
            inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        else:
            return None, []
        inner = getattr(inner, "jaxpr", inner)
        if len(inner.eqns) != 1 or inner.eqns[0].outvars != inner.outvars or inner.constvars:
            return None, []
        (eqn,) = inner.eqns
        if any(var not in inner.invars for var in eqn.invars):
            return None, []
        places = [places[inner.invars.index(var)] for var in eqn.invars]
        name = eqn.primitive.name
    return eqn, places


@dataclass(frozen=True)
class Product:
    """A `dot_general` of x and w: y[g, t, n] = sum over k of x[g, t, k] w[g, n, k], the batch among t.

    Attributes:
        needs: of x.
        x_layout, y_layout: where the batch lies in them.
        x_order, y_order: axes of x as (t, g, k), of y as (t, g, n).
        w_order: axes of w as (g, n, k).
        groups, n, k, positions: lengths; positions of one sample.
        w_shape: of w.
    """

    batch: int
    needs: tuple[int, ...]
    x_layout: Layout
    y_layout: Layout
    x_order: tuple[int, ...]
    y_order: tuple[int, ...]
    w_order: tuple[int, ...]
    positions: int
    groups: int
    n: int
    k: int
    w_shape: tuple[int, ...]

    @staticmethod
    def of(batch: int, eqn: Any, side: int, places: tuple[int, int], x: Any, w: Any, y: Any) -> "Product | None":
        """`side`: 0 where w is the first operand."""
        contract, same = eqn.params["dimension_numbers"]
        (w_contract, x_contract), (w_same, x_same) = (contract[::-1], same[::-1]) if side else (contract, same)
        x_shape, w_shape = x.aval.shape, w.aval.shape
        x_free = [axis for axis in range(len(x_shape)) if axis not in (*x_contract, *x_same)]
        w_free = [axis for axis in range(len(w_shape)) if axis not in (*w_contract, *w_same)]
        if not x.layout or not y.layout or any(part.axis not in x_free for part in x.layout):
            return None
        same_axes = list(range(len(x_same)))
        first = len(same_axes)
        counts = (len(w_free), len(x_free)) if side == 0 else (len(x_free), len(w_free))
        runs = [list(range(first, first + counts[0])), list(range(first + counts[0], first + sum(counts)))]
        y_w, y_x = runs if side == 0 else runs[::-1]
        expected = tuple(part._replace(axis=y_x[x_free.index(part.axis)]) for part in x.layout)
        if y.layout != expected:
            return None
        inside = front_shape(x_shape, x.layout)
        return Product(
            batch,
            places[1:],
            x.layout,
            y.layout,
            (*x_free, *x_same, *x_contract),
            (*y_x, *same_axes, *y_w),
            (*w_same, *w_free, *w_contract),
            math.prod(inside[axis] for axis in x_free),
            math.prod(x_shape[axis] for axis in x_same),
            math.prod(w_shape[axis] for axis in w_free),
            math.prod(x_shape[axis] for axis in x_contract),
            w_shape,
        )

    def _both(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, Array]:
        """(B, positions, groups, k) and (B, positions, groups, n)."""
        (x,), (y,) = ins, cotangents
        shape = (self.batch, self.positions, self.groups)
        a = front(x, self.x_layout).transpose(0, *(axis + 1 for axis in self.x_order)).reshape(*shape, self.k)
        d = front(y, self.y_layout).transpose(0, *(axis + 1 for axis in self.y_order)).reshape(*shape, self.n)
        return a, d

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        a, d = self._both(ins, cotangents)
        rows = _form_rows(_as_it_is, a, d)
        rows = rows.reshape(self.batch, *(self.w_shape[axis] for axis in self.w_order))
        return [rows.transpose(0, *(self.w_order.index(axis) + 1 for axis in range(len(self.w_shape))))]

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        a, d = self._both(ins, cotangents)
        cost = self.cost()
        limit = cost.row_size * min(chunk or self.batch, self.batch)
        if cost.form == "pairs":
            return _pairs_gram(a, d, limit)
        width = max(1, limit // (self.batch * self.groups * self.k))
        # Cut by output channel: pieces of a row are disjoint, and so their products add up.
        pieces = [d[..., channel : channel + width] for channel in range(0, self.n, width)]
        return sum(outer(_form_rows(_as_it_is, a, piece)) for piece in pieces)

    def cost(self) -> Cost:
        return _cost(self.batch, self.positions, 1, self.k, self.n, self.groups)


@dataclass(frozen=True)
class Convolution:
    """A `conv_general_dilated` of x with the kernel w, whatever the order of their axes.

    Attributes:
        x_layout, y_layout: where the batch lies in x and y, after their axes were brought to (batch, ..., channels).
        x_order, y_order: the axes of x and y in that order.
        w_order: the axes of w as (..., inputs, outputs).
        x_shape, y_shape: (B, ..., channels) as the windows below see them: of a batch merged with other axes these come
            first among the positions.
        kernel_size, strides, padding, input_dilation, kernel_dilation: one for each of the axes between.
        groups: feature groups; equal to the number of input channels for a depthwise convolution.
    """

    batch: int
    needs: tuple[int, ...]
    x_layout: Layout
    y_layout: Layout
    x_order: tuple[int, ...]
    y_order: tuple[int, ...]
    w_order: tuple[int, ...]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(batch: int, eqn: Any, side: int, places: tuple[int, int], x: Any, w: Any, y: Any) -> "Convolution | None":
        params, numbers = eqn.params, eqn.params["dimension_numbers"]
        x_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
        y_order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        if side != 1 or params["batch_group_count"] != 1 or not x.layout or not y.layout:
            return None
        x_layout, y_layout = (
            tuple(part._replace(axis=order.index(part.axis)) for part in value.layout)
            for value, order in ((x, x_order), (y, y_order))
        )
        if len(x_layout) != 1 or x_layout[0].axis != 0 or x_layout != y_layout:
            return None
        x_shape, y_shape = ([value.aval.shape[axis] for axis in order] for value, order in ((x, x_order), (y, y_order)))
        merged = x_layout[0].outer * x_layout[0].inner
        extra = () if merged == 1 else (merged,)
        ones = (1,) * len(extra)
        return Convolution(
            batch,
            places[1:],
            x_layout,
            y_layout,
            x_order,
            y_order,
            (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]),
            (batch, *extra, *x_shape[1:]),
            (batch, *extra, *y_shape[1:]),
            (*ones, *(w.aval.shape[axis] for axis in numbers.rhs_spec[2:])),
            (*ones, *params["window_strides"]),
            (*(((0, 0),) * len(extra)), *params["padding"]),
            (*ones, *params["lhs_dilation"]),
            (*ones, *params["rhs_dilation"]),
            params["feature_group_count"],
        )

    def _both(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, Array]:
        (x,), (y,) = ins, cotangents
        a = front(x.transpose(self.x_order), self.x_layout).reshape(self.x_shape)
        return a, front(y.transpose(self.y_order), self.y_layout).reshape(self.y_shape)

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        a, d = self._both(ins, cotangents)
        offsets, channels = _offsets(self.kernel_size), self.y_shape[-1]
        blocks = _form_rows(lambda a: self._patches(a, offsets), a, self._grouped(d))
        rows = blocks.reshape(self.batch, self.groups, channels // self.groups, len(offsets), -1)
        sizes = self.kernel_size[len(self.kernel_size) + 2 - len(self.w_order) :]
        rows = rows.transpose(0, 3, 4, 1, 2).reshape(self.batch, *sizes, -1, channels)
        return [rows.transpose(0, *(self.w_order.index(axis) + 1 for axis in range(len(self.w_order))))]

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        a, d = self._both(ins, cotangents)
        offsets, cost = _offsets(self.kernel_size), self.cost()
        cotangent = self._grouped(d)
        limit = cost.row_size * min(chunk or self.batch, self.batch)
        if cost.form == "pairs":
            return _pairs_gram(self._patches(a, offsets), cotangent, limit)
        total = jnp.zeros((self.batch, self.batch), a.dtype)
        for some_offsets, channels in self._pieces(cost.row_size, limit // self.batch):
            patches = partial(self._patches, offsets=some_offsets)
            total += outer(_form_rows(patches, a, cotangent[..., channels]))
        return total

    def cost(self) -> Cost:
        columns, channels = self.x_shape[-1] // self.groups, self.y_shape[-1] // self.groups
        offsets = math.prod(self.kernel_size)
        return _cost(self.batch, math.prod(self.y_shape[1:-1]), offsets, columns, channels, self.groups)

    def _pieces(self, size: int, limit: int) -> Iterator[tuple[list, slice]]:
        """Cuts a row of `size` entries by kernel offset, then by output channel, into about `limit` entries."""
        offsets, channels = _offsets(self.kernel_size), self.y_shape[-1] // self.groups
        together = max(1, min(len(offsets), len(offsets) * limit // size))
        width = max(1, min(channels, channels * limit * len(offsets) // (size * together)))
        for first in range(0, len(offsets), together):
            for channel in range(0, channels, width):
                yield offsets[first : first + together], slice(channel, channel + width)

    def _pad(self, a: Array) -> Array:
        pads = [(*pad, dilation - 1) for pad, dilation in zip(self.padding, self.input_dilation, strict=True)]
        return lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def _patches(self, a: Array, offsets: list[tuple[int, ...]]) -> Array:
        """What the kernel sees at each position: (B, positions, groups, offsets * channels per group).

        Slices: `conv_general_dilated_patches` is ten times slower in compiled loops on CPU.
        """
        padded = self._pad(a)
        slices = [self._grouped(self._slice(padded, offset)) for offset in offsets]
        return slices[0] if len(slices) == 1 else jnp.concatenate(slices, -1)

    def _grouped(self, array: Array) -> Array:
        """(B, ..., C) -> (B, positions, groups, channels per group)."""
        array = array.reshape(len(array), -1, array.shape[-1])
        return array.reshape(*array.shape[:2], self.groups, -1)

    def _slice(self, padded: Array, offset: tuple[int, ...]) -> Array:
        start = [o * dilation for o, dilation in zip(offset, self.kernel_dilation, strict=True)]
        counts = zip(start, self.y_shape[1:-1], self.strides, strict=True)
        limit = [s + (n - 1) * stride + 1 for s, n, stride in counts]
        return lax.slice(padded, [0, *start, 0], [len(padded), *limit, padded.shape[-1]], [1, *self.strides, 1])


class _Small:
    """Products of rows that are never large: formed whole."""

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        del chunk
        (rows,) = self.rows(ins, cotangents)
        return outer(rows)


@dataclass(frozen=True)
class Broadcast(_Small):
    """A weight-side value spread over the batch, and perhaps over other axes.

    Attributes:
        axes: of the output, that the axes of w went to.
    """

    axes: tuple[int, ...]
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    y_layout: Layout
    needs: tuple[int, ...] = ()

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        d = front(cotangents[0], self.y_layout)
        stays = {axis for axis, size in zip(self.axes, self.w_shape, strict=True) if size != 1}
        rows = d.sum([axis + 1 for axis in range(d.ndim - 1) if axis not in stays])
        return [rows.reshape(len(d), *self.w_shape)]

    def cost(self) -> Cost:
        return _small_cost(self.y_shape, self.y_layout, self.w_shape)


@dataclass(frozen=True)
class Elementwise(_Small):
    """An equation entry by entry, over whose batch w is spread.

    Attributes:
        at: position of w.
        part: where sub-batches lie in w; None: it is the same for all samples.
    """

    eqn: Any
    at: int
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    y_layout: Layout
    part: Part | tuple[()]

    @property
    def needs(self) -> tuple[int, ...]:
        name = self.eqn.primitive.name
        # What is not asked for need not be kept for the backward pass.
        return () if name in _SIGNS else (1 - self.at,) if name == "mul" else tuple(range(len(self.eqn.invars)))

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        d = front(self._spread(ins, cotangents[0]), self.y_layout)
        if not self.w_shape:  # a single number, which needs no axes of its own
            return [d.reshape(len(d), -1).sum(1)]
        rest = [*self.w_shape]
        if self.part:
            rest[self.part.axis] = 1
        rows = d.sum([axis + 1 for axis, size in enumerate(rest) if size == 1], keepdims=True)
        if self.part:  # a sample's row lies in its own sub-batch
            own = (
                jnp.arange(len(d)) // (len(d) // self.part.size)
                if self._major()
                else jnp.arange(len(d)) % self.part.size
            )
            spread = [len(d), *(self.part.size if axis == self.part.axis else 1 for axis in range(len(rest)))]
            rows = rows * jax.nn.one_hot(own, self.part.size, dtype=rows.dtype).reshape(spread)
        return [rows]

    def _major(self) -> bool:
        return self.y_layout[0].size == self.part.size and self.y_layout[0].axis == self.part.axis

    def _spread(self, ins: Sequence[Array], d: Array) -> Array:
        """The cotangent of w as if it had an entry for each entry of y."""
        name = self.eqn.primitive.name
        if name in _SIGNS:
            return -d if _SIGNS[name][self.at] < 0 else d
        if name == "mul":
            return d * ins[0]
        whole = [jnp.broadcast_to(value, self.y_shape) if i == self.at else value for i, value in enumerate(ins)]

        def entries(w: Array) -> Array:
            return bind(self.eqn, *[w if i == self.at else value for i, value in enumerate(whole)])[0]

        y, pull = jax.vjp(entries, whole[self.at])
        return pull(d.astype(y.dtype))[0]

    def cost(self) -> Cost:
        return _small_cost(self.y_shape, self.y_layout, self.w_shape)


@dataclass(frozen=True)
class Lookup:
    """Entries of a table w (entries, ...) picked by indices that hold the batch.

    Attributes:
        columns: entries of what one index picks.
        positions: picked for one sample.
    """

    eqn: Any
    batch: int
    needs: tuple[int, ...]
    index_layout: Layout
    y_layout: Layout
    y_order: tuple[int, ...]
    w_shape: tuple[int, ...]
    positions: int

    @staticmethod
    def of(batch: int, eqn: Any, index: Any, w: Any, y: Any) -> "Lookup | None":
        numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], w.aval.shape
        simple = (
            tuple(numbers.collapsed_slice_dims) == (0,)
            and tuple(numbers.start_index_map) == (0,)
            and not numbers.operand_batching_dims
            and not numbers.start_indices_batching_dims
            and tuple(sizes) == (1, *shape[1:])
            and index.layout
            and y.layout
        )
        if not simple:
            return None
        offset = tuple(numbers.offset_dims)
        others = tuple(axis for axis in range(len(y.aval.shape)) if axis not in offset)
        expected = tuple(part._replace(axis=others[part.axis]) for part in index.layout if part.axis < len(others))
        if y.layout != expected:
            return None
        positions = math.prod(front_shape(index.aval.shape, index.layout))
        return Lookup(eqn, batch, (1,), index.layout, y.layout, (*others, *offset), shape, positions)

    def _both(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, Array]:
        """Entries picked, (B, positions), -1 where none is; cotangents (B, positions, columns)."""
        index = front(ins[0], self.index_layout).reshape(self.batch, -1)
        d = front(cotangents[0], self.y_layout).transpose(0, *(axis + 1 for axis in self.y_order))
        size = self.w_shape[0]
        inside = (index >= 0) & (index < size)
        if "CLIP" in str(self.eqn.params["mode"]) or "PROMISE" in str(self.eqn.params["mode"]):
            return jnp.clip(index, 0, size - 1), d.reshape(*index.shape, -1)
        return jnp.where(inside, index, -1), d.reshape(*index.shape, -1)

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        index, d = self._both(ins, cotangents)
        # An index below zero would count from the end.
        index = jnp.where(index < 0, self.w_shape[0], index)
        table = jnp.zeros((self.w_shape[0], d.shape[-1]), d.dtype)
        rows = jax.vmap(lambda index, d: table.at[index].add(d, mode="drop"))(index, d)
        return [rows.reshape(self.batch, *self.w_shape)]

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        if self.cost().form == "rows":
            return outer(self.rows(ins, cotangents)[0])
        index, d = self._both(ins, cotangents)

        def one_sample(sample: tuple[Array, Array]) -> Array:
            index_i, d_i = sample
            same = (index_i[:, None, None] == index[None]) & (index_i[:, None, None] >= 0)
            return jnp.einsum("sjt,sc,jtc->j", same.astype(d.dtype), d_i, d, precision=_HIGHEST)

        limit = math.prod(self.w_shape) * min(chunk or self.batch, self.batch)
        together = max(1, limit // (2 * self.batch * self.positions**2))
        return lax.map(one_sample, (index, d), batch_size=min(together, self.batch))

    def cost(self) -> Cost:
        size, columns = math.prod(self.w_shape), math.prod(self.w_shape[1:])
        rows = 2 * self.batch**2 * size
        pairs = 2 * self.batch**2 * self.positions**2 * (columns + 1)
        return Cost("pairs" if pairs < rows else "rows", min(rows, pairs), size)


@dataclass(frozen=True)
class Whole(_Small):
    """Any other equation, which works sample by sample: that of one sample pulled back for each, or where it is not
    known how it looks for one sample, all of it once a sample, from a cotangent that is zero elsewhere.

    Attributes:
        ins, outs: what is known of the equation's inputs and outputs.
    """

    op: Op
    batch: int
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]

    @property
    def needs(self) -> tuple[int, ...]:
        return tuple(range(len(self.op.ins)))

    @property
    def has_single(self) -> bool:
        """Whether the equation for one sample takes a sample's share of the inputs."""
        layouts = [value.layout for value in (*self.ins, *self.outs) if value.layout is not None]
        if self.op.single is None or any(not self._whole(layout) for layout in layouts):
            return False
        pairs = zip((*self.ins, *self.outs), (*self.op.single.invars, *self.op.single.outvars), strict=True)
        return all(self._of_one(value) == var.aval.shape for value, var in pairs)

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        return self._by_samples(ins, cotangents) if self.has_single else self._by_masks(ins, cotangents)

    def _by_samples(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        operands, given = self.op.operands, [out for out in self.outs if out.aval.inexact]
        split = [value.layout is not None for value in self.ins]
        shares = [front(x, value.layout) if value.layout else x for x, value in zip(ins, self.ins, strict=True)]
        own = [front(d, out.layout).astype(out.aval.dtype) for d, out in zip(cotangents, given, strict=True)]

        def of_sample(ins: list[Array], cotangents: list[Array]) -> list[Array]:
            _, pull = jax.vjp(partial(self._outputs, self.op.single, ins), [ins[i] for i in operands])
            return pull(cotangents)[0]

        return jax.vmap(of_sample, ([0 if axis else None for axis in split], 0))(shares, own)

    def _by_masks(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        given = [out for out in self.outs if out.aval.inexact]
        _, pull = jax.vjp(partial(self._outputs, self.op.eqn, ins), [ins[i] for i in self.op.operands])

        def of_sample(i: Array) -> list[Array]:
            masks = [sample_of(out.aval.shape, out.layout) == i for out in given]
            own = [jnp.where(mask, d, 0) for mask, d in zip(masks, cotangents, strict=True)]
            return pull([d.astype(out.aval.dtype) for d, out in zip(own, given, strict=True)])[0]

        return lax.map(of_sample, jnp.arange(self.batch))

    def _outputs(self, eqn: Any, ins: Sequence[Array], weights: Sequence[Array]) -> list[Array]:
        """Those with a derivative."""
        values = list(ins)
        for i, weight in zip(self.op.operands, weights, strict=True):
            values[i] = weight
        return [y for y, out in zip(bind(eqn, *values), self.outs, strict=True) if out.aval.inexact]

    def _whole(self, layout: Layout) -> bool:
        return len(layout) == 1 and layout[0].size == self.batch

    def _of_one(self, value: Value) -> tuple[int, ...]:
        return front_shape(value.aval.shape, value.layout) if value.layout else value.aval.shape

    def cost(self) -> Cost:
        size = sum(math.prod(self.ins[i].aval.shape) for i in self.op.operands)
        return Cost("rows", 2 * self.batch**2 * size, size)


_RULES = {"dot_general": Product.of, "conv_general_dilated": Convolution.of}
_SIGNS = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1)}
_ELEMENTWISE = frozenset(("mul", "div", "max", "min", "pow", "atan2", "select_n", "rem", "clamp", *_SIGNS))


def _part(layout: Layout | None) -> Part | tuple[()] | None:
    """The one axis of sub-batches in a weight-side value; empty without any, None where there is no rule."""
    if layout is None:
        return ()
    plain = len(layout) == 1 and layout[0].outer == layout[0].inner == 1
    return layout[0] if plain else None


def _small_cost(y_shape: Sequence[int], layout: Layout, w_shape: Sequence[int]) -> Cost:
    size, batch = math.prod(w_shape), math.prod(part.size for part in layout)
    return Cost("rows", 2 * math.prod(y_shape) + 2 * batch**2 * size, size)


def _form_rows(patches: Callable[[Array], Array], a: Array, d: Array) -> Array:
    """(B, g * c * k) rows from `patches(a)` (B, T, g, k) and d (B, T, g, c), as many samples at a time as
    `_PATCH_ENTRIES` allows.

    The barrier keeps XLA from cutting the patches of all layers at once, during the forward pass.
    """
    a, d = lax.optimization_barrier((a, d))
    batch, shape = len(a), jax.eval_shape(patches, a).shape
    most = max(1, _PATCH_ENTRIES.get(jax.default_backend(), 1 << 25) // math.prod(shape[1:]))
    # A divisor of the batch: a remainder would be a second shape, and a second program.
    together = next(count for count in range(min(most, batch), 0, -1) if batch % count == 0)
    if together == batch:
        return _block(patches(a), d).reshape(batch, -1)
    # Every entry is overwritten. Zeros would be constants, which XLA lays out for all layers before the first is done.
    start = jnp.broadcast_to(d.ravel()[0], (batch, shape[2] * shape[3] * d.shape[3]))

    def some_samples(index: Array, rows: Array) -> Array:
        some_a, some_d = (lax.dynamic_slice_in_dim(array, index * together, together) for array in (a, d))
        block = _block(patches(some_a), some_d).reshape(together, -1)
        return lax.dynamic_update_slice_in_dim(rows, block, index * together, 0)

    return lax.fori_loop(0, batch // together, some_samples, start)


def _pairs_gram(a: Array, d: Array, limit: int) -> Array:
    """Sum over groups and pairs of positions of (a_is . a_jt) (d_is . d_jt), about `limit` products at a time."""
    batch, positions, groups, _ = d.shape

    def one_sample(sample: tuple[Array, Array]) -> Array:
        a_i, d_i = sample
        inputs = jnp.einsum("sgk,jtgk->jgst", a_i, a, precision=_HIGHEST)
        cotangents = jnp.einsum("sgc,jtgc->jgst", d_i, d, precision=_HIGHEST)
        return jnp.sum(inputs * cotangents, (1, 2, 3))

    # The usual last layer: two matrix products of the batch, no loop.
    if positions == 1 and groups == 1:
        return outer(a[:, 0, 0]) * outer(d[:, 0, 0])
    # Two products of T x T for every pair of samples and group are alive at once.
    samples = max(1, limit // (2 * batch * groups * positions**2))
    return lax.map(one_sample, (a, d), batch_size=min(samples, batch))


def _block(a: Array, d: Array) -> Array:
    """(B, T, g, k), (B, T, g, c) -> (B, g, c, k), summed over positions."""
    if a.shape[2] == 1:
        turned = d[:, :, 0].transpose(0, 2, 1)
        if jax.default_backend() == "cpu":  # whose products of explicit transposes are faster
            turned = lax.optimization_barrier(turned)
        return jnp.einsum("bct,btk->bck", turned, a[:, :, 0], precision=_HIGHEST)[:, None]
    if a.shape[3] == 1 or d.shape[3] == 1:  # depthwise: a matrix product one number wide is slow
        return jnp.sum(d[..., :, None] * a[..., None, :], 1)
    return jnp.einsum("btgk,btgc->bgck", a, d, precision=_HIGHEST)


def _as_it_is(a: Array) -> Array:
    return a


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    offsets: list[tuple[int, ...]] = [()]
    for size in kernel_size:
        offsets = [(*head, o) for head in offsets for o in range(size)]
    return offsets


def _cost(batch: int, positions: int, offsets: int, columns: int, channels: int, groups: int) -> Cost:
    row_size = offsets * columns * channels * groups
    rows = 2 * batch * (positions + batch) * row_size
    pairs = 2 * batch**2 * positions**2 * groups * (offsets * columns + channels + 1)
    # T^2 pairs of positions beat rows where a kernel is large and positions are few: last layers, 1x1 maps.
    form: Form = "pairs" if pairs < rows else "rows"
    return Cost(form, min(rows, pairs), row_size)
