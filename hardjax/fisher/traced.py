"""A network that is traced once for each shape of its arguments, and run by its traces."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.extend import core

from hardjax.fisher.layouts import Aval, Sizes
from hardjax.fisher.pieces import Pieces
from hardjax.fisher.program import Apply, Op, Program, Value, alive_equations, arguments, opened
from hardjax.fisher.walk import ENTERED, make_jaxpr


class Traced:
    """`apply` for the length of one check: (variables, images, train, key) -> (logits, {}).

    Nothing is believed of the traces but that JAX made them: they are lists of equations, run one after the other.
    """

    def __init__(self, apply: Apply) -> None:
        self.apply = apply
        self.name = getattr(apply, "name", getattr(apply, "__name__", type(apply).__name__))
        self._jaxprs: dict[Any, Any] = {}
        self._programs: dict[int, tuple[Program, Pieces]] = {}

    def jaxpr(self, variables: Any, images: Any, key: Any, train: bool) -> Any:
        """As `program.make_jaxpr`."""
        name = _shapes_of(arguments(variables, images, key), train)
        if name not in self._jaxprs:
            self._jaxprs[name] = make_jaxpr(self.apply, variables, images, key, train)
        return self._jaxprs[name]

    def __call__(self, variables: Any, images: Any, train: bool, key: Array | None = None) -> tuple[Array, dict]:
        jaxpr = self.jaxpr(variables, images, key, train)
        if id(jaxpr) not in self._programs:
            self._programs[id(jaxpr)] = listed(jaxpr), Pieces()
        program, run = self._programs[id(jaxpr)]
        return run(program, program.environment(variables, images, key), _bound), {}


def listed(closed: Any) -> Program:
    """A trace as the list of its equations, calls entered; of their values nothing is found out but the types."""
    ops: list[Op] = []
    values: list[Value] = []
    constants: dict[int, Any] = {}

    def value(var: Any) -> int:
        shape = tuple(var.aval.shape)
        values.append(Value(Aval(shape, shape, var.aval.dtype), "const", None))
        return len(values) - 1

    def enter(jaxpr: Any, ins: Sequence[int]) -> list[int]:
        jaxpr, consts = opened(jaxpr)
        names = dict(zip(jaxpr.invars, ins, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            names[var] = value(var)
            constants[names[var]] = const

        def read(var: Any) -> int:
            if not isinstance(var, core.Literal):
                return names[var]
            key = value(var)
            constants[key] = var.val
            return key

        for eqn in alive_equations(jaxpr, [True] * len(jaxpr.outvars)):
            given = list(map(read, eqn.invars))
            if eqn.primitive.name in ENTERED:
                outs = enter(eqn.params[ENTERED[eqn.primitive.name]], given)
            else:
                outs = list(map(value, eqn.outvars))
                ops.append(Op(eqn, tuple(given), tuple(outs)))
            names.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    inputs = tuple(map(value, closed.jaxpr.invars))
    (output,) = enter(closed, inputs)
    return Program(Sizes(0, 0), tuple(ops), values, constants, inputs, {}, output)


def _bound(op: Op, values: list[Any], env: Any) -> list[Any]:
    del env
    return op.bind(*values)


def _shapes_of(tree: Any, train: bool) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return train, structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
