"""Real processes for tests: started, watched for a sign of work, and struck at a moment."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
_PATIENCE = 300.0  # seconds for a process on a busy machine


class Child:
    """A Python process of its own.

    Args:
        arguments: of the interpreter.
        cache: HARDJAX_CACHE; None takes one that lives as long as the tests' compilation cache.
    """

    def __init__(self, *arguments: object, cache: Path | None = None) -> None:
        kept = cache or Path(jax.config.jax_compilation_cache_dir) / "processes"
        # This very code, wherever the package is installed.
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"HARDJAX_CACHE": str(kept), "PYTHONPATH": search, "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        # A file would meet the limits that are set on those of the process; a pipe that nobody reads would stop it.
        self._printed: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            self._printed += pipe

    @property
    def printed(self) -> str:
        """Standard output and standard error so far, to the last whole line."""
        if self.process.poll() is not None:
            self._reader.join(10)
        return b"".join(self._printed).decode()

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
