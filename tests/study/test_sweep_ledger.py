"""The ledger of a sweep: every cell at most once, whoever writes, whatever is torn."""

import contextlib
import json
import os
import threading

import pytest
from sweeps import cells, row

from hardjax._validate import Refusal
from hardjax.study import ledger as ledgers
from hardjax.study.ledger import Ledger, check, opened
from hardjax.study.sweep_rows import done_in, read_rows
from hardjax.training import lock


@pytest.fixture
def ledger(tmp_path):
    with opened(tmp_path / "sweep", "first") as held:
        yield held


def _file(ledger):
    return ledger.folder / "sweep.jsonl"


def _workers(ledger):
    return [line["worker"] for line in map(json.loads, _file(ledger).read_text().splitlines())]


def test_a_row_that_comes_late_is_dropped(ledger):
    (cell,) = cells(1)
    other = Ledger(ledger.folder, "second")
    assert other.add(row(cell, worker="second"))
    assert not ledger.add(row(cell, worker="first"))
    ledger.merge()
    assert _workers(ledger) == ["second"]


def test_claims_go_round(ledger):
    other = Ledger(ledger.folder, "second")
    given = cells(3)
    assert ledger.claim(given) == given[:1] and other.claim(given) == given[1:2]
    assert Ledger(ledger.folder, "third").claim(given) == given[2:]
    assert Ledger(ledger.folder, "fourth").claim(given) == []
    ledger.add(row(given[0]))
    assert ledger.claim(given) == []  # what it held is done, the rest is held by others
    other.release()
    assert ledger.claim(given) == given[1:2]
    for cell in given[1:]:
        other.add(row(cell))
    assert ledger.claim(given) is None


def test_a_worker_stays_with_a_shape_and_keeps_out_of_that_of_another(ledger):
    given = cells(2) + cells(2, batch_size=32) + cells(1, batch_size=64)
    other = Ledger(ledger.folder, "second")
    assert ledger.claim(given) == given[:1]
    assert other.claim(given) == given[2:3]  # another shape, though a cell of the first one is free
    ledger.add(row(given[0]))
    assert ledger.claim(given, given[0].shape) == given[1:2]
    other.add(row(given[2]))
    assert other.claim(given, given[2].shape) == given[3:4]
    ledger.add(row(given[1]))
    assert ledger.claim(given, given[1].shape) == given[4:]


def test_several_cells_of_one_shape_may_be_one_claim(ledger):
    given = cells(3) + cells(2, batch_size=32)
    assert ledger.claim(given, most=lambda shape: 2) == given[:2]
    assert Ledger(ledger.folder, "second").claim(given, given[0].shape, lambda shape: 4) == given[2:3]


def test_a_torn_line_is_repaired(ledger):
    first, second, third = cells(3)
    ledger.add(row(first))
    with _file(ledger).open("ab") as file:
        file.write(b'{"row_version": 1, "key": "')
    assert len(read_rows(ledger.folder)) == 1
    again = Ledger(ledger.folder, "second")
    again.add(row(second))
    with _file(ledger).open("ab") as file:
        file.write(b"\0\0\0")
    ledger.add(row(third))
    assert len(_workers(ledger)) == 3 and [one["key"] for one in read_rows(ledger.folder)] == [
        cell.key for cell in (first, second, third)
    ]


@pytest.mark.parametrize("torn", [b"\0\0\0", b"\0\0\0\n", b"\n"])
def test_zeros_that_a_crash_left_are_a_torn_line_to_all_readers(tmp_path, torn):
    first, second = cells(2)
    (tmp_path / "hardjax.json").touch()
    (tmp_path / "sweep.jsonl").write_bytes(json.dumps(row(first)).encode() + b"\n" + torn)
    assert len(read_rows(tmp_path)) == 1
    with opened(tmp_path, "first") as held:
        assert set(held.rows) == {first.key} and held.add(row(second))
    assert len((tmp_path / "sweep.jsonl").read_bytes().splitlines()) == len(read_rows(tmp_path)) == 2


def test_what_a_killed_worker_wrote_to_its_own_file_is_brought_over(tmp_path):
    first, second, third = cells(3)
    with opened(tmp_path, "first") as held:
        held.add(row(first))
        own = held.folder / "sweep" / "rows"
        lines = [json.dumps(row(one, worker="killed")) for one in (first, second, third)]
        (own / "killed.jsonl").write_text("\n".join(lines)[:-10])  # the third one is torn
        with opened(tmp_path, "second") as other:  # while somebody else is here
            assert set(other.rows) == {first.key, second.key}
        assert _workers(held) == ["somebody", "killed"] and (own / "killed.jsonl").exists()
    assert sorted(os.listdir(tmp_path)) == ["hardjax.json", "sweep.jsonl"]
    with opened(tmp_path, "third") as held:
        assert set(held.rows) == {first.key, second.key}


