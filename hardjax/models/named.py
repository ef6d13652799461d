"""Networks of one's own by name, see `_by_name`."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hardjax import _by_name, _validate
from hardjax._validate import Refusal
from hardjax.models.apply import Apply, Seeded, adapted, make_apply
from hardjax.models.modes import refusing

# Given to a class or function that asks for it: what is drawn from it follows the seed of the run.
_KEYS = ("key", "rngs")


def create(name: str, num_classes: int, options: Mapping[str, Any]) -> Apply:
    """The network: what the name stands for, or what it makes if it is a class or a function.

    Args:
        num_classes: given to a class or function that asks for it; so is a key of the run's seed, to one that asks for
            `key` or for `rngs` (NNX).
        options: its other arguments, plain JSON.

    Raises:
        ValueError: as `_by_name.find`; an unknown option (the closest one is offered) or one that is missing; no
            network.
    """
    found = _by_name.find(name, "model")
    network = adapted(found)
    if network is not None or not callable(found):
        if options and network is not None:
            raise Refusal(f"{name} is a network already: model_options go to a class or a function that makes one.")
        return make_apply(found, name)
    # JSON has lists, and modules must be hashable.
    given = {option: tuple(v) if isinstance(v, list) else v for option, v in options.items()}
    # Of a class what `__init__` says: a metaclass (NNX has one) takes anything.
    signature = inspect.signature(found.__init__ if isinstance(found, type) else found)
    parameters = list(signature.parameters.values())[isinstance(found, type) :]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in given:
            _validate.one_of(sorted(set(named) - {"parent", *_KEYS}), **{f"option of {name}": option})
    asked = [word for word, p in named.items() if p.default is p.empty and word not in given]
    if "num_classes" in asked:
        given["num_classes"] = num_classes
    key = next((word for word in _KEYS if word in asked), None)
    if missing := [word for word in asked if word not in ("num_classes", key)]:
        raise Refusal(f"Expected model_options for {name} with {', '.join(missing)}, which it asks for.")
    if key is not None:
        return make_apply(Seeded(functools.partial(_drawn, found, given, key), name), name)
    with refusing(name, "cannot be made"):
        made = found(**given)
    return make_apply(made, name)


def _drawn(make: Callable, given: Mapping[str, Any], word: str, key: Any) -> Any:
    if word == "rngs":
        from flax import nnx

        key = nnx.Rngs(key)
    return make(**given, **{word: key})
