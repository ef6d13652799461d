"""Entries of a table, picked by indices that hold the batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.definition import outer
from hardjax.fisher.layouts import Layout, front, front_shape
from hardjax.fisher.rules.forming import HIGHEST
from hardjax.fisher.rules.rule import Cost


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
            return jnp.einsum("sjt,sc,jtc->j", same.astype(d.dtype), d_i, d, precision=HIGHEST)

        limit = math.prod(self.w_shape) * min(chunk or self.batch, self.batch)
        together = max(1, limit // (2 * self.batch * self.positions**2))
        return lax.map(one_sample, (index, d), batch_size=min(together, self.batch))

    def cost(self) -> Cost:
        size, columns = math.prod(self.w_shape), math.prod(self.w_shape[1:])
        rows = 2 * self.batch**2 * size
        pairs = 2 * self.batch**2 * self.positions**2 * (columns + 1)
        return Cost("pairs" if pairs < rows else "rows", min(rows, pairs), size)