def test_many_threads_write_every_cell_once(ledger):
    given = cells(20)

    def work(name):
        mine = Ledger(ledger.folder, name)
        for cell in given:
            mine.add(row(cell, worker=name))

    threads = [threading.Thread(target=work, args=(f"worker {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_workers(ledger)) == 20 and len(read_rows(ledger.folder)) == 20


def test_rows_of_another_version_are_refused(tmp_path):
    (tmp_path / "hardjax.json").write_text("")
    (tmp_path / "sweep.jsonl").write_text(json.dumps(row(cells(1)[0]) | {"row_version": 0}) + "\n")
    for look in (read_rows, done_in):
        with pytest.raises(Refusal, match="are of version 0, this hardjax writes 1"):
            look(tmp_path)
    with pytest.raises(Refusal, match="of version 0"), opened(tmp_path, "second"):
        raise AssertionError


def _damaged(config=None, **changed):
    found = row(cells(1)[0])
    return json.dumps(found | {"config": found["config"] | (config or {})} | changed)


@pytest.mark.parametrize(
    "line",
    [
        *("{}", "[]", "no JSON", json.dumps({"row_version": 1, "config": {}, "data": "x"})),
        *(_damaged(metrics=None), _damaged(metrics={}), _damaged(history={}), _damaged(status="new"), _damaged(data=1)),
        *(_damaged({"batch_size": "x"}), _damaged({"learning_rate": "x"}), _damaged({"batch_plan": {"text": "x"}})),
    ],
)
def test_a_damaged_line_is_refused(tmp_path, line):
    (tmp_path / "sweep.jsonl").write_text(f"{line}\n{json.dumps(row(cells(1)[0]))}\n")
    with pytest.raises(Refusal, match=r"Damaged sweep\.jsonl"):
        read_rows(tmp_path)
    (tmp_path / "hardjax.json").write_text("")
    with pytest.raises(Refusal, match=r"Damaged sweep\.jsonl"), opened(tmp_path, "first"):
        raise AssertionError


def test_failed_cells_are_forgotten_on_request_and_only_alone(tmp_path):
    good, bad, other = cells(3)
    with opened(tmp_path, "first") as held:
        held.add(row(good))
        held.add(row(bad, status="failed"))
        held.add(row(other, status="failed"))  # of another grid
        refused = pytest.raises(Refusal, match="Another process works on the sweep")
        with refused, opened(tmp_path, "second", retry_failed=[bad.key]):
            raise AssertionError
    with opened(tmp_path, "third") as held:
        assert set(held.rows) == {good.key, bad.key, other.key}
    with opened(tmp_path, "fourth", retry_failed=[good.key, bad.key]) as held:
        assert set(held.rows) == {good.key, other.key} and held.claim([good, bad]) == [bad]
        held.add(row(bad))
    assert [one["status"] for one in read_rows(tmp_path)] == ["done", "failed", "done"]


def test_a_folder_that_holds_something_else_is_refused_and_a_sweep_is_not_taken_for_a_run(tmp_path):
    from hardjax.study import rows
    from hardjax.training.run import check_output

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hardjax.json").write_text("")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds no sweep \(config.json\)"):
        check(tmp_path / "run")
    assert check(tmp_path / "run", overwrite=True)
    with opened(tmp_path / "sweep", "first") as held:
        held.add(row(cells(1)[0]))
        assert not lock.hold(os.open(held.folder / "hardjax.json", os.O_RDWR), patience=0)  # no run may begin there
    for resume in (check_output, lambda *given: rows.check(given[0], None, *given[1:])):
        with pytest.raises(Refusal, match="holds a sweep"):
            resume(tmp_path / "sweep", False, True)
    with opened(tmp_path / "sweep", "first", overwrite=True) as held:
        assert not held.rows


def test_a_folder_is_marked_as_ours_before_anything_else(tmp_path, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "_shared", killed)
        with pytest.raises(KeyboardInterrupt), opened(tmp_path / "new", "first"):
            raise AssertionError
    with opened(tmp_path / "new", "first") as held:
        assert not held.rows


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_folder_whose_maker_was_killed_is_taken_up(tmp_path, steps):
    for name in ("hardjax.json", "sweep", "sweep/hardjax.json")[:steps]:
        (tmp_path / name).touch() if name.endswith(".json") else (tmp_path / name).mkdir()
    with opened(tmp_path, "first") as held:
        assert held.add(row(cells(1)[0]))
    assert len(read_rows(tmp_path)) == 1


def test_one_that_joins_while_the_other_ends_keeps_its_share(tmp_path, monkeypatch):
    """To try for the folder alone costs the share: whoever ends in that moment takes the work folder away."""
    first, second = cells(2)
    ending = contextlib.ExitStack()
    held = ending.enter_context(opened(tmp_path, "first"))
    assert held.claim([first, second]) == [first] and held.add(row(first))
    hold, merge = lock.hold, Ledger.merge

    def lost(descriptor, *, shared=False, patience=0.5):
        if not shared and patience == 0:  # the second one, which tries for it alone
            monkeypatch.setattr(lock, "hold", hold)
            assert not hold(descriptor, patience=0)
            ending.close()
            assert not (tmp_path / "sweep").exists()
            return False
        return hold(descriptor, shared=shared, patience=patience)

    def merged(self):
        look = os.open(tmp_path / "hardjax.json", os.O_RDWR)
        kept.append(not hold(look, patience=0))
        os.close(look)
        merge(self)

    kept = []
    monkeypatch.setattr(lock, "hold", lost)
    monkeypatch.setattr(Ledger, "merge", merged)
    with opened(tmp_path, "second") as other:
        assert kept[-1] and other.claim([first, second]) == [second] and other.add(row(second))
    assert len(read_rows(tmp_path)) == 2


def test_a_share_that_is_not_got_back_is_said(tmp_path, monkeypatch):
    hold = lock.hold
    monkeypatch.setattr(lock, "hold", lambda *given, shared=False, **more: not shared and hold(*given, **more))
    with pytest.raises(Refusal, match="Another process is writing in"), opened(tmp_path, "first"):
        raise AssertionError


def test_a_lock_that_is_never_given_back_is_said(ledger, monkeypatch):
    monkeypatch.setattr(ledgers, "_PATIENCE", 0.0)
    with ledger.locked(), pytest.raises(Refusal, match=r"held the lock of the sweep .* may be stopped"):
        Ledger(ledger.folder, "second").claim(cells(1))


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_locked", lambda descriptor, shared: True)
    with pytest.raises(Refusal, match="on a file system with locks"), opened(tmp_path, "first"):
        raise AssertionError
