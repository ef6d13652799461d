"""Real processes for tests: started, watched for a sign of work, and struck at a moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
_PATIENCE = 300.0  # seconds for a process on a busy machine


class Child:
    """A Python process of its own, with what it prints in a file: a pipe that nobody reads would stop it.

    Args:
        arguments: of the interpreter.
        log: file for standard output and standard error together.
        cache: HARDJAX_CACHE; None takes one that lives as long as the tests' compilation cache.
    """

    def __init__(self, *arguments: object, log: Path, cache: Path | None = None) -> None:
        kept = cache or Path(jax.config.jax_compilation_cache_dir) / "processes"
        # This very code, wherever the package is installed.
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"HARDJAX_CACHE": str(kept), "PYTHONPATH": search, "TF_CPP_MIN_LOG_LEVEL": "2"}
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def ends(self, seconds: float = _PATIENCE) -> int:
        """Its exit code; negative for a signal."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.strike(signal.SIGKILL)
            raise AssertionError(f"no end after {seconds} s:\n{self.printed[-3000:]}") from None

    def shows(self, sign: Callable[[], object], seconds: float = _PATIENCE) -> bool:
        """Wait for a sign; False where the process ended without one."""
        until = time.monotonic() + seconds
        while not sign():
            if self.process.poll() is not None:
                return bool(sign())
            if time.monotonic() > until:
                self.strike(signal.SIGKILL)
                raise AssertionError(f"no sign after {seconds} s:\n{self.printed[-3000:]}")
            time.sleep(0.001)
        return True

    def strike(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.strike(signal.SIGKILL)
        self.process.wait()


def hardjax(*arguments: object, log: Path, cache: Path | None = None) -> Child:
    """`hardjax ...` as a user starts it."""
    return Child("-m", "hardjax", *arguments, log=log, cache=cache)
