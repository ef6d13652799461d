"""The way from parameters to a weight-side value, along which rows are pulled back."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.fisher import written
from hardjax.fisher.program import Op, Program

# What only moves entries, where their number stays: the products of rows are the same before and after.
_MOVES = frozenset(
    [
        "reshape",
        "transpose",
        "squeeze",
        "rev",
        "copy",
        "copy_p",
        "convert_element_type",
        "broadcast_in_dim",
        "expand_dims",
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A weight-side value as a function of parameters.

    Attributes:
        ops: in order.
        params: names of the parameters it depends on, and their keys.
        fixed: keys of the other values it depends on, which are held (statistics of the batch, constants).
        end: key of the value.
        moves: every entry of the one parameter is an entry of the value, and nothing else is.
    """

    ops: tuple[Op, ...]
    params: Mapping[str, int]
    fixed: tuple[int, ...]
    end: int
    moves: bool
    constants: Mapping[int, Any]

    def pull(self, params: Mapping[str, Array], fixed: Sequence[Array], rows: Array) -> dict[str, Array]:
        """Rows (B, *shape of the value) -> {parameter: (B, *its shape)}."""
        if not self.ops:
            return dict.fromkeys(self.params, rows)
        names = list(self.params)

        def value(leaves: list[Array]) -> Array:
            env = {**self.constants, **dict(zip(self.fixed, fixed, strict=True))}
            env |= {self.params[name]: leaf for name, leaf in zip(names, leaves, strict=True)}
            for op in self.ops:
                env.update(zip(op.outs, _wide(op, [env[key] for key in op.ins]), strict=True))
            return env[self.end]

        # Rows of a kernel that is cast to half precision are not rounded to it on their way back.
        wide = [params[name].astype(jnp.promote_types(params[name].dtype, jnp.float32)) for name in names]
        y, pull = jax.vjp(value, wide)
        found = jax.vmap(lambda row: pull(row)[0])(rows.astype(y.dtype))
        return dict(zip(names, found, strict=True))

    def written(self, params: Sequence[str]) -> Hashable:
        """What it computes, parameters by their places among `params`."""
        names = {key: index for index, key in enumerate(self.fixed)}
        names |= {key: ("parameter", list(params).index(name)) for name, key in self.params.items() if name in params}
        names |= {key: ("constant", written.value(constant)) for key, constant in self.constants.items()}
        lines = []
        for op in self.ops:
            ins = tuple(names.setdefault(key, ("unread", len(names))) for key in op.ins)
            outs = tuple(names.setdefault(key, ("made", len(names))) for key in op.outs)
            lines.append((written.equation(op.eqn), ins, outs))
        return tuple(lines), names.get(self.end), self.moves


def chain_of(program: Program, made_by: Mapping[int, Op], end: int) -> Chain:
    """The chain to a weight-side value."""
    names = {key: name for name, key in program.params.items()}
    ops: dict[int, Op] = {}
    params, fixed, constants = {}, {}, {}
    waiting, seen = [end], set()
    while waiting:
        key = waiting.pop()
        if key in seen:
            continue
        seen.add(key)
        if key in names and program.values[key].kind == "weight":
            params[names[key]] = key
        elif program.values[key].kind == "weight":
            op = made_by[key]
            ops[id(op)] = op
            waiting += op.ins
        elif key in program.constants:
            constants[key] = program.constants[key]
        else:
            fixed[key] = None
    order = {id(op): index for index, op in enumerate(program.ops())}
    ordered = tuple(sorted(ops.values(), key=lambda op: order[id(op)]))
    values = program.values
    moves = len(params) == 1 and all(
        op.eqn.primitive.name in _MOVES and _size(values[op.ins[0]]) == _size(values[op.outs[0]]) for op in ordered
    )
    return Chain(ordered, dict(sorted(params.items())), tuple(fixed), end, moves, constants)


def _size(value: Any) -> int:
    return math.prod(value.aval.shape)


def _wide(op: Op, values: list[Any]) -> list[Any]:
    if op.eqn.primitive.name != "convert_element_type":
        return op.bind(*values)
    dtype = op.eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return op.bind(*values)
    return [values[0].astype(jnp.promote_types(dtype, jnp.float32))]
