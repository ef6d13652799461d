"""The seam between Flax and the rest: a module as two pure functions."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def init_variables(module: nn.Module, key: Array, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """{"params", "batch_stats"} in float32 for images of shape (H, W, C); pure."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    params_key, dropout_key = jax.random.split(key)
    variables = module.init({"params": params_key, "dropout": dropout_key}, images, **_mode(module, False))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def make_apply(module: nn.Module) -> Callable[..., tuple[Array, Any]]:
    """`apply(variables, images, train, key=None) -> (logits, batch_stats)`, pure.

    In training the statistics are the updated ones, in evaluation those given. `key` feeds the "dropout" stream. A
    module of one's own may take `train`, `training`, `deterministic`, or none of them.
    """

    def apply(variables: dict[str, Any], images: Array, train: bool, key: Array | None = None) -> tuple[Array, Any]:
        variables = {name: value for name, value in variables.items() if name != "batch_stats" or value}
        if not train:
            return module.apply(variables, images, **_mode(module, False)), variables.get("batch_stats", {})
        rngs = {} if key is None else {"dropout": key}
        mode = _mode(module, True)
        logits, changed = module.apply(variables, images, **mode, rngs=rngs, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    return apply


def samples_are_independent(apply: Callable, variables: Any, image_shape: tuple[int, int, int]) -> bool:
    """Whether each sample's logits in training depend on that sample alone: no batch statistics, nothing drawn.

    Args:
        apply: as `make_apply` returns.
        variables: arrays or their shapes.
        image_shape: (H, W, C).
    """
    if jax.tree.leaves(variables["batch_stats"]):
        return False
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda key, variables, images: apply(variables, images, True, key)[0])(
        jax.eval_shape(lambda: jax.random.key(0)), variables, images
    )
    key = traced.jaxpr.invars[0]
    return not any(key is var for equation in traced.jaxpr.eqns for var in equation.invars)


def _mode(module: nn.Module, train: bool) -> dict[str, bool]:
    names = inspect.signature(type(module).__call__).parameters
    for name, value in {"train": train, "training": train, "deterministic": not train}.items():
        if name in names:
            return {name: value}
    return {}
