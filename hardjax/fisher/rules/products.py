"""Products: `dot_general` of a batched value and a weight-side one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import Array

from hardjax.fisher.layouts import Layout, front, front_shape
from hardjax.fisher.rules.forming import Former, cost_of, form_rows, former_of, pairs_gram, rows_gram
from hardjax.fisher.rules.rule import Cost


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
        rows = form_rows(self._former, a, d)
        rows = rows.reshape(self.batch, *(self.w_shape[axis] for axis in self.w_order))
        return [rows.transpose(0, *(self.w_order.index(axis) + 1 for axis in range(len(self.w_shape))))]

    def gram(self, ins: Sequence[Array], cotangents: Sequence[Array], chunk: int | None) -> Array:
        a, d = self._both(ins, cotangents)
        cost = self.cost()
        limit = cost.row_size * min(chunk or self.batch, self.batch)
        if cost.form == "pairs":
            return pairs_gram(a, d, limit)
        width = max(1, limit // (self.batch * self.groups * self.k))
        # Cut by output channel: pieces of a row are disjoint, and so their products add up.
        pieces = [d[..., channel : channel + width] for channel in range(0, self.n, width)]
        return sum(rows_gram(self._former, a, piece) for piece in pieces)

    @property
    def _former(self) -> Former:
        return former_of(_as_it_is, _as_it_is, self.groups, self.positions * self.groups * self.k)

    def cost(self) -> Cost:
        return cost_of(self.batch, self.positions, 1, self.k, self.n, self.groups)


def _as_it_is(a: Array) -> Array:
    return a
