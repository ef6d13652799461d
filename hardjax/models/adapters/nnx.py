"""Flax NNX: modules, which hold their weights and change while they run.

A pass works on a copy. `deterministic`, `use_running_average` and the other usual names are switched in every module
that has such an attribute, and handed to `__call__` where it takes one. Random streams begin anew at every pass, each
with a key of its own from its place in the network.
"""

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from hardjax.models import modes
from hardjax.models.adapters.base import TRANSIENT, Apply, at, nested, unpacked
from hardjax.models.modes import Manner

_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats", nnx.Intermediate: TRANSIENT[0]}


class NnxApply(Apply):
    holds_weights = True
    advice = "attributes `deterministic` or `use_running_average`, or an argument, that switch all its layers"

    def __init__(self, module: Any, make: Callable[[Array], Any] | None, name: str) -> None:
        super().__init__(module, name or type(module).__name__)
        self.starts_alike = make is None
        # Cloned: whatever becomes of the module later changes no run.
        held = nnx.split(nnx.clone(module) if make is None else module)
        self._split = (lambda key: held) if make is None else (lambda key: nnx.split(make(key)))
        self._graph, state = held
        self._leaves = dict(nnx.to_flat_state(state))

    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        return modes.by_arguments(list(inspect.signature(type(self.module).__call__).parameters.values())[2:])

    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        return _collections(dict(nnx.to_flat_state(self._split(key)[1])))

    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        def forward(images: Array) -> Any:
            module = self._merged(variables, jax.random.key(0) if key is None else key)
            for _, part in nnx.iter_modules(module):
                for name in modes.NAMES.keys() & vars(part).keys():
                    if vars(part)[name] is None or isinstance(vars(part)[name], bool):
                        setattr(part, name, modes.NAMES[name] == train)
            out = module(images, **modes.arguments(manner, train))
            return out, _collections(dict(nnx.to_flat_state(nnx.state(module))))

        out, changed = modes.bound(forward, manner.axes)(images)
        return out, {name: value for name, value in changed.items() if name not in TRANSIENT}

    def restore(self, variables: Mapping[str, Any]) -> Any:
        return self._merged(unpacked(variables), jax.random.key(0))

    def _merged(self, variables: Mapping[str, Any], key: Array) -> Any:
        """The module with these variables, its streams begun from the key."""
        leaves = {}
        for path, leaf in self._leaves.items():
            if isinstance(leaf, nnx.RngKey):
                own = jax.random.fold_in(key, zlib.crc32("/".join(map(str, path)).encode()))
                value = jax.random.split(own, leaf.shape) if leaf.shape else own
            elif isinstance(leaf, nnx.RngCount):
                value = jnp.zeros(leaf.shape, jnp.uint32)
            else:
                value = at(variables, (_collection(leaf), *map(str, path)))
            leaves[path] = leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
        return nnx.merge(self._graph, nnx.from_flat_state(leaves))


def adapt(model: Any, make: Callable[[Array], Any] | None, name: str) -> Apply | None:
    """The network of an NNX module."""
    return NnxApply(model, make, name) if isinstance(model, nnx.Module) and callable(model) else None


def _collections(leaves: Mapping[tuple, Any]) -> dict[str, Any]:
    found = {
        (_collection(leaf), *map(str, path)): leaf.get_value() if isinstance(leaf, nnx.Variable) else jnp.asarray(leaf)
        for path, leaf in leaves.items()
        if not isinstance(leaf, nnx.RngState)
    }
    return nested(found)


def _collection(leaf: Any) -> str:
    """Its name among the variables: of any other kind of variable, that of the kind."""
    for kind, name in _COLLECTIONS.items():
        if isinstance(leaf, kind):
            return name
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "constants"
