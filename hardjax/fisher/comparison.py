"""Rows of per-sample gradients beside their definition, on a few made-up samples at parameters moved by noise."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hardjax.choose.losses import Loss
from hardjax.fisher import by_uses, definition
from hardjax.fisher.alike import alike
from hardjax.fisher.names import named_leaves
from hardjax.fisher.pieces import Pieces
from hardjax.fisher.program import Uncovered
from hardjax.fisher.traced import Traced

# Five samples: enough to tell them apart, and unlike two or three they leave batch statistics of one pixel a variance
# that is not all rounding. Another size where five is refused (sub-batches of a fixed size).
_SIZES = (5, 7, 3)
# Numbers in the rows and in the copies of the largest value between: 1 GiB in float32, held a few times.
MOST = 1 << 28
TOLERANCE = {"float32": 1e-3, "half": 0.05}  # share of the whole gradient; bfloat16 models differ by 0.02 from theirs
# A change of logits beyond rounding. What couples samples by less moves no row by as much as the tolerance.
_MOVED = 1e-6
_NUDGE = 1e-6  # relative change of the images whose effect shows how far rounding reaches


class Subject(NamedTuple):
    """What is checked: a network with its loss, and the rows with the method by which they are formed.

    Attributes:
        model: a network of any make; in `compare` and what stands below it a `Traced` one.
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


def compare(subject: Subject, kind: str, size: int, deciding: Collection[str] = ()) -> Comparison:
    """The rows beside their definition, at parameters moved by noise; at entirely random ones if those give nothing
    finite (a run that diverged).

    Args:
        kind: of the arithmetic, "float32" or "half".
        size: samples, as `size_of` gives it.
        deciding: names of variables that stay as they are.
    """
    with settings():
        for near in (True, False):
            inputs = _made_up(subject, size, near, deciding)
            errors, nudged = _measured(subject, inputs)
            if all(math.isfinite(change) for change in nudged.values()):
                break
    # Where the definition itself moves by this much at a nudge of rounding's size, so may the rows.
    rounding = 10 * max(nudged.values(), default=0.0)
    tolerance = max(TOLERANCE[kind], min(rounding, TOLERANCE["half"])) if math.isfinite(rounding) else 0.0
    return Comparison(errors, tolerance)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """What networks are traced and compared under, whatever the caller's."""
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        yield


def size_of(subject: Subject) -> int:
    """The first batch size of `_SIZES`, then of the divisors of the batch at hand, that the network takes, and at which
    it computes as it does for the batch at hand. At the latest this is that batch itself.

    Raises:
        ValueError: no other would do, and for that a comparison takes too much memory.
    """
    batch, key, train = subject.images.shape[0], jax.eval_shape(lambda: jax.random.key(0)), subject.rows != "frozen"

    def traced(size: int) -> Any:
        variables, images, _ = shapes_of(subject, size)
        return subject.model.jaxpr(variables, images, key, train)

    at_hand = traced(batch)
    for size in (*_SIZES, *(size for size in range(2, batch) if batch % size == 0)):
        try:
            if alike(traced(size), at_hand, size, batch):
                return size
        except (ValueError, TypeError):  # a size that the network does not take
            continue
    largest = max((var.aval.size for eqn in at_hand.jaxpr.eqns for var in eqn.outvars), default=0)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(subject.variables["params"]))
    if (needed := batch * (parameters + largest)) > MOST:
        raise Uncovered(
            f"{subject.model.name} computes otherwise for fewer samples than {batch}, and comparing its rows there"
            f" takes {needed:.1e} numbers, more than {MOST:.1e}."
        )
    return batch


def shapes_of(subject: Subject, size: int) -> tuple[Any, Any, Any]:
    """Shapes and types of variables, images and labels, in 32 bits."""

    def shape(leaf: Any, first: int | None = None) -> jax.ShapeDtypeStruct:
        narrow = {"float64": "float32", "int64": "int32", "uint64": "uint32"}.get(str(leaf.dtype), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape if first is None else (first, *leaf.shape[1:]), narrow)

    return jax.tree.map(shape, dict(subject.variables)), shape(subject.images, size), shape(subject.labels, size)


