"""Rows of per-sample gradients beside their definition, on a few made-up samples at parameters moved by noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax.choose.losses import Loss
from hardjax.fisher import by_uses, definition
from hardjax.fisher.names import named_leaves
from hardjax.fisher.unchecked import defined_rows
from hardjax.models.apply import as_apply

# Five samples: enough to tell them apart, and unlike two or three they leave batch statistics of one pixel a variance
# that is not all rounding. Another size where five is refused (sub-batches of a fixed size).
_SIZES = (5, 7, 3)
TOLERANCE = {"float32": 1e-3, "half": 0.05}  # share of the whole gradient; bfloat16 models differ by 0.02 from theirs
# A change of logits beyond rounding. What couples samples by less moves no row by as much as the tolerance.
_MOVED = 1e-6
_NUDGE = 1e-6  # relative change of the images whose effect shows how far rounding reaches


class Subject(NamedTuple):
    """What is checked: a network with its loss, and the rows with the method by which they are formed.

    Attributes:
        images, labels: (B, ...), or their shapes where nothing is to be computed.
    """

    model: Any
    loss: Loss
    rows: str
    method: str
    variables: Any
    images: Any
    labels: Any


class Comparison(NamedTuple):
    """Errors of every parameter's rows relative to the norm of all rows, and how far rounding may carry them."""

    errors: dict[str, float]
    tolerance: float


def compare(subject: Subject, kind: str) -> Comparison:
    """The rows beside their definition, at parameters moved by noise; at entirely random ones if those give nothing
    finite (a run that diverged).

    Args:
        kind: of the arithmetic, "float32" or "half".
    """
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        for near in (True, False):
            inputs = _made_up(subject, size_of(subject), near)
            errors, nudged = _measured(subject, inputs)
            if all(math.isfinite(change) for change in nudged.values()):
                break
    # Where the definition itself moves by this much at a nudge of rounding's size, so may the rows.
    rounding = 10 * max(nudged.values(), default=0.0)
    tolerance = max(TOLERANCE[kind], min(rounding, TOLERANCE["half"])) if math.isfinite(rounding) else 0.0
    return Comparison(errors, tolerance)


def rows_of(subject: Subject, variables: Any, images: Array, labels: Array, key: Array) -> dict[str, Array]:
    apply = as_apply(subject.model)
    if subject.method == "layers":
        problem = by_uses.problem(apply, subject.loss, variables, images, labels, key, subject.rows != "frozen")
        return by_uses.rows(problem)
    return named_leaves(defined_rows(apply, subject.loss, subject.rows, variables, images, labels, key))


