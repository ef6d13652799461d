"""Settings as plain Python: every field checked against its annotation, and read from JSON."""

import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hardjax import _validate
from hardjax._validate import Refusal

_Kind = TypeVar("_Kind")
_NO = object()  # "does not fit": None is a value that settings have
_BITS = 64  # of whole numbers: beyond, they fit no array, and Python itself does not write out the largest ones
_WORDS = {
    int: f"a whole number of {_BITS} bits",
    float: "a number",
    bool: "True or False",
    str: "text",
    Callable: "a function",
    types.NoneType: "None",
}


def settle(settings: Any) -> None:
    """Turn the fields of a frozen dataclass into plain Python of the annotated types; for `__post_init__`.

    Scalars of NumPy and JAX become Python's, paths text, lists tuples, a whole number a float where one is annotated;
    mappings are copied as JSON. What was validated is then what is written, hashed and compared: `1 == True` and
    `np.int64(1) == 1` would otherwise let a wrong type through, and `json` would refuse it after hours.

    Raises:
        ValueError: a field of another type, such as the text "false" for a truth value.
    """
    for name, hint in _hints(type(settings)).items():
        object.__setattr__(settings, name, plain(name, getattr(settings, name), hint))


def plain(name: str, value: Any, hint: Any) -> Any:
    """One value as plain Python of the annotated type.

    Raises:
        ValueError: it is of another type.
    """
    try:
        found = _convert(value, hint)
    except RecursionError:  # lists that hold themselves
        found = _NO
    if found is _NO:
        raise Refusal(f"Expected {name}={_validate.shown(value)} to be {_words(hint)}.")
    return found


def read(cls: type[_Kind], given: Any, what: str = "") -> _Kind:
    """The dataclass that a JSON object describes.

    Args:
        what: its name in messages, empty for the outermost one.

    Raises:
        ValueError: no object, an unknown setting (the closest one is offered), a lacking one, or a value refused.
    """
    if not isinstance(given, Mapping):
        raise Refusal(f"Expected {what or 'settings'}={_validate.shown(given)} to be a JSON object.")
    fields = [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for name in given:
        _validate.one_of([field.name for field in fields], **{f"setting of {what}" if what else "setting": name})
    missing = dataclasses.MISSING
    lacking = [f.name for f in fields if f.default is missing and f.default_factory is missing and f.name not in given]
    if lacking:
        raise Refusal(f"Expected {what or 'settings'} with {', '.join(lacking)}, got {_validate.shown(dict(given))}.")
    return cls(**given)


def field_help(cls: type) -> dict[str, str]:
    """The first sentence on each field under `Attributes:` in the docstring."""
    found: dict[str, str] = {}
    # Python 3.13 takes the indentation off docstrings; cleaned, they are alike everywhere.
    lines, name = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines(), ""
    for line in lines:
        depth, text = len(line) - len(line.lstrip()), line.strip()
        if not text or depth < 4:
            break
        if depth == 4:
            name, _, text = text.partition(": ")
            found |= dict.fromkeys(name.split(", "), "")
        found |= {part: f"{found[part]} {text}".strip() for part in name.split(", ")}
    return {name: text.split(". ")[0].rstrip(".") for name, text in found.items()}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def hints(cls: type) -> dict[str, Any]:
    """Annotation of each field of a dataclass."""
    return dict(_hints(cls))


def _convert(value: Any, hint: Any) -> Any:
    """The value as plain Python of that type, `_NO` where it is of another."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return next((found for part in parts if (found := _convert(value, part)) is not _NO), _NO)
    if origin is tuple:
        return _sequence(value, parts)
    if hint in (Mapping, dict) or origin in (Mapping, dict):
        return _json(value) if isinstance(value, Mapping) else _NO
    value = _scalar(value)
    # bool is a subclass of int: without its own case True would be a batch size of 1.
    if hint is bool:
        return value if isinstance(value, bool) else _NO
    if hint is int:
        return _whole(value)
    if hint is float:
        return _float(value)
    if hint is str:
        return str(value) if isinstance(value, str) else _NO
    return value if isinstance(value, hint) else _NO


def _sequence(value: Any, parts: tuple[Any, ...]) -> Any:
    """tuple[X, ...] of a list, a tuple or a row of numbers."""
    if not isinstance(value, list | tuple) and getattr(value, "ndim", 0) != 1:
        return _NO
    found = tuple(_convert(entry, parts[0]) for entry in value)
    return _NO if any(entry is _NO for entry in found) else found


def _whole(value: Any) -> Any:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return _NO
    return int(value) if int(value).bit_length() < _BITS else _NO


def _float(value: Any) -> Any:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return _NO
    try:
        return float(value)
    except OverflowError:  # a whole number beyond float64
        return _NO


def _scalar(value: Any) -> Any:
    """Scalars of NumPy and JAX as Python's; a path as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _json(value: Any) -> Any:
    """A copy as `json` would read it back: text for keys, lists, finite numbers; else `_NO`."""
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            return _NO
        found = {str(name): _json(entry) for name, entry in value.items()}
        return _NO if any(entry is _NO for entry in found.values()) else found
    if isinstance(value, list | tuple) or (hasattr(value, "tolist") and not isinstance(value, type) and value.ndim):
        entries = [_json(entry) for entry in value]
        return _NO if any(entry is _NO for entry in entries) else entries
    value = _scalar(value)
    # JSON has no NaN: `json` would write one that no strict reader takes, or it would come back as null.
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _NO
    if value is None or isinstance(value, bool | str):
        return value
    return _whole(value)


def _words(hint: Any) -> str:
    """What is allowed, for a reader."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is tuple:
        return f"a list of {'numbers' if parts[0] in (int, float) else 'texts'}"
    if hint in (Mapping, dict) or origin in (Mapping, dict):
        return "plain JSON: an object of texts, finite numbers (whole ones of 64 bits), truth values, lists and objects"
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))
