"""What runs and comparisons left in their folders, read without jax and while they still write."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.training.lock import is_being_written

Entry = Mapping[str, Any]

_CONFIG, _HISTORY, _SUMMARY, _MARKER = "config.json", "history.jsonl", "summary.json", "hardjax.json"


@dataclass(frozen=True)
class Found:
    """The files of one run or comparison.

    Attributes:
        name: as a reader calls the folder.
        config: of a run, or what the arms of a comparison share.
        history: an entry a test point, or a run.
        summary: None while it runs, and where it was cut short.
        written: a process writes here now.
    """

    name: str
    config: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None
    written: bool

    @property
    def is_comparison(self) -> bool:
        return "arms" in self.config

    @property
    def status(self) -> str:
        """running, finished, interrupted, diverged, or cut short: no summary, and nobody writes."""
        if self.written:
            return "running"
        if self.summary is None:
            return "cut short"
        if self.summary.get("diverged") or self.summary.get("end") == "spectrum not finite":
            return "diverged"
        if self.summary.get("interrupted") or self.summary.get("end") == "interrupted":
            return "interrupted"
        return "finished"


def find(given: str) -> list[Path]:
    """The folder itself where it holds a run or a comparison, else those in it that do, by name.

    Raises:
        ValueError: there is none, or it cannot be looked at.
    """
    folder = _validate.local_folder(run=given)
    try:
        if folder.name == "checkpoint" and (folder.parent / _CONFIG).is_file():
            return [folder.parent]
        if (folder / _CONFIG).is_file():
            return [folder]
        # Other tools too call their files config.json: what nobody named must carry our marker.
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        held = [path for path in inside if (path / _CONFIG).is_file() and (path / _MARKER).is_file()]
    except OSError as error:
        raise Refusal(f"Expected run={_validate.shown(given)} to be readable: {error.strerror or error}.") from None
    if not held and (folder / "sweep.jsonl").is_file():
        given = _validate.shown(given)
        raise Refusal(f"Expected run={given} of a run or comparison, got a sweep: `hardjax sweep --plot` draws those.")
    if not held:
        raise Refusal(f"No run or comparison in {_validate.shown(given)}; `hardjax train --output` writes one.")
    return held


def read(folder: Path) -> Found:
    """The files in one of the folders that `find` gives.

    Raises:
        ValueError: a file is damaged or cannot be read.
    """
    # Asked first: a run that ends in between has its summary by the time that the files are read.
    written = is_being_written(folder)
    config = _load(folder / _CONFIG)
    assert config is not None
    return Found(str(folder), config, _lines(folder / _HISTORY), _load(folder / _SUMMARY, missing=True), written)


def number(value: Any) -> float:
    """A number of a file; NaN for null and for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def numbers(entries: Sequence[Entry], field: str) -> list[float]:
    """One field of every entry."""
    return [number(entry.get(field)) for entry in entries]


def _load(path: Path, missing: bool = False) -> dict[str, Any] | None:
    """A JSON object; None where it may be missing and is."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing:
            return None
        raise Refusal(f"No {path.name} in {str(path.parent)!r}.") from None
    except OSError as error:
        raise Refusal(f"Expected {str(path)!r} to be readable: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: {error}.") from None
    if not isinstance(content, dict):
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: no JSON object.")
    return content


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """JSON objects, one a line; a last line that is still being written, or was cut off, is left out."""
    try:
        lines = path.read_bytes().split(b"\n") if os.path.lexists(path) else []
    except OSError as error:
        raise Refusal(f"Expected {str(path)!r} to be readable: {error.strerror or error}.") from None
    found = []
    for place, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        elif place < len(lines):  # what follows the last newline is torn, or nothing
            raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: line {place} is no JSON object.")
    return tuple(found)
