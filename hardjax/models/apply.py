"""The seam between Flax and the rest: a module as two pure functions, `init_variables` and `make_apply`.

The engine knows {"params", "batch_stats"} and one random key a step. What else a network of one's own may have (modes
by other names, further random streams, constants in collections of their own, boxes, named axes, extra outputs) is
understood here, by `modes.understand`, or refused in one line.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal
from hardjax.models import modes, traces
from hardjax.models.modes import Manner, plain

# Constants of a network live among its statistics: both are carried from step to step and saved, neither is trained.
OTHERS = "(other collections)"
# What Flax keeps for looking on; it has the shape of one batch's activations.
_TRANSIENT = ("intermediates", "perturbations")


def is_ours(model: Any) -> bool:
    """Whether the network is one of the zoo's own classes, which tests have seen: it is neither probed nor checked."""
    module = getattr(model, "module", model)
    return type(module).__module__.startswith("hardjax.models.")


def init_variables(module: nn.Module, key: Array, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """{"params", "batch_stats"} in float32 for images of shape (H, W, C); pure.

    Layers that exist only in training are made as well. Boxes (`nn.with_partitioning`) are taken off.

    Raises:
        ValueError: no Linen module, or one that cannot be made for such images, or whose mode is not understood.
    """
    check_module(module)
    images = jnp.zeros((1, *image_shape), jnp.float32)
    params_key, dropout_key = jax.random.split(key)
    if is_ours(module):
        variables = module.init({"params": params_key, "dropout": dropout_key}, images, train=False)
        return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    manner = modes.understand(module, None, images)
    rngs = {"params": params_key, **modes.streams(manner, dropout_key)}
    with modes.refusing(module, "cannot be made"):
        variables = plain(modes.init(module, manner, False, rngs, images))
        # Two images: batch norm in training refuses, or warns of, a single value.
        trained = plain(modes.init(module, manner, True, rngs, jnp.zeros((2, *image_shape), jnp.float32)))
    # Where both modes make a leaf, evaluation's is taken: it is what a network without further layers always got.
    return _packed(_merged(trained, variables))


def make_apply(module: nn.Module) -> "Apply":
    """`apply(variables, images, train, key=None) -> (logits, batch_stats)`, pure.

    In training the statistics are the updated ones, in evaluation those given. `key` feeds the "dropout" stream, and
    whatever other streams the module draws from. The mode may be an argument or a field by any of the usual names (see
    `modes`); a module that returns (logits, extras) gives its logits.

    Raises:
        ValueError: no Linen module; while tracing, a module whose mode is not understood, or that draws random numbers
            in training where no key is given.
    """
    check_module(module)
    return Apply(module)


def as_apply(model: Any) -> Callable[..., tuple[Array, Any]]:
    """(variables, images, train, key) -> (logits, new statistics): `model` itself if it is such a function.

    Raises:
        ValueError: as `make_apply`.
    """
    if callable(model) and not isinstance(model, nn.Module | type):
        return model
    return make_apply(model)


class Apply:
    """See `make_apply`. It remembers how its module wants to be called, by the shape of images and variables.

    Make a new one when the module's code may have changed: one a run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._manners: dict[Any, Manner] = {}

    def __call__(
        self, variables: Mapping[str, Any], images: Array, train: bool, key: Array | None = None
    ) -> tuple[Array, Any]:
        if is_ours(self.module):
            return _apply_ours(self.module, variables, images, train, key)
        manner, full = self._manner(variables, images), _unpacked(variables)
        if train and key is None and manner.draws:
            raise Refusal(f"{modes.name(self.module)} draws random numbers in training: pass key=.")
        rngs = modes.streams(manner, key) if train and key is not None else {}
        with modes.refusing(self.module, "cannot be applied"):
            out = modes.call(self.module, manner, train, full, images, rngs, ["batch_stats"] if train else False)
        if not train:
            return modes.logits_of(self.module, out, len(images)), variables.get("batch_stats", {})
        changed = plain(out[1]).get("batch_stats", {})
        others = variables.get("batch_stats", {}).get(OTHERS)
        changed = {**changed, OTHERS: others} if others else changed
        return modes.logits_of(self.module, out[0], len(images)), changed

    def _manner(self, variables: Mapping[str, Any], images: Array) -> Manner:
        """How the module is called: found out once for these shapes."""
        full = _unpacked(variables)
        shapes = tuple((jax.tree_util.keystr(p), v.shape) for p, v in jax.tree_util.tree_leaves_with_path(full))
        at = (images.shape[1:], shapes)
        if at not in self._manners:
            self._manners[at] = modes.understand(self.module, full, images)
        return self._manners[at]


def check_module(module: Any) -> None:
    """Raises ValueError for what is no instance of a Linen module, saying what is expected."""
    if isinstance(module, nn.Module):
        return
    expected = "Expected a Flax Linen module (an instance of flax.linen.Module) as the model, got"
    if isinstance(module, type):
        raise Refusal(f"{expected} the class {module.__name__}: call it, {module.__name__}(...).")
    if any(cls.__module__.startswith("flax.nnx") for cls in type(module).__mro__):
        raise Refusal(f"{expected} the NNX module {type(module).__name__}: flax.nnx.bridge.to_linen wraps its class.")
    kind = f"the function {getattr(module, '__name__', module)}" if callable(module) else repr(module)
    raise Refusal(f"{expected} {kind}: wrap it in a module's __call__(self, images, train).")


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


def _apply_ours(module: nn.Module, variables: Any, images: Array, train: bool, key: Array | None) -> tuple[Array, Any]:
    variables = {name: value for name, value in variables.items() if name != "batch_stats" or value}
    if not train:
        return module.apply(variables, images, train=False), variables.get("batch_stats", {})
    rngs = {} if key is None else {"dropout": key}
    logits, changed = module.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
    return logits, changed.get("batch_stats", {})


def _packed(variables: dict[str, Any]) -> dict[str, Any]:
    others = {
        name: value for name, value in variables.items() if name not in ("params", "batch_stats", *_TRANSIENT) and value
    }
    stats = variables.get("batch_stats", {})
    return {"params": variables.get("params", {}), "batch_stats": {**stats, OTHERS: others} if others else stats}


def _unpacked(variables: Mapping[str, Any]) -> dict[str, Any]:
    """As Flax takes them: no empty statistics, constants in their own collections."""
    full = {name: value for name, value in plain(variables).items() if name not in _TRANSIENT}
    stats = dict(full.pop("batch_stats", {}))
    others = stats.pop(OTHERS, {})
    return {**full, **others, **({"batch_stats": stats} if stats else {})}


def _merged(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    both = {name: _merged(under[name], over[name]) for name in under.keys() & over.keys()}
    return {**under, **over, **both}
