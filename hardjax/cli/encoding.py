"""Text for terminals and pipes that cannot write all of Unicode: `PYTHONIOENCODING=ascii`, the C locale of a batch job.

A table that fails with UnicodeEncodeError at the end of a run loses hours.
"""

import codecs
from typing import Any

_NEAREST = {"±": "+-", "…": "...", "µ": "u", "·": "*"} | dict(zip("▁▂▃▄▅▆▇█", "_.-~=+*#", strict=True))
_HANDLER = "hardjax.nearest"


def degrade(*streams: Any) -> None:
    """Let these text streams write what they cannot encode as the nearest ASCII; never an exception."""
    codecs.register_error(_HANDLER, _nearest)
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # not what tests and notebooks put in its place
            stream.reconfigure(errors=_HANDLER)


def writable(text: str, stream: Any) -> str:
    """The text as this stream will write it, for what is laid out by width before it is written."""
    name = getattr(stream, "encoding", None) or "utf-8"
    codecs.register_error(_HANDLER, _nearest)
    return text.encode(name, _HANDLER).decode(name)


def _nearest(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_NEAREST.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
