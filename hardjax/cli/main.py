"""`hardjax COMMAND`: finds the command, and turns what went wrong into a line and an exit code.

Only names and one line each are known here; a command is imported when it is called, so that `hardjax --help` answers
at once.
"""

import importlib
import os
import signal
import sys
import warnings
from typing import Any

from hardjax import _validate
from hardjax._validate import Refusal
from hardjax._version import __version__
from hardjax.cli import encoding

COMMANDS = {  # name -> one line; the module hardjax.cli.NAME has `run(arguments) -> exit code`
    "train": "Train one network and write to a folder: configuration, history, summary, checkpoint, pictures.",
    "compare": "Ways of choosing against ordinary training and its controls, over seeds: a table and a picture.",
    "sweep": "A grid of runs, by several processes at once: a row a cell in sweep.jsonl, and pictures drawn from it.",
    "table": "Published tables, figures and claims: list them (without an action), show, run, copy or plot one.",
    "show": "Status, curves and verdict of runs and comparisons, finished or running, from their files.",
    "measure": "Read the spectra that runs recorded, with any tolerance, measure their final states, and draw both.",
    "data": "List, prepare or check data sets.",
    "models": "List the networks with their sizes beside the published ones.",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 on what is refused, 130 when interrupted.

    Any other exception is a fault of ours and keeps its traceback (exit 1).
    """
    encoding.degrade(sys.stdout, sys.stderr)
    warnings.showwarning = _show_warning
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except Refusal as refusal:
        print(f"hardjax: {' '.join(str(refusal).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        print("hardjax: interrupted.", file=sys.stderr)
        code = 128 + signal.Signals[getattr(error, "signal", None) or "SIGINT"]
    except BrokenPipeError:
        # The reader has gone (`hardjax data list | head -1`); the interpreter must not try to flush again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """What a run goes on after, as a line of ours; other people's warnings as Python shows them."""
    if category.__module__.startswith("hardjax."):
        print(f"hardjax: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *rest[:2]))


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command in ("", "-h", "--help"):
        print(_help(), file=sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if command == "--version":
        print(f"hardjax {__version__}")
        return 0
    _validate.one_of(COMMANDS, command=command)
    return importlib.import_module(f"hardjax.cli.{command}").run(rest)


def _help() -> str:
    lines = ["usage: hardjax COMMAND [OPTIONS]", "", "Choosing what a network trains on.", "", "commands:"]
    lines += [f"  {name:<9}{about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "hardjax COMMAND --help lists the options of a command; hardjax --version."])
