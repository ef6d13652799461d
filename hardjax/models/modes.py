"""How a network of one's own is called in training and in evaluation, found out by its signature and by trying.

Training and evaluation may be told apart by an argument, by a field of the module, or by **kwargs; by one of the usual
names or by any other that a trial shows to be the one. A trial traces both passes, computes nothing, and looks at what
they do: batch statistics must move in training and only there, dropout must draw.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
from jax import Array

from hardjax._validate import Refusal, first_line
from hardjax.models import traces

if TYPE_CHECKING:
    from hardjax.models.adapters.base import Apply

# Where a network's logits are among its outputs, see `apply.Logits`.
Take = int | str | Callable[[Any], Array]
# Usual names, and what each is in training.
NAMES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "train_mode", "training_mode"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "use_running_stats", "frozen_stats"), False),
    **dict.fromkeys(("eval", "is_eval", "evaluate", "evaluation", "eval_mode", "evaluating"), False),
    **dict.fromkeys(("inference", "is_inference", "inference_mode", "test", "testing", "is_test", "test_mode"), False),
}
# Provided though nothing asks for them: a module may look (`has_rng`) before it draws.
_STREAMS = ("dropout", "drop_path", "droppath", "stochastic_depth", "noise", "default")


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


def understand(network: "Apply", variables: Any, images: Any) -> Manner:
    """The first way of calling the network that a trial finds right; one that shows a difference goes first.

    Args:
        variables: of the network (arrays or shapes), or None: those that it makes itself.
        images: (B, ...), array or shape.

    Raises:
        ValueError: none is; the line says what the trial of the likeliest one showed.
    """
    usual, unusual = network.candidates()
    fits, reasons = _tried(network, usual, variables, images)
    if reasons and not (fits and fits[0][1]):
        # Something does not move, or no usual name fits at all: perhaps the switch has another name. Only then: a
        # switch that happens to change what the network is (`use_norm`) is no mode.
        found, _ = _tried(network, unusual, variables, images)
        fits = [(manner, evident) for manner, evident in found if evident] or fits
    unmoved = [reason for reason in reasons if isinstance(reason, Unmoved)]
    if fits and (fits[0][1] or not unmoved):
        return fits[0][0]
    raise (unmoved or reasons)[0]


def switches(parameters: Sequence[inspect.Parameter]) -> tuple[list[str], bool]:
    """(names among a call's further parameters that may be its mode, whether it takes any keywords)."""
    given = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    found = [p.name for p in given if p.default is p.empty or p.default is None or isinstance(p.default, bool)]
    # 0 and 1 for False and True: of a usual name there is no doubt what they mean.
    found += [p.name for p in given if p.name in NAMES and type(p.default) is int]
    return found, any(p.kind == p.VAR_KEYWORD for p in parameters)


def known(names: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """The usual names among these, with what each is in training."""
    return tuple((n, NAMES[n]) for n in names if n in NAMES)


def by_arguments(parameters: Sequence[inspect.Parameter]) -> tuple[list[Manner], list[Manner]]:
    """Ways of calling by the usual names, and, where there are none, by any other switch: of a network whose mode is an
    argument or none."""
    names, any_keyword = switches(parameters)
    usual = [Manner(known(names))]
    if any_keyword:
        usual += [Manner((*known(names), (n, value))) for n, value in NAMES.items() if n not in names]
    others = [] if known(names) else names
    return usual, [Manner(((n, value),)) for value in (True, False) for n in others]


def arguments(manner: Manner, train: bool) -> dict[str, bool]:
    """Keywords that put a call into this mode."""
    return {n: value == train for n, value in manner.arguments}


def bound(forward: Callable[[Any], Any], axes: Sequence[str]) -> Callable[[Any], Any]:
    """`forward` with its named axes bound to axes of length 1: the whole batch is in this program."""
    for axis in axes:
        forward = _bound(forward, axis)
    return forward


def logits_of(name: str, out: Any, batch: int, take: Take | None) -> Array:
    """The logits among a network's outputs: its only one, or the one that was chosen.

    Args:
        take: the choice, see `apply.Logits`; None where none was made.

    Raises:
        ValueError: several outputs and no choice among them, or a choice that gives no array of the batch.
    """
    if take is None:
        if isinstance(out, jax.Array):
            return out
        raise Refusal(f"Expected logits ({batch}, classes) alone from {name}, got {_told(out)}: {advice(out, batch)}.")
    taken = out
    if callable(take):
        with refusing(name, "gives no logits by take"):
            taken = take(out)
    elif not isinstance(out, jax.Array):  # else alone: auxiliary heads are often there in training only
        by_name = isinstance(take, str) and not isinstance(out, Mapping)
        try:
            taken = getattr(out, take) if by_name else out[take]
        except (LookupError, TypeError, AttributeError):
            raise Refusal(f"Expected {name} to return something at take={take!r}, got {_told(out)}.") from None
    if not _is_logits(taken, batch):
        at = getattr(take, "__name__", "a function") if callable(take) else repr(take)
        raise Refusal(f"Expected logits ({batch}, classes) from {name} at take={at}, got {_told(taken)}.")
    return taken


def advice(out: Any, batch: int) -> str:
    """How to choose among these outputs."""
    fits = [repr(place) for place, entry in _entries(out) if _is_logits(entry, batch) and entry.ndim == 2]
    return f"say which they are, hj.models.Logits(model, take={' or '.join(fits[:3]) or '...'})"


def _is_logits(entry: Any, batch: int) -> bool:
    # How many axes follow is the loss's business.
    return isinstance(entry, jax.Array) and entry.ndim > 0 and len(entry) == batch


def _entries(out: Any) -> list[tuple[Any, Any]]:
    """(what `take` would be, entry) of each of several outputs."""
    if isinstance(out, Mapping):
        return [(name, entry) for name, entry in out.items() if isinstance(name, str)]
    if isinstance(out, tuple | list):
        return list(enumerate(out))
    return [(f.name, getattr(out, f.name)) for f in dataclasses.fields(out)] if dataclasses.is_dataclass(out) else []


def _told(out: Any) -> str:
    """Outputs in a few words: names and shapes."""
    if isinstance(out, jax.Array):
        return str(out.shape)
    shapes = [
        f"{f'{place} ' if isinstance(place, str) else ''}{getattr(entry, 'shape', type(entry).__name__)}"
        for place, entry in _entries(out)
    ]
    more = ["..."] if len(shapes) > 4 else []
    return f"{type(out).__name__} of {', '.join(shapes[:4] + more)}" if shapes else type(out).__name__


@contextlib.contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Turns whatever a network raises into one line: its code is somebody else's, so any class of error may come."""
    try:
        yield
    except (Refusal, jax.errors.JaxRuntimeError):  # the latter: out of memory
        raise
    except Exception as error:
        raise Refusal(f"{name} {what}: {first_line(error)}") from error


def plain(variables: Any) -> dict[str, Any]:
    """Variables as nested dicts of arrays: `FrozenDict`s thawed, boxes (`nn.with_partitioning`) taken off.

    Raises:
        ValueError: no mapping.
    """
    if not isinstance(variables, Mapping):
        raise Refusal(f'Expected variables {{"params": ..., "batch_stats": ...}}, got {type(variables).__name__}.')
    return flax.core.meta.unbox(flax.core.unfreeze(dict(variables)))


class Unmoved(Refusal):
    """Nothing that a network has for training moves in what is taken for its training mode."""


def _tried(
    network: "Apply", manners: list[Manner], variables: Any, images: Any
) -> tuple[list[tuple[Manner, bool]], list[Refusal]]:
    """(manners that a trial lets pass and whether it saw a difference, only the first one that shows any or else all;
    why the others do not pass)."""
    fits, reasons = [], []
    for manner in manners:
        try:
            found = _trial(network, manner, variables, images)
        except Refusal as error:
            reasons.append(error)
            continue
        if found[1]:
            return [found], reasons
        fits.append(found)
    return fits, reasons


def _shape(array: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of an array as JAX would take it: NumPy's float64 is float32 outside 64-bit mode, of which jax 0.12 warns."""
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True))


def _trial(network: "Apply", manner: Manner, variables: Any, images: Any) -> tuple[Manner, bool]:
    """(the manner with streams, axes and draws filled in, whether training and evaluation were seen to differ).

    Raises:
        ValueError: the network cannot be called so, or not to any purpose.
    """
    for _ in range(8):  # each round adds a stream or an axis that the last one lacked
        try:
            with refusing(network.name, network.called):
                return _look(network, manner, variables, images)
        except Refusal as error:
            missing = network.missing(error.__cause__, manner)
            if missing is None:
                raise
            manner = missing
    raise Refusal(f"{network.name} cannot be called: it asks for ever new random streams or axes.")


def _look(network: "Apply", manner: Manner, variables: Any, images: Any) -> tuple[Manner, bool]:
    key, name = jax.eval_shape(lambda: jax.random.key(0)), network.name
    # Two images: batch norm in training refuses, or makes nothing of, a single value.
    batch = images.shape[0] if variables is not None else max(2, images.shape[0])
    images = _shape(images, (batch, *images.shape[1:]))
    if variables is None:
        variables = jax.eval_shape(lambda key, images: network.make(manner, True, key, images), key, images)
    variables = jax.tree.map(lambda leaf: _shape(leaf, leaf.shape), variables)

    def forward(train: bool) -> Callable[..., Any]:
        def fn(variables: Any, images: Array, key: Array) -> tuple[Array, Any]:
            out, changed = network.call(manner, train, variables, images, key, watched=True)
            return logits_of(name, out, batch, network.take), changed

        return fn

    def trace(train: bool) -> tuple[set[str], bool, Any]:
        """(collections that this mode moves, whether its logits depend on the key, the collections' shapes)."""
        traced, (_, changed) = jax.make_jaxpr(forward(train), return_shape=True)(variables, images, key)
        moved = traces.moved(traced.jaxpr, variables, changed)
        return moved, traces.depends(traced.jaxpr, 0, {len(traced.jaxpr.invars) - 1}), changed

    with network.watching() as dropouts:
        moved, draws, changed = trace(True)
    if others := sorted(moved - {"batch_stats"}):
        raise Refusal(f"{name} changes its collection {others[0]!r} in training; only 'batch_stats' may change.")
    awake = Unmoved(
        f"{name} draws random numbers or moves its statistics in evaluation as in training: {network.expected(manner)}"
    )
    try:
        if any(trace(False)[:2]):
            raise awake
    except network.awake as error:
        raise awake from error
    if jax.tree.leaves(variables.get("batch_stats", {})) and "batch_stats" not in moved:
        raise Unmoved(
            f"{name} has batch statistics and a training pass leaves them as they were: {network.expected(manner)}"
        )
    if faults := _reshaped(variables.get("batch_stats", {}), changed.get("batch_stats", {})):
        raise Refusal(f"{name} gives other batch statistics than it takes: {faults}.")
    if any(isinstance(rate, Array) or rate > 0 for rate in dropouts) and not draws:
        raise Unmoved(f"{name} has dropout and a training pass draws nothing: {network.expected(manner)}")
    return dataclasses.replace(manner, draws=draws), bool(moved) or draws


def _reshaped(before: Any, after: Any) -> str:
    """Statistics whose shape a pass changes, or that come or go."""
    old, new = (
        {jax.tree_util.keystr(p): v.shape for p, v in jax.tree_util.tree_leaves_with_path(t)} for t in (before, after)
    )
    return ", ".join(
        f"{n} {new.get(n, 'none')} for {old.get(n, 'none')}" for n in sorted({*old, *new}) if old.get(n) != new.get(n)
    )


def _bound(forward: Any, axis: str) -> Any:
    def bound(images: Array) -> Any:
        out = jax.vmap(forward, axis_name=axis)(images[None])
        return jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), out)

    return bound
