"""People's own code by name: `package.module:Name`, or `./file.py:Name`, whose code is run."""

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal, first_line, shown


def is_own(name: str) -> bool:
    """Whether a name is one of these and none of ours."""
    return ":" in name or name.endswith(".py")


def find(name: str, setting: str) -> Any:
    """What the name stands for; runs the code of its module.

    Args:
        setting: that the name is the value of, for messages.

    Raises:
        ValueError: no such module or name, or its code fails.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not all(part.isidentifier() for part in attribute.split(".")):
        raise Refusal(f"Expected {setting}={shown(name)} as package.module:Name or ./file.py:Name.")
    is_file = place.endswith(".py") or os.sep in place
    module = _of_file(name, place, setting) if is_file else _imported(name, place, setting)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [word for word in vars(module) if not word.startswith("_")]
        raise Refusal(f"There is no {attribute!r} in {place}{_validate.closest(attribute, public)}") from None


def _imported(name: str, module: str, setting: str) -> ModuleType:
    if not all(part.isidentifier() for part in module.split(".")):
        raise Refusal(f"Expected {setting}={shown(name)} as package.module:Name or ./file.py:Name.")
    _on_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise Refusal(
                f"There is no module {module!r} for {setting}={shown(name)}: no {error.name!r} here."
            ) from None
        raise _failing(module, error) from error
    except (Exception, SystemExit) as error:  # somebody else's code
        raise _failing(module, error) from error


def _of_file(name: str, place: str, setting: str) -> ModuleType:
    file = _validate.local_folder(**{setting: place})
    try:
        source = file.read_bytes()
    except OSError as error:
        raise Refusal(f"Cannot read {place} for {setting}={shown(name)}: {error.strerror}.") from None
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
