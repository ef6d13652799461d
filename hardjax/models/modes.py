"""How a Linen module of one's own is called in training and in evaluation, found out by its signature and by trying.

Training and evaluation may be told apart by an argument of `__call__`, by a field of the module, or by **kwargs; by
one of the usual names or by any other that a trial shows to be the one. A trial traces both passes, computes nothing,
and looks at what they do: batch statistics must move in training and only there, dropout must draw.
"""

import contextlib
import dataclasses
import inspect
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal
from hardjax.models import traces

# Usual names, and what each is in training.
NAMES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode", "training_mode"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "use_running_stats", "frozen_stats"), False),
    **dict.fromkeys(("eval", "is_eval", "evaluate", "evaluation", "eval_mode", "evaluating"), False),
    **dict.fromkeys(("inference", "is_inference", "inference_mode", "test", "testing", "is_test", "test_mode"), False),
}
# Provided though nothing asks for them: a module may look (`has_rng`) before it draws.
_STREAMS = ("dropout", "drop_path", "droppath", "stochastic_depth", "noise", "default")
# Parameters change by their gradient alone; every other collection is watched.
_ALL = flax.core.DenyList(("params",))


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a module is called.

    Attributes:
        arguments, fields: name -> its value in training; in evaluation it is the opposite.
        streams: names of the random streams that it is given.
        axes: named axes that it reduces over; each is bound to an axis of length 1.
        draws: its logits in training depend on the random key.
    """

    arguments: tuple[tuple[str, bool], ...] = ()
    fields: tuple[tuple[str, bool], ...] = ()
    streams: tuple[str, ...] = _STREAMS
    axes: tuple[str, ...] = ()
    draws: bool = False


def name(module: nn.Module) -> str:
    return type(module).__name__


def understand(module: nn.Module, variables: Any, images: Any) -> Manner:
    """The first way of calling the module that a trial finds right; one that shows a difference goes first.

    Args:
        variables: of the module (arrays or shapes), or None: those that it makes itself.
        images: (B, ...), array or shape.

    Raises:
        ValueError: none is; the line says what the trial of the likeliest one showed.
    """
    usual, unusual = _candidates(module)
    fits, reasons = _tried(module, usual, variables, images)
    if reasons and not (fits and fits[0][1]):
        # Something does not move, or no usual name fits at all: perhaps the switch has another name. Only then: a
        # switch that happens to change what the network is (`use_norm`) is no mode.
        found, _ = _tried(module, unusual, variables, images)
        fits = [(manner, evident) for manner, evident in found if evident] or fits
    unmoved = [reason for reason in reasons if isinstance(reason, _Unmoved)]
    if fits and (fits[0][1] or not unmoved):
        return fits[0][0]
    raise (unmoved or reasons)[0]


def init(module: nn.Module, manner: Manner, train: bool, rngs: Mapping[str, Array], images: Array) -> Any:
    """Variables as the module makes them in this mode."""
    module, mode = _in_mode(module, manner, train)
    return module.init(dict(rngs), images, **mode)


def call(
    module: nn.Module, manner: Manner, train: bool, variables: Any, images: Array, rngs: Mapping, mutable: Any
) -> Any:
    """`module.apply` in this mode, its named axes bound to axes of length 1: the whole batch is in this program."""
    module, mode = _in_mode(module, manner, train)

    def forward(images: Array) -> Any:
        return module.apply(variables, images, **mode, rngs=dict(rngs), mutable=mutable)

    for axis in manner.axes:
        forward = _bound(forward, axis)
    return forward(images)


def streams(manner: Manner, key: Array) -> dict[str, Array]:
    """A key for each stream; "dropout" has the key itself, as ever. Equal keys would make streams draw alike."""
    return {s: key if s == "dropout" else jax.random.fold_in(key, zlib.crc32(s.encode())) for s in manner.streams}


def logits_of(module: nn.Module, out: Any, batch: int) -> Array:
    """The logits among a module's outputs.

    Raises:
        ValueError: neither a (B, classes) array nor a tuple that begins with one.
    """
    first = out[0] if isinstance(out, tuple | list) and out else out
    if isinstance(first, jax.Array) and (first is out or (first.ndim == 2 and len(first) == batch)):
        return first
    got = ", ".join(str(getattr(leaf, "shape", leaf)) for leaf in jax.tree.leaves(out)[:3])
    raise Refusal(
        f"Expected logits ({batch}, classes) from {name(module)}, or a tuple that begins with them, got"
        f" {type(out).__name__} of {got}."
    )


@contextlib.contextmanager
def refusing(module: nn.Module, what: str) -> Iterator[None]:
    """Turns whatever a module raises into one line: its code is somebody else's, so any class of error may come."""
    try:
        yield
    except (Refusal, jax.errors.JaxRuntimeError):  # the latter: out of memory
        raise
    except Exception as error:
        raise Refusal(f"{name(module)} {what}: {_first_line(error)}") from error


