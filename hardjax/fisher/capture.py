"""Taps on the layers of a Linen module: the one place of `fisher` that knows Flax.

A tap is the identity on a layer's output. Going backward it meets the output's cotangent, forms that layer's share of
the Gram matrix from it and the layer's own input, and hands the share on as the cotangent of an unused input, the
sink. Automatic differentiation adds the shares up, and no cotangent outlives its layer.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hardjax._validate import Refusal
from hardjax.fisher.rules import Convolution, Linear, Rule, Scaling
from hardjax.models.apply import Apply, check_module, is_ours, make_apply
from hardjax.models.layers import BatchNorm

Path = tuple[str, ...]

# Their __call__ normalises by a mean and variance kept beside "scale" and "bias", and couples the samples of a batch.
BATCH_NORMS: list[type[nn.Module]] = [nn.BatchNorm, BatchNorm]
_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm)
_REWRITING = (nn.SpectralNorm, nn.WeightNorm)


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


Emit = Callable[[Layer, Array, Array], Any]


class Uncovered(Refusal):
    """What `method="layers"` cannot do; the line lacks the advice, which depends on what else can."""


def named_leaves(tree: Any) -> dict[str, Array]:
    """A tree of variables as {"path/of/leaf": leaf}."""
    return {"/".join(path_of(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_of(path: tuple) -> Path:
    """Names on the way to a leaf, from its key path."""
    return tuple(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)


def forward_of(
    model: Any, variables: Mapping[str, Any], images: Any, key: Array | None = None
) -> Callable[[Mapping[str, Any], Array, bool], Array]:
    """(variables, images, train) -> logits; new statistics are dropped.

    `model` is a Linen module, or (variables, images, train, key) -> (logits, new statistics) around one. How a module
    is called in either mode is found out here, by tracing it: inside `taps` its layers would be met twice.

    Raises:
        ValueError: neither of the two, or a module that cannot be called.
    """
    if isinstance(model, nn.Module) or not callable(model) or isinstance(model, type):
        check_module(model)
        model = make_apply(model)
    if isinstance(model, Apply) and not is_ours(model):
        model.prepare(variables, images)
    return lambda variables, images, train: model(variables, images, train, key)[0]


def find_layers(forward: Callable[[], Array], params: Any, batch: int, zeros: frozenset[Path] = frozenset()) -> list:
    """The layer calls of an abstract forward pass, in order, less those whose parameters are all among `zeros`.

    Args:
        zeros: parameters whose gradient is zero whatever the values: they need no rule.

    Raises:
        ValueError: a parameter that no rule covers, or a layer used in a way that no rule covers.
    """
    # Shapes and settings alone: a list that Python fills with arrays while tracing leaks tracers under nn.remat and
    # nn.scan.
    layers: list[Layer] = []
    refused: dict[Path, Refusal] = {}

    def note(layer: Layer, x: Array, y: Array, aux: Any) -> Array:
        layers.append(layer)
        return y

    with _intercept(batch, note, refused):
        jax.eval_shape(forward)
    shapes = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    covered = {(*layer.path, name): shape for layer in layers for name, shape in layer.shapes.items()}
    for path in sorted(shapes.keys() - zeros):
        for layer_path, reason in refused.items():
            if path[: len(layer_path)] == layer_path:
                raise reason
    missing = sorted("/".join(path) for path in shapes.keys() - covered.keys() - zeros)
    if missing:
        raise Uncovered(
            f"no rule by layers for {some(missing)} (there is one for Dense, Conv, BatchNorm, GroupNorm, LayerNorm,"
            " RMSNorm and InstanceNorm outside of nn.jit)."
        )
    for path, shape in covered.items():
        if shapes.get(path) != shape and path not in zeros:
            raise Uncovered(
                f"parameter {'/'.join(path)} is {shapes.get(path)} in the model and {shape} in its layer, as where"
                " layers are stacked by nn.scan or nn.vmap."
            )
    return [layer for layer in layers if any((*layer.path, name) not in zeros for name in layer.shapes)]


def some(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shared_paths(layers: list[Layer]) -> set[Path]:
    """Paths of layers called more than once: their rows add up before they are multiplied."""
    return {path for path, calls in Counter(layer.path for layer in layers).items() if calls > 1}


@contextlib.contextmanager
def taps(batch: int, paths: Set[Path], sink_of: Callable[[Path], Any], emit: Emit) -> Iterator[None]:
    """Inside, the output of the layers at `paths` passes a tap whose sink `sink_of(path)` receives
    `emit(layer, a, d)`."""

    def wire(layer: Layer, x: Array, y: Array, aux: Any) -> Array:
        if layer.path not in paths:
            return y
        return _tap(layer, emit)(y, lax.stop_gradient(x), aux, sink_of(layer.path))

    with _intercept(batch, wire, {}):
        yield


@contextlib.contextmanager
def shared_statistics(axis_name: str) -> Iterator[None]:
    """Inside, batch norms normalise one mapped sample by the statistics of the whole mapped axis.

    Scale and bias stay the mapped sample's own, so that `vmap` over copies of the parameters tells apart what each
    sample contributes. Modules without variables (dropout, stochastic depth) see the whole axis as well: the mask of a
    batch is not the mask of each of its samples.
    """
    busy = False

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal busy
        module = context.module
        alone = not busy and context.method_name == "__call__" and _is_one_sample(args, kwargs)
        known = _base(module) in BATCH_NORMS
        if not alone or not (known or not module.variables):
            return next_fun(*args, **kwargs)
        params = module.variables.get("params", {})
        x, *rest = args
        # Statistics of all samples from one sample's call: only so does each copy of scale and bias meet its own
        # sample.
        everyone = lax.all_gather(x, axis_name).reshape(-1, *x.shape[1:])
        # The call below comes back to this interceptor, with the whole axis as its batch.
        busy = True
        try:
            if known:
                y = _normalise(module, rest, kwargs)(everyone, module.variables.get("batch_stats", {}))
            else:
                y = next_fun(everyone, *rest, **kwargs)
        finally:
            busy = False
        if not isinstance(y, Array) or y.shape[:1] != everyone.shape[:1]:
            return next_fun(*args, **kwargs)  # what comes of it is compared with the model itself
        own = jnp.take(y, lax.axis_index(axis_name), 0)[None]
        if not params:
            return own
        axes = _feature_axes(module, own.ndim)
        spread = [n if axis in axes else 1 for axis, n in enumerate(own.shape)]
        scaled = own * params["scale"].reshape(spread) if "scale" in params else own
        scaled = scaled + params["bias"].reshape(spread) if "bias" in params else scaled
        return scaled.astype(y.dtype)

    with nn.intercept_methods(interceptor):
        yield


def _is_one_sample(args: tuple, kwargs: dict) -> bool:
    """One array, whose leading axis has length 1, and nothing else that is an array."""
    arrays = [value for value in (*args, *kwargs.values()) if isinstance(value, jax.Array)]
    return len(arrays) == 1 and arrays[0] is args[0] and arrays[0].ndim > 1 and len(arrays[0]) == 1 if args else False


def _intercept(
    batch: int, wire: Callable[[Layer, Array, Array, Any], Array], refused: dict[Path, Refusal]
) -> contextlib.AbstractContextManager:
    """Calls `wire(layer, x, y, statistics) -> y` at every outermost layer that a rule covers; why others of these
    kinds are not covered is left in `refused`."""
    inside = False

    def interceptor(next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        # The outermost layer alone: what it calls is a part of its own arithmetic.
        if inside or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        module = context.module
        base, rewriting = _base(module), isinstance(module, _REWRITING)
        if base is None and not rewriting:
            return next_fun(*args, **kwargs)
        inside = True
        try:
            y = next_fun(*args, **kwargs)
        finally:
            inside = False
        path = tuple(module.path)
        if rewriting:
            # The layer that it wraps is a child of somebody else: its parameters stand beside it, not below.
            refused[tuple(module.layer_instance.path)] = Uncovered(
                f"{type(module).__name__} at {'/'.join(path)} rewrites its layer's parameters."
            )
            return y
        try:
            layer = _describe(base, module, args, kwargs, y, batch)
        except Refusal as error:
            refused[path] = error
            return y
        aux = dict(module.variables.get("batch_stats", {}))
        return y if layer is None else wire(layer, args[0], y, aux)

    return nn.intercept_methods(interceptor)


def _tap(layer: Layer, emit: Emit) -> Callable[[Array, Array, Any, Any], Array]:
    @jax.custom_vjp
    def tap(y: Array, x: Array, aux: Any, sink: Any) -> Array:
        del x, aux, sink
        return y

    def forward(y: Array, x: Array, aux: Any, sink: Any) -> tuple[Array, tuple]:
        del sink
        return y, (x, aux)

    def backward(residuals: tuple, cotangent: Array) -> tuple:
        a = layer.prepare(*residuals)
        # Products of bfloat16 would decide which eigenvalues count as zero.
        dtype = jnp.promote_types(a.dtype, jnp.float32)
        # The share leaves as a cotangent: autodiff sums it over layers, also through loops and rematerialisation.
        return cotangent, None, None, emit(layer, a.astype(dtype), cotangent.astype(dtype))

    tap.defvjp(forward, backward)
    return tap


def _base(module: nn.Module) -> type[nn.Module] | None:
    """The covered class whose behaviour `module` has; a subclass with a __call__ of its own has another."""
    known = (nn.Dense, nn.Conv, *_NORMS, *BATCH_NORMS)
    for cls in type(module).__mro__:
        if cls in known:
            return cls if type(module).__call__ is cls.__call__ else None
    return None


def _describe(base: type, module: nn.Module, args: tuple, kwargs: dict, y: Array, batch: int) -> Layer | None:
    params = module.variables.get("params", {})
    if not params:
        return None
    path = tuple(module.scope.path)
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
        rule, prepare = _scaling(module, x, params, name), _normalise(module, rest, kwargs)
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
    axes = _feature_axes(module, x.ndim)
    if 0 in axes or any(tuple(x.shape[axis] for axis in axes) != value.shape for value in params.values()):
        raise Uncovered(f"layer {name} scales axes {axes} of {x.shape}.")
    return Scaling(axes, tuple(params))


def _feature_axes(module: Any, rank: int) -> tuple[int, ...]:
    axes = getattr(module, "feature_axes", getattr(module, "axis", -1))
    return tuple(sorted(axis % rank for axis in _tuple(axes, 1)))


def _normalise(module: nn.Module, rest: list, kwargs: dict) -> Callable[[Array, Any], Array]:
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
