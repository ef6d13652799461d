"""The one that waits for the workers of a sweep: who ended, who is replaced, who is killed."""

import subprocess
import sys
import threading

import pytest
from sweeps import cells, row

from hardjax._validate import Refusal
from hardjax.study import crew, leases, processes
from hardjax.study.crew import Crew
from hardjax.study.ledger import Ledger, opened
from hardjax.study.processes import Worker

EVER = "import time; time.sleep(600)"


@pytest.fixture
def held(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "_POLL", 0.01)
    monkeypatch.setattr(crew, "_GRACE", 0.0)
    monkeypatch.setattr(leases, "started", lambda pid: None)  # leases are of this process, which must not hold them
    with opened(tmp_path, "parent") as ledger:
        yield ledger


@pytest.fixture
def workers(held, monkeypatch):
    """Processes in place of workers: `program` is what they run, `claim` what they do to the ledger before."""
    found = Workers(held)
    monkeypatch.setattr(processes, "start", found.start)
    return found


class Workers:
    def __init__(self, held):
        self.held, self.started, self.modes = held, [], []
        self.program, self.claim = EVER, lambda ledger: None

    def start(self, orders, owner, core, environment):
        self.modes.append(orders["performance"]["population"])
        self.claim(Ledger(self.held.folder, owner))
        process = subprocess.Popen([sys.executable, "-c", self.program], stdin=subprocess.PIPE)
        self.started.append(process)
        return Worker(process, owner)


def _conduct(held, given, over=lambda: False, count=1):
    with Crew(held, given, count, None, 60.0) as found:
        found.conduct(over, lambda: None)


@pytest.mark.parametrize(
    "end, how",
    [
        ("raise SystemExit(0)", "with exit status 0"),
        ("raise SystemExit(1)", "with exit status 1"),
        ("raise SystemExit(130)", "with exit status 130"),
        ("import os; os.kill(os.getpid(), 9)", "by SIGKILL"),
    ],
)
def test_a_worker_that_ends_while_cells_are_left_is_replaced_and_counted(held, workers, end, how):
    deadly, other = cells(2)
    workers.program = end

    def claim(ledger):
        if len(workers.started) < 3:
            assert ledger.claim([deadly, other]) == [deadly]
        else:
            assert ledger.claim([deadly, other]) == [other] and ledger.add(row(other))

    workers.claim = claim
    _conduct(held, [deadly, other])
    assert len(workers.started) == 4 and held.rows[other.key]["status"] == "done"
    reason = held.rows[deadly.key]["reason"]
    assert reason.startswith(f"3 processes ended {how} while they trained it")
    assert ("out of memory" in reason) == (how == "by SIGKILL")


def test_after_a_chunk_that_cost_a_worker_the_next_one_trains_one_by_one(held, workers):
    deadly, *others = cells(3)
    workers.program = "raise SystemExit(1)"

    def claim(ledger):
        if len(workers.started) == 0:
            assert len(ledger.claim([deadly, *others], most=lambda shape: 3)) == 3
        elif len(workers.started) < 4:
            assert ledger.claim([deadly, *others]) == [deadly]
        else:
            for other in others:
                assert ledger.claim([deadly, *others]) == [other] and ledger.add(row(other))

    workers.claim = claim
    _conduct(held, [deadly, *others])
    # The chunk's end counts for none of its cells: three more, alone, are the guilty one's.
    assert workers.modes == [None, "workers", "workers", "workers", None]
    assert [held.rows[one.key]["status"] for one in (deadly, *others)] == ["failed", "done", "done"]


def test_a_worker_that_refused_is_not_replaced(held, workers):
    workers.program, workers.claim = "raise SystemExit(2)", lambda ledger: ledger.claim(cells(1))
    with pytest.raises(Refusal, match="ended with 1 cells left"):
        _conduct(held, cells(1))
    assert len(workers.started) == 1 and not held.rows


def test_a_worker_that_was_asked_to_end_is_not_replaced(held, workers):
    workers.program, workers.claim = "input()", lambda ledger: ledger.claim(cells(1))
    _conduct(held, cells(1), over=lambda: workers.started)
    assert len(workers.started) == 1 and workers.started[0].returncode == 0 and not held.rows


def test_a_worker_that_stands_still_when_it_is_asked_to_end_is_killed(held, workers, monkeypatch):
    monkeypatch.setattr(crew, "_TO_SAVE", 0.1)
    conduct = threading.Thread(target=_conduct, args=(held, cells(1)), kwargs={"over": lambda: workers.started})
    conduct.start()
    conduct.join(60)
    stuck = conduct.is_alive()
    for process in workers.started:
        process.kill()
    conduct.join()
    assert not stuck and not held.rows


def test_a_worker_that_was_to_claim_no_more_is_followed_by_another_and_costs_nothing(held, workers):
    given = cells(3)
    workers.program = f"raise SystemExit({processes.MORE})"

    def claim(ledger):
        (taken,) = ledger.claim(given)
        assert ledger.add(row(taken))

    workers.claim = claim
    _conduct(held, given)
    assert len(workers.started) == 3 and {row["status"] for row in held.rows.values()} == {"done"}
