"""One ordinary backward pass whose layers leave Gram matrices, rows or sums of rows behind instead of gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax.fisher import capture, definition, rules
from hardjax.fisher.capture import Layer, Path


class Problem(NamedTuple):
    """A forward pass ready to be differentiated.

    Attributes:
        logits: () -> (B, classes).
        labels: (B,) integers.
        layers: every call of a covered layer whose parameters have a gradient.
        dtype: of the sums: float32, or float64 where the parameters or images are.
        idle: name -> shape of the parameters whose rows are zero whatever the values (unused, or behind a
            stop_gradient).
    """

    logits: Callable[[], Array]
    labels: Array
    layers: list[Layer]
    dtype: Any
    idle: dict[str, tuple[int, ...]]


def problem(
    forward: definition.Forward,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    train: bool,
    *,
    all_used: bool = False,
) -> Problem:
    """Finds the layers by an abstract forward pass.

    Args:
        all_used: every parameter is known to have a gradient: saves the trace that looks for those without.

    Raises:
        ValueError: a parameter that no rule covers.
    """

    def logits() -> Array:
        return forward(variables, images, train)

    params = variables["params"]
    leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    dtype = jnp.result_type(jnp.float32, images, *leaves)
    zeros = frozenset() if all_used else _zero_gradients(forward, variables, images, labels, train)
    layers = capture.find_layers(logits, params, len(images), zeros)
    tapped = {(*layer.path, name) for layer in layers for name in layer.shapes}
    shapes = capture.named_leaves(params)
    idle = {"/".join(path): shapes["/".join(path)].shape for path in zeros - tapped}
    return Problem(logits, labels, layers, dtype, idle)


def _zero_gradients(
    forward: definition.Forward, variables: Mapping[str, Any], images: Array, labels: Array, train: bool
) -> frozenset[Path]:
    """Parameters whose gradient the trace itself shows to be zero. Never by value: units that happen to be dead would
    lose their rows."""

    def summed(params: Any) -> Array:
        return definition.losses(forward({**variables, "params": params}, images, train), labels).sum()

    params = variables["params"]
    jaxpr = jax.make_jaxpr(jax.grad(summed))(params).jaxpr
    made_by = {id(var): equation for equation in jaxpr.eqns for var in equation.outvars}

    def is_zero(var: Any) -> bool:
        # A gradient that nothing contributes to stands in the trace as a zero, or as a zero spread to its shape.
        if isinstance(var, jax.extend.core.Literal):
            return not np.any(var.val)
        equation = made_by.get(id(var))
        return equation is not None and equation.primitive.name == "broadcast_in_dim" and is_zero(equation.invars[0])

    names = [capture.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return frozenset(name for name, var in zip(names, jaxpr.outvars, strict=True) if is_zero(var))


def grams(problem: Problem, chunk: int | None) -> dict[str, Array]:
    """Parameter path -> (B, B)."""
    batch, shared = len(problem.labels), capture.shared_paths(problem.layers)
    square = jnp.zeros((batch, batch), problem.dtype)

    def emit(layer: Layer, a: Array, d: Array) -> dict[str, Array]:
        return layer.rule.rows(a, d) if layer.path in shared else layer.rule.grams(a, d, chunk)

    sinks: dict[Path | None, Any] = {
        layer.path: _row_sinks(layer, problem) if layer.path in shared else dict.fromkeys(layer.shapes, square)
        for layer in problem.layers
    }
    left = _backward(problem, sinks, emit)
    found = {
        name: rules.outer(value) if path in shared else value
        for path, values in left.items()
        for name, value in _named(path, values).items()
    }
    return found | dict.fromkeys(problem.idle, square)


def gram(problem: Problem, chunk: int | None) -> Array:
    """(B, B): one sink that all layers share, so that their matrices are added up as they come."""
    batch, shared = len(problem.labels), capture.shared_paths(problem.layers)

    def emit(layer: Layer, a: Array, d: Array) -> Any:
        # Calls of one layer add up to one row before rows are multiplied: (r + s)(r + s)' is not rr' + ss'.
        return layer.rule.rows(a, d) if layer.path in shared else sum(layer.rule.grams(a, d, chunk).values())

    total = jnp.zeros((batch, batch), problem.dtype)
    sinks = {layer.path: _row_sinks(layer, problem) for layer in problem.layers if layer.path in shared}
    left = _backward(problem, {None: total, **sinks}, emit)
    rows = [value for path in sinks for value in left[path].values()]
    return sum((rules.outer(value) for value in rows), left[None])


def rows(problem: Problem) -> dict[str, Array]:
    """Parameter path -> (B, *shape)."""
    sinks: dict[Path | None, Any] = {layer.path: _row_sinks(layer, problem) for layer in problem.layers}
    left = _backward(problem, sinks, lambda layer, a, d: layer.rule.rows(a, d))
    found = {name: value for path, values in left.items() for name, value in _named(path, values).items()}
    zeros = {name: jnp.zeros((len(problem.labels), *shape), problem.dtype) for name, shape in problem.idle.items()}
    return found | zeros


def rows_and_grams(problem: Problem) -> tuple[dict[str, Array], dict[str, Array]]:
    """`rows` and `grams` of one backward pass."""
    batch, shared = len(problem.labels), capture.shared_paths(problem.layers)
    square = jnp.zeros((batch, batch), problem.dtype)

    def emit(layer: Layer, a: Array, d: Array) -> tuple[dict, dict]:
        return layer.rule.rows(a, d), {} if layer.path in shared else layer.rule.grams(a, d, None)

    sinks: dict[Path | None, Any] = {
        layer.path: (_row_sinks(layer, problem), {} if layer.path in shared else dict.fromkeys(layer.shapes, square))
        for layer in problem.layers
    }
    left = _backward(problem, sinks, emit)
    found = {name: value for path, (of, _) in left.items() for name, value in _named(path, of).items()}
    products = {name: rules.outer(value) for name, value in found.items()}
    products |= {name: value for path, (_, of) in left.items() for name, value in _named(path, of).items()}
    zeros = {name: jnp.zeros((batch, *shape), problem.dtype) for name, shape in problem.idle.items()}
    return found | zeros, products | dict.fromkeys(problem.idle, square)


def missed(problem: Problem) -> dict[str, Array]:
    """Layer name -> () bool: the backward pass met it another number of times than the forward pass showed."""
    _, wrong = _counted_backward(problem, {None: None}, lambda layer, a, d: None)
    return {"/".join(path) or "the model itself": value for path, value in wrong.items()}


def _backward(problem: Problem, sinks: dict[Path | None, Any], emit: capture.Emit) -> dict[Path | None, Any]:
    """What each sink received, NaN if a layer was missed; a layer without a sink of its own uses the sink None."""
    left, wrong = _counted_backward(problem, sinks, emit)
    # One layer missed spoils the whole result: a sum that lacks a share looks like any other sum.
    any_wrong = jnp.stack([jnp.array(False), *wrong.values()]).any()
    return {
        path: jax.tree.map(lambda value: jnp.where(any_wrong, jnp.nan, value), received)
        for path, received in left.items()
    }


def _counted_backward(
    problem: Problem, sinks: dict[Path | None, Any], emit: capture.Emit
) -> tuple[dict[Path | None, Any], dict[Path, Array]]:
    """(what each sink received, path -> missed).

    Every tap also adds 1 to a counter of its layer. A transformation that hides calls from the taps (nn.jit keeps a
    trace without them) or maps over them (nn.vmap) shows there. Of a layer whose rows are added up before they are
    multiplied, any number of calls is right.
    """
    paths, shared = list(sinks), capture.shared_paths(problem.layers)
    calls = {layer.path: jnp.zeros((), problem.dtype) for layer in problem.layers}

    def typed(layer: Layer, a: Array, d: Array) -> tuple[Any, Array]:
        received = jax.tree.map(lambda value: value.astype(problem.dtype), emit(layer, a, d))
        # 1, but made from the cotangent: a constant would not be summed over an axis that the layer is mapped over.
        return received, jnp.where(d.ravel()[0] == 0, 1, 1).astype(problem.dtype)

    def objective(sinks: list[Any], calls: list[Array]) -> Array:
        of_path, counter = dict(zip(paths, sinks, strict=True)), dict(zip(counted, calls, strict=True))

        def sink_of(path: Path) -> tuple[Any, Array]:
            return of_path[path if path in of_path else None], counter[path]

        with capture.taps(len(problem.labels), set(counted), sink_of, typed):
            logits = problem.logits()
        return definition.losses(logits, problem.labels).sum()

    counted = list(calls)
    left, met = jax.grad(objective, (0, 1))(list(sinks.values()), list(calls.values()))
    wrong = {path: (count < 1) if path in shared else (count != 1) for path, count in zip(counted, met, strict=True)}
    return dict(zip(paths, left, strict=True)), wrong


def _row_sinks(layer: Layer, problem: Problem) -> dict[str, Array]:
    return {name: jnp.zeros((len(problem.labels), *shape), problem.dtype) for name, shape in layer.shapes.items()}


def _named(path: Path | None, values: Mapping[str, Array]) -> dict[str, Array]:
    return {"/".join((*(path or ()), name)): value for name, value in values.items()}
