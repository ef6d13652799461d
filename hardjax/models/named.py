"""Networks of one's own by name: `package.module:Name`, or `./file.py:Name`, whose code is run."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal, shown
from hardjax.models.apply import Apply, Seeded, adapted, make_apply
from hardjax.models.modes import first_line, refusing

# Given to a class or function that asks for it: what is drawn from it follows the seed of the run.
_KEYS = ("key", "rngs")


def is_own(name: str) -> bool:
    """Whether a name is one of these and none of the zoo's."""
    return ":" in name or name.endswith(".py")


def find(name: str) -> Any:
    """What the name stands for; runs the code of its module.

    Raises:
        ValueError: no such module or name, or its code fails.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not all(part.isidentifier() for part in attribute.split(".")):
        raise Refusal(f"Expected model={shown(name)} as package.module:Name or ./file.py:Name.")
    is_file = place.endswith(".py") or os.sep in place
    module = _of_file(name, place) if is_file else _imported(name, place)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [word for word in vars(module) if not word.startswith("_")]
        raise Refusal(f"There is no {attribute!r} in {place}{_validate.closest(attribute, public)}") from None


def create(name: str, num_classes: int, options: Mapping[str, Any]) -> Apply:
    """The network: what the name stands for, or what it makes if it is a class or a function.

    Args:
        num_classes: given to a class or function that asks for it; so is a key of the run's seed, to one that asks for
            `key` or for `rngs` (NNX).
        options: its other arguments, plain JSON.

    Raises:
        ValueError: as `find`; an unknown option (the closest one is offered) or one that is missing; no network.
    """
    found = find(name)
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


def _imported(name: str, module: str) -> ModuleType:
    if not all(part.isidentifier() for part in module.split(".")):
        raise Refusal(f"Expected model={shown(name)} as package.module:Name or ./file.py:Name.")
    _on_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise Refusal(f"There is no module {module!r} for model={shown(name)}: no {error.name!r} here.") from None
        raise _failing(module, error) from error
    except (Exception, SystemExit) as error:  # somebody else's code
        raise _failing(module, error) from error


def _of_file(name: str, place: str) -> ModuleType:
    file = _validate.local_folder(model=place)
    try:
        source = file.read_bytes()
    except OSError as error:
        raise Refusal(f"Cannot read {place} for model={shown(name)}: {error.strerror}.") from None
    _on_path(file.resolve().parent)
    try:
        return _run(str(file.resolve()), source)
    except (Exception, SystemExit) as error:
        raise _failing(place, error) from error


@functools.lru_cache(maxsize=32)
def _run(file: str, source: bytes) -> ModuleType:
    """The module of a file, run once as long as it stays as it is."""
    name = f"{Path(file).stem}_{hashlib.sha256(file.encode() + source).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the names in annotations
    try:
        exec(compile(source, file, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _on_path(folder: Path) -> None:
    """First on the path, as Python has the folder of a script and that of `python -m`; it stays, for what its code
    imports later."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _failing(place: str, error: BaseException) -> Refusal:
    return Refusal(f"The code of {place} fails: {type(error).__name__}: {first_line(error)}")
