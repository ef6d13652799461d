"""What is common to the networks of all frameworks: collections packed for the engine, the mode found out once."""

import contextlib
import copy
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal, shown
from hardjax.models import modes
from hardjax.models.modes import Manner, Take, plain

# Constants of a network live among its statistics: both are carried from step to step and saved, neither is trained.
OTHERS = "(other collections)"
# What Flax keeps for looking on; it has the shape of one batch's activations.
TRANSIENT = ("intermediates", "perturbations")
# Images that a network is made from. Two (batch norm in training refuses, or warns of, a single value); more for one
# that cuts its batches into parts, of any usual size.
_COUNTS = (2, 64, 2**7 * 3**2 * 5)


class Apply(ABC):
    """A network as two pure functions: `init` and the object itself. An adapter says how it is made and called.

    `apply(variables, images, train, key=None) -> (logits, batch_stats)`: in training the statistics are the updated
    ones, in evaluation those given. `key` feeds whatever the network draws from. It remembers how its network wants to
    be called, by the shape of images and variables: make a new one when the network's code may have changed, one a run.

    Attributes:
        module: the network as it was given.
        name: for titles and refusals.
        holds_weights: it has weights of its own, which `init` gives, or it is made anew from the key.
        starts_alike: its first weights are the same whatever the key, since the network came with them.
        take: the choice among several outputs, or None.
        called: how a refusal says that it cannot be called.
        awake: what the framework raises where evaluation draws or moves statistics.
    """

    holds_weights: ClassVar[bool] = False
    starts_alike: bool = False
    called: ClassVar[str] = "cannot be called"
    awake: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.take: Take | None = None
        self._manners: dict[Any, Manner] = {}

    @abstractmethod
    def candidates(self) -> tuple[list[Manner], list[Manner]]:
        """Ways of calling by the usual names of a mode, and, where there are none, by any other switch."""

    @abstractmethod
    def make(self, manner: Manner, train: bool, key: Array, images: Array) -> dict[str, Any]:
        """First variables: {"params", "batch_stats", other collections}, nested dicts of arrays by strings."""

    @abstractmethod
    def call(
        self, manner: Manner, train: bool, variables: Mapping[str, Any], images: Array, key: Array | None, watched: bool
    ) -> tuple[Any, dict[str, Any]]:
        """(what the network returns, collections after the pass); `watched`: all that may have changed, in a trial."""

    def restore(self, variables: Mapping[str, Any]) -> Any:
        """The framework's own object with these variables."""
        raise Refusal(f"Expected a network that holds its weights (NNX or Equinox), got {self.name}: pass variables.")

    def init(self, key: Array, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """{"params", "batch_stats"} in float32 for images of shape (H, W, C); pure.

        Raises:
            ValueError: it cannot be made for such images, or its mode is not understood.
        """
        refusals: list[Refusal] = []
        for count in _COUNTS:
            try:
                return self.first(key, jnp.zeros((count, *image_shape), jnp.float32))
            except modes.Unmoved:
                raise
            except Refusal as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def first(self, key: Array, images: Array) -> dict[str, Any]:
        """`init` for images (B, H, W, C)."""
        manner = modes.understand(self, None, images)
        with modes.refusing(self.name, "cannot be made"):
            return self.packed(self.make(manner, True, key, images))

    def __call__(
        self, variables: Mapping[str, Any], images: Array, train: bool, key: Array | None = None
    ) -> tuple[Array, Any]:
        manner, full = self.prepare(variables, images), unpacked(variables)
        if train and key is None and manner.draws:
            raise Refusal(f"{self.name} draws random numbers in training: pass key=.")
        with modes.refusing(self.name, "cannot be applied"):
            out, changed = self.call(manner, train, full, images, key, watched=False)
        logits, stats = modes.logits_of(self.name, out, len(images), self.take), variables.get("batch_stats", {})
        if not train:
            return logits, stats
        # A scan's carry keeps its types; a trial has compared the shapes.
        changed = jax.tree.map(
            lambda new, old: new.astype(old.dtype), changed.get("batch_stats", {}), full.get("batch_stats", {})
        )
        others = stats.get(OTHERS)
        return logits, {**changed, OTHERS: others} if others else changed

    def packed(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """First variables as the engine takes them: constants among the statistics, parameters in at least float32.

        Raises:
            ValueError: a parameter that cannot be differentiated.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise Refusal(f"Expected floating-point parameters from {self.name}, got {leaf.dtype} at {name}.")
        taken = ("params", "batch_stats", *TRANSIENT)
        others = {name: value for name, value in variables.items() if name not in taken and value}
        stats = variables.get("batch_stats", {})
        # Small steps would be lost in the eight bits of a bfloat16.
        params = jax.tree.map(
            lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), variables.get("params", {})
        )
        return {"params": params, "batch_stats": {**stats, OTHERS: others} if others else stats}

    def taking(self, take: Take) -> "Apply":
        """The same network with a choice among its outputs.

        Raises:
            ValueError: it has one already.
        """
        if self.take is not None:
            raise Refusal(f"Expected one hj.models.Logits around {self.name}, got two: take= may be a function.")
        other = copy.copy(self)
        other.take, other._manners = take, {}
        return other

    def prepare(self, variables: Mapping[str, Any], images: Array) -> Manner:
        """How the network is called: found out once for these shapes, before anybody watches its layers."""
        full = unpacked(variables)
        shapes = tuple((jax.tree_util.keystr(p), v.shape) for p, v in jax.tree_util.tree_leaves_with_path(full))
        at = (images.shape[1:], shapes)
        if at not in self._manners:
            self._manners[at] = modes.understand(self, full, images)
        return self._manners[at]

    def missing(self, error: BaseException | None, manner: Manner) -> Manner | None:
        """The manner with the named axis whose absence was the error."""
        axis = re.search(r"unbound axis name: ([^\s.]+)", str(error)) if isinstance(error, NameError) else None
        if axis and axis[1] not in manner.axes:
            return dataclasses.replace(manner, axes=(*manner.axes, axis[1]))
        return None

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[Any]]:
        """The rates of the dropout layers that are called inside, where a framework lets them be seen."""
        yield []

    def expected(self, manner: Manner) -> str:
        used = [n for n, _ in (*manner.arguments, *manner.fields)]
        tried = f"tried with {', '.join(used)}; " if used else ""
        return f"{tried}expected {self.advice}; statistics that shall stay fixed belong in a collection of constants."

    advice: ClassVar[str] = "an argument such as `train` that switches all its layers"


def unpacked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """As frameworks take them: no empty statistics, constants in their own collections.

    Raises:
        ValueError: no parameters among them.
    """
    full = {name: value for name, value in plain(variables).items() if name not in TRANSIENT}
    if "params" not in full:
        raise Refusal(f'Expected variables {{"params": ..., "batch_stats": ...}}, got {shown(sorted(full))}.')
    stats = dict(full.pop("batch_stats", {}))
    others = stats.pop(OTHERS, {})
    return {**full, **others, **({"batch_stats": stats} if stats else {})}


def nested(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested dicts of what lies at these paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What lies at a path of nested dicts.

    Raises:
        ValueError: nothing lies there.
    """
    found: Any = tree
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            raise Refusal(f"Expected {'/'.join(path)} among the variables: hj.models.init_variables gives them all.")
        found = found[name]
    return found
