"""What each sample adds to the gradient of a weight-side value, from one use of it, and the Gram matrix of that.

A use is an equation y = f(x, w) of a batched x and a weight-side w. From x and the cotangent of y a rule forms the rows
(B, *shape of w), or their (B, B) products without ever holding more than `chunk` samples' worth of rows. The uses that
matter (products, convolutions, what is spread over the batch) have rules by cost; any other is taken whole.
"""

from typing import Any

from hardjax.fisher.layouts import Layout, Part
from hardjax.fisher.program import Op, Program
from hardjax.fisher.rules.convolutions import Convolution
from hardjax.fisher.rules.lookup import Lookup
from hardjax.fisher.rules.products import Product
from hardjax.fisher.rules.rule import Cost, Rule
from hardjax.fisher.rules.spread import ENTRY_BY_ENTRY, Broadcast, Elementwise
from hardjax.fisher.rules.whole import Whole

__all__ = ["Broadcast", "Convolution", "Cost", "Elementwise", "Lookup", "Product", "Rule", "Whole", "rule_of"]

_RULES = {"dot_general": Product.of, "conv_general_dilated": Convolution.of}


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
        if name in ENTRY_BY_ENTRY and (part := _part(weight.layout)) is not None:
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


def _part(layout: Layout | None) -> Part | tuple[()] | None:
    """The one axis of sub-batches in a weight-side value; empty without any, None where there is no rule."""
    if layout is None:
        return ()
    plain = len(layout) == 1 and layout[0].outer == layout[0].inner == 1
    return layout[0] if plain else None
