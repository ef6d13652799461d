"""The loss of one sample: what batches and samples are ranked by, what is trained, what spectra are taken of."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from hardjax import _by_name, _validate
from hardjax._validate import Refusal, first_line, shown

CROSS_ENTROPY = "softmax_cross_entropy_with_integer_labels"
# By what their targets are: integer classes, an output each along the last axis ...
_OF_CLASSES = (CROSS_ENTROPY, "multiclass_hinge_loss", "multiclass_perceptron_loss", "multiclass_sparsemax_loss")
# ... or numbers, shaped like the outputs.
_OF_VALUES = (
    "squared_error",
    "l2_loss",
    "huber_loss",
    "log_cosh",
    "cosine_distance",
    "softmax_cross_entropy",
    "safe_softmax_cross_entropy",
    "poly_loss_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "hinge_loss",
    "perceptron_loss",
    "sparsemax_loss",
)
NAMES = _OF_CLASSES + _OF_VALUES
# Of these any other label trains in silence, to nonsense.
_SIGNS, _SHARES = ("hinge_loss", "perceptron_loss"), ("softmax_cross_entropy", "safe_softmax_cross_entropy")
_SHARES += ("poly_loss_cross_entropy", "sigmoid_binary_cross_entropy", "sigmoid_focal_loss")
_ROUNDING = 1e-3  # of losses computed alone and in a batch, relative to the largest


@dataclass(frozen=True, eq=False)
class Loss:
    """`loss(outputs (B, ...), targets (B, ...)) -> (B,)` in at least float32; equal to itself alone.

    Attributes:
        name: as in `TrainConfig.loss`.
        fn: (outputs, targets) -> (B,), or (B, ...) of optax's, whose mean over a sample (its pixels, its coordinates)
            is the sample's loss.
        targets: "classes" (integers, an output each along the last axis), "values" (floats shaped like the outputs) or
            "any" (of one's own: whatever it takes).
    """

    name: str
    fn: Callable[[Array, Array], Array]
    targets: str

    def __call__(self, outputs: Array, targets: Array) -> Array:
        # bfloat16 keeps 8 bits: losses would tie, and ties decide which batch is replayed.
        found = self.fn(outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)), targets)
        if self.targets == "any" or found.ndim == 1:
            return found
        return found.reshape(len(found), -1).mean(-1)

    def correct(self, outputs: Array, targets: Array, losses: Array) -> Array | None:
        """(B,) whether the largest output is that of the sample's class, or at which share of its positions (pixels);
        None where targets are no classes of the outputs."""
        if not self.counts(outputs, targets):
            return None
        right = outputs.argmax(-1) == targets
        if right.ndim == 1:
            # NaN is the largest of outputs: the first one would be the class predicted.
            return right & ~jnp.isnan(losses)
        return jnp.where(jnp.isnan(losses), 0, right.reshape(len(right), -1).mean(-1))

    def counts(self, outputs: Any, targets: Any) -> bool:
        """Whether predictions are right or wrong; of arrays or their shapes."""
        # Of a single output the largest is always the first.
        several = outputs.ndim > targets.ndim and outputs.shape[-1] > 1
        return several and jnp.issubdtype(targets.dtype, jnp.integer) and outputs.shape[:-1] == targets.shape

    def check(self, outputs: Any, targets: Any, classes: int = 0) -> None:
        """Whether a network's outputs fit the targets; of arrays or their shapes, nothing is computed.

        Args:
            classes: outputs that integer targets need at least.

        Raises:
            ValueError: they do not.
        """
        kind = jnp.integer if self.targets == "classes" else jnp.floating
        if self.targets != "any" and not jnp.issubdtype(targets.dtype, kind):
            wanted = "integer classes" if self.targets == "classes" else "floats shaped like the model's outputs"
            others = _OF_VALUES if self.targets == "classes" else _OF_CLASSES
            raise Refusal(
                f"Expected {wanted} as labels with loss={self.name}, got {targets.dtype}; losses of these:"
                f" {', '.join(others)}."
            )
        fits = outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape
        if self.targets == "classes" and not (fits and outputs.shape[-1] >= classes):
            wanted = ", ".join(str(size) for size in (*targets.shape, classes or "classes"))
            raise Refusal(f"Expected logits of shape ({wanted}) from the model; it gives {outputs.shape}.")
        # Broadcast, (B, 1) outputs and (B,) targets would make (B, B) numbers.
        if self.targets == "values" and outputs.shape != targets.shape:
            raise Refusal(f"Expected outputs of the labels' shape {targets.shape}; the model gives {outputs.shape}.")
        try:
            found = jax.eval_shape(self, outputs, targets)
        except Exception as error:  # somebody else's code
            raise self._failing(outputs, targets, error) from error
        if getattr(found, "shape", None) != outputs.shape[:1] or not jnp.issubdtype(found.dtype, jnp.floating):
            given = ", ".join(f"{leaf.dtype} of shape {leaf.shape}" for leaf in jax.tree.leaves(found)) or "nothing"
            raise Refusal(
                f"Expected loss={self.name} to give ({outputs.shape[0]},) floats, one a sample, for outputs"
                f" {outputs.shape} and labels {targets.shape}; it gives {given}."
            )

    def _failing(self, outputs: Any, targets: Any, error: Exception) -> Refusal:
        return Refusal(
            f"loss={self.name} fails on outputs {outputs.shape} and labels {targets.shape}:"
            f" {type(error).__name__}: {first_line(error)}"
        )

    def check_labels(self, targets: Array) -> None:
        """That the labels of a data set are what the loss means.

        Args:
            targets: (n, ...), all of them.

        Raises:
            ValueError: others than -1 and 1, or outside 0..1.
        """
        if self.name in _SIGNS and not bool((jnp.abs(targets) == 1).all()):
            raise Refusal(f"Expected labels -1 and 1 with loss={self.name}, got {_range(targets)}.")
        if self.name in _SHARES and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise Refusal(f"Expected labels in 0..1 with loss={self.name}, got {_range(targets)}.")

    def check_independent(self, outputs: Any, targets: Array) -> None:
        """That a sample's loss is its own: one that mixes samples has no gradient of a sample, and ranks none.

        Args:
            outputs: shape and type of a network's outputs for some samples.
            targets: (k, ...), of the data.

        Raises:
            ValueError: a sample's loss depends on the others of its batch.
        """
        if self.targets != "any":
            return
        # Each of them twice: a loss may look at which labels are equal.
        targets = jnp.concatenate([jnp.asarray(targets)] * 2)
        shape = (len(targets), *outputs.shape[1:])
        made = np.random.default_rng(0).standard_normal(shape).astype(outputs.dtype)

        @jax.jit
        def both(outputs: Array, targets: Array) -> tuple[Array, Array]:
            alone = lax.map(lambda one: self(one[0][None], one[1][None])[0], (outputs, targets))
            return self(outputs, targets), alone

        try:
            together, alone = (np.asarray(found, np.float64) for found in both(made, targets))
        except Exception as error:  # somebody else's code
            raise self._failing(made, targets, error) from error
        apart = np.abs(together - alone)[np.isfinite(alone)]
        # Written so that NaN counts as apart.
        if not apart.max(initial=0) <= _ROUNDING * np.abs(alone[np.isfinite(alone)]).max(initial=1e-6):
            raise Refusal(
                f"Expected loss={self.name} to give each sample a loss of its own; it changes with the others of its"
                f" batch, by {apart.max():.2g}."
            )


def resolve(loss: str | Callable) -> Loss:
    """The loss that `TrainConfig.loss` stands for; of optax's the same one whenever asked.

    Raises:
        ValueError: an unknown name (the closest one is offered), no function of that name, or its code fails.
    """
    if isinstance(loss, Loss):
        return loss
    check(loss)
    name = name_of(loss)
    if name in NAMES:
        return _of_optax(name)
    if not isinstance(loss, str):
        return Loss(name, loss, "any")
    found = _by_name.find(loss, "loss")
    check(found)
    return Loss(loss, found, "any")


def check(loss: Any) -> None:
    """What can be said of a loss before anybody's code is run.

    Raises:
        ValueError: an unknown name, or no function.
    """
    if isinstance(loss, str) and not _by_name.is_own(loss):
        _validate.one_of(NAMES, loss=loss)
    elif not isinstance(loss, str) and (isinstance(loss, type) or not callable(loss)):
        raise Refusal(f"Expected loss={shown(loss)} to be a function of (outputs, labels) or a name.")


def name_of(loss: str | Callable) -> str:
    """How a loss is recorded: by its name; of a function its module and name where these find it again, and else a text
    that nothing is found by."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, Loss):
        return loss.name
    name = getattr(loss, "__qualname__", type(loss).__name__)
    if name in NAMES and getattr(optax.losses, name) is loss:
        return name
    module = getattr(loss, "__module__", type(loss).__module__)
    found = functools.reduce(
        lambda owner, part: getattr(owner, part, None), name.split("."), sys.modules.get(str(module))
    )
    # Wrapped (a partial, `jax.vmap`) or made inside a function, the name would find another loss.
    return f"{module}:{name}" if found is loss else f"{module}:{name} (not found by this name)"


@functools.cache
def _of_optax(name: str) -> Loss:
    fn = getattr(optax.losses, name)
    if name in _OF_CLASSES and name != CROSS_ENTROPY:
        # Some of these take one axis of positions alone.
        fn = _by_position(fn)
    return Loss(name, fn, "classes" if name in _OF_CLASSES else "values")


def _range(targets: Array) -> str:
    return f"values from {float(targets.min()):g} to {float(targets.max()):g}"


def _by_position(fn: Callable) -> Callable[[Array, Array], Array]:
    def over_positions(outputs: Array, targets: Array) -> Array:
        return fn(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)).reshape(targets.shape)

    return over_positions