def plain(variables: Any) -> dict[str, Any]:
    """Variables as nested dicts of arrays: `FrozenDict`s thawed, boxes (`nn.with_partitioning`) taken off."""
    return flax.core.meta.unbox(flax.core.unfreeze(dict(variables)))


class _Unmoved(Refusal):
    """Nothing that a network has for training moves in what is taken for its training mode."""


def _tried(
    module: nn.Module, manners: list[Manner], variables: Any, images: Any
) -> tuple[list[tuple[Manner, bool]], list[Refusal]]:
    """(manners that a trial lets pass and whether it saw a difference, only the first one that shows any or else all;
    why the others do not pass)."""
    fits, reasons = [], []
    for manner in manners:
        try:
            found = _trial(module, manner, variables, images)
        except Refusal as error:
            reasons.append(error)
            continue
        if found[1]:
            return [found], reasons
        fits.append(found)
    return fits, reasons


def _candidates(module: nn.Module) -> tuple[list[Manner], list[Manner]]:
    """Ways of calling by the usual names, and, where there are none, by any other switch."""
    signature = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    given = [p for p in signature[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    may_switch = [p.name for p in given if p.default is p.empty or p.default is None or isinstance(p.default, bool)]
    # 0 and 1 for False and True: of a usual name there is no doubt what they mean.
    may_switch += [p.name for p in given if p.name in NAMES and type(p.default) is int]
    fields = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    switches = [f for f in fields if isinstance(getattr(module, f), bool) or getattr(module, f) is None]
    known, own = (tuple((n, NAMES[n]) for n in names if n in NAMES) for names in (may_switch, switches))
    usual = [Manner(known, ())] if known or not own else []
    usual += [Manner((), own), Manner(known, own)] if own else []
    if any(p.kind == p.VAR_KEYWORD for p in signature):
        usual += [Manner((*known, (n, value)), ()) for n, value in NAMES.items() if n not in dict(known)]
    unusual = []
    for value in (True, False) if not known and not own else ():
        unusual += [Manner(((n, value),), ()) for n in may_switch]
        unusual += [Manner((), ((n, value),)) for n in switches if isinstance(getattr(module, n), bool)]
    return usual, unusual


def _shape(array: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of an array as JAX would take it: NumPy's float64 is float32 outside 64-bit mode, of which jax 0.12 warns."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True))


def _trial(module: nn.Module, manner: Manner, variables: Any, images: Any) -> tuple[Manner, bool]:
    """(the manner with streams, axes and draws filled in, whether training and evaluation were seen to differ).

    Raises:
        ValueError: the module cannot be called so, or not to any purpose.
    """
    for _ in range(8):  # each round adds a stream or an axis that the last one lacked
        try:
            with refusing(module, "cannot be called"):
                return _look(module, manner, variables, images)
        except Refusal as error:
            missing = _missing(error.__cause__, manner)
            if missing is None:
                raise
            manner = missing
    raise Refusal(f"{name(module)} cannot be called: it asks for ever new random streams or axes.")


def _look(module: nn.Module, manner: Manner, variables: Any, images: Any) -> tuple[Manner, bool]:
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Two images: batch norm in training refuses, or makes nothing of, a single value.
    batch = images.shape[0] if variables is not None else 2
    images = _shape(images, (batch, *images.shape[1:]))
    if variables is None:
        variables = _made(module, manner, key, images)
    variables = jax.tree.map(lambda leaf: _shape(leaf, leaf.shape), variables)
    dropouts = []

    def watch(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            dropouts.append(context.module.rate)
        return next_fun(*args, **kwargs)

    def train(variables: Any, images: Array, key: Array) -> tuple[Array, Any]:
        with nn.intercept_methods(watch):
            out, changed = call(module, manner, True, variables, images, streams(manner, key), _ALL)
        changed = {n: v for n, v in plain(changed).items() if n not in ("intermediates", "perturbations")}
        return logits_of(module, out, batch), changed

    def evaluate(variables: Any, images: Array) -> Array:
        return logits_of(module, call(module, manner, False, variables, images, {}, False), batch)

    traced, (_, changed) = jax.make_jaxpr(train, return_shape=True)(variables, images, key)
    try:
        jax.make_jaxpr(evaluate)(variables, images)
    except (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError) as error:
        raise _Unmoved(
            f"{name(module)} draws random numbers or moves its statistics in evaluation as in training:"
            f" {_expected(manner)}"
        ) from error
    moved = traces.moved(traced.jaxpr, variables, changed)
    draws = traces.depends(traced.jaxpr, 0, {len(traced.jaxpr.invars) - 1})
    if others := sorted(moved - {"batch_stats"}):
        raise Refusal(
            f"{name(module)} changes its collection {others[0]!r} in training; only 'batch_stats' may change."
        )
    if jax.tree.leaves(variables.get("batch_stats", {})) and "batch_stats" not in moved:
        raise _Unmoved(
            f"{name(module)} has batch statistics and a training pass leaves them as they were: {_expected(manner)}"
        )
    if any(isinstance(rate, Array) or rate > 0 for rate in dropouts) and not draws:
        raise _Unmoved(f"{name(module)} has dropout and a training pass draws nothing: {_expected(manner)}")
    return dataclasses.replace(manner, draws=draws), bool(moved) or draws


def _made(module: nn.Module, manner: Manner, key: Any, images: Any) -> Any:
    """Shapes of the variables that the module makes, those of layers that exist only in training among them."""

    def make(key: Array, images: Array) -> Any:
        return plain(init(module, manner, True, {"params": key, **streams(manner, key)}, images))

    return jax.eval_shape(make, key, images)


def _missing(error: BaseException | None, manner: Manner) -> Manner | None:
    """The manner with the random stream or the named axis whose absence was the error."""
    stream = re.search(r'needs PRNG for "([^"]+)"', str(error))
    axis = re.search(r"unbound axis name: ([^\s.]+)", str(error)) if isinstance(error, NameError) else None
    if stream and stream[1] not in (*manner.streams, "params"):
        return dataclasses.replace(manner, streams=(*manner.streams, stream[1]))
    if axis and axis[1] not in manner.axes:
        return dataclasses.replace(manner, axes=(*manner.axes, axis[1]))
    return None


def _in_mode(module: nn.Module, manner: Manner, train: bool) -> tuple[nn.Module, dict[str, bool]]:
    fields = {n: value == train for n, value in manner.fields}
    return module.clone(**fields) if fields else module, {n: value == train for n, value in manner.arguments}


def _bound(forward: Any, axis: str) -> Any:
    def bound(images: Array) -> Any:
        out = jax.vmap(forward, axis_name=axis)(images[None])
        return jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), out)

    return bound


def _expected(manner: Manner) -> str:
    used = [n for n, _ in (*manner.arguments, *manner.fields)]
    tried = f"tried with {', '.join(used)}; " if used else ""
    return (
        f"{tried}expected an argument or a field such as `train` that switches all its layers (around an nn.Sequential:"
        " a module that hands it on); statistics that shall stay fixed belong in a collection of constants."
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" ?\(https?://\S+\)", "", text)
    return text if len(text) <= 200 else text[:197] + "..."