def _measured(subject: Subject, inputs: tuple) -> tuple[dict[str, float], dict[str, float]]:
    """(errors by parameter, changes of the definition at a nudge)."""
    frozen, by_copies = subject.rows == "frozen", subject.method == "vmap"
    apply, loss = subject.model, subject.loss
    variables, images, labels, key = inputs
    coupled, draws = (False, False) if frozen else _coupling(apply, *inputs)
    found = _found_by_copies(subject) if by_copies else _found_by_uses(subject, inputs)

    def defined(*inputs: Any) -> dict[str, np.ndarray]:
        if frozen:
            return _named(definition.frozen_rows(apply, loss, *inputs))
        if coupled and not by_copies:
            return _named(definition.gradient(apply, loss, *inputs))
        return _named(definition.coupled_rows(apply, loss, *inputs))

    rows, products = found(*inputs)
    expected = defined(*inputs)
    nudge = (images * (1 + _NUDGE)).astype(images.dtype) if is_float(images) else images
    nudged = defined(variables, nudge, labels, key)  # whole numbers (tokens) cannot be nudged
    of_products = _product_errors(products, rows)
    if not coupled:
        return _largest(_errors(rows, expected), of_products), _errors(nudged, expected)
    # With batch statistics a row is what its copy of the parameters adds. Rows also add up to the gradient, and change
    # places as their samples do: neither knows where a parameter meets the batch, which copies and rows both rest on.
    of_copies, whole = {}, _norm(expected)
    if by_copies:
        expected, nudged = ({name: np.sum(row, 0) for name, row in some.items()} for some in (expected, nudged))
    else:
        copies, _ = _found_by_copies(subject)(*inputs)
        of_copies, whole = _errors(rows, copies), _norm(copies)
    sums = {name: np.sum(row, 0) for name, row in rows.items()}
    errors = _largest(_errors(sums, expected, whole), of_products, of_copies)
    if not draws:  # a mask belongs to its place
        order = _cycle(len(images))
        turned, _ = found(variables, images[order], labels[order], key)
        errors = _largest(errors, _errors(turned, {name: row[order] for name, row in rows.items()}))
    return errors, _errors(nudged, expected, whole)


# Inputs -> (rows, products), NumPy arrays by parameter.
_Found = Callable[..., tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


def _found_by_uses(subject: Subject, inputs: tuple) -> _Found:
    problem, run = by_uses.problem(subject.model, subject.loss, *inputs, subject.rows != "frozen"), Pieces()

    def found(variables: Any, images: np.ndarray, labels: np.ndarray, key: Array) -> tuple:
        # The same program with other values, so that pieces that are compiled serve again.
        env = problem.program.environment(variables, images, key)
        rows, products = by_uses.rows_and_grams(dataclasses.replace(problem, env=env, labels=labels), run)
        return jax.tree.map(np.asarray, (rows, products))

    return found


def _found_by_copies(subject: Subject) -> _Found:
    run = Pieces()

    def found(*inputs: Any) -> tuple:
        return _named(definition.contribution_rows(subject.model, subject.loss, *inputs, run=run)), {}

    return found


def _named(tree: Any) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named_leaves(tree))


def _cycle(count: int) -> np.ndarray:
    """One cycle through all samples, which changes places with no shift, no reversal and no exchange: an order of a
    network's own that did would pass unseen."""
    places, order = np.random.default_rng(2).permutation(count), np.empty(count, int)
    order[places] = np.roll(places, 1)
    return order


def _made_up(subject: Subject, size: int, near: bool, deciding: Collection[str]) -> tuple:
    """(variables moved by noise, images, labels, key) in NumPy; `near` the given values, or without them; what is
    `deciding` stays as it is."""
    shapes, images, labels = shapes_of(subject, size)
    rng = np.random.default_rng(7)

    def moved(path: tuple, leaf: Any, shape: Any) -> Any:
        leaf = np.asarray(leaf)
        kept = not is_float(leaf) or jax.tree_util.keystr(path) in deciding
        if kept or str(getattr(path[0], "key", "")) not in ("params", "batch_stats"):
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
    if subject.loss.targets == "classes":
        (logits,) = subject.model.jaxpr(shapes, images, key, subject.rows != "frozen").out_avals
        # Of every class about as many, neighbours apart.
        targets = np.arange(math.prod(labels.shape)).reshape(labels.shape) * 2 % logits.shape[-1]
    else:  # what else a loss takes (probabilities, signs) is for the data to say
        targets = np.asarray(subject.labels)[np.arange(size) % subject.labels.shape[0]]
    return variables, made, targets.astype(labels.dtype), key


def _coupling(apply: Traced, variables: Any, images: np.ndarray, labels: Any, key: Array) -> tuple[bool, bool]:
    """Whether a sample's logits move when another sample is replaced, and when another key is drawn."""
    del labels

    def logits(images: np.ndarray, key: Array) -> np.ndarray:
        found = np.asarray(apply(variables, images, True, key)[0], np.float64)
        return found.reshape(len(found), -1)

    here, moved = logits(images, key), 0.0
    for i in range(len(images)):
        others = images.copy()
        others[i] = images[(i + 1) % len(images)]
        change = np.abs(logits(others, key) - here)
        moved = np.maximum(moved, np.delete(change, i, 0).max())  # NumPy's maximum: NaN must not lose
    scale = np.maximum(np.abs(here).max(), np.finfo(np.float32).tiny)
    drawn = np.abs(logits(images, jax.random.fold_in(key, 1)) - here).max()
    # Written so that NaN counts as coupled.
    return not moved / scale <= _MOVED, not drawn / scale <= _MOVED


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
