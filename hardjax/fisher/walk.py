"""From the traces of a network at two batch sizes to its program: what every value of it is.

Both are gone through side by side, equation by equation: the axis whose length changes is the batch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.core import Tracer
from jax.extend import core

from hardjax.fisher import layouts
from hardjax.fisher.layouts import Aval, Layout, Sizes
from hardjax.fisher.names import named_leaves
from hardjax.fisher.orders import decided_by_values
from hardjax.fisher.program import (
    Apply,
    Node,
    Op,
    Program,
    Region,
    Uncovered,
    Value,
    alive_equations,
    arguments,
    inside,
    opened,
)

# Calls: name of the equation -> of its parameter that holds what is called.
ENTERED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_REMAT = ("remat2", "remat", "checkpoint")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# Given the batch twice as large, what divides it still does; the others are for networks with sizes of their own.
_OTHERS = (lambda n: 2 * n, lambda n: 3 * n, lambda n: n + 1, lambda n: n - 1)


def trace(
    apply: Apply, variables: Mapping[str, Any], images: Any, key: Any, train: bool, *, beside_one: bool = False
) -> Program:
    """Traces the network at its batch size and at another one; computes nothing.

    Args:
        beside_one: the other one is a single sample, of which many networks take no batch.

    Raises:
        ValueError: no other batch size gives the same equations, or the batch is not the logits' leading axis.
    """
    batch = images.shape[0]
    # A network that keeps its traces hands them on.
    traced = getattr(apply, "jaxpr", partial(make_jaxpr, apply))
    here, images = traced(variables, images, key, train), _shapes(images)
    reason: Exception | None = None
    for size in [1] if beside_one else dict.fromkeys(other(batch) for other in _OTHERS if other(batch) > 1):
        resized = jax.ShapeDtypeStruct((size, *images.shape[1:]), images.dtype, weak_type=images.weak_type)
        try:
            there = traced(variables, resized, key, train)
            return _Walk(Sizes(batch, size)).program(here, there, variables, images, key)
        except (ValueError, TypeError) as error:
            if isinstance(error, Uncovered) and not isinstance(error, _Unlike):
                raise
            reason = reason or error
    assert reason is not None
    if isinstance(reason, Uncovered):
        raise reason
    raise Uncovered(f"it takes a batch of {batch} alone: {' '.join(str(reason).split())[:200]}")


def make_jaxpr(apply: Apply, variables: Mapping[str, Any], images: Any, key: Any, train: bool) -> Any:
    """The logits as a function of the leaves of (parameters, rest of the variables, images, key)."""

    def logits(params: Any, rest: Any, images: Array, key: Any) -> Array:
        return apply({**rest, "params": params}, images, train, key)[0]

    return jax.make_jaxpr(logits)(*_shapes(arguments(variables, images, key)))


class _Unlike(Uncovered):
    """The equations at the two sizes are not the same ones."""


def _shapes(tree: Any) -> Any:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, weak_type=getattr(leaf, "weak_type", False))

    return jax.tree.map(shape, tree)


class _Walk:
    """Goes through both traces side by side, through calls as well, and notes what every value is."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.values: list[Value] = []
        self.constants: dict[int, Any] = {}
        self.names: dict[int, str] = {}  # of a weight-side value: one parameter that it depends on
        self.fixed: set[int] = set()  # what follows from the batch size alone
        self.joined: dict[int, list[int]] = {}  # what is put together along its last axis (indices): of these

    def program(self, here: Any, there: Any, variables: Any, images: Any, key: Any) -> Program:
        params, rest, _, keys = arguments(variables, images, key)
        counts = [len(jax.tree.leaves(tree)) for tree in (params, rest, images, keys)]
        kinds = [kind for kind, count in zip(("weight", "const", "batched", "const"), counts, strict=True)
                 for _ in range(count)]  # fmt: skip
        args = []
        for kind, var, other in zip(kinds, here.jaxpr.invars, there.jaxpr.invars, strict=True):
            aval = _aval(var, other)
            # A whole number is no weight: nothing is differentiated with respect to it.
            kind = "const" if kind == "weight" and not aval.inexact else kind
            layout = ((0, 1, self.sizes.batch, 1),) if kind == "batched" else None
            args.append(self.value(aval, kind, layout and (layouts.Part(*layout[0]),)))
        of_params = dict(zip(named_leaves(params), args, strict=False))
        self.names = {at: name for name, at in of_params.items()}
        if len(here.jaxpr.outvars) != 1:
            raise Uncovered("it gives more than the logits.")
        nodes, (output,) = self.walk(here, there, args, [True])
        layout = self.values[output].layout
        if layout != (layouts.Part(0, 1, self.sizes.batch, 1),):
            raise Uncovered("its logits do not follow the batch as their leading axis.")
        return Program(
            self.sizes,
            tuple(nodes),
            self.values,
            self.constants,
            tuple(args),
            of_params,
            output,
        )

    def value(self, aval: Aval, kind: str, layout: Layout | None, constant: Any = None) -> int:
        self.values.append(Value(aval, kind, layout))
        if constant is not None:
            self.constants[len(self.values) - 1] = constant
            if not isinstance(constant, Tracer):
                self.fixed.add(len(self.values) - 1)
        return len(self.values) - 1

    def walk(self, here: Any, there: Any, args: Sequence[int], wanted: Sequence[bool]) -> tuple[list[Node], list[int]]:
        """Nodes of a (closed) jaxpr, and the keys of its outputs."""
        (here, consts), (there, others) = opened(here), opened(there)
        names: dict[Any, int] = dict(zip(here.invars, args, strict=True))
        for var, other, const in zip(here.constvars, there.constvars, consts, strict=True):
            aval = _aval(var, other)
            names[var] = self.value(aval, "const", self._spread(aval), const)
        del others  # a constant that holds the batch is the same function of its size

        def read(var: Any, other: Any) -> int:
            if isinstance(var, core.Literal):
                return self.value(_aval(var, other), "const", None, var.val)
            return names[var]

        alive, others = alive_equations(here, wanted), alive_equations(there, wanted)
        if [eqn.primitive for eqn in alive] != [eqn.primitive for eqn in others]:
            raise _Unlike(f"it computes otherwise for a batch of {self.sizes.other} than for {self.sizes.batch}.")
        used = {var for eqn in alive for var in eqn.invars if not isinstance(var, core.Literal)}
        used |= {var for var, want in zip(here.outvars, wanted, strict=True)
                 if want and not isinstance(var, core.Literal)}  # fmt: skip
        nodes: list[Node] = []
        for eqn, other in zip(alive, others, strict=True):
            if len(eqn.invars) != len(other.invars) or len(eqn.outvars) != len(other.outvars):
                raise _Unlike(f"it computes otherwise for a batch of {self.sizes.other} than for {self.sizes.batch}.")
            ins = [read(a, b) for a, b in zip(eqn.invars, other.invars, strict=True)]
            some, outs = self.node(eqn, other, ins, [var in used for var in eqn.outvars])
            nodes += some
            names.update(zip(eqn.outvars, outs, strict=True))
        # An output that nobody wants may never have been computed.
        outs = [
            read(a, b) if isinstance(a, core.Literal) or a in names else -1
            for a, b in zip(here.outvars, there.outvars, strict=True)
        ]
        return nodes, outs

    def node(self, eqn: Any, other: Any, ins: list[int], wanted: list[bool]) -> tuple[list[Node], list[int]]:
        name = eqn.primitive.name
        if name in ENTERED:
            return self.walk(eqn.params[ENTERED[name]], other.params[ENTERED[name]], ins, wanted)
        if name in _REMAT:
            return self.region(eqn, other, ins, wanted)
        avals = [_aval(a, b) for a, b in zip(eqn.outvars, other.outvars, strict=True)]
        kinds = {self.values[key].kind for key in ins}
        given = [self._given(key) for key in ins]
        of_ins = [self.values[key].aval for key in ins]
        found = [layouts.follow(eqn, given, of_ins, aval, self.sizes) for aval in avals]
        if decided_by_values(eqn, given, of_ins, partial(self._is_fixed, ins)):
            found = [layout and layouts.LOST for layout in found]
        if name == "stop_gradient" and found == [layouts.LOST]:
            # Samples taken out of their order, of which nothing is differentiated: like statistics, common to all.
            found = [None]
        meets = "weight" in kinds and any(_changes(aval) for aval in avals)
        # Statistics of parts of the batch change with its size as the batch does: their samples are lost, not gone.
        lost = layouts.LOST in [layout for aval, layout in zip(avals, found, strict=True) if aval.inexact]
        if name in _CUSTOM and meets and (lost or _couples(eqn, other)):
            # Inside, its samples are coupled, and what each adds must be read there. That its own derivative is that of
            # what it computes is for the check to find out.
            return self.walk(_inner(eqn), _inner(other), ins, wanted)
        batched = [self._is_batched(layout) for layout in found]
        use = "weight" in kinds and any(batched)
        if use:
            self._refuse_mixing(eqn, other, ins, avals, found)
        elif "weight" in kinds and "batched" in kinds and any(aval.inexact for aval in avals):
            raise Uncovered(f"{self._where(ins)} meets the batch in {name}, which mixes its samples.")
        kind = next((kind for kind in ("batched", "weight", "shared") if kind in kinds), "const")
        outs = []
        for aval, layout, own in zip(avals, found, batched, strict=True):
            of_out = "batched" if own else "shared" if kind == "batched" else kind
            if kind == "const" and layout == layouts.LOST:
                of_out = "const"  # entries that no sample owns yet take the order of what they meet
            # Nothing is differentiated through these.
            fixed = of_out == "weight" and (not aval.inexact or name == "stop_gradient")
            outs.append(self.value(aval, "shared" if fixed else of_out, layout))
        if self.fixed.issuperset(ins):
            self.fixed.update(outs)
        if name == "concatenate" and eqn.params["dimension"] == len(avals[0].shape) - 1:
            self.joined[outs[0]] = ins
        weights = [i for i, key in enumerate(ins) if self.values[key].kind == "weight"]
        if weights:
            self.names.update(dict.fromkeys(outs, self.names[ins[weights[0]]]))
        single = other if self.sizes.other == 1 else None
        return [Op(eqn, tuple(ins), tuple(outs), tuple(weights) if use else (), single)], outs

    def region(self, eqn: Any, other: Any, ins: list[int], wanted: list[bool]) -> tuple[list[Node], list[int]]:
        nodes, outs = self.walk(eqn.params["jaxpr"], other.params["jaxpr"], ins, wanted)
        if not nodes:
            return [], outs
        made = {key for node in nodes for key in node.outs}
        read = dict.fromkeys(key for node in nodes for key in node.ins if key not in made)
        needed = [key for key in dict.fromkeys(outs) if key in made]
        settings = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
        return [
            Region(tuple(nodes), tuple(key for key in read if key not in self.constants), tuple(needed), settings)
        ], outs

    def _given(self, key: int) -> Layout | None:
        value = self.values[key]
        # A constant has no samples whose order could be lost.
        return value.layout or None if value.kind == "const" else value.layout

    def _is_fixed(self, ins: Sequence[int], position: int, entry: int | None) -> bool:
        key = ins[position]
        if entry is not None and key in self.joined:
            owners = [part for part in self.joined[key] for _ in range(self.values[part].aval.shape[-1])]
            key = owners[entry]
        return key in self.fixed

    def _spread(self, aval: Aval) -> Layout | None:
        if not _changes(aval):
            return None
        axes = [axis for axis, (a, b) in enumerate(zip(aval.shape, aval.other, strict=True)) if a != b]
        plain = len(axes) == 1 and aval.shape[axes[0]] == self.sizes.batch
        return (layouts.Part(axes[0], 1, self.sizes.batch, 1),) if plain else layouts.LOST

    def _is_batched(self, layout: Layout | None) -> bool:
        return layout is not None and (not layout or layouts.complete(layout, self.sizes))

    def _refuse_mixing(
        self, eqn: Any, other: Any, ins: list[int], avals: list[Aval], found: list[Layout | None]
    ) -> None:
        name = eqn.primitive.name
        of_outs = [layout for aval, layout in zip(avals, found, strict=True) if aval.inexact]
        if any(not self._is_batched(layout) for layout in of_outs):
            raise Uncovered(f"{self._where(ins)} meets the batch in {name}, which mixes its samples.")
        if layouts.LOST in [*of_outs, *(self._given(key) for key in ins)]:
            raise Uncovered(f"{self._where(ins)} meets in {name} a batch whose samples are out of order or in pairs.")
        if _couples(eqn, other):
            raise Uncovered(f"{self._where(ins)} is used inside {name}, which couples samples.")

    def _where(self, ins: list[int]) -> str:
        return f"parameter {next(self.names[key] for key in ins if self.values[key].kind == 'weight')}"


