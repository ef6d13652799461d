"""Convolutions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.layouts import Layout, front
from hardjax.fisher.rules import rule
from hardjax.fisher.rules.forming import HIGHEST, Former, cost_of, form_rows, former_of, pairs_gram, rows_gram
from hardjax.fisher.rules.rule import Cost


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
        """(B, ..., inputs) and (B, ..., groups, channels)."""
        (x,), (y,) = ins, cotangents
        a = front(x.transpose(self.x_order), self.x_layout).reshape(self.x_shape)
        d = front(y.transpose(self.y_order), self.y_layout).reshape(*self.y_shape[:-1], self.groups, -1)
        return a, d

    def rows(self, ins: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        a, d = self._both(ins, cotangents)
        offsets, channels = _offsets(self.kernel_size), self.y_shape[-1] // self.groups
        if self._shifts:
            rows = self._rows_by_shifts(a, d)
        else:
            rows = form_rows(self._former(offsets), a, d)
            if not self._thin:
                rows = rows.reshape(self.batch, self.groups, channels, len(offsets), -1).transpose(0, 3, 4, 1, 2)
        sizes = self.kernel_size[len(self.kernel_size) + 2 - len(self.w_order) :]
        rows = rows.reshape(self.batch, *sizes, -1, self.y_shape[-1])
        return [rows.transpose(0, *(self.w_order.index(axis) + 1 for axis in range(len(self.w_order))))]

    def _rows_by_shifts(self, a: Array, d: Array) -> Array:
        """(B, offsets but for the column, columns, inputs, outputs)"""
        lead, inputs = _offsets(self.kernel_size[:-1]), a.shape[-1]
        places = {}
        for phase, columns in self._phases():
            rows = form_rows(self._by_shifts(lead, phase, columns), a, d)
            rows = rows.reshape(self.batch, len(lead), inputs, len(columns), -1)
            places |= {column: rows[:, :, :, index] for index, column in enumerate(columns)}
        return jnp.stack([places[column] for column in range(self.kernel_size[-1])], 2)

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        a, d = self._both(ins, cotangents)
        cost = self.cost()
        limit = cost.row_size * min(chunk or self.batch, self.batch)
        if cost.form == "pairs":
            former = self._by_patches(_offsets(self.kernel_size))
            return pairs_gram(former.left(a), self._flat(d), limit)
        total = jnp.zeros((self.batch, self.batch), a.dtype)
        for former, channels in self._pieces(cost.row_size, limit // self.batch):
            total += rows_gram(former, a, d[..., channels])
        return total

    def cost(self) -> Cost:
        columns, channels = self.x_shape[-1] // self.groups, self.y_shape[-1] // self.groups
        offsets = math.prod(self.kernel_size)
        return cost_of(self.batch, math.prod(self.y_shape[1:-1]), offsets, columns, channels, self.groups)

    def _pieces(self, size: int, limit: int) -> Iterator[tuple[Former, slice]]:
        """Cuts a row of `size` entries by kernel offset, then by output channel, into about `limit` entries: their
        products add up."""
        offsets = _offsets(self.kernel_size[:-1] if self._shifts else self.kernel_size)
        channels = self.y_shape[-1] // self.groups
        together = max(1, min(len(offsets), len(offsets) * limit // size))
        width = max(1, min(channels, channels * limit * len(offsets) // (size * together)))
        apart = width == 1 and limit * len(offsets) * channels < size
        for first in range(0, len(offsets), together):
            for former in self._formers(offsets[first : first + together], apart):
                for channel in range(0, channels, width):
                    yield former, slice(channel, channel + width)

    def _formers(self, offsets: list[tuple[int, ...]], apart: bool) -> list[Former]:
        """Whose rows together are those of these kernel offsets, for shifts less the column; `apart`: each column's by
        itself."""
        if not self._shifts:
            return [self._former(offsets)]
        return [
            self._by_shifts(offsets, phase, part)
            for phase, columns in self._phases()
            for part in ([[column] for column in columns] if apart else [columns])
        ]

    def _former(self, offsets: list[tuple[int, ...]]) -> Former:
        return self._by_offsets(offsets) if self._thin else self._by_patches(offsets)

    @property
    def _shifts(self) -> bool:
        """Whether shifted copies of both sides are cheaper than patches, a copy of the input for each kernel entry;
        products grow by what the kernel overhangs."""
        wide = self.kernel_size[-1] if self.kernel_size else 1
        if not rule.on_cpu() or self.groups != 1 or wide == 1:
            return False
        inputs, outputs, lead = self.x_shape[-1], self.y_shape[-1], math.prod(self.kernel_size[:-1])
        lines = math.prod(self.y_shape[1:-2])
        shifted = sum(
            lines * self._length(some) * _work(lead * inputs, len(some) * outputs, lead * inputs + len(some) * outputs)
            for _, some in self._phases()
        )
        # Runs of fewer than 16 channels cost as much as 16; the cotangent is turned once.
        copied = lead * wide * max(inputs, 16) + outputs / 2
        return shifted < lines * self.y_shape[-2] * _work(lead * wide * inputs, outputs, copied)

    def _phases(self) -> list[tuple[int, list[int]]]:
        """Kernel columns by the columns of the padded input that they meet, every stride-th one from a phase on."""
        found: dict[int, list[int]] = {}
        for column in range(self.kernel_size[-1]):
            found.setdefault(column * self.kernel_dilation[-1] % self.strides[-1], []).append(column)
        return list(found.items())

    def _shift(self, column: int) -> int:
        return column * self.kernel_dilation[-1] // self.strides[-1]

    def _length(self, columns: Sequence[int]) -> int:
        return self.y_shape[-2] + self._shift(columns[-1])

    def _by_shifts(self, lead: list[tuple[int, ...]], phase: int, columns: list[int]) -> Former:
        """Rows (b, lead, inputs, columns, channels): the input is shifted along all axes but the last, the cotangent
        along that."""
        length, high = self._length(columns), self._shift(columns[-1])
        counts = (*self.y_shape[1:-2], length)

        def left(a: Array) -> Array:
            turned = lax.optimization_barrier(jnp.moveaxis(self._pad(a), -1, 1))
            inputs = [self._cut(turned, 2, [*self._starts(offset), phase], counts) for offset in lead]
            return jnp.concatenate([some.reshape(*some.shape[:2], -1) for some in inputs], 1)

        def right(d: Array) -> Array:
            d = d[..., 0, :]
            ends = [(0, 0)] * (d.ndim - 2)
            shifts = [self._shift(column) for column in columns]
            placed = jnp.concatenate([jnp.pad(d, [*ends, (low, high - low), (0, 0)]) for low in shifts], -1)
            return placed.reshape(len(d), -1, placed.shape[-1])

        def join(left: Array, right: Array) -> Array:
            return jnp.einsum("bkt,btc->bkc", left, right, precision=HIGHEST).reshape(len(left), -1)

        sides = len(lead) * self.x_shape[-1] + len(columns) * self.y_shape[-1]
        return Former(left, right, join, math.prod(counts) * sides, 2)

    @property
    def _thin(self) -> bool:
        """Whether each input channel is alone in its group."""
        return self.groups == self.x_shape[-1] > 1 and rule.on_cpu()

    def _by_offsets(self, offsets: list[tuple[int, ...]]) -> Former:
        """Rows (b, offsets, groups, channels) where a group has one input.

        One sample at a time: its products are summed while they are in the cache. Cut as patches, depthwise kernels
        took 5 to 15 times as long (2 cores).
        """

        def join(padded: Array, d: Array) -> Array:
            def of_sample(sample: tuple[Array, Array]) -> Array:
                padded, d = sample
                seen = (self._cut(padded[None], 1, self._starts(o), self.y_shape[1:-1])[0] for o in offsets)
                return jnp.stack([(x[..., None] * d).sum(range(d.ndim - 2)) for x in seen]).ravel()

            return lax.map(of_sample, (padded, d))

        return Former(self._pad, lambda d: d, join, 1, len(self.y_shape))

    def _by_patches(self, offsets: list[tuple[int, ...]]) -> Former:
        """Rows (b, groups, channels, offsets * inputs per group), of what the kernel sees at each position.

        Slices: `conv_general_dilated_patches` is ten times slower in compiled loops on CPU.
        """

        def patches(a: Array) -> Array:
            padded = self._pad(a)
            slices = [self._cut(padded, 1, self._starts(offset), self.y_shape[1:-1]) for offset in offsets]
            slices = [some.reshape(len(a), math.prod(self.y_shape[1:-1]), self.groups, -1) for some in slices]
            return slices[0] if len(slices) == 1 else jnp.concatenate(slices, -1)

        entries = math.prod(self.y_shape[1:-1]) * len(offsets) * self.x_shape[-1]
        return former_of(patches, self._flat, self.groups, entries)

    def _flat(self, d: Array) -> Array:
        """(b, positions, groups, channels)"""
        return d.reshape(len(d), -1, *d.shape[-2:])

    def _pad(self, a: Array) -> Array:
        pads = [(*pad, dilation - 1) for pad, dilation in zip(self.padding, self.input_dilation, strict=True)]
        return lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def _starts(self, offset: tuple[int, ...]) -> list[int]:
        return [o * dilation for o, dilation in zip(offset, self.kernel_dilation, strict=False)]

    def _cut(self, padded: Array, first: int, starts: Sequence[int], counts: Sequence[int]) -> Array:
        """Every stride-th entry of the axes from `first` on."""
        start, limit, stride = [0] * padded.ndim, [*padded.shape], [1] * padded.ndim
        for axis, (at, count, step) in enumerate(zip(starts, counts, self.strides, strict=True), first):
            start[axis], limit[axis], stride[axis] = at, at + (count - 1) * step + 1, step
        return lax.slice(padded, start, limit, stride)


def _offsets(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    offsets: list[tuple[int, ...]] = [()]
    for size in kernel_size:
        offsets = [(*head, o) for head in offsets for o in range(size)]
    return offsets


def _work(rows: int, columns: int, copied: float) -> float:
    """At one position, in multiply-adds: one copy of an entry takes as long as 40 (2 cores), and each is cut out and
    joined."""
    return rows * columns + 2 * 40 * copied
