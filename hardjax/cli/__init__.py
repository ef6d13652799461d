"""The command line: `hardjax COMMAND`. Arguments become calls of the library; what comes back is printed."""

from hardjax.cli.main import main

__all__ = ["main"]