def _aval(var: Any, other: Any) -> Aval:
    shape, again = var.aval.shape, other.aval.shape
    if len(shape) != len(again) or var.aval.dtype != other.aval.dtype:
        raise _Unlike(f"it has values of shape {shape} at one batch size and of {again} at another.")
    return Aval(tuple(shape), tuple(again), var.aval.dtype)


def _changes(aval: Aval) -> bool:
    return aval.shape != aval.other


def _inner(eqn: Any) -> Any:
    return eqn.params["fun_jaxpr" if "fun_jaxpr" in eqn.params else "call_jaxpr"]


def _couples(eqn: Any, other: Any) -> bool:
    """Whether something inside an equation is reduced over the batch."""
    return any(_reduces(a, b) for a, b in zip(inside(eqn), inside(other), strict=True))


def _reduces(here: Any, there: Any) -> bool:
    (here, _), (there, _) = opened(here), opened(there)
    wanted = [True] * len(here.outvars)
    alive, others = alive_equations(here, wanted), alive_equations(there, wanted)
    if len(alive) != len(others):
        return True
    for eqn, other in zip(alive, others, strict=True):
        try:
            ins = [_aval(a, b) for a, b in zip(eqn.invars, other.invars, strict=True)]
            outs = [_aval(a, b) for a, b in zip(eqn.outvars, other.outvars, strict=True)]
        except ValueError:
            return True
        if any(_changes(a) and a.inexact for a in ins) and any(a.inexact and not _changes(a) for a in outs):
            return True
        if _couples(eqn, other):
            return True
    return False
