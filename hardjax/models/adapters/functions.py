"""A pair of pure functions, for whatever has no adapter of its own.

    init(key, images) -> {"params": ..., "batch_stats": ...}       images (1, H, W, C); "batch_stats" where it has any
    apply(variables, images, train=..., key=...) -> logits         or (logits, new batch_stats) where it has statistics

`train` (by any of the usual names) and `key` are left out where `apply` does not name them. Under `hj.models.Logits`
all outputs stand in the place of the logits.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal, shown
from hardjax.models import modes
from hardjax.models.adapters.base import Apply
from hardjax.models.modes import Manner

_COLLECTIONS = ("params", "batch_stats")
_KEYS = ("key", "rng", "rng_key", "prng_key", "dropout_key", "dropout_rng")


class FunctionsApply(Apply):
    advice = "`apply` with an argument such as `train` that switches all it does"

    def __init__(self, pair: tuple) -> None:
        self._init, self._apply = pair
        super().__init__(pair, getattr(self._apply, "__name__", "apply"))
        self._further = list(inspect.signature(self._apply).parameters.values())[2:]
        self._key = next((p.name for p in self._further if p.name in _KEYS), None)

    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        return modes.by_arguments([p for p in self._further if p.name != self._key])

    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        made = self._init(key, images[:1])
        if not isinstance(made, Mapping) or "params" not in made or set(made) - set(_COLLECTIONS):
            expected = '{"params": ..., "batch_stats": ...}'
            raise Refusal(f"Expected init of {self.name} to give {expected}, got {shown(_kinds(made))}.")
        return jax.tree.map(jnp.asarray, modes.plain(made))

    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        given = modes.arguments(manner, train)
        if self._key is not None:
            given[self._key] = jax.random.key(0) if key is None else key
        out, stats = self._apply(variables, images, **given), variables.get("batch_stats", {})
        if not isinstance(out, tuple) or (self.take is not None and not stats):
            return out, {"batch_stats": stats}
        if len(out) != 2 or (not stats and jax.tree.leaves(out[1])):
            under = "under hj.models.Logits give (outputs, new batch_stats)"
            advice = under if stats else modes.advice(out, len(images))
            raise Refusal(
                f"Expected logits from {self.name}, or (logits, new batch_stats) where init gives batch_stats, got"
                f" {len(out)} outputs: {advice}."
            )
        return out[0], {"batch_stats": modes.plain(out[1] or {})}


def adapt(model: Any) -> Apply | None:
    """The network of a pair (init, apply)."""
    return FunctionsApply(model) if all(map(callable, model)) else None


def _kinds(made: Any) -> Any:
    return sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
