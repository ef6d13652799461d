"""The seam between frameworks and the rest: a network of any make as two pure functions.

The engine knows {"params", "batch_stats"} and one random key a step. What else a network of one's own may have (modes
by other names, further random streams, constants in collections of their own, boxes, named axes, extra outputs) is
understood in `adapters`, by `modes.understand`, or refused in one line.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal, shown
from hardjax.models import traces
from hardjax.models.adapters import functions
from hardjax.models.adapters.base import OTHERS, Apply
from hardjax.models.adapters.linen import is_ours
from hardjax.models.modes import Take, refusing

__all__ = [
    "OTHERS",
    "Apply",
    "Logits",
    "Seeded",
    "adapted",
    "as_apply",
    "init_variables",
    "is_ours",
    "make_apply",
    "restore",
    "samples_are_independent",
]

# Tried in turn; the modules of frameworks are imported when one of their objects is met.
_ADAPTERS = {"linen": "flax.linen", "nnx": "flax.nnx", "equinox": "equinox", "haiku": "haiku"}


@dataclass(frozen=True, eq=False)
class Seeded:
    """A network that holds its weights (NNX, Equinox), made from the key of a run: another seed, other weights.

    Attributes:
        make: (key) -> the network; pure, it is traced.
        name: for titles.

    Example: `hj.models.Seeded(lambda key: Net(rngs=nnx.Rngs(key)))`.
    """

    make: Callable[[Array], Any]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Logits:
    """A network that returns more than logits, and which of its outputs they are; the others are left out.

    Attributes:
        model: of any make, or a `Seeded`.
        take: place in a tuple, name in a mapping or of an attribute, or a function of what the network returns that
            gives logits (B, classes). Where the network returns an array alone (in evaluation, say), that is taken for
            the logits of a place or name.

    Raises:
        ValueError: a `take` that is none of these.

    Example: `hj.models.Logits(Net(), take="logits")`.
    """

    model: Any
    take: Take

    def __post_init__(self) -> None:
        if isinstance(self.take, bool) or not (isinstance(self.take, int | str) or callable(self.take)):
            raise Refusal(f"Expected take={shown(self.take)} to be a place, a name, or a function of the outputs.")


def make_apply(model: Any, what: str = "the model") -> Apply:
    """`apply(variables, images, train, key=None) -> (logits, batch_stats)`, pure; its `init` is `init_variables`.

    In training the statistics are the updated ones, in evaluation those given. `key` feeds whatever the network draws
    from. The mode may be an argument or a field by any of the usual names (see `modes`).

    Args:
        model: a Linen, NNX or Equinox module (or Equinox's pair of module and state), a Haiku transform, a pair of
            functions (init, apply), a `Seeded` of one that holds its weights, a `Logits` of one that returns more.
        what: it is called in a refusal.

    Raises:
        ValueError: none of these; while tracing, a network whose mode is not understood, that returns several outputs,
            or that draws random numbers in training where no key is given.
    """
    found = adapted(model)
    if found is None:
        raise Refusal(f"Expected a network as {what} ({_MAKES}), got {_described(model)}")
    return found


_MAKES = "a Linen, NNX or Equinox module, a Haiku transform, or a pair of functions (init, apply)"


def as_apply(model: Any) -> Callable[..., tuple[Array, Any]]:
    """(variables, images, train, key) -> (logits, new statistics): of a network, or `model` itself if it is such a
    function.

    Raises:
        ValueError: as `make_apply`.
    """
    found = adapted(model)
    is_function = callable(model) and not isinstance(model, type | functools.partial)
    return found or (model if is_function else make_apply(model))


def init_variables(model: Any, key: Array, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """{"params", "batch_stats"} in float32 for images of shape (H, W, C); pure. Of a network that holds its weights,
    those.

    Raises:
        ValueError: no network, or one that cannot be made for such images, or whose mode is not understood.
    """
    return make_apply(model).init(key, image_shape)


def restore(model: Any, variables: Mapping[str, Any]) -> Any:
    """The NNX or Equinox network itself (of the latter with state: the pair) with these variables, such as
    `result.state.variables`.

    Raises:
        ValueError: another network, which holds no weights.
    """
    return make_apply(model).restore(variables)


def samples_are_independent(apply: Callable, variables: Any, image_shape: tuple[int, int, int]) -> bool:
    """Whether each sample's logits in training depend on that sample alone: no batch statistics, nothing drawn.

    Args:
        apply: as `make_apply` returns.
        variables: arrays or their shapes.
        image_shape: (H, W, C).
    """
    stats = {name: value for name, value in dict(variables["batch_stats"]).items() if name != OTHERS}
    if jax.tree.leaves(stats):
        return False
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    traced = jax.make_jaxpr(lambda key, variables, images: apply(variables, images, True, key)[0])(
        jax.eval_shape(lambda: jax.random.key(0)), variables, images
    ).jaxpr
    # Making the streams' keys uses the key; what counts is whether the logits depend on it.
    return not traces.depends(traced, 0, {0})


def adapted(model: Any) -> Apply | None:
    """The network in the hands of its framework's adapter; None where it is of none."""
    if isinstance(model, Apply):
        return model
    if isinstance(model, Logits):
        found = adapted(model.model)
        return None if found is None else found.taking(model.take)
    if not isinstance(model, Seeded):
        return _of_framework(model, None, "")
    if not callable(model.make):
        raise Refusal(f"Expected make={shown(model.make)} to be a function of a key that makes a network.")
    name, made = model.name or getattr(model.make, "__name__", "Seeded"), []
    with refusing(name, "cannot be made"):
        # Its arrays are tracers: it is good for nothing but its kind.
        jax.eval_shape(lambda key: made.append(model.make(key)), jax.eval_shape(lambda: jax.random.key(0)))
    if isinstance(made[0], Logits):
        return adapted(Logits(Seeded(lambda key: model.make(key).model, model.name), made[0].take))
    found = _of_framework(made[0], model.make, model.name)
    if found is None:
        raise Refusal(f"Expected {name} to make a network ({_MAKES}), got {_described(made[0])}")
    return found


def _of_framework(model: Any, make: Callable[[Array], Any] | None, name: str) -> Apply | None:
    is_pair = type(model) is tuple and len(model) == 2  # Haiku's transforms are tuples of a class of their own
    first = model[0] if is_pair else model
    kind = first if isinstance(first, type) else type(first)
    found = None
    for adapter, home in _ADAPTERS.items():
        # By name: a framework that is not installed, or that nobody uses, is not imported.
        if any(f"{cls.__module__}.".startswith(f"{home}.") for cls in kind.__mro__):
            if kind is not first:
                with refusing(name or kind.__name__, "cannot be read"):
                    found = importlib.import_module(f"hardjax.models.adapters.{adapter}").adapt(model, make, name)
            break
    else:
        found = functions.adapt(model) if is_pair else None
    if found is not None and make is not None and not found.holds_weights:
        raise Refusal(f"{found.name} draws its weights by the seed as it is: make it without a key.")
    return found


def _described(model: Any) -> str:
    """What was given instead of a network, and what to do with it."""
    if isinstance(model, Logits):
        return _described(model.model)
    if isinstance(model, type):
        return f"the class {model.__name__}: call it, {model.__name__}(...)."
    if isinstance(model, functools.partial):
        return f"a partial of {getattr(model.func, '__name__', shown(model.func))}: call it."
    if inspect.isroutine(model):
        return f"the function {model.__name__}: hk.transform it, or give the pair (init, apply)."
    return f"{shown(model)}."
