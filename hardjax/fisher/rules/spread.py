"""What is spread over the batch, or meets it entry by entry."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.fisher.layouts import Layout, Part, front
from hardjax.fisher.program import bind
from hardjax.fisher.rules.rule import Cost, OfRows

_SIGNS = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1)}
ENTRY_BY_ENTRY = frozenset(("mul", "div", "max", "min", "pow", "atan2", "select_n", "rem", "clamp", *_SIGNS))


@dataclass(frozen=True)
class Broadcast(OfRows):
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
class Elementwise(OfRows):
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


def _small_cost(y_shape: Sequence[int], layout: Layout, w_shape: Sequence[int]) -> Cost:
    size, batch = math.prod(w_shape), math.prod(part.size for part in layout)
    return Cost("rows", 2 * math.prod(y_shape) + 2 * batch**2 * size, size)
