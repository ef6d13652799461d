"""Layers of a Linen module that a rule covers: which they are, and what of their input multiplies their parameters.

With `capture` the one place of `fisher` that knows Flax.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax._validate import Refusal
from hardjax.fisher.rules import Convolution, Linear, Rule, Scaling
from hardjax.models.layers import BatchNorm

Path = tuple[str, ...]

# Their __call__ normalises by a mean and variance kept beside "scale" and "bias", and couples the samples of a batch.
BATCH_NORMS: list[type[nn.Module]] = [nn.BatchNorm, BatchNorm]
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm)


@dataclass(frozen=True)
class Layer:
    """One call of a layer that a rule covers.

    Attributes:
        path: of its parameters in `variables["params"]`.
        rule: how its rows are formed.
        prepare: (input, statistics) -> what multiplies the parameters.
        shapes: parameter name -> shape as the layer sees it.
        input_shape, output_shape: of this call, as the rule takes them.
    """

    path: Path
    rule: Rule
    prepare: Callable[[Array, Any], Array]
    shapes: Mapping[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return "/".join(self.path) or "the model itself"


class Uncovered(Refusal):
    """What `method="layers"` cannot do; the line lacks the advice, which depends on what else can."""


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The covered class whose behaviour `module` has; a subclass with a __call__ of its own has another."""
    known = (nn.Dense, nn.Conv, *_NORMS, *BATCH_NORMS)
    for cls in type(module).__mro__:
        if cls in known:
            return cls if type(module).__call__ is cls.__call__ else None
    return None


def describe(base: type, module: nn.Module, args: tuple, kwargs: dict, y: Array, batch: int) -> Layer | None:
    params = module.variables.get("params", {})
    if not params:
        return None
    path = tuple(module.path)
    name = "/".join(path) or type(module).__name__
    if not args:
        raise Uncovered(f"layer {name} takes its input by keyword: pass it as the first positional argument.")
    x, *rest = args
    # A masked mean, say: the rule would form the rows of another layer.
    if any(isinstance(value, jax.Array | np.ndarray) for value in (*rest, *kwargs.values())):
        raise Uncovered(f"layer {name} takes a mask or another array beside its input.")
    if x.ndim < 2 or x.shape[0] != batch or y.shape[0] != batch:
        raise Uncovered(
            f"layer {name} takes {x.shape} and gives {y.shape}: expected the batch of {batch} as the leading axis."
        )
    if base is nn.Dense:
        rule, prepare = Linear("bias" in params), _cast(y.dtype)
    elif base is nn.Conv:
        rule, prepare = _convolution(module, x, name), _convolution_input(module, y.dtype)
    else:
        rule, prepare = _scaling(module, x, params, name), normalise(module, rest, kwargs)
    shapes = {key: tuple(value.shape) for key, value in params.items()}
    return Layer(path, rule, prepare, shapes, tuple(x.shape), tuple(y.shape))


def _convolution(module: Any, x: Array, name: str) -> Convolution:
    kernel_size = _tuple(module.kernel_size, 1)
    rank = len(kernel_size)
    if x.ndim != rank + 2:
        raise Uncovered(f"layer {name} takes {x.shape}: expected one batch axis, {rank} spatial axes and channels.")
    if module.mask is not None:
        raise Uncovered(f"layer {name} masks its kernel.")
    strides, input_dilation, kernel_dilation = (
        _tuple(value, rank) for value in (module.strides, module.input_dilation, module.kernel_dilation)
    )
    extents = _extents(kernel_size, kernel_dilation)
    padding = module.padding
    if isinstance(padding, str) and padding.upper() in ("SAME", "SAME_LOWER", "VALID"):
        pads = lax.padtype_to_pads(x.shape[1:-1], extents, strides, padding.upper())
    elif isinstance(padding, str):  # CIRCULAR, REFLECT, CAUSAL: `_convolution_input` pads
        pads = [(0, 0)] * rank
    else:
        sides = [padding] * rank if isinstance(padding, int) else padding
        pads = [(side, side) if isinstance(side, int) else side for side in sides]
    return Convolution(
        kernel_size,
        strides,
        tuple((int(low), int(high)) for low, high in pads),
        input_dilation,
        kernel_dilation,
        module.feature_group_count,
        module.use_bias,
    )


def _convolution_input(module: Any, dtype: Any) -> Callable[[Array, Any], Array]:
    """The input as it enters the convolution itself: cast, and padded where Flax pads beforehand."""
    rank = len(_tuple(module.kernel_size, 1))
    modes = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}
    mode = modes.get(module.padding) if isinstance(module.padding, str) else None
    if mode is None:
        return _cast(dtype)
    extents = _extents(_tuple(module.kernel_size, 1), _tuple(module.kernel_dilation, rank))
    pads = [(k - 1, 0) if module.padding == "CAUSAL" else ((k - 1) // 2, k // 2) for k in extents]
    return lambda x, aux: jnp.pad(x.astype(dtype), [(0, 0), *pads, (0, 0)], mode=mode)


def _extents(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]


def _scaling(module: Any, x: Array, params: Mapping[str, Array], name: str) -> Scaling:
    axes = feature_axes(module, x.ndim)
    if 0 in axes or any(tuple(x.shape[axis] for axis in axes) != value.shape for value in params.values()):
        raise Uncovered(f"layer {name} scales axes {axes} of {x.shape}.")
    return Scaling(axes, tuple(params))


def feature_axes(module: Any, rank: int) -> tuple[int, ...]:
    axes = getattr(module, "feature_axes", getattr(module, "axis", -1))
    return tuple(sorted(axis % rank for axis in _tuple(axes, 1)))


def normalise(module: nn.Module, rest: list, kwargs: dict) -> Callable[[Array, Any], Array]:
    """The layer itself with scale 1 and bias 0: the output cannot be divided by a scale that may be 0."""
    # The whole batch is in this program: a named axis over which statistics were reduced has length 1, and is no longer
    # bound when the backward pass is traced.
    unbound = {"axis_name": None} if hasattr(module, "axis_name") else {}
    twin = module.clone(parent=None, name=None, **unbound)
    shapes = {name: (value.shape, value.dtype) for name, value in module.variables.get("params", {}).items()}

    def normalised(x: Array, batch_stats: Any) -> Array:
        params = {name: (jnp.ones if name == "scale" else jnp.zeros)(*shape) for name, shape in shapes.items()}
        variables = {"params": params, "batch_stats": batch_stats}
        return twin.apply(variables, x, *rest, **kwargs, mutable=["batch_stats"])[0]

    return normalised


def _cast(dtype: Any) -> Callable[[Array, Any], Array]:
    return lambda x, aux: x.astype(dtype)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    return (value,) * rank if isinstance(value, int) else tuple(value)
