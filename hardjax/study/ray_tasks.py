"""Workers of a sweep as tasks of Ray, wherever its cluster has room.

Each claims cells of the shared folder as any other worker does, trains them, and ends; what it costs when one dies is
decided in `crew`, as for processes of this machine.
"""

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hardjax._validate import Refusal, first_line
from hardjax.study import processes

_CRASHED = 1  # Ray does not say how a process ended


class Task(NamedTuple):
    """A task and the owner of its leases."""

    result: Any
    owner: str


class RayTasks:
    """What `Crew` starts workers by, in place of the module `processes`.

    The cluster is that of RAY_ADDRESS, of a `ray.init` before, or a local one that ends with the block.

    Args:
        cpus, gpus: that each task asks the cluster for. With one processor a task has one thread on a core of its own.

    Raises:
        ValueError: Ray is not installed, or (on entering) there is no cluster.
    """

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0) -> None:
        self._ray, self._cpus, self._gpus = _imported(), cpus, gpus
        self._began, self._trained = False, self._ray.remote(trained)
        self._orders: dict[str, Any] = {}  # as JSON -> where Ray keeps them

    def __enter__(self) -> "RayTasks":
        if not self._ray.is_initialized():
            try:
                self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # Ray raises nothing narrower where a cluster does not start
                raise Refusal(f"Expected a cluster of Ray to work on: {first_line(error)}") from error
            self._began = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._began:
            self._ray.shutdown()

    def places(self) -> int:
        """Tasks that the cluster has room for now, one at least."""
        there = self._ray.cluster_resources()
        asked = {"CPU": self._cpus, "GPU": self._gpus}
        return max(1, min(int(there.get(name, 0) // each) for name, each in asked.items() if each))

    def start(self, orders: dict[str, Any], owner: str, core: int, environment: dict[str, str]) -> Task:
        """A worker that trains what it claims first, and ends; it waits until the cluster has room."""
        orders = orders | {"once": True, "at": os.getcwd(), "pinned": self._cpus == 1 and not self._gpus}
        text = json.dumps(orders, sort_keys=True)
        if text not in self._orders:  # once for all tasks: it holds every cell
            self._orders[text] = self._ray.put(orders)
        environment = dict(environment)
        if self._gpus:
            environment.pop("JAX_PLATFORMS")
        if orders["pinned"]:
            environment["XLA_FLAGS"] = processes.one_thread()
        # This very package, wherever the one that is installed lies.
        search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search)
        remote = self._trained.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_retries=0,  # `Crew` tries again, and counts what each cell costs
            runtime_env={"env_vars": environment},
        )
        return Task(remote.remote(self._orders[text], owner), owner)

    def ended(self, task: Task) -> int | None:
        """Its exit status; None while it is under way, or waits for room."""
        if not self._ray.wait([task.result], timeout=0)[0]:
            return None
        return self._outcome(task)[0]

    def _outcome(self, task: Task) -> tuple[int, str]:
        """(exit status, what it said) of one that ended."""
        try:
            return self._ray.get(task.result)
        except self._ray.exceptions.TaskCancelledError:
            return processes.MORE, ""
        except self._ray.exceptions.OutOfMemoryError:
            return -signal.SIGKILL, ""
        except self._ray.exceptions.RayError as error:
            crashed = isinstance(error, self._ray.exceptions.WorkerCrashedError)
            return _CRASHED, "" if crashed else " ".join(str(error).split())[:300]

    def told(self, code: int) -> str:
        """How a worker ended, in words."""
        return processes.told(code) if code < 0 else "without a word to Ray"

    def ask_to_end(self, tasks: Sequence[Task]) -> None:
        """Let them save the run under way and end; those that wait for room do not begin."""
        for task in tasks:
            self._ray.cancel(task.result)

    def end(self, task: Task, patience: float) -> int:
        """Wait for a task that was asked to end, or ended; kill it where it stands still. Returns its exit status."""
        self._ray.wait([task.result], timeout=patience)
        if self.ended(task) is None:
            self._ray.cancel(task.result, force=True)
            return -signal.SIGKILL
        code, line = self._outcome(task)
        if line:
            print(f"hardjax: worker: {line}", file=sys.stderr, flush=True)
        return code


def trained(orders: dict[str, Any], owner: str) -> tuple[int, str]:
    """A task, in a process of Ray's; (exit status, what it refused)."""
    from hardjax.training.signals import interruptible

    with suppress(OSError):  # networks of one's own may be files named from there
        os.chdir(orders["at"])
    if orders["pinned"]:
        _pin_once()
    try:
        with interruptible() as asked:  # Ray cancels a task by SIGINT
            processes.obey(orders | {"owner": owner}, asked)
    except Refusal as refusal:
        return processes.REFUSED, " ".join(str(refusal).split())
    except BaseException:
        traceback.print_exc()
        # The process with it, so that its lease ends: Ray would keep it for the next task.
        os._exit(_CRASHED)
    return processes.MORE, ""


@functools.cache
def _pin_once() -> None:
    processes.pin(0)


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise Refusal("Expected launcher='ray' with Ray installed: pip install 'hardjax[ray]'.") from None
    return ray
