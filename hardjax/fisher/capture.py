"""Taps on the layers of a Linen module: with `layers` the one place of `fisher` that knows Flax.

A tap is the identity on a layer's output. Going backward it meets the output's cotangent, forms that layer's share of
the Gram matrix from it and the layer's own input, and hands the share on as the cotangent of an unused input, the
sink. Automatic differentiation adds the shares up, and no cotangent outlives its layer.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax._validate import Refusal
from hardjax.fisher.layers import BATCH_NORMS, Layer, Path, Uncovered, base_of, describe, feature_axes, normalise
from hardjax.models.apply import Apply, as_apply, is_ours

Emit = Callable[[Layer, Array, Array], Any]
_REWRITING = (nn.SpectralNorm, nn.WeightNorm)


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
    model = as_apply(model)
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
        known = base_of(module) in BATCH_NORMS
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
                y = normalise(module, rest, kwargs)(everyone, module.variables.get("batch_stats", {}))
            else:
                y = next_fun(everyone, *rest, **kwargs)
        finally:
            busy = False
        if not isinstance(y, Array) or y.shape[:1] != everyone.shape[:1]:
            return next_fun(*args, **kwargs)  # what comes of it is compared with the model itself
        own = jnp.take(y, lax.axis_index(axis_name), 0)[None]
        if not params:
            return own
        axes = feature_axes(module, own.ndim)
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
        base, rewriting = base_of(module), isinstance(module, _REWRITING)
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
            layer = describe(base, module, args, kwargs, y, batch)
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
