"""`sweep.jsonl` as it is read: rows of one version, each cell once."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax.choose.batch_plan import BatchPlan
from hardjax.study.cells import ROW_VERSION, key_of
from hardjax.study.outcomes import FAILED, STATUSES
from hardjax.training import files, lines
from hardjax.training.resume import with_defaults

Row = dict[str, Any]

_READ = ("median_test_top1", "median_validation_top1", "chance_top1", "first_class_top1")  # by figures


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
        check_row(row, path)
        found.setdefault(key_of_row(row), row)
    return list(found.values())


def done_in(folder: Path, failed: bool = True) -> set[str]:
    """Keys of the cells that have a row; none where there is no sweep yet.

    Args:
        failed: those too whose rows say that they failed.
    """
    rows = read_rows(folder) if (folder / files.SWEEP_ROWS).is_file() else []
    return {key_of_row(row) for row in rows if failed or row["status"] != FAILED}


def check_row(row: Any, path: Path) -> None:
    """Raises ValueError for what is no row of this version."""
    if not isinstance(row, dict) or not isinstance(row.get("config"), dict) or "data" not in row:
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: a line is no row of a sweep.")
    if row.get("row_version") != ROW_VERSION:
        raise Refusal(
            f"The rows in {str(path)!r} are of version {row.get('row_version')}, this hardjax writes {ROW_VERSION}:"
            " name another folder."
        )
    if not (_is_outcome(row) and _is_configuration(with_defaults(row["config"]))):
        raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: a line is no row of a sweep.")


def _is_outcome(row: Mapping[str, Any]) -> bool:
    metrics, history = row.get("metrics"), row.get("history")
    if row.get("status") not in STATUSES or not isinstance(row["data"], str) or not isinstance(metrics, dict):
        return False
    if row["status"] == FAILED:
        return True
    columns = list(history.values()) if isinstance(history, dict) else []
    return (
        isinstance(metrics.get("converged"), bool)
        and all(_is_number(metrics.get(name)) for name in _READ)
        and "epoch" in (history or ())
        and all(isinstance(column, list) and all(map(_is_number, column)) for column in columns)
        and None not in history["epoch"]
    )


def _is_configuration(config: Mapping[str, Any]) -> bool:
    """What figures read of one; the rest may be a strategy of one's own, of which nothing is known."""
    plan = config["batch_plan"]
    try:
        if plan is not None:
            BatchPlan(plan["text"])
        for name in ("batch_size", "epochs"):
            _validate.at_least(1, **{name: config[name]})
        for name in ("learning_rate", "base_learning_rate"):
            if config[name] is not None:
                _validate.positive(**{name: config[name]})
        _validate.at_least(0, seed=config["seed"])
    except (Refusal, KeyError, TypeError):
        return False
    return all(isinstance(config[name], str) for name in ("model", "dataset"))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
