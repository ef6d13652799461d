"""Append-only files: torn lines, marks, full disks, several writers, and numbers that JSON does not have."""

import json
import multiprocessing
import resource
import signal

import numpy as np
import pytest

from hardjax._validate import Refusal
from hardjax.training import lines
from hardjax.training.lines import LineFile, Mark


def test_lines_come_back_as_they_were_written(tmp_path):
    file = LineFile(tmp_path / "a.jsonl")
    entries = [{"x": 0.1, "y": float("inf"), "z": -float("inf")}, {"x": [1, 2], "y": "inf", "z": {"w": True}}]
    file.append(entries[0])
    file.append(entries[1])
    assert lines.read_lines(tmp_path / "a.jsonl") == entries
    assert file.mark.size == (tmp_path / "a.jsonl").stat().st_size and lines.holds(tmp_path / "a.jsonl", file.mark)
    # Other readers take it too: no word that JSON does not have.
    text = (tmp_path / "a.jsonl").read_text()
    assert "1e999" in text and "Infinity" not in text and "NaN" not in lines.encode({"x": np.float32("nan")})


@pytest.mark.parametrize("torn", ['{"x": 1', '{"x": 1}', "\0" * 9, "\0" * 9 + "\n"])
def test_a_torn_last_line_is_not_read_and_taken_away_by_the_next_writer(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    lines.append_line(path, {"x": 0})
    with path.open("a") as file:
        file.write(torn)
    assert lines.read_lines(path) == [{"x": 0}]
    if not torn.endswith("\n"):
        lines.append_line(path, {"x": 2})
        assert lines.read_lines(path) == [{"x": 0}, {"x": 2}]


def test_damage_before_the_last_line_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x"\n{"x": 3}\n')
    with pytest.raises(Refusal, match=r"Damaged a.jsonl .*: line 2 is no JSON"):
        lines.read_lines(tmp_path / "a.jsonl")


def test_a_file_is_cut_to_what_belongs_to_a_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    file = LineFile(path)
    file.append({"x": 1})
    mark = file.mark
    file.append({"x": 2})
    assert lines.cut(path, mark) and lines.read_lines(path) == [{"x": 1}]
    # The next line goes where the mark is, whatever stands there.
    path.write_text('{"x": 1}\nnobody knows')
    LineFile(path, mark).append({"x": 3})
    assert lines.read_lines(path) == [{"x": 1}, {"x": 3}]
    before = path.read_bytes()
    assert not lines.cut(path, Mark(mark.size, mark.checksum ^ 1)) and not lines.cut(path, Mark(10**6, 0))
    assert path.read_bytes() == before
    assert lines.cut(tmp_path / "none", Mark()) and not lines.cut(tmp_path / "none", mark)


@pytest.fixture
def small_disk():
    """Files of this process may have 4,096 bytes: what a full disk says, from the same calls."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_disk_takes_no_line_that_was_there(tmp_path, small_disk, shared):
    path = tmp_path / "a.jsonl"
    file = LineFile(path)

    def add(entry):
        lines.append_line(path, entry) if shared else file.append(entry)

    add({"x": "-" * 3000})
    with pytest.raises(Refusal, match=r"a.jsonl' to be writable: File too large"):
        add({"x": "-" * 3000})  # half of it fits
    assert path.stat().st_size < 3100
    add({"x": 2})
    assert [len(str(entry["x"])) for entry in lines.read_lines(path)] == [3000, 1]


def _write(path, writer):
    for count in range(50):
        lines.append_line(path, {"writer": writer, "count": count, "filling": "-" * 500})


@pytest.mark.ci
def test_two_writers_lose_no_line(tmp_path):
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [(entry["writer"], entry["count"]) for entry in lines.read_lines(path)]
    assert sorted(found) == [(writer, count) for writer in range(2) for count in range(50)]
    assert [count for writer, count in found if writer == 0] == list(range(50))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64"])
def test_arrays_come_back_to_the_bit(dtype):
    array = np.random.default_rng(0).integers(0, 200, (3, 5)).astype(dtype)
    if array.dtype.kind == "f":
        array[0, :4] = np.nan, np.inf, -0.0, np.finfo(dtype).tiny
    found = lines.unpack(json.loads(lines.encode(lines.pack(array))))
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("damaged", [None, {}, {"zlib": "!", "dtype": "<f4", "shape": [1]}, 3])
def test_a_damaged_array_is_refused(damaged):
    with pytest.raises(Refusal, match="Expected a packed array"):
        lines.unpack(damaged)
