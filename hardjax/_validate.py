"""Keyword checks that raise one clear line: what, the value, what is allowed."""

import difflib
import math
import numbers
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SHOWN = 120  # characters of a refused value: an array must not fill the screen
_MOST_NAME, _MOST_PATH = 255, 4095  # bytes of a file's name and of a path, on nearly every file system


class Refusal(ValueError):
    """What a caller asked for cannot be done; one line that says what, the value, and what is allowed.

    The command line prints it and exits with 2. Any other exception is a fault of ours and keeps its traceback.
    """


class OutOfMemory(Refusal, MemoryError):
    """The device ran out of memory; the line says what to set."""


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error of the runtime says so; XLA on a CPU calls some of them INTERNAL."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))


def in_half_open_unit(**named: float) -> None:
    """Each value lies in (0, 1]."""
    for name, value in named.items():
        if not (_is_number(value) and 0 < value <= 1):
            raise Refusal(f"Expected {name}={shown(value)} in (0, 1].")


def in_closed_unit(**named: float) -> None:
    """Each value lies in [0, 1]."""
    for name, value in named.items():
        if not (_is_number(value) and 0 <= value <= 1):
            raise Refusal(f"Expected {name}={shown(value)} in [0, 1].")


def in_unit(**named: float) -> None:
    """Each value lies in [0, 1)."""
    for name, value in named.items():
        if not (_is_number(value) and 0 <= value < 1):
            raise Refusal(f"Expected {name}={shown(value)} in [0, 1).")


def at_least(least: int, **named: int) -> None:
    """Each value is a whole number not below `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise Refusal(f"Expected {name}={shown(value)} to be a whole number of at least {least}.")


def positive(**named: float) -> None:
    """Each value is a finite number above 0."""
    for name, value in named.items():
        if not (_is_number(value) and value > 0):
            raise Refusal(f"Expected {name}={shown(value)} to be a finite number above 0.")


def not_negative(**named: float) -> None:
    """Each value is a finite number not below 0."""
    for name, value in named.items():
        if not (_is_number(value) and value >= 0):
            raise Refusal(f"Expected {name}={shown(value)} to be a finite number of at least 0.")


def in_float32(**named: float) -> None:
    """Each value is one that float32 can hold: beyond 3.4e38 it would be infinite, below 1.2e-38 nothing at all."""
    for name, value in named.items():
        # XLA flushes what is below the least normal number to zero: a rate of 1e-40 would train nothing and say so
        # nowhere.
        if value and not 1.1754944e-38 <= abs(value) <= 3.4028234e38:
            raise Refusal(f"Expected {name}={shown(value)} to be 0 or of a size from 1.2e-38 to 3.4e38 (float32).")


def boolean(**named: bool) -> None:
    """Each value is True or False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise Refusal(f"Expected {name}={shown(value)} to be True or False.")


def one_of(allowed: Iterable[str], **named: str) -> None:
    """Each value is one of the allowed words; the closest one is offered."""
    allowed = list(allowed)
    for name, value in named.items():
        # An array is compared entry by entry: `in` alone would ask for the truth of several values.
        if not isinstance(value, str) or value not in allowed:
            raise Refusal(f"Unknown {name} {shown(value)}{closest(value, allowed)} Allowed: {', '.join(allowed)}.")


def local_folder(**named: str | os.PathLike) -> Path:
    """The one path, with ~ expanded; nothing on disk is looked at.

    Addresses such as gs://bucket/run are refused: written as a path they would be a local folder called "gs:", and the
    run would be lost there or fail when it is saved.
    """
    ((name, value),) = named.items()
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise Refusal(f"Expected {name}={shown(value)} to be a folder.")
    # Path("gs://a") has one slash left; a single letter is a drive.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise Refusal(f"Expected {name}={shown(text)} to be a folder of this machine, not an address.")
    try:
        path = Path(text).expanduser()
        lengths = [len(os.fsencode(part)) for part in path.parts]
    except RuntimeError:
        raise Refusal(f"Expected {name}={shown(text)} to be a folder; there is no such home.") from None
    except UnicodeEncodeError:
        raise Refusal(f"Expected {name}={shown(text)} to be a folder; no file can have that name.") from None
    if max(lengths, default=0) > _MOST_NAME or sum(lengths) + len(lengths) > _MOST_PATH:
        raise Refusal(f"Expected {name}={shown(text)} to be a folder: File name too long.")
    return path


def shown(value: Any) -> str:
    """`repr` in one line of bounded length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # 10**5000, lists nested without end, a class of the caller's: the refusal matters, not its repr
        text = f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def closest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a full stop where nothing is near."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else "."


def _is_number(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def first_line(error: BaseException) -> str:
    """What an error of other people's code says, in one line without addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" ?\(https?://\S+\)", "", text)
    return text if len(text) <= 200 else text[:197] + "..."
