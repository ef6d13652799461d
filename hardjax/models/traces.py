"""What a trace tells without values: which outputs depend on which inputs, and which are inputs handed on."""

from typing import Any

import jax

_CALLS = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call"}
_MOVES = {"broadcast_in_dim", "squeeze", "reshape", "copy", "transpose", "slice"}


def depends(jaxpr: Any, output: int, inputs: set[int]) -> bool:
    """Whether an output of a trace is computed from any of the inputs, all by position."""
    return bool(_needed(jaxpr, {output}) & inputs)


def moved(jaxpr: Any, variables: Any, changed: Any) -> set[str]:
    """Collections that a training pass leaves otherwise than they were; structural, so that any values do."""
    inputs = dict(zip(_paths(variables), jaxpr.invars, strict=False))
    outputs = dict(zip(_paths(changed), jaxpr.outvars[1:], strict=True))
    return {path[0] for path, var in outputs.items() if path not in inputs or _source(jaxpr, var) is not inputs[path]}


def _source(jaxpr: Any, var: Any) -> Any:
    """Where a variable's very value comes from: through what only moves it (binding an axis of length 1 does) and
    through calls (remat, jit) that hand it on."""
    by = {id(var): (equation, k) for equation in jaxpr.eqns for k, var in enumerate(equation.outvars)}
    while id(var) in by:
        equation, k = by[id(var)]
        inner = _called(equation)
        if inner is not None:
            origin = _source(inner, inner.outvars[k])
            positions = [i for i, invar in enumerate(inner.invars) if invar is origin]
            if not positions:
                return var
            var = equation.invars[positions[0]]
        elif equation.primitive.name in _MOVES:
            var = equation.invars[0]
        else:
            return var
    return var


def _needed(jaxpr: Any, outputs: set[int]) -> set[int]:
    """Positions of the inputs from which these outputs are computed. A call is looked into: Flax hands the random keys
    to every call, drawn or not."""
    needed = {id(jaxpr.outvars[k]) for k in outputs}
    for equation in reversed(jaxpr.eqns):
        wanted = {k for k, var in enumerate(equation.outvars) if id(var) in needed}
        if wanted:
            inner = _called(equation)
            positions = range(len(equation.invars)) if inner is None else _needed(inner, wanted)
            needed |= {id(equation.invars[i]) for i in positions}
    return {i for i, var in enumerate(jaxpr.invars) if id(var) in needed}


def _called(equation: Any) -> Any:
    """The inner trace of an equation that does nothing but run it."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
    inner = getattr(inner, "jaxpr", inner)
    fits = inner is not None and len(inner.invars) == len(equation.invars)
    return inner if fits and len(inner.outvars) == len(equation.outvars) else None


def _paths(tree: Any) -> list[tuple[str, ...]]:
    return [tuple(str(getattr(k, "key", k)) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
