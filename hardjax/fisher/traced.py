"""A network that is traced once for each shape of its arguments, and run by its traces."""

from typing import Any

import jax
from jax import Array

from hardjax.fisher.pieces import Pieces
from hardjax.fisher.program import Apply, Op, Program, arguments, listed, make_jaxpr


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


def _bound(op: Op, values: list[Any], env: Any) -> list[Any]:
    del env
    return op.bind(*values)


def _shapes_of(tree: Any, train: bool) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return train, structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
