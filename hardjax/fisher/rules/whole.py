"""Any equation without a rule of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax.fisher.layouts import Layout, front, front_shape, sample_of
from hardjax.fisher.program import Op, Value, bind
from hardjax.fisher.rules.rule import Cost, OfRows


@dataclass(frozen=True)
class Whole(OfRows):
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
