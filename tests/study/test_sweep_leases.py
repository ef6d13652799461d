"""Leases: when somebody's hold on a cell ends, and when it does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hardjax.study import leases
from hardjax.study.leases import Leases


@pytest.fixture
def two(tmp_path):
    """A worker with a lease, and an observer; both are this process."""
    worker, observer = (Leases(tmp_path, owner, expiry=60.0) for owner in ("worker", "observer"))
    worker.take(["one", "two"])
    return worker, observer


def _held(observer, now):
    return [cell for lease in observer.living(now) for cell in lease.cells]


def test_a_lease_holds_while_it_is_renewed(two):
    worker, observer = two
    for now in range(0, 1000, 10):
        assert _held(observer, now) == ["one", "two"]
        worker.renew()
    worker.take(["three"])
    assert _held(observer, 1000.0) == ["three"]
    worker.release()
    assert _held(observer, 1000.0) == [] and observer.living() == []
    worker.renew()  # nothing to renew
    assert not worker.knows("worker") and observer.living() == []


def test_a_heartbeat_that_stands_still_ends_a_lease_by_the_observers_clock(two):
    worker, observer = two
    assert _held(observer, 0.0) and _held(observer, 15.0) and _held(observer, 30.0) and _held(observer, 59.9 - 15)
    assert _held(observer, 59.9)
    assert not _held(observer, 60.0)
    # Woken: its lease holds again, though another worker may have taken the cells by then.
    worker.renew()
    assert _held(observer, 61.0)


def test_an_observer_that_was_away_takes_nothing_for_the_others_absence(two):
    _, observer = two
    assert _held(observer, 0.0)
    assert _held(observer, 10_000.0)  # one look, however late, counts for a quarter of the time
    assert _held(observer, 20_000.0) and _held(observer, 30_000.0)
    assert not _held(observer, 40_000.0)


def test_no_clock_is_compared(two, tmp_path):
    """A file from the future, or from long ago, is one that has not been looked at yet."""
    _, observer = two
    for when in (0, 4_000_000_000):
        os.utime(tmp_path / "worker.json", (when, when))
        assert _held(observer, 5.0)


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="only Linux tells when a process was started")
def test_a_dead_process_ends_its_lease_at_once(process, tmp_path, monkeypatch):
    worker, observer = (Leases(tmp_path, owner) for owner in ("worker", "observer"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        worker.take(["one"])
    assert _held(observer, 0.0) == ["one"]
    process.send_signal(signal.SIGSTOP)  # it may be woken
    assert _held(observer, 1.0) == ["one"]
    process.kill()
    until = time.monotonic() + 30
    while leases.started(process.pid) is not None:  # from here on a zombie: nobody has asked after it
        assert time.monotonic() < until
    assert process.returncode is None and _held(observer, 2.0) == []
    assert worker.knows("worker")  # the lease is left for the one who started it
    # Another process of the same number is not the one that held it.
    with monkeypatch.context() as patch:
        patch.setattr(leases, "started", lambda pid: "later")
        assert _held(observer, 3.0) == []


def test_a_dead_process_of_another_machine_is_not_looked_for(tmp_path, monkeypatch):
    worker, observer = (Leases(tmp_path, owner) for owner in ("worker", "observer"))
    with monkeypatch.context() as patch:
        patch.setattr(leases, "this_host", lambda: "elsewhere")
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # beyond the largest number that Linux gives
        worker.take(["one"])
    assert [_held(observer, now) for now in (0.0, 15.0, 30.0, 45.0)] == [["one"]] * 4
    assert _held(observer, 60.0) == []


def test_a_damaged_lease_holds_nothing(tmp_path):
    (tmp_path / "worker.json").write_text('{"owner": "worker"')
    assert Leases(tmp_path, "observer").living(0.0) == []
