"""What commands print: tables, and values as a reader wants them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardjax.cli.encoding import writable


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same columns, numbers to the right; box characters and signs as the terminal can write them."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=writable(title, sys.stdout))
    for name in rows[0]:
        numeric = all(isinstance(row[name], int | float) or str(row[name])[:1] in "+-0123456789" for row in rows)
        shown.add_column(writable(name, sys.stdout), justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(writable(value(cell), sys.stdout) for cell in row.values()))
    console = Console()
    # No markup: a folder called "[/b]" is not the end of bold type. 160 columns on a pipe, where rich would take 80.
    Console(width=None if console.is_terminal else 160, markup=False, emoji=False, highlight=False).print(shown)


def value(cell: Any) -> str:
    """Four digits of a number, thousands apart in a whole one, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def picture(path: Path, draw: Callable[[], Any]) -> bool:
    """Save the figure that `draw` returns; the last thing a command does with its results, written by then.

    Whatever goes wrong while drawing (a font, a backend, a full disk) costs hours of training if it ends the command,
    and nothing if it is a line of warning: the numbers can be drawn again. So any exception is caught here, and only
    here.
    """
    try:
        draw().savefig(path, dpi=120)
    except Exception as error:
        reason = " ".join(str(error).split())
        print(f"hardjax: {path.name} could not be drawn ({type(error).__name__}: {reason})", file=sys.stderr)
        path.unlink(missing_ok=True)
        return False
    return True
