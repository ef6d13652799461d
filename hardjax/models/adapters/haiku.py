"""Haiku: what `hk.transform` and `hk.transform_with_state` give. The mode is an argument of the function.

All of a Haiku state is taken for batch statistics. Parameters are made by a pass in training mode, as Haiku's batch
norm asks for.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
from jax import Array

from hardjax._validate import Refusal
from hardjax.models import modes
from hardjax.models.adapters.base import Apply
from hardjax.models.modes import Manner


class HaikuApply(Apply):
    advice = "an argument of the transformed function such as `is_training` that switches all its layers"

    def __init__(self, transformed: Any) -> None:
        # The function as it was written: the transform itself takes anything.
        self._function = getattr(transformed.init, "_original_fn", None)
        super().__init__(transformed, getattr(self._function, "__name__", "transform"))
        self._stateful = isinstance(transformed, hk.TransformedWithState)
        self._takes_key = "rng" in inspect.signature(transformed.apply).parameters  # not after hk.without_apply_rng

    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        if self._function is None:
            return [Manner(), *(Manner(((n, value),)) for n, value in modes.NAMES.items())], []
        return modes.by_arguments(list(inspect.signature(self._function).parameters.values())[1:])

    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        def init(images: Array) -> Any:
            return self.module.init(key, images, **modes.arguments(manner, True))

        made = modes.bound(init, manner.axes)(images)
        params, state = made if self._stateful else (made, {})
        return modes.plain({"params": params, "batch_stats": state})

    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        key = jax.random.key(0) if key is None else key
        before = [variables["params"], *([variables.get("batch_stats", {})] if self._stateful else [])]
        rest = [key] if self._takes_key else []

        def forward(images: Array) -> Any:
            return self.module.apply(*before, *rest, images, **modes.arguments(manner, train))

        out = modes.bound(forward, manner.axes)(images)
        out, state = out if self._stateful else (out, {})
        return out, {"batch_stats": modes.plain(state)}


def adapt(model: Any, make: Any, name: str) -> Apply | None:
    """The network of a transform.

    Raises:
        ValueError: a transform of several functions.
    """
    if isinstance(model, hk.Transformed | hk.TransformedWithState):
        return HaikuApply(model)
    if isinstance(model, hk.MultiTransformed | hk.MultiTransformedWithState):
        raise Refusal("Expected a Haiku transform of one function, got one of several: transform the network alone.")
    return None