def size_of(subject: Subject) -> int:
    """The first batch size of `_SIZES`, then of the divisors of the batch at hand, that the network takes."""
    batch, apply = subject.images.shape[0], as_apply(subject.model)
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    reason: Exception | None = None
    for size in (*_SIZES, *divisors):
        variables, images, _ = shapes_of(subject, size)
        try:
            jax.eval_shape(
                lambda variables, images, key: apply(variables, images, subject.rows != "frozen", key)[0],
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

    return jax.tree.map(shape, dict(subject.variables)), shape(subject.images, size), shape(subject.labels, size)


def _measured(subject: Subject, inputs: tuple) -> tuple[dict[str, float], dict[str, float]]:
    """(errors by parameter, changes of the definition at a nudge)."""
    frozen, by_copies = subject.rows == "frozen", subject.method == "vmap"
    apply, loss = as_apply(subject.model), subject.loss

    coupled, draws = (False, False) if frozen else _coupling(apply, *inputs)

    def found(*inputs: Any) -> tuple:
        if by_copies:
            return rows_of(subject, *inputs), {}
        return by_uses.rows_and_grams(by_uses.problem(apply, loss, *inputs, not frozen))

    def defined(*inputs: Any) -> Any:
        if frozen:
            return definition.frozen_rows(apply, loss, *inputs)
        if coupled and not by_copies:
            return definition.gradient(apply, loss, *inputs)
        return definition.coupled_rows(apply, loss, *inputs)

    def copied(*inputs: Any) -> Any:
        return definition.contribution_rows(apply, loss, *inputs)

    variables, images, labels, key = inputs
    compiled = _compiled([found, defined, *([copied] if coupled and not by_copies else [])], inputs)
    rows, products = compiled[0](*inputs)
    expected = named_leaves(compiled[1](*inputs))
    nudge = (images * (1 + _NUDGE)).astype(images.dtype) if is_float(images) else images
    nudged = named_leaves(compiled[1](variables, nudge, labels, key))  # whole numbers (tokens) cannot be nudged
    of_products = _product_errors(products, rows)
    if not coupled:
        return _largest(_errors(rows, expected), of_products), _errors(nudged, expected)
    # With batch statistics a row is what its copy of the parameters adds. Rows also add up to the gradient, and change
    # places as their samples do: neither knows where a parameter meets the batch, which copies and rows both rest on.
    of_copies, whole = {}, _norm(expected)
    if by_copies:
        expected, nudged = ({name: np.sum(row, 0) for name, row in some.items()} for some in (expected, nudged))
    else:
        copies = named_leaves(compiled[2](*inputs))
        of_copies, whole = _errors(rows, copies), _norm(copies)
    sums = {name: np.sum(row, 0) for name, row in rows.items()}
    errors = _largest(_errors(sums, expected, whole), of_products, of_copies)
    if not draws:  # a mask belongs to its place
        order = _cycle(len(images))
        turned, _ = compiled[0](variables, images[order], labels[order], key)
        errors = _largest(errors, _errors(turned, {name: np.asarray(row)[order] for name, row in rows.items()}))
    return errors, _errors(nudged, expected, whole)


def _compiled(fns: Sequence[Callable], inputs: tuple) -> list[Callable]:
    """Executables of what runs once or twice on five samples: compiling is all that it costs, and one is compiled while
    the next is traced."""
    with ThreadPoolExecutor(len(fns)) as pool:
        waiting = [pool.submit(_compiled_quickly, jax.jit(fn).lower(*inputs)) for fn in fns]
        return [future.result() for future in waiting]


def _compiled_quickly(lowered: Any) -> Callable:
    """On CPU without optimisations, in a quarter of the time."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    try:
        return lowered.compile(compiler_options=options | {"xla_cpu_use_fusion_emitters": False})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile(compiler_options=options)  # jax 0.12 has no such choice any more


def _cycle(count: int) -> np.ndarray:
    """One cycle through all samples, which changes places with no shift, no reversal and no exchange: an order of a
    network's own that did would pass unseen."""
    places, order = np.random.default_rng(2).permutation(count), np.empty(count, int)
    order[places] = np.roll(places, 1)
    return order


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
    apply = as_apply(subject.model)
    if subject.loss.targets == "classes":
        classes = jax.eval_shape(lambda: apply(variables, jnp.asarray(made), False, key)[0]).shape[-1]
        # Of every class about as many, neighbours apart.
        targets = np.arange(math.prod(labels.shape)).reshape(labels.shape) * 2 % classes
    else:  # what else a loss takes (probabilities, signs) is for the data to say
        targets = np.asarray(subject.labels)[np.arange(size) % subject.labels.shape[0]]
    return variables, made, targets.astype(labels.dtype), key


def _coupling(apply: Any, variables: Any, images: Array, labels: Array, key: Array) -> tuple[bool, bool]:
    """Whether a sample's logits move when another sample is replaced, and when another key is drawn."""
    del labels

    def changes(variables: Any, images: Array, key: Array) -> tuple[Array, Array]:
        def logits(images: Array, key: Array) -> Array:
            return apply(variables, images, True, key)[0]

        def moved(i: Array) -> Array:
            others = images.at[i].set(images[(i + 1) % len(images)])
            change = jnp.abs(logits(others, key) - here).reshape(len(images), -1).max(-1)
            return jnp.where(jnp.arange(len(images)) == i, 0, change).max()

        here = logits(images, key)
        scale = jnp.maximum(jnp.abs(here).max(), jnp.finfo(jnp.float32).tiny)
        drawn = jnp.abs(logits(images, jax.random.fold_in(key, 1)) - here).max()
        return jax.lax.map(moved, jnp.arange(len(images))).max() / scale, drawn / scale

    (compiled,) = _compiled([changes], (variables, images, key))
    coupled, draws = compiled(variables, images, key)
    # Written so that NaN counts as coupled.
    return not float(coupled) <= _MOVED, not float(draws) <= _MOVED


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
        gap, own = float(np.abs(product - flat @ flat.T).max()), _norm({name: flat}) or whole
        # Up to five times as well.
        errors[name] = gap / (whole * own) * min(5.0, whole / own)
    return errors


def _largest(first: dict[str, float], *others: dict[str, float]) -> dict[str, float]:
    # NumPy's maximum: NaN must not lose.
    return {name: float(np.max([error, *(other[name] for other in others if other)])) for name, error in first.items()}


def _norm(arrays: Mapping[str, Any]) -> float:
    return math.sqrt(sum(float(np.square(np.asarray(array, np.float64)).sum()) for array in arrays.values()))


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
