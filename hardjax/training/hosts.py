"""Several processes, of several machines perhaps, that train one run together by `jax.distributed`: how they find each
other, what they tell each other, and how the loss of one ends the others.

All of them do the same in the same order. What a process alone would decide by its clock, its signals or its disk they
decide together here; files and screen are those of the first, process 0.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hardjax._validate import Refusal, at_least, first_line
from hardjax.engine import devices
from hardjax.training import lines
from hardjax.training.signals import Asked

LOST_AFTER = 30  # seconds without a heartbeat of a process after which the others end
_WAIT = 300  # seconds for all processes to come
_LAST_WORDS = 1.0  # seconds
_NO_BOUND = 2**31 - 1
_LOST = "another process of this job was lost, or has ended"
_NEXT = "the same command of all processes with --resume goes on from the newest checkpoint"
# Written for the handler of a signal, which must not depend on what Python is at.
_LAST_LINE = f"hardjax: {_LOST} (no heartbeat); {_NEXT}.\n".encode()
_handlers: list[Any] = []  # C keeps an address alone


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    lost_after: int = LOST_AFTER,
) -> None:
    """Become one of the processes of a job, before anything is computed; waits for the others.

    From here on the process ends with status 1 and a line of its own where the heartbeats of another one stand still.

    Args:
        coordinator: "address:port" at which process 0 listens; all three None: as Slurm, Open MPI or a TPU says.
        processes: how many there are.
        process_id: which one this is, from 0.
        lost_after: seconds without a heartbeat.

    Raises:
        ValueError: some of the three alone, values out of range, or nothing says who takes part.
    """
    _check(coordinator, processes, process_id, lost_after)
    # Its notifier would take SIGTERM from Python, which saves the run at it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _end_at_abort()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=_WAIT,
            heartbeat_timeout_seconds=lost_after,
        )
    except (ValueError, RuntimeError) as error:
        given = "Slurm, Open MPI and TPUs do" if coordinator is None else f"coordinator={coordinator!r} is given"
        raise Refusal(
            f"Expected to find the other processes of this job ({given}; else give --coordinator, --processes and"
            f" --process-id): {first_line(error)}"
        ) from error


def _check(coordinator: str | None, processes: int | None, process_id: int | None, lost_after: int) -> None:
    at_least(1, lost_after=lost_after)
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    if lacking := [name for name, value in given.items() if value is None]:
        if len(lacking) < len(given):
            raise Refusal(f"Expected coordinator, processes and process_id together; {', '.join(lacking)} not given.")
        return
    if not re.fullmatch(r".+:\d{1,5}", str(coordinator)):
        raise Refusal(f"Expected coordinator={coordinator!r} as address:port, such as 10.0.0.1:1234.")
    assert processes is not None
    at_least(1, processes=processes)
    at_least(0, process_id=process_id)
    if process_id >= processes:
        raise Refusal(f"Expected process_id={process_id} below processes={processes}.")


def _end_at_abort() -> None:
    """Where heartbeats fail jaxlib aborts the process, after pages of its own: end with one line of ours and 1."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def end(number: int) -> None:
        os.write(2, _LAST_LINE)
        os._exit(1)

    # Not Python's `signal`, whose handlers run in the main thread, when abort() has long killed the process.
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    _handlers.append(end)
    library.signal(int(signal.SIGABRT), ctypes.cast(end, ctypes.c_void_p))


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this is the process that writes files and the screen."""
    return jax.process_index() == 0


def check_alone(what: str) -> None:
    """Raises ValueError where this is one of several processes, which train single runs alone."""
    if several():
        raise Refusal(
            f"Expected one process for {what}, got {jax.process_count()} of jax.distributed: together they train single"
            " runs (hj.run, hardjax train)."
        )


@contextmanager
def together(what: str) -> Iterator[None]:
    """A block that all processes go through: what one of them refuses, all refuse.

    Args:
        what: each of them is to do in it, for those that could.

    Raises:
        ValueError: this process or another one cannot.
    """
    refused: Refusal | None = None
    try:
        yield
    except Refusal as refusal:
        refused = refusal
    found = multihost_utils.process_allgather(np.int32(refused is not None)) if several() else np.zeros(1, np.int32)
    if refused is not None:
        raise refused
    if found.any():
        raise Refusal(f"Process {int(found.argmax())} of this job cannot {what}; its own line says why.")


def told(value: int) -> int:
    """What process 0 gives, below 2^31."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def check_same(facts: Mapping[str, Any]) -> None:
    """Look whether all processes were given the same.

    Raises:
        ValueError: one of them was not, naming what differs.
    """
    if not several():
        return
    sums = [zlib.crc32(lines.encode(json.loads(lines.encode(value))).encode()) & 0x7FFFFFFF for value in facts.values()]
    found = multihost_utils.process_allgather(np.array(sums, np.int32))
    apart = found != found[0]
    if apart.any():
        process, place = (int(axis[0]) for axis in np.nonzero(apart))
        raise Refusal(
            f"Expected the same {list(facts)[place]} in all processes of this job; process {process} has another."
        )


class Accord:
    """What the processes of a run decide together while they train, without standing still: the wishes of each travel
    behind a dispatch, and are read when the next one has been handed out.

    Args:
        mesh: of the run.
        asked: of this process.
    """

    def __init__(self, mesh: Mesh | None, asked: Asked) -> None:
        self._mesh = mesh if devices.spans_processes(mesh) else None
        self._asked, self._called = asked, 0
        self._under_way: Array | None = None
        if self._mesh is not None:
            everywhere = devices.everywhere(self._mesh)
            self._gather = jax.jit(lambda wishes: wishes.max(0), out_shardings=everywhere)

    @property
    def asked(self) -> bool:
        """Whether the run was asked to end, by a signal to any of the processes."""
        return bool(self._asked) if self._mesh is None else self._called > 0

    def exchange(self, bound: int | None) -> int | None:
        """Hand out what this process wishes; returns the least number of steps in a dispatch that any of them wished
        the time before, or None."""
        if self._mesh is None:
            return bound
        before, mine = self._under_way, [int(self._asked.signal or 0), -(_NO_BOUND if bound is None else bound)]
        wishes = np.broadcast_to(np.array(mine, np.int32), (self._mesh.size, 2))
        self._under_way = self._gather(devices.place(wishes, devices.over_axis(self._mesh, 0)))
        if before is None:
            return None
        called, least = (int(number) for number in np.asarray(before))
        if called and not self._called:
            self._called = called
            self._asked.signal = self._asked.signal or signal.Signals(called)
        return None if -least == _NO_BOUND else -least


def end(error: BaseException) -> None:
    """End this process of several after an error: with its status, and without waiting for the others, which are told
    by the loss of this one."""
    if isinstance(error, Refusal):
        name = "" if leads() else f"process {jax.process_index()}: "
        print(f"hardjax: {name}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if leads():  # its end ends all: the others may have lines of their own to say
            time.sleep(_LAST_WORDS)
        _leave(2)
    if is_loss(error):
        print(f"hardjax: {_LOST} ({first_line(error)}); {_NEXT}.", file=sys.stderr)
        _leave(1)
    if isinstance(error, KeyboardInterrupt):
        _leave(130)
    sys.excepthook(type(error), error, error.__traceback__)
    _leave(1)


def is_loss(error: BaseException) -> bool:
    """Whether an error of the runtime says that another process does not answer."""
    # Gloo's come as ValueError where a result is read.
    words = ("Gloo", "NCCL", "UNAVAILABLE", "closed by peer", "Connection reset")
    return isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(word in str(error) for word in words)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: jax waits for all processes at a regular end.
    os._exit(code)
