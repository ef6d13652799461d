"""Weights of PyTorch's reference implementations as Flax variables. Needs NumPy arrays, not PyTorch."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hardjax._validate import Refusal, shown
from hardjax.models.apply import init_variables
from hardjax.models.zoo import ZOO, create

_FIRST = ("conv_stem", "features.conv0", "conv0", "conv1")  # first convolutions of the zoo
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def from_torch(
    name: str,
    state_dict: Mapping[str, Any],
    num_classes: int = 10,
    *,
    new_head: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """The variables {"params", "batch_stats"} of `create(name, num_classes, **options)` from a PyTorch state dict.

    Names are those of timm (all of P1's networks), torchvision (ResNets and DenseNet-121, the same as timm's there; its
    EfficientNets and MobileNets differ in names, padding and epsilon and are not taken) and, for P3's and P4's, of the
    parameter tree joined by dots ("blocks.0.conv1.weight"). Running variances are taken as they are: `BatchNorm` here
    keeps the unbiased variance, as PyTorch does. "num_batches_tracked" is not needed.

    Args:
        state_dict: arrays or CPU tensors in PyTorch's layouts, such as `m.state_dict()`, in any order. The size and
            channels of the images that they were made for are read from them.
        new_head: a key: draw the last layer anew instead of reading it, for another number of classes.

    Returns:
        NumPy arrays of the given dtypes in Flax's layouts.

    Raises:
        ValueError: unknown name or option; a tensor that NumPy cannot read (on a GPU, bfloat16); or all missing,
            unexpected and wrongly shaped tensors, in one message.
    """
    module = create(name, num_classes, **options)
    if not isinstance(state_dict, Mapping):
        raise Refusal(f"Expected state_dict={shown(state_dict)} to be a mapping from names to tensors.")
    given = {key: _array(key, value) for key, value in state_dict.items()}
    shape = _image_shape(given, ZOO[name].image_shape)
    expected = jax.eval_shape(lambda key: init_variables(module, key, shape), jax.random.key(0))
    # Shapes alone, traced: a network of 20 million parameters is never drawn only to be replaced.
    # Compiled, what the head does not need is never computed.
    draw_head = jax.jit(lambda key: init_variables(module, key, shape)["params"][module.last_layer])
    head = None if new_head is None else draw_head(new_head)
    missing, wrong, used = [], [], set()

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray | None:
        *parts, kind = (entry.key for entry in path[1:])
        source = ".".join([*parts, _LEAVES[kind]])
        used.add(source)
        if head is not None and parts == [module.last_layer]:
            return np.asarray(head[kind])
        if source not in given:
            missing.append(source)
            return None
        value = given[source]
        # (out, in, h, w) to (h, w, in, out), which fits depthwise kernels as well: (C, 1, h, w) to (h, w, 1, C).
        turn = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim) if kind == "kernel" else None
        value = value if turn is None else value.transpose(turn)
        if value.shape != leaf.shape:
            wrong.append(f"{source} {given[source].shape} instead of {_torch_shape(leaf.shape, kind)}")
            return None
        # A transposed view would be copied by every transfer to the device.
        return np.ascontiguousarray(value)

    variables = jax.tree_util.tree_map_with_path(read, expected)
    unexpected = [key for key in given if key not in used and not key.endswith("num_batches_tracked")]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    found = [f"{kind}: {', '.join(those)}" for kind, those in faults.items() if those]
    if found:
        raise Refusal(f"The state dict does not fit {name} with {num_classes} classes. {'; '.join(found)}.")
    return variables


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, RuntimeError) as error:
        raise Refusal(
            f"Expected {name} to be an array or a CPU tensor that NumPy can read (no bfloat16, no gradient), got"
            f" {type(value).__name__}: {' '.join(str(error).split())}"
        ) from None


def _image_shape(given: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(H, W, C) of images that fit these weights, as far as the weights depend on them; else `shape`."""
    height, width, channels = shape
    first = next((given[f"{name}.weight"] for name in _FIRST if f"{name}.weight" in given), None)
    if first is not None and first.ndim == 4:
        channels = first.shape[1]
    dense = given.get("fc1.weight")
    if dense is not None and dense.ndim == 2:
        if first is None:  # a perceptron: how its columns make an image is all the same
            return 1, 1, dense.shape[1]
        height = width = 8 * math.isqrt(dense.shape[1] // 64) + 7  # the reduced AlexNet: 64 channels after three pools
    return height, width, channels


def _torch_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if kind == "kernel":
        return tuple(shape[i] for i in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))
    return shape
