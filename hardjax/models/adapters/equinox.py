"""Equinox: modules of one sample, mapped over the batch; with `eqx.nn.State` also the pair (module, state).

A module is called as `module(image, state, key=key)` with one image (H, W, C); state and key are left out where it has
none. `eqx.nn.inference_mode` switches it. Floating-point arrays are its parameters, all of its state batch statistics.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
from jax import Array

from hardjax._validate import Refusal
from hardjax.models import modes
from hardjax.models.adapters.base import Apply, at, nested, unpacked
from hardjax.models.modes import Manner


class EquinoxApply(Apply):
    holds_weights = True
    called = "cannot be called with one image (H, W, C)"
    advice = "layers with a field `inference`, or an argument such as `inference`, that switch all it does"

    def __init__(self, model: Any, make: Callable[[Array], Any] | None, name: str) -> None:
        super().__init__(model, name or type(model[0] if isinstance(model, tuple) else model).__name__)
        self.starts_alike = make is None
        held = self._with_state(model)
        self._made = (lambda key: held) if make is None else (lambda key: self._with_state(make(key)))
        module, state = held
        parameters = list(inspect.signature(type(module).__call__).parameters.values())[2:]
        self._stateful = bool(jax.tree.leaves(state))
        self._further = [p for p in parameters[self._stateful :] if p.name not in ("key", "state")]
        self._takes_key = any(p.name == "key" for p in parameters)
        with_paths, self._tree = jax.tree.flatten_with_path(module)
        self._leaves = [(tuple(map(_name, path)), leaf) for path, leaf in with_paths]
        self._state_tree = jax.tree.structure(state)

    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        return modes.by_arguments(self._further)

    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        return self._collections(*self._made(key))

    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        module, state = self._restored(variables)
        module = eqx.nn.inference_mode(module, value=not train)
        given = modes.arguments(manner, train)
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(images))

        def one(image: Array, key: Array) -> Any:
            keyword = given | ({"key": key} if self._takes_key else {})
            if not self._stateful:
                return module(image, **keyword), None
            out = module(image, state, **keyword)
            if not isinstance(out, tuple) or len(out) < 2 or not isinstance(out[-1], eqx.nn.State):
                raise Refusal(f"Expected (logits, state) from {self.name}, got {type(out).__name__}.")
            return out[0] if len(out) == 2 else out[:-1], jax.tree.leaves(out[-1])

        # The axis that its batch norm reduces over is the batch.
        first, rest = manner.axes[:1], manner.axes[1:]
        mapped = jax.vmap(one, out_axes=(0, None), axis_name=first[0] if first else None)
        out, leaves = modes.bound(lambda args: mapped(*args), rest)((images, keys)) if rest else mapped(images, keys)
        return out, {"batch_stats": _numbered(leaves or [])}

    def restore(self, variables: Mapping[str, Any]) -> Any:
        module, state = self._restored(unpacked(variables))
        return (module, state) if self._stateful else module

    def _with_state(self, model: Any) -> tuple[Any, Any]:
        if isinstance(model, tuple):
            return model
        try:
            return eqx.nn.make_with_state(lambda: model)()
        except ValueError:
            raise Refusal(
                f"{self.name} has state of its own: pass the pair that eqx.nn.make_with_state gives."
            ) from None

    def _collections(self, module: Any, state: Any) -> dict[str, Any]:
        leaves = zip(self._leaves, jax.tree.leaves(module), strict=True)
        found = {(_collection(leaf), *path): leaf for (path, _), leaf in leaves if eqx.is_array(leaf)}
        return {**nested(found), "batch_stats": _numbered(jax.tree.leaves(state))}

    def _restored(self, variables: Mapping[str, Any]) -> tuple[Any, Any]:
        leaves = [at(variables, (_collection(v), *path)) if eqx.is_array(v) else v for path, v in self._leaves]
        numbers = map(str, range(self._state_tree.num_leaves))
        state = jax.tree.unflatten(self._state_tree, [at(variables, ("batch_stats", number)) for number in numbers])
        return jax.tree.unflatten(self._tree, leaves), state


def adapt(model: Any, make: Callable[[Array], Any] | None, name: str) -> Apply | None:
    """The network of a module, or of a pair of module and state."""
    module, *state = model if isinstance(model, tuple) else (model,)
    fits = isinstance(module, eqx.Module) and callable(module) and all(isinstance(s, eqx.nn.State) for s in state)
    return EquinoxApply(model, make, name) if fits else None


def _numbered(leaves: list) -> dict[str, Any]:
    return {str(k): leaf for k, leaf in enumerate(leaves)}


def _collection(leaf: Any) -> str:
    return "params" if eqx.is_inexact_array(leaf) else "constants"


def _name(entry: Any) -> str:
    """A step on the way to a leaf."""
    return str(next(getattr(entry, n) for n in ("name", "key", "idx") if hasattr(entry, n)))
