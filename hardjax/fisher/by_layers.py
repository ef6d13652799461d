"""One ordinary backward pass whose layers leave Gram matrices, rows or sums of rows behind instead of gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hardjax.fisher import capture, definition
from hardjax.fisher.capture import Layer, Path


class Problem(NamedTuple):
    """A forward pass ready to be differentiated.

    Attributes:
        logits: () -> (B, classes).
        labels: (B,) integers.
        layers: every call of a covered layer.
        dtype: of the sums: float32, or float64 where the parameters or images are.
    """

    logits: Callable[[], Array]
    labels: Array
    layers: list[Layer]
    dtype: Any


def problem(
    forward: definition.Forward, variables: Mapping[str, Any], images: Array, labels: Array, train: bool
) -> Problem:
    """Finds the layers by an abstract forward pass.

    Raises:
        ValueError: a parameter that no rule covers.
    """

    def logits() -> Array:
        return forward(variables, images, train)

    leaves = [leaf for leaf in jax.tree.leaves(variables["params"]) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    dtype = jnp.result_type(jnp.float32, images, *leaves)
    return Problem(logits, labels, capture.find_layers(logits, variables["params"], len(images)), dtype)


def grams(problem: Problem, chunk: int | None) -> dict[str, Array]:
    """Parameter path -> (B, B)."""
    batch, shared = len(problem.labels), capture.shared_paths(problem.layers)
    square = jnp.zeros((batch, batch), problem.dtype)

    def emit(layer: Layer, a: Array, d: Array) -> dict[str, Array]:
        return layer.rule.rows(a, d) if layer.path in shared else layer.rule.grams(a, d, chunk)

    sinks = {
        layer.path: _row_sinks(layer, problem) if layer.path in shared else dict.fromkeys(layer.shapes, square)
        for layer in problem.layers
    }
    left = _backward(problem, sinks, emit)
    return {
        name: definition.outer(value) if path in shared else value
        for path, values in left.items()
        for name, value in _named(path, values).items()
    }


def gram(problem: Problem, chunk: int | None) -> Array:
    """(B, B): one sink that all layers share, so that their matrices are added up as they come."""
    batch, shared = len(problem.labels), capture.shared_paths(problem.layers)

    def emit(layer: Layer, a: Array, d: Array) -> Any:
        return layer.rule.rows(a, d) if layer.path in shared else sum(layer.rule.grams(a, d, chunk).values())

    total = jnp.zeros((batch, batch), problem.dtype)
    sinks = {layer.path: _row_sinks(layer, problem) for layer in problem.layers if layer.path in shared}
    left = _backward(problem, {None: total, **sinks}, emit)
    rows = [value for path in sinks for value in left[path].values()]
    return sum((definition.outer(value) for value in rows), left[None])


def rows(problem: Problem) -> dict[str, Array]:
    """Parameter path -> (B, *shape)."""
    sinks = {layer.path: _row_sinks(layer, problem) for layer in problem.layers}
    left = _backward(problem, sinks, lambda layer, a, d: layer.rule.rows(a, d))
    return {name: value for path, values in left.items() for name, value in _named(path, values).items()}


def row_sums(problem: Problem) -> dict[str, Array]:
    """Parameter path -> (*shape), the sum of its rows over the batch."""
    sinks = {
        layer.path: {name: jnp.zeros(shape, problem.dtype) for name, shape in layer.shapes.items()}
        for layer in problem.layers
    }
    left = _backward(problem, sinks, lambda layer, a, d: jax.tree.map(lambda r: r.sum(0), layer.rule.rows(a, d)))
    return {name: value for path, values in left.items() for name, value in _named(path, values).items()}


def _backward(problem: Problem, sinks: dict[Path | None, Any], emit: capture.Emit) -> dict[Path | None, Any]:
    """What each sink received; a layer without one of its own uses the sink None."""
    paths = list(sinks)

    def typed(layer: Layer, a: Array, d: Array) -> Any:
        return jax.tree.map(lambda value: value.astype(problem.dtype), emit(layer, a, d))

    def objective(sinks: list[Any]) -> Array:
        of_path = dict(zip(paths, sinks, strict=True))
        with capture.taps(len(problem.labels), lambda path: of_path[path if path in of_path else None], typed):
            logits = problem.logits()
        return definition.losses(logits, problem.labels).sum()

    return dict(zip(paths, jax.grad(objective)(list(sinks.values())), strict=True))


def _row_sinks(layer: Layer, problem: Problem) -> dict[str, Array]:
    return {name: jnp.zeros((len(problem.labels), *shape), problem.dtype) for name, shape in layer.shapes.items()}


def _named(path: Path | None, values: Mapping[str, Array]) -> dict[str, Array]:
    return {"/".join((*(path or ()), name)): value for name, value in values.items()}
