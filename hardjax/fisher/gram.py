"""Gram matrices of per-sample gradients, three definitions and two methods.

With batch norm "the gradient of one sample" has three meanings. They differ by factors, so name the one you use:

- `"contribution"` (P3, and the published measurements): the sum of the losses is back-propagated once with batch
  statistics; row i is what batch position i adds to every parameter's gradient. Rows add up to the gradient.
- `"coupled"`: row i is d loss_i / d parameters through the batch statistics, which every sample of the batch moves.
  Rows add up to the gradient as well.
- `"frozen"`: row i is the gradient of sample i alone under the running statistics, as at test time.

Without batch norm (and other coupling between samples) all three are the same.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from hardjax import _validate
from hardjax._validate import OutOfMemory, Refusal, ran_out_of_memory
from hardjax.choose.losses import CROSS_ENTROPY, Loss, resolve
from hardjax.fisher import by_uses, check, executables, memory
from hardjax.fisher.comparison import Subject
from hardjax.fisher.names import named_leaves
from hardjax.fisher.unchecked import Rows, defined_rows, make_unchecked
from hardjax.models.apply import as_apply
from hardjax.models.modes import plain

ROWS = ("contribution", "coupled", "frozen")
METHODS = ("layers", "vmap")
_FEW = 5  # samples that a loss is tried on


def make_gram(
    model: Any,
    rows: Rows = "contribution",
    *,
    method: str = "layers",
    loss: str | Callable = CROSS_ENTROPY,
    chunk: int | None = None,
    by_parameter: bool = False,
) -> Callable[..., Any]:
    """`fn(variables, images, labels, key=None) -> (B, B)`: a pure function for use inside `jit`, `scan` or `vmap`.

    It reads the variables, changes nothing and returns no new statistics. Products run at the highest precision in
    float32 (float64 if the parameters are float64), whatever the precision of the training around it.

    For a loop over batches: `fn = jax.jit(make_gram(model))`, compiled once. A network that is not of the zoo must have
    been checked before it is traced, by one call of `gram` or `coverage` with the same rows and method; called on
    arrays, `fn` checks by itself. So must a loss of one's own.

    Args:
        model: a network of any make (a Linen, NNX or Equinox module, a Haiku transform, a pair of functions; see
            `hj.models.make_apply`), or a plain function `apply(variables, images, train, key) -> (logits, new
            statistics)` of {"params", ...}. Parameters may be used as you like: rows are read from the traced function.
        rows: "contribution", "coupled" or "frozen": see the module's docstring, they are different matrices.
        method: "layers" (one ordinary backward, use by use of the parameters) or "vmap" (the definition: a copy of the
            parameters for each sample; slow). "coupled" needs B cotangents and has the one method.
        loss: of each sample, as `TrainConfig.loss`.
        chunk: memory for the rows of at most this many samples of one parameter at a time (parameters used more than
            once, or rewritten before they are used, keep the rows of all B); for "coupled" the cotangents back-
            propagated at a time (its B x P rows are all kept). None: all B. Results differ by rounding only.
        by_parameter: return {"path/of/parameter": (B, B)}; the sum over them is the Gram matrix.

    Returns:
        `fn`, with images (B, ...) float, labels (B, ...) as the loss takes them, such as (B,) integers in the model's
        classes (a label outside gives NaN, as nothing can be raised from compiled code) and `key`, the dropout key,
        where the model draws one in training.
        It raises ValueError while tracing: fewer than 2 images, a parameter that meets samples which are mixed or out
        of order (by name), a network that nobody has checked.

    Raises:
        ValueError: an unknown word, a chunk below 1, or a chunk with method="vmap".
    """
    _check_settings(rows, method, chunk)
    loss = resolve(loss)
    checked = make_unchecked(model, loss, rows, method, chunk, by_parameter)

    def fn(variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None = None) -> Any:
        variables = plain(variables)
        _check_batch(images, labels)
        _check_outputs(model, loss, variables, images, labels, key)
        subject = Subject(model, loss, rows, method, variables, images, labels)
        check.ensure(subject, traced=_is_traced(variables, images, labels, key))
        return checked(variables, images, labels, key)

    return fn


def gram(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    loss: str | Callable = CROSS_ENTROPY,
    chunk: int | None = None,
    by_parameter: bool = False,
    key: Array | None = None,
) -> Any:
    """The (B, B) Gram matrix of per-sample gradients of a batch, G[i, j] = row_i . row_j, in squared nats or the loss's
    own unit.

    The SUM of the samples' losses is what is differentiated (P3), softmax cross-entropy unless you say so: under
    "contribution" the entries of G add up to the squared norm of B times the gradient of the mean loss.

    The rows of a network that is not of the zoo are compared with the network's own gradient at its first call, and it
    is traced anew at every call, as its code may have changed: for a loop, `jax.jit(make_gram(model))`.

    Args:
        model, rows, method, loss, chunk, by_parameter: as in `make_gram`.
        variables: {"params": ..., "batch_stats": ...}, left as they are.
        images: (B, ...) as the model takes them, B >= 2.
        labels: (B,) integer classes, or (B, ...) as the loss takes them.
        key: the dropout key, where the model draws one in training.

    Raises:
        ValueError: as in `make_gram`, a label out of range, or rows that are not those of the network's gradient.
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
    model = as_apply(model)  # how it is called is found out once
    variables, images, labels = plain(variables), jnp.asarray(images), jnp.asarray(labels)
    _check_batch(images, labels)
    loss = resolve(loss)
    _check_outputs(model, loss, variables, images, labels, key)
    traced = _is_traced(variables, images, labels, key)
    check.ensure(Subject(model, loss, rows, method, variables, images, labels), traced=traced)
    if traced:
        return make_unchecked(model, loss, rows, method, chunk, by_parameter)(variables, images, labels, key)
    return _computed(model, (loss, rows, method, chunk, by_parameter), (variables, images, labels, key))


