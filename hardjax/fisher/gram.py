"""Gram matrices of per-sample gradients, three definitions and two methods.

With batch norm "the gradient of one sample" has three meanings. They differ by factors, so name the one you use:

- `"contribution"` (P3, and the published measurements): the sum of the losses is back-propagated once with batch
  statistics; row i is what batch position i adds to every parameter's gradient. Rows add up to the gradient.
- `"coupled"`: row i is d loss_i / d parameters through the batch statistics, which every sample of the batch moves.
  Rows add up to the gradient as well.
- `"frozen"`: row i is the gradient of sample i alone under the running statistics, as at test time.

Without batch norm (and other coupling between samples) all three are the same.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hardjax import _validate
from hardjax._validate import OutOfMemory, Refusal
from hardjax.fisher import by_layers, capture, definition

Rows = Literal["contribution", "coupled", "frozen"]
ROWS = ("contribution", "coupled", "frozen")
METHODS = ("layers", "vmap")


class LayerPlan(NamedTuple):
    """How one layer's share is formed.

    Attributes:
        name: path of the layer.
        form: "rows" (rows, then their products) or "pairs" (products over pairs of positions, no rows).
        calls: times the layer is called in one forward pass.
        row_bytes: memory of the rows of all B samples.
        flops: floating-point operations.
    """

    name: str
    form: str
    calls: int
    row_bytes: int
    flops: int


def make_gram(
    model: Any,
    rows: Rows = "contribution",
    *,
    method: str = "layers",
    chunk: int | None = None,
    by_parameter: bool = False,
) -> Callable[..., Any]:
    """`fn(variables, images, labels, key=None) -> (B, B)`: a pure function for use inside `jit`, `scan` or `vmap`.

    It reads the variables, changes nothing and returns no new statistics. Products run at the highest precision in
    float32 (float64 if the parameters are float64), whatever the precision of the training around it.

    Args:
        model: a Linen module (with an argument `train`, `training` or `deterministic`, or none), or the engine's
            `apply(variables, images, train, key) -> (logits, new batch_stats)` around one.
        rows: "contribution", "coupled" or "frozen": see the module's docstring, they are different matrices.
        method: "layers" (one ordinary backward, layer by layer) or "vmap" (the definition; slow; takes parameters of
            any layer, and gives NaN where samples are coupled by more than batch norm, or by dropout).
            "coupled" needs B cotangents and has the one method.
        chunk: memory for the rows of at most this many samples of one layer at a time (layers called more than once
            keep the rows of all B); for "coupled" the cotangents back-propagated at a time (its B x P rows are all
            kept). None: all B. Results differ by rounding only.
        by_parameter: return {"path/of/parameter": (B, B)}; the sum over them is the Gram matrix.

    Returns:
        `fn`, with images (B, ...) float, labels (B,) integers in the model's classes (a label outside gives NaN, as
        nothing can be raised from compiled code) and `key`, the dropout key, where the model draws one in training.
        It raises ValueError while tracing: fewer than 2 images, a parameter that no rule covers (by name). A layer
        that a transformation hides (nn.jit, nn.vmap) makes the result NaN; `gram` and `coverage` name it.

    Raises:
        ValueError: an unknown word, a chunk below 1, or a chunk with method="vmap".
    """
    _check_settings(rows, method, chunk)

    def fn(variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None) -> Any:
        _check_batch(images, labels)
        # Kept apart from the training step around it, so that compiling the two together leaves the step's own
        # arithmetic as it was.
        variables, images, labels = lax.optimization_barrier((dict(variables), images, labels))
        with jax.default_matmul_precision("highest"):
            forward = capture.forward_of(model, key)
            if rows == "coupled" or method == "vmap":
                grams = definition.products(_defined_rows(forward, rows, variables, images, labels, chunk))
                return grams if by_parameter else sum(grams.values())
            problem = _find(forward, rows, variables, images, labels)
            return by_layers.grams(problem, chunk) if by_parameter else by_layers.gram(problem, chunk)

    return fn


def gram(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    chunk: int | None = None,
    by_parameter: bool = False,
    key: Array | None = None,
) -> Any:
    """The (B, B) Gram matrix of per-sample gradients of a batch, G[i, j] = row_i . row_j, in squared nats.

    Losses are softmax cross-entropy with integer labels, and their SUM is what is differentiated (P3): under
    "contribution" the entries of G add up to the squared norm of B times the gradient of the mean loss.

    Args:
        model, rows, method, chunk, by_parameter: as in `make_gram`.
        variables: {"params": ..., "batch_stats": ...}, left as they are.
        images: (B, ...) as the model takes them, B >= 2.
        labels: (B,) integers.
        key: the dropout key, where the model draws one in training.

    Raises:
        ValueError: as in `make_gram`, or a label out of range.
        OutOfMemory: (a ValueError and a MemoryError) the device ran out of memory; the line says what to set.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train: bool):
        ...         x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        ...         return nn.Dense(3)(nn.relu(x).mean((1, 2)))
        >>> images, labels = jnp.ones((5, 8, 8, 1)), jnp.arange(5) % 3
        >>> variables = Net().init(jax.random.key(0), images, train=False)
        >>> gram(Net(), variables, images, labels).shape
        (5, 5)
    """
    _check_settings(rows, method, chunk)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    _check_batch(images, labels)
    _check_labels(model, variables, images, labels, key)
    fn = _compiled(model, rows, method, chunk, by_parameter)
    try:
        found = jax.block_until_ready(fn(variables, images, labels, key))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        layered = method == "layers" and rows != "coupled"
        largest = _largest(plan(model, variables, images, key=key)) if layered else ""
        advice = memory_advice(rows, method, chunk, len(images))
        raise OutOfMemory(f"Out of memory for the Gram matrix of B={len(images)} images{largest}: {advice}.") from error
    if not isinstance(images, jax.core.Tracer) and not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
        _explain_nan(model, variables, images, labels, rows, method, key)
    return found


def memory_advice(rows: str, method: str, chunk: int | None, batch: int) -> str:
    """What to set when the memory is not enough."""
    smaller = max(1, (chunk or batch) // 4)
    if method == "vmap" and rows != "coupled":
        return 'method="vmap" holds all rows at once; take method="layers" or a smaller batch'
    if chunk == 1:
        return f"chunk=1 is the least; measure a smaller batch than {batch}"
    return f"set chunk={smaller} (Performance.gram_chunk, --gram-chunk) or measure a smaller batch"


def jacobian(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    key: Array | None = None,
) -> dict[str, Array]:
    """The rows themselves: {"path/of/parameter": (B, *parameter shape)} in nats per unit of the parameter.

    All rows of all layers at once, B times the parameters: for small models and for checking `gram`.

    Args, Raises: as in `gram`; pure, for use inside `jit` as well.
    """
    _check_settings(rows, method, None)
    _check_batch(images, labels)
    with jax.default_matmul_precision("highest"):
        forward = capture.forward_of(model, key)
        if rows == "coupled" or method == "vmap":
            tree = _defined_rows(forward, rows, variables, images, labels, None)
            return capture.named_leaves(tree)
        return by_layers.rows(_find(forward, rows, variables, images, labels))


def coverage(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    tolerance: float = 1e-4,
    key: Array | None = None,
) -> dict[str, float]:
    """Checks the rows against the ordinary gradient of this very model: {parameter: relative error}.

    For every parameter the rows are added up and compared with the gradient of the summed losses, and the entries of
    its Gram matrix with the gradient's squared norm; errors are relative to the largest that the sums could be. A
    layer whose parameters are used behind its back (tied to another layer, rewritten, mapped over) shows here. Training
    that measures a module of one's own runs this once.

    Args:
        rows: "contribution" (batch statistics) or "frozen" (running statistics).
        method: as in `make_gram`.
        tolerance: largest error let pass; 1e-4 leaves a wide margin for float32, bfloat16 models need about 0.05.

    Raises:
        ValueError: errors above the tolerance, by parameter; otherwise as in `gram`.
    """
    _validate.one_of(("contribution", "frozen"), rows=rows)
    _validate.one_of(METHODS, method=method)
    _validate.positive(tolerance=tolerance)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    _check_batch(images, labels)
    _check_labels(model, variables, images, labels, key)

    @jax.jit
    def compare(variables: Mapping[str, Any], images: Array, labels: Array) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):
            forward = capture.forward_of(model, key)
            if method == "layers":
                problem = _find(forward, rows, variables, images, labels)
                sums, grams = by_layers.row_sums(problem), by_layers.grams(problem, None)
            else:
                tree = _defined_rows(forward, rows, variables, images, labels, None)
                sums = {name: leaf.sum(0) for name, leaf in capture.named_leaves(tree).items()}
                grams = definition.products(tree)

            def summed(params: Any) -> Array:
                logits = forward({**variables, "params": params}, images, rows == "contribution")
                return definition.losses(logits, labels).sum()

            grads = capture.named_leaves(jax.grad(summed)(variables["params"]))
            return {name: _disagreement(sums[name], grams[name], grads[name]) for name in grads}

    errors = {name: float(error) for name, error in compare(variables, images, labels).items()}
    wrong = [f"{name} ({error:.1e})" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        raise Refusal(f"Rows do not add up to the gradient within {tolerance:g}: {', '.join(wrong)}.")
    return errors


def plan(
    model: Any, variables: Mapping[str, Any], images: Array, rows: Rows = "contribution", *, key: Array | None = None
) -> list[LayerPlan]:
    """How `method="layers"` will form each layer's share, in the order of the forward pass; nothing is computed.

    Raises:
        ValueError: as in `gram`.
    """
    _validate.one_of(("contribution", "frozen"), rows=rows)
    labels = jnp.zeros(len(images), jnp.int32)
    problem = _find(capture.forward_of(model, key), rows, variables, images, labels)
    calls = Counter(layer.name for layer in problem.layers)
    plans = {}
    for layer in problem.layers:
        cost = layer.rule.cost(layer.input_shape, layer.output_shape)
        form = cost.form if calls[layer.name] == 1 else "rows"
        row_bytes = cost.row_size * len(images) * problem.dtype.itemsize
        plans[layer.name] = LayerPlan(layer.name, form, calls[layer.name], row_bytes, cost.flops)
    return list(plans.values())


def _find(forward: definition.Forward, rows: str, variables: Mapping[str, Any], images: Array, labels: Array) -> Any:
    return by_layers.problem(forward, variables, images, labels, train=rows == "contribution")


def _defined_rows(
    forward: definition.Forward,
    rows: str,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    chunk: int | None,
) -> Any:
    if rows == "coupled":
        return definition.coupled_rows(forward, variables, images, labels, chunk)
    fn = definition.contribution_rows if rows == "contribution" else definition.frozen_rows
    return fn(forward, variables, images, labels)


def _explain_nan(
    model: Any, variables: Mapping[str, Any], images: Array, labels: Array, rows: str, method: str, key: Array | None
) -> None:
    """Raises ValueError where a Gram matrix is not finite though the losses are: the rows would have been wrong."""
    forward = capture.forward_of(model, key)
    if not jnp.isfinite(definition.losses(forward(variables, images, rows != "frozen"), labels)).all():
        return
    if method == "layers" and rows != "coupled":
        found = by_layers.missed(_find(forward, rows, variables, images, labels))
        if layers := [name for name, wrong in found.items() if wrong]:
            raise Refusal(
                f"Layer {', '.join(layers)} is hidden by nn.jit or mapped by nn.vmap, which is not covered:"
                ' method="vmap" takes it.'
            )
    if method == "vmap" and rows == "contribution":
        raise Refusal(
            'method="vmap" gives every sample its own copy of the parameters; in this model samples are coupled by more'
            ' than batch norm, or share a dropout mask. Take method="layers", or rows="coupled".'
        )


def _disagreement(row_sum: Array, gram: Array, grad: Array) -> Array:
    """Of the rows' sum and of the Gram's entry sum with the gradient, relative to the largest possible values."""
    largest = jnp.sqrt(len(gram) * jnp.trace(gram))
    norm = jnp.sqrt(jnp.sum(grad**2))
    of_rows = jnp.sqrt(jnp.sum((row_sum - grad) ** 2)) / largest
    of_gram = jnp.abs(gram.sum() - norm**2) / largest**2
    return jnp.where((largest == 0) & (norm == 0), 0.0, jnp.maximum(of_rows, of_gram))


@functools.lru_cache(maxsize=32)
def _compiled_cached(model: Any, settings: tuple) -> Callable[..., Any]:
    rows, method, chunk, by_parameter = settings
    return jax.jit(make_gram(model, rows, method=method, chunk=chunk, by_parameter=by_parameter))


def _compiled(model: Any, *settings: Any) -> Callable[..., Any]:
    try:
        hash(model)
    except TypeError:  # a module with a list or dict among its fields compiles anew at every call
        return _compiled_cached.__wrapped__(model, settings)
    return _compiled_cached(model, settings)


def _check_settings(rows: str, method: str, chunk: int | None) -> None:
    _validate.one_of(ROWS, rows=rows)
    _validate.one_of(METHODS, method=method)
    if chunk is not None:
        _validate.at_least(1, chunk=chunk)
        if method == "vmap" and rows != "coupled":
            raise Refusal(f'Expected chunk=None with method="vmap", which forms all rows at once, got {chunk}.')


def _check_batch(images: Array, labels: Array) -> None:
    if images.ndim < 2 or labels.shape != images.shape[:1]:
        raise Refusal(f"Expected images (B, ...) and labels (B,), got {images.shape} and {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise Refusal(f"Expected integer labels, got {labels.dtype}.")
    if len(images) < 2:
        raise Refusal(f"Expected at least 2 images, got {len(images)}: a Gram matrix of one row has no spectrum.")


def _check_labels(model: Any, variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None) -> None:
    """Concrete labels must lie in the model's classes."""
    logits = jax.eval_shape(lambda: capture.forward_of(model, key)(variables, images, False))
    if logits.ndim != 2 or logits.shape[0] != len(images):
        raise Refusal(f"Expected logits of shape ({len(images)}, classes), got {logits.shape}.")
    if isinstance(labels, jax.core.Tracer):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise Refusal(f"Expected labels in 0..{logits.shape[1] - 1}, got {low}..{high}.")


def _largest(layers: list[LayerPlan]) -> str:
    layer = max(layers, key=lambda layer: layer.row_bytes)
    return f" (largest layer {layer.name}: {layer.row_bytes / 2**20:.0f} MiB of rows)"
