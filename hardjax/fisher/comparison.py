"""Rows of per-sample gradients beside their definition, on a few made-up samples at parameters moved by noise."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax.fisher import by_layers, capture, definition

# Five samples: enough to tell them apart, and unlike two or three they leave batch statistics of one pixel a variance
# that is not all rounding. Another size where five is refused (sub-batches of a fixed size).
_SIZES = (5, 7, 3)
TOLERANCE = {"float32": 1e-3, "half": 0.05}  # share of the whole gradient; bfloat16 models differ by 0.02 from theirs
_NUDGE = 1e-6  # relative change of the images whose effect shows how far rounding reaches


class Subject(NamedTuple):
    """What is checked: a network, as shapes, with the rows and the method by which they are formed."""

    model: Any
    rows: str
    method: str
    variables: Any
    images: Any


class Comparison(NamedTuple):
    """Errors of every parameter's rows relative to the norm of all rows, by name, and how far rounding may carry them.

    unknown: there was no definition to compare with, and what could be compared instead failed.
    """

    errors: dict[str, float]
    tolerance: float
    unknown: bool


def compare(subject: Subject, kind: str) -> Comparison:
    """The rows beside their definition, at parameters moved by noise; at entirely random ones if those give nothing
    finite (a run that diverged).

    Args:
        kind: of the arithmetic, "float32" or "half".
    """
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        for near in (True, False):
            inputs = _made_up(subject, size_of(subject), near)
            errors, nudged, unknown = _measured(subject, inputs)
            if all(math.isfinite(change) for change in nudged.values()):
                break
    # Where the definition itself moves by this much at a nudge of rounding's size, so may the rows.
    rounding = 10 * max(nudged.values(), default=0.0)
    tolerance = max(TOLERANCE[kind], min(rounding, TOLERANCE["half"])) if math.isfinite(rounding) else 0.0
    return Comparison(errors, tolerance, unknown)


def hidden(subject: Subject) -> list[str]:
    """Layers that the backward pass met another number of times than the forward pass showed."""
    if subject.method != "layers":
        return []
    with jax.enable_x64(False):
        variables, images, labels, key = _made_up(subject, size_of(subject), True)
        forward = capture.forward_of(subject.model, variables, images, key)
        train = subject.rows != "frozen"
        problem = by_layers.problem(forward, variables, jnp.asarray(images), jnp.asarray(labels), train)
        return [name for name, wrong in by_layers.missed(problem).items() if wrong]


def rows_of(subject: Subject, forward: Any, variables: Any, images: Array, labels: Array) -> dict[str, Array]:
    train = subject.rows != "frozen"
    if subject.method == "layers":
        return by_layers.rows(by_layers.problem(forward, variables, images, labels, train))
    fn = definition.contribution_rows if train else definition.frozen_rows
    return capture.named_leaves(fn(forward, variables, images, labels))


def size_of(subject: Subject) -> int:
    """The first batch size of `_SIZES`, then of the divisors of the batch at hand, that the network takes."""
    batch = subject.images.shape[0]
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    reason: Exception | None = None
    for size in (*_SIZES, *divisors):
        variables, images, _ = shapes_of(subject, size)
        try:
            jax.eval_shape(
                lambda variables, images, key: capture.forward_of(subject.model, variables, images, key)(
                    variables, images, subject.rows != "frozen"
                ),
                variables,
                images,
                jax.eval_shape(lambda: jax.random.key(0)),
            )
        except (ValueError, TypeError) as error:
            reason = reason or error
            continue
        return size
    assert reason is not None  # there is a size at least
    raise reason


def shapes_of(subject: Subject, size: int) -> tuple[Any, Any, Any]:
    """Shapes and types of variables, images and labels, in 32 bits."""

    def shape(leaf: Any, first: int | None = None) -> jax.ShapeDtypeStruct:
        narrow = {"float64": "float32", "int64": "int32", "uint64": "uint32"}.get(str(leaf.dtype), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape if first is None else (first, *leaf.shape[1:]), narrow)

    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    return jax.tree.map(shape, dict(subject.variables)), shape(subject.images, size), labels


def _measured(subject: Subject, inputs: tuple) -> tuple[dict[str, float], dict[str, float], bool]:
    """(errors by parameter, changes of the definition at a nudge, whether there was no definition)."""
    frozen, by_copies = subject.rows == "frozen", subject.method == "vmap"

    def forward_of(variables: Any, images: Array, key: Array) -> Any:
        return capture.forward_of(subject.model, variables, images, key)

    @jax.jit
    def coupling(variables: Any, images: Array, labels: Array, key: Array) -> Array:
        return _coupling(forward_of(variables, images, key), variables, images)

    def formed(variables: Any, images: Array, labels: Array, key: Array) -> tuple:
        forward = forward_of(variables, images, key)
        if by_copies:
            return rows_of(subject, forward, variables, images, labels), {}
        return by_layers.rows_and_grams(by_layers.problem(forward, variables, images, labels, not frozen))

    @jax.jit
    def found_and_defined(variables: Any, images: Array, labels: Array, key: Array) -> tuple:
        forward = forward_of(variables, images, key)
        if frozen:
            defined = capture.named_leaves(definition.frozen_rows(forward, variables, images, labels))
            return formed(variables, images, labels, key), defined, None, 0.0
        own = capture.named_leaves(definition.coupled_rows(forward, variables, images, labels))
        if not (coupled or by_copies):
            return formed(variables, images, labels, key), own, None, 0.0
        try:
            copied, gap = definition.copied_rows(forward, variables, images, labels)
            copied = capture.named_leaves(copied)
        except (ValueError, TypeError):  # a network that takes no single sample has no copies, and perhaps layers
            if by_copies:
                raise
            copied, gap = None, jnp.inf
        return (copied, {}) if by_copies else formed(variables, images, labels, key), own, copied, gap

    coupled = not frozen and not float(coupling(*inputs)) <= TOLERANCE["float32"]
    variables, images, labels, key = inputs
    (rows, products), defined, copied, gap = found_and_defined(*inputs)
    # Relative, so that black stays black; whole numbers (tokens) cannot be nudged.
    nudge = images * (1 + _NUDGE) if is_float(images) else images
    _, nudged, _, _ = found_and_defined(variables, nudge, labels, key)
    of_products = _product_errors(products, rows)
    if not coupled:
        return _largest(_errors(rows, defined), of_products), _errors(nudged, defined), False
    # With batch statistics a row is what its copy of the parameters adds. The rows add up to the gradient as well,
    # which tells whether the copies leave out a use of a parameter.
    whole = _norm(defined)
    sums, added, nudged = ({name: np.sum(row, 0) for name, row in some.items()} for some in (rows, defined, nudged))
    errors, nudges = _errors(sums, added, whole), _errors(nudged, added, whole)
    if float(gap) <= TOLERANCE["half"] / 2:
        return _largest(errors, _errors(rows, copied), of_products), nudges, False
    return _largest(errors, of_products), nudges, by_copies or not _follow(subject, inputs, rows)


def _follow(subject: Subject, inputs: tuple, rows: dict[str, Array]) -> bool:
    """Whether the rows change places as their samples do. Where samples are coupled by who knows what, this and that
    they add up to the gradient is all that can be asked for."""
    variables, images, labels, key = inputs
    # A turn moves every sample; an exchange of two would leave the others where they were.
    order = np.roll(np.arange(len(images)), 1)

    @jax.jit
    def turned(variables: Any, images: Array, labels: Array, key: Array) -> dict[str, Array]:
        forward = capture.forward_of(subject.model, variables, images, key)
        return rows_of(subject, forward, variables, images, labels)

    found = turned(variables, images[order], labels[order], key)
    expected = {name: row[order] for name, row in rows.items()}
    return max(_errors(found, expected).values(), default=0.0) <= TOLERANCE["half"]


def _made_up(subject: Subject, size: int, near: bool) -> tuple:
    """(variables moved by noise, images, labels, key) in NumPy; `near` the given values, or without them."""
    shapes, images, labels = shapes_of(subject, size)
    rng = np.random.default_rng(7)

    def moved(path: tuple, leaf: Any, shape: Any) -> Any:
        leaf = np.asarray(leaf)
        if not is_float(leaf) or str(getattr(path[0], "key", "")) not in ("params", "batch_stats"):
            return leaf.astype(shape.dtype)
        # float32: NumPy's own arithmetic for bfloat16 is slow, and a bfloat16 spread would be coarse.
        leaf = leaf.astype(np.float32)
        leaf = np.where(np.isfinite(leaf) & near, leaf, 0 if near or leaf.ndim > 1 else 1)
        if path[0].key == "batch_stats":  # variances stay above zero
            leaf = leaf * (1 + 0.3 * rng.random(leaf.shape)) + 0.1
        elif leaf.size:
            # As far as its values lie apart; where they are all equal, as far as an initialiser would draw them.
            fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100
            spread = leaf.std() / 2 or 1 / math.sqrt(max(1, fan_in))
            leaf = leaf + spread * rng.standard_normal(leaf.shape)
        return leaf.astype(shape.dtype)

    variables = jax.tree_util.tree_map_with_path(moved, dict(subject.variables), shapes)
    if is_float(images):
        made = rng.standard_normal(images.shape).astype(images.dtype)
    else:
        made = np.asarray(subject.images)[np.arange(size) % subject.images.shape[0]].astype(images.dtype)
    key = jax.random.key(7)
    forward = capture.forward_of(subject.model, variables, made, key)
    classes = jax.eval_shape(lambda: forward(variables, jnp.asarray(made), False)).shape[-1]
    return variables, made, (np.arange(size) * 2 % classes).astype(labels.dtype), key


def _coupling(forward: Any, variables: Any, images: Array) -> Array:
    """How far a sample's logits move, relative to the largest, when another sample is replaced."""
    logits = forward(variables, images, True)

    def moved(i: Array) -> Array:
        others = images.at[i].set(images[(i + 1) % len(images)])
        change = jnp.abs(forward(variables, others, True) - logits).max(-1)
        return jnp.where(jnp.arange(len(images)) == i, 0, change).max()

    change = jax.lax.map(moved, jnp.arange(len(images))).max()
    return change / jnp.maximum(jnp.abs(logits).max(), jnp.finfo(jnp.float32).tiny)