def jacobian(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    loss: str | Callable = CROSS_ENTROPY,
    key: Array | None = None,
) -> dict[str, Array]:
    """The rows themselves: {"path/of/parameter": (B, *parameter shape)} in nats per unit of the parameter.

    All rows of all parameters at once, B times their size: for small models and for checking `gram`.

    Args, Raises: as in `gram`; pure, for use inside `jit` as well (see `make_gram`).
    """
    _check_settings(rows, method, None)
    apply, variables = as_apply(model), plain(variables)
    _check_batch(images, labels)
    loss = resolve(loss)
    _check_outputs(apply, loss, variables, images, labels, key)
    subject = Subject(apply, loss, rows, method, variables, images, labels)
    check.ensure(subject, traced=_is_traced(variables, images, labels, key))
    with jax.default_matmul_precision("highest"):
        if rows == "coupled" or method == "vmap":
            return named_leaves(defined_rows(apply, loss, rows, variables, images, labels, key))
        return by_uses.rows(by_uses.problem(apply, loss, variables, images, labels, key, rows != "frozen"))


def coverage(
    model: Any,
    variables: Mapping[str, Any],
    images: Array,
    labels: Array,
    rows: Rows = "contribution",
    method: str = "layers",
    *,
    loss: str | Callable = CROSS_ENTROPY,
    tolerance: float | None = None,
    key: Array | None = None,
) -> dict[str, float]:
    """Checks the rows against the gradient of this very model: {parameter: error relative to the whole gradient}.

    On a few made-up samples, at the given parameters moved by noise, every row is compared with its definition: the
    gradient of its own loss where samples are independent, else the gradient in a copy of the parameters, the gradient
    of the batch, and the rows of the same samples in another order. A wrong number passes in silence only where a
    second, independent mistake hides the first; neither a head that starts at zero nor an order of the samples that
    changes does. `gram` and training do this once for every network of one's own; call it before `make_gram` is
    compiled by other code.

    Args:
        rows: "contribution" (batch statistics) or "frozen" (running statistics).
        method, loss: as in `make_gram`.
        tolerance: largest error let pass; None: 1e-3, or 0.05 where the model computes in half precision.

    Raises:
        ValueError: errors above the tolerance, by parameter, and what can be done; otherwise as in `gram`.
    """
    _validate.one_of(("contribution", "frozen"), rows=rows)
    _validate.one_of(METHODS, method=method)
    if tolerance is not None:
        _validate.positive(tolerance=tolerance)
    if _is_traced(variables, images, labels, key):
        raise Refusal("Expected coverage to be called on arrays outside of jit: it computes and compares.")
    model, variables, images, labels = as_apply(model), plain(variables), jnp.asarray(images), jnp.asarray(labels)
    _check_batch(images, labels)
    loss = resolve(loss)
    _check_outputs(model, loss, variables, images, labels, key)
    return check.run(Subject(model, loss, rows, method, variables, images, labels), tolerance)


