"""Workers of a sweep as processes: one a core, pinned, with one thread each; they die with the one that started them.

`main` is a worker's. It reads one line of orders from its standard input, and that pipe is the tie to its parent: "end"
asks it to end (saved), its end means that the parent is gone. What decides the number of
XLA's threads must be set before jax is imported, so nothing of ours is imported at the top.
"""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# With these and a core each, two workers make 1.4 to 1.9 times the runs an hour of one that has both cores (2 cores).
_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_PATIENCE = 0.5  # seconds for a signal of the terminal to arrive by itself
_PLACES = 8  # workers on a core that are told apart
_END = b"end\n"
REFUSED = 2  # exit status of a worker that said why it cannot go on: another one could not either
MORE = 3  # of one that trained what it had claimed, and was to claim no more
# This very package, wherever the one that is installed lies; no file of the present folder is taken for a module.
_MAIN = """
import sys
if {root!r} not in sys.path: sys.path.insert(0, {root!r})
from hardjax.study.processes import main
sys.exit(main())
"""


class Worker(NamedTuple):
    """A process and the owner of its leases."""

    process: subprocess.Popen
    owner: str


def cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def start(orders: dict[str, Any], owner: str, core: int, environment: dict[str, str], *, heard: bool = False) -> Worker:
    """A worker, on a core of its own as far as there are free ones.

    Args:
        orders: JSON, see `obey`.
        owner: of its leases.
        core: place in `cores()` from which it looks for one.
        environment: variables beside those of this process.
        heard: read what it prints.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _MAIN.format(root=str(Path(__file__).parents[2]))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if heard else subprocess.DEVNULL,
        env=os.environ | environment | {"XLA_FLAGS": one_thread()},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died at once, which its exit code will say
        process.stdin.write(json.dumps(orders | {"owner": owner, "core": core}).encode() + b"\n")
        process.stdin.flush()
    return Worker(process, owner)


def one_thread() -> str:
    """XLA_FLAGS of a worker with one thread."""
    return " ".join(filter(None, [os.environ.get("XLA_FLAGS"), _ONE_THREAD]))


def ended(worker: Worker) -> int | None:
    """Its exit code; None while it works."""
    return worker.process.poll()


def told(code: int) -> str:
    """How a worker ended, in words."""
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"


def ask_to_end(workers: Sequence[Worker]) -> None:
    """Let them save the run under way and end."""
    for worker in workers:
        with suppress(OSError):
            worker.process.stdin.write(_END)  # type: ignore[union-attr]
            worker.process.stdin.flush()  # type: ignore[union-attr]


def end(worker: Worker, patience: float) -> int:
    """Wait for a worker that was asked to end, or ended; kill it where it stands still. Returns its exit code."""
    try:
        code = worker.process.wait(patience)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        code = worker.process.wait()
    with suppress(OSError):  # what it has not read
        worker.process.stdin.close()  # type: ignore[union-attr]
    return code


def obey(orders: dict[str, Any], asked: Any) -> None:
    """Do what the orders say, until they are done or until it is asked to end.

    Args:
        orders: cells, performance, folder, owner, expiry and workers of a sweep; with "estimate", cells to try; with
            "once", end after the cells that were claimed first.
        asked: looked at between two cells.
    """
    from hardjax.study import ledger, work
    from hardjax.study.cells import Cell

    cells = [Cell.from_dict(one) for one in orders["cells"]]
    trainer = _trainer(json.dumps(orders["performance"]))
    if "estimate" in orders:  # also of no cell, where nothing is left
        from hardjax.study.estimate import tried

        # What a network of one's own prints is no answer.
        with os.fdopen(os.dup(1), "w") as answers:
            os.dup2(2, 1)
            for cell, places in zip(cells, orders["estimate"], strict=True):
                print(json.dumps(tried(trainer, cell, places)), file=answers, flush=True)
        return
    with ledger.opened(orders["folder"], orders["owner"], orders["expiry"]) as held:
        once = bool(orders.get("once"))
        work.work(held, cells, trainer, lambda: asked, workers=orders["workers"], once=once)


@functools.lru_cache(maxsize=2)
def _trainer(performance: str) -> Any:
    """One of a process, which may be given several orders: data is read once."""
    from hardjax.config import Performance
    from hardjax.study.work import Trainer

    return Trainer(performance=Performance(**json.loads(performance)))


def pin(core: int) -> None:
    """Take one core, until the process ends: the one with the fewest workers of this user, of any sweep.

    Two workers on one core would take twice as long.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    from hardjax.training.lock import hold

    allowed = cores()
    order = allowed[core % len(allowed) :] + allowed[: core % len(allowed)]
    folder = Path(tempfile.gettempdir()) / f"hardjax-cores-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        # A lock for the first worker on each core, then one for the second ...
        for place, free in itertools.product(range(_PLACES), order):
            descriptor = os.open(folder / f"{free}-{place}", os.O_RDWR | os.O_CREAT, 0o600)
            if hold(descriptor, patience=0):
                os.sched_setaffinity(0, {free})
                return
            os.close(descriptor)
    os.sched_setaffinity(0, {order[0]})


def _line(left: bytearray) -> bytes:
    """The next line of standard input, b"" at its end; what was read behind it is left."""
    # Not through sys.stdin: a thread that waits in its buffer keeps the interpreter from ending.
    while b"\n" not in left and (more := os.read(0, 1 << 16)):
        left += more
    line, newline, rest = bytes(left).partition(b"\n")
    left[:] = rest
    return line + newline


def _watch(left: bytearray) -> None:
    """End with the parent; on its word, end after saving."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    os.set_blocking(heard, False)
    # Which signals have come, whoever handles them: a second one would end the run without saving it.
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def watch() -> None:
        if _line(left) == _END:
            time.sleep(_PATIENCE)
            come: set[int] = set()
            with suppress(BlockingIOError):
                come = set(os.read(heard, 64))
            if not come & {signal.SIGINT, signal.SIGTERM}:
                os.kill(os.getpid(), signal.SIGTERM)
            _line(left)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_one_line(message: Warning | str, category: type[Warning], *rest: object) -> str:
    return f"hardjax: worker: {category.__name__}: {' '.join(str(message).split())}\n"


def main() -> int:
    """A worker's whole life; returns its exit code."""
    left = bytearray()
    orders = json.loads(_line(left))
    pin(orders["core"])
    _watch(left)
    from hardjax._validate import Refusal
    from hardjax.training.signals import interruptible

    warnings.formatwarning = _in_one_line
    try:
        with interruptible() as asked:
            obey(orders, asked)
    except Refusal as refusal:
        print(f"hardjax: worker: {' '.join(str(refusal).split())}", file=sys.stderr, flush=True)
        return REFUSED
    except KeyboardInterrupt:
        return 130
    return 0
