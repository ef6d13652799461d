"""Keyword checks that raise one clear line: what, the value, what is allowed."""

import difflib
import math
import numbers
from collections.abc import Iterable


class Refusal(ValueError):
    """What a caller asked for cannot be done; one line that says what, the value, and what is allowed.

    The command line prints it and exits with 2. Any other exception is a fault of ours and keeps its traceback.
    """


def in_half_open_unit(**named: float) -> None:
    """Each value lies in (0, 1]."""
    for name, value in named.items():
        if not (_is_number(value) and 0 < value <= 1):
            raise Refusal(f"Expected {name}={value!r} in (0, 1].")


def in_closed_unit(**named: float) -> None:
    """Each value lies in [0, 1]."""
    for name, value in named.items():
        if not (_is_number(value) and 0 <= value <= 1):
            raise Refusal(f"Expected {name}={value!r} in [0, 1].")


def in_unit(**named: float) -> None:
    """Each value lies in [0, 1)."""
    for name, value in named.items():
        if not (_is_number(value) and 0 <= value < 1):
            raise Refusal(f"Expected {name}={value!r} in [0, 1).")


def at_least(least: int, **named: int) -> None:
    """Each value is a whole number not below `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise Refusal(f"Expected {name}={value!r} to be a whole number of at least {least}.")


def positive(**named: float) -> None:
    """Each value is a finite number above 0."""
    for name, value in named.items():
        if not (_is_number(value) and value > 0):
            raise Refusal(f"Expected {name}={value!r} to be a finite number above 0.")


def not_negative(**named: float) -> None:
    """Each value is a finite number not below 0."""
    for name, value in named.items():
        if not (_is_number(value) and value >= 0):
            raise Refusal(f"Expected {name}={value!r} to be a finite number of at least 0.")


def boolean(**named: bool) -> None:
    """Each value is True or False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise Refusal(f"Expected {name}={value!r} to be True or False.")


def one_of(allowed: Iterable[str], **named: str) -> None:
    """Each value is one of the allowed words; the closest one is offered."""
    allowed = list(allowed)
    for name, value in named.items():
        if value not in allowed:
            raise Refusal(f"Unknown {name} {value!r}{closest(value, allowed)} Allowed: {', '.join(allowed)}.")


def closest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a full stop where nothing is near."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else "."


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
