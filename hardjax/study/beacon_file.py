"""The content of a file of beacons, and the beacons of a content that anyone may have written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hardjax import _validate
from hardjax._validate import Refusal, shown
from hardjax.study.beacons import FIELDS, TOLERANCES, Trail, check_distinct, shared

_HEAD = {"format": "beacons of hardjax", "version": 1}
_PLACE = ("run", "batches", "learning_rate", "seed", "diverged", "test_error", "train_error")
_ERRORS = ("test", "train", "validation")


def to_dict(trails: Sequence[Trail], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of beacons, plain (`docs/command-line.md` says what stands in it).

    Args:
        settings: of any of them.

    Raises:
        ValueError: two of them are one configuration and seed, or one changes its batch size.
    """
    check_distinct(trails)
    _check_sizes(trails)
    return _HEAD | {
        "settings": shared(settings),
        "tolerances": list(TOLERANCES),
        "beacons": [to_plain(trail) for trail in trails],
    }


def to_plain(trail: Trail) -> dict[str, Any]:
    """A trail for JSON, of a run under a plan too."""
    return {
        **{name: getattr(trail, name) for name in _PLACE},
        "epoch": trail.epoch,
        "errors": dict(trail.errors),
        "measures": {f"{tolerance:g}": dict(trail.measures[tolerance]) for tolerance in TOLERANCES},
    }


def from_dict(content: Any) -> tuple[list[Trail], dict[str, Any]]:
    """The beacons, and the settings that they share, of what `to_dict` made and a file gave back.

    Raises:
        ValueError: no beacons, of another version, damaged, or one configuration and seed twice.
    """
    if not isinstance(content, dict) or content.get("format") != _HEAD["format"]:
        raise Refusal("Expected a file that `hardjax measure --write-beacons` wrote.")
    if content.get("version") != _HEAD["version"]:
        raise Refusal(f"Expected version {_HEAD['version']} of the beacons, got {shown(content.get('version'))}.")
    try:
        trails = [from_plain(one) for one in _of(content, "beacons", list)]
        settings = _of(content, "settings", dict)
        if settings.get("measure") is not None:
            _of(_of(settings, "measure", dict), "rows", str)
    except Refusal as refusal:
        raise Refusal(f"Damaged beacons: {refusal}") from None
    if not trails:
        raise Refusal("Expected at least one beacon.")
    _check_sizes(trails)
    for one in trails[1:]:
        if not np.array_equal(one.epoch, trails[0].epoch):
            raise Refusal(f"Damaged beacons: {shown(one.run)} and {shown(trails[0].run)} have other epochs.")
    check_distinct(trails)
    return trails, settings


def from_plain(plain: Any) -> Trail:
    """The trail that `to_plain` wrote.

    Raises:
        ValueError: it is another thing.
    """
    if not isinstance(plain, dict):
        raise Refusal(f"Expected a beacon to be an object, got {shown(plain)}.")
    if not isinstance(plain.get("batches"), str):
        _validate.at_least(1, batches=plain.get("batches"))
    _validate.at_least(0, seed=plain.get("seed"))
    _validate.positive(learning_rate=plain.get("learning_rate"))
    _validate.boolean(diverged=plain.get("diverged"))
    kept, measured = _of(plain, "errors", dict), _of(plain, "measures", dict)
    errors = {name: _column(kept, name) for name in _ERRORS}
    measures = {
        tolerance: {name: _column(_of(measured, f"{tolerance:g}", dict), name) for name in FIELDS}
        for tolerance in TOLERANCES
    }
    epoch = _column(plain, "epoch")
    if not (len(epoch) and np.isfinite(epoch).all() and (np.diff(epoch, prepend=0.0) > 0).all()):
        raise Refusal(f"Expected epoch={shown(epoch.tolist())} to be rising numbers above 0.")
    columns = [*errors.values(), *(column for fields in measures.values() for column in fields.values())]
    if any(len(column) != len(epoch) for column in columns):
        raise Refusal(f"Expected {len(epoch)} values, as many as epochs, in every column of a beacon.")
    return Trail(
        run=_of(plain, "run", str),
        batches=plain["batches"],
        learning_rate=float(plain["learning_rate"]),
        seed=plain["seed"],
        diverged=plain["diverged"],
        test_error=_number(plain, "test_error"),
        train_error=_number(plain, "train_error"),
        epoch=epoch,
        measures=measures,
        errors=errors,
    )


def _check_sizes(trails: Sequence[Trail]) -> None:
    for trail in trails:
        if isinstance(trail.batches, str):
            raise Refusal(f"The run in {trail.run!r} has batch_plan={trail.batches!r}; a beacon keeps one batch size.")


def _of(content: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of this kind."""
    found = content.get(name)
    if not isinstance(found, kind):
        word = {dict: "an object", list: "a list", str: "text"}[kind]
        raise Refusal(f"Expected {name}={shown(found)} to be {word}.")
    return found


def _number(content: Mapping[str, Any], name: str) -> float:
    """A number, NaN of null."""
    if name not in content:
        raise Refusal(f"Expected a number {name}, or null.")
    return _read(name, content[name])


def _column(content: Mapping[str, Any], name: str) -> np.ndarray:
    return np.array([_read(name, value) for value in _of(content, name, list)], np.float64)


def _read(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(f"Expected {name} to hold numbers or null, got {shown(value)}.")
    try:
        return float(value)
    except OverflowError:
        raise Refusal(f"Expected {name} to hold numbers of float64, got {shown(value)}.") from None
