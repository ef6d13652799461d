"""Weights of PyTorch's reference implementations as Flax variables. Needs NumPy arrays, not PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hardjax.models.apply import init_variables
from hardjax.models.zoo import ZOO, create

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def from_torch(
    name: str,
    state_dict: Mapping[str, Any],
    num_classes: int = 10,
    *,
    image_shape: tuple[int, int, int] | None = None,
    new_head: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """The variables {"params", "batch_stats"} of `create(name, num_classes, **options)` from a PyTorch state dict.

    Names are those of timm (all of P1's networks), torchvision (ResNets and DenseNet-121, the same as timm's there; its
    EfficientNets and MobileNets differ in names, padding and epsilon and are not taken) and, for P3's and P4's, of the
    parameter tree joined by dots ("blocks.0.conv1.weight"). Running variances are taken as they are: `BatchNorm` here
    keeps the unbiased variance, as PyTorch does. "num_batches_tracked" is not needed.

    Args:
        state_dict: arrays or CPU tensors in PyTorch's layouts, such as `m.state_dict()`.
        image_shape: (H, W, C) that the weights were made for, where the paper's own does not fit: it decides the
            columns of the first dense layer of "mlp" and "alexnet_reduced", and the channels of the first convolution.
        new_head: a key: draw the last layer anew instead of reading it, for another number of classes.

    Returns:
        NumPy arrays of the given dtypes in Flax's layouts.

    Raises:
        ValueError: unknown name or option; or all missing, unexpected and wrongly shaped tensors, in one message.
    """
    module = create(name, num_classes, **options)
    shape = image_shape or ZOO[name].image_shape
    if image_shape is None and (first := _first_kernel(state_dict)) is not None:
        shape = (*shape[:2], first)
    expected = jax.eval_shape(lambda key: init_variables(module, key, shape), jax.random.key(0))
    drawn = {} if new_head is None else _head(init_variables(module, new_head, shape)["params"])
    missing, wrong, used = [], [], set()

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray | None:
        *parts, kind = (entry.key for entry in path[1:])
        if parts == [drawn.get("name")]:
            used.add(f"{drawn['name']}.{_LEAVES[kind]}")
            return np.asarray(drawn["values"][kind])
        source = ".".join([*parts, _LEAVES[kind]])
        used.add(source)
        if source not in state_dict:
            missing.append(source)
            return None
        value = np.asarray(state_dict[source])
        turn = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim) if kind == "kernel" else None
        value = value if turn is None else value.transpose(turn)
        if value.shape != leaf.shape:
            given = np.asarray(state_dict[source]).shape
            wrong.append(f"{source} {given} instead of {_torch_shape(leaf.shape, kind)}")
            return None
        return np.ascontiguousarray(value)

    variables = jax.tree_util.tree_map_with_path(read, expected)
    unexpected = [key for key in state_dict if key not in used and not key.endswith("num_batches_tracked")]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    found = [f"{kind}: {', '.join(those)}" for kind, those in faults.items() if those]
    if found:
        raise ValueError(f"The state dict does not fit {name} with {num_classes} classes. {'; '.join(found)}.")
    return variables


def _head(params: Mapping[str, Any]) -> dict[str, Any]:
    """The last layer's name and values."""
    name = next(name for name in ("fc", "classifier", *(f"fc{i}" for i in range(99, 0, -1))) if name in params)
    return {"name": name, "values": params[name]}


def _first_kernel(state_dict: Mapping[str, Any]) -> int | None:
    """Input channels of the first convolution."""
    shapes = (np.shape(value) for value in state_dict.values())
    return next((shape[1] for shape in shapes if len(shape) == 4), None)


def _torch_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if kind == "kernel":
        return tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
    return shape