def _computed(model: Any, settings: tuple, inputs: tuple) -> Any:
    """What the compiled function gives; what went wrong on the device is said in one line."""
    _, rows, method, chunk, _ = settings
    variables, images, _, key = inputs
    fn = executables.compiled(model, settings, inputs)
    try:
        # Waited for: a device that runs out of memory says so here, where what to set can be said.
        return jax.block_until_ready(fn(*inputs))
    except jax.errors.JaxRuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        layered = method == "layers" and rows != "coupled"
        where = memory.largest(memory.plan(model, variables, images, key=key)) if layered else ""
        advice = memory.advice(rows, method, chunk, len(images))
        raise OutOfMemory(f"Out of memory for the Gram matrix of B={len(images)} images{where}: {advice}.") from error


def _is_traced(*args: Any) -> bool:
    # A constant is a tracer inside jit even where every argument is an array that the function closes over.
    return any(isinstance(leaf, Tracer) for leaf in (*jax.tree.leaves(args), jnp.zeros(())))


def _check_settings(rows: str, method: str, chunk: int | None) -> None:
    _validate.one_of(ROWS, rows=rows)
    _validate.one_of(METHODS, method=method)
    if chunk is not None:
        _validate.at_least(1, chunk=chunk)
        if method == "vmap" and rows != "coupled":
            raise Refusal(f'Expected chunk=None with method="vmap", which forms all rows at once, got {chunk}.')


def _check_batch(images: Array, labels: Array) -> None:
    if images.ndim < 2 or labels.shape[:1] != images.shape[:1]:
        raise Refusal(f"Expected images (B, ...) and labels (B, ...), got {images.shape} and {labels.shape}.")
    if len(images) < 2:
        raise Refusal(f"Expected at least 2 images, got {len(images)}: a Gram matrix of one row has no spectrum.")


def _check_outputs(
    model: Any, loss: Loss, variables: Mapping[str, Any], images: Array, labels: Array, key: Array | None
) -> None:
    """Outputs, labels and loss fit; concrete classes are among the model's."""
    apply = as_apply(model)
    logits = jax.eval_shape(lambda: apply(variables, images, False, key)[0])
    loss.check(logits, labels)
    if isinstance(labels, Tracer):
        return
    if not _is_traced(labels):
        few = min(_FEW, len(labels))
        loss.check_independent(jax.ShapeDtypeStruct((few, *logits.shape[1:]), logits.dtype), labels[:few])
    if loss.targets != "classes":
        return
    known = np.asarray(labels)  # NumPy: inside somebody's jit the least of known labels would be a tracer
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= logits.shape[-1]:
        raise Refusal(f"Expected labels in 0..{logits.shape[-1] - 1}, got {low}..{high}.")