def _errors(found: Mapping[str, Any], expected: Mapping[str, Any], whole: float | None = None) -> dict[str, float]:
    """Of each parameter, relative to all of them together: one whose rows are rounding alone has no size of its own.

    An error that is large beside the parameter's own rows counts up to five times: half precision lets through what is
    small beside the whole, and a wrong row of a small parameter should not hide there.
    """
    whole = _norm(expected) if whole is None else whole
    errors = {}
    for name, row in expected.items():
        gap = _norm({name: np.asarray(found[name], np.float64) - np.asarray(row, np.float64)})
        if gap == 0 or whole == 0:
            errors[name] = math.inf if gap else 0.0
            continue
        own = gap / (_norm({name: row}) or gap)
        errors[name] = gap / whole * min(5.0, max(1.0, own * whole / gap / 5))
    return errors


def _product_errors(products: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, float]:
    """Of each parameter's Gram matrix, which the rules form in ways of their own; on the scale of the rows, so that one
    left out counts as its rows would."""
    whole, errors = _norm(rows) or 1.0, {}
    for name, product in products.items():
        flat = np.asarray(rows[name], np.float64).reshape(len(rows[name]), -1)
        # In float64 on the host, so that the comparison adds no rounding of its own.
        gap = float(np.abs(product - flat @ flat.T).max())
        errors[name] = gap / (whole * (_norm({name: flat}) or whole))
    return errors


def _largest(first: dict[str, float], *others: dict[str, float]) -> dict[str, float]:
    # NumPy's maximum: NaN must not lose.
    return {name: float(np.max([error, *(other[name] for other in others if other)])) for name, error in first.items()}


def _norm(arrays: Mapping[str, Any]) -> float:
    return math.sqrt(sum(float(np.square(np.asarray(array, np.float64)).sum()) for array in arrays.values()))


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
