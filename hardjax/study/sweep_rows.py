"""`sweep.jsonl` as it is read: rows of one version, each cell once."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardjax._validate import Refusal
from hardjax.study.cells import ROW_VERSION, key_of
from hardjax.study.outcomes import FAILED
from hardjax.training import files, lines

Row = dict[str, Any]


def key_of_row(row: Mapping[str, Any]) -> str:
    """The key of the cell that a row is of, by the settings of this version."""
    return key_of(row["config"], row["data"], row.get("network"))


def read_rows(folder: str | os.PathLike) -> list[Row]:
    """The rows of a sweep, whole, each cell once; also while it is written.

    Raises:
        ValueError: there is none, it is damaged or of another version.
    """
    path = Path(folder) / files.SWEEP_ROWS
    if not path.is_file():
        raise Refusal(f"No sweep in {str(folder)!r}; `hardjax sweep --output` writes one.")
    found: dict[str, Row] = {}
    for row in lines.read_lines(path):
        _check_version(row, path)
        found.setdefault(key_of_row(row), row)
    return list(found.values())


def done_in(folder: Path, failed: bool = True) -> set[str]:
    """Keys of the cells that have a row; none where there is no sweep yet.

    Args:
        failed: those too whose rows say that they failed.
    """
    rows = read_rows(folder) if (folder / files.SWEEP_ROWS).is_file() else []
    return {key_of_row(row) for row in rows if failed or row["status"] != FAILED}


def row_in(line: bytes, path: Path) -> Row:
    """The row that a line of `sweep.jsonl` holds.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: a line is no JSON.") from None
    _check_version(row, path)
    return row


def _check_version(row: Any, path: Path) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("config"), dict) or "data" not in row:
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: a line is no row of a sweep.")
    if row.get("row_version") != ROW_VERSION:
        raise Refusal(
            f"The rows in {str(path)!r} are of version {row.get('row_version')}, this hardjax writes {ROW_VERSION}:"
            " name another folder."
        )
