"""Statistics that decide what a network computes: which branch is taken, whether something counts at all."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hardjax.fisher.program import Op, Program, alive_equations, arguments, inside

# What is drawn from a stored key or count is another draw each time.
_DRAWS = ("random_", "threefry")


def deciding(program: Program, variables: Mapping[str, Any]) -> tuple[str, ...]:
    """Names (`jax.tree_util.keystr`) of the whole numbers and single numbers among statistics from which alone truth
    values follow, or whole numbers that are used beside images or parameters. Numbers that are only calculated with
    (the count by which an average is corrected) decide nothing."""
    params, rest, _, _ = arguments(variables, None, None)
    leaves, first = jax.tree_util.tree_leaves_with_path(rest), len(jax.tree.leaves(params))
    # key -> names of the statistics that it follows from
    origins = {
        at: frozenset([jax.tree_util.keystr(path)])
        for at, (path, leaf) in zip(program.inputs[first:], leaves, strict=False)
        if _may_decide(leaf)
    }
    found: set[str] = set()
    for op in program.ops():
        names = frozenset().union(*(origins.get(at, ()) for at in op.ins))
        if not names:
            continue
        if _decides(program, op, [at for at in op.ins if at in origins]):
            found |= names
        if all(program.values[at].kind == "const" for at in op.ins) and not op.eqn.primitive.name.startswith(_DRAWS):
            origins.update(dict.fromkeys(op.outs, names))
    return tuple(sorted(found))


def _may_decide(leaf: Any) -> bool:
    number = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    return number and (math.prod(leaf.shape) == 1 or not jnp.issubdtype(leaf.dtype, jnp.inexact))


def _decides(program: Program, op: Op, ins: list[int]) -> bool:
    types = [program.values[at].aval.dtype for at in ins]
    if jnp.bool_ in types:
        return True
    inner = inside(op.eqn)
    beside_others = inner or any(program.values[at].kind != "const" for at in op.ins)
    if beside_others and any(jnp.issubdtype(dtype, jnp.integer) for dtype in types):
        return True
    return any(map(_asks, inner))


def _asks(jaxpr: Any) -> bool:
    """Whether truth values are computed in a trace."""
    alive = alive_equations(jaxpr, [True] * len(jaxpr.outvars))
    return any(any(var.aval.dtype == jnp.bool_ for var in eqn.outvars) or any(map(_asks, inside(eqn))) for eqn in alive)
