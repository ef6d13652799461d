"""Workers of a sweep before they begin: the core that each takes, the orders that it reads."""

import os
import tempfile

import pytest

from hardjax.study import processes


@pytest.fixture
def descriptors(monkeypatch):
    """What `os.open` opened and nobody has closed; closed at the end."""
    held, open_, close = [], os.open, os.close

    def opening(*given):
        held.append(open_(*given))
        return held[-1]

    def closing(descriptor):
        held.remove(descriptor)
        close(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opening)
        patch.setattr(os, "close", closing)
        yield held
    for descriptor in held:
        close(descriptor)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are pinned on Linux alone")
def test_each_worker_takes_the_core_with_the_fewest(tmp_path, monkeypatch, descriptors):
    taken = []
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, found: taken.extend(found))
    monkeypatch.setattr(processes, "cores", lambda: [2, 5, 7])
    for core in (1, 1, 0, 0, 1):
        processes.pin(core)
    assert taken == [5, 7, 2, 2, 5] and len(descriptors) == 5
    os.close(descriptors[0])  # the first one ends
    processes.pin(0)
    assert taken[-1] == 5
    (tmp_path / "other").touch()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "other"))  # where no folder can be made
    processes.pin(2)
    assert taken[-1] == 7


def test_orders_are_read_line_by_line(monkeypatch):
    pieces = [b"ord", b"ers\nen", b"d\n", b"torn", b""]
    monkeypatch.setattr(os, "read", lambda descriptor, size: pieces.pop(0) if pieces else b"")
    left = bytearray()
    assert [processes._line(left) for _ in range(4)] == [b"orders\n", b"end\n", b"torn", b""]
