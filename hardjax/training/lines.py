"""Append-only files of strict JSON lines: whatever kills a writer, all lines but the last are whole."""

import base64
import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from hardjax._validate import Refusal

try:
    import fcntl
except ImportError:  # Windows: without locks
    fcntl = None  # type: ignore[assignment]

_INFINITE = "\x00inf"  # stands for a number that `json` would write as a word which no other reader takes


class Mark(NamedTuple):
    """Bytes of a file and their CRC-32."""

    size: int = 0
    checksum: int = 0


_START = Mark()


class LineFile:
    """A file with one writer, which knows how far it has come.

    Args:
        path: created by the first line.
        mark: what is there already; the rest is overwritten by the next line.

    Attributes:
        mark: of all lines written.
    """

    def __init__(self, path: Path, mark: Mark = _START) -> None:
        self.path, self.mark = path, mark

    def append(self, *entries: Any, durable: bool = False) -> None:
        """Lines, all of them or none.

        Args:
            durable: wait until they are on the disk, not only in the memory of the system.

        Raises:
            ValueError: they cannot be written (a full disk).
        """
        data = b"".join(_line(entry) for entry in entries)
        if not data and not durable:
            return
        with refused(self.path, "to be writable"):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                try:
                    _write(descriptor, data, self.mark.size)
                except OSError:
                    # Half a line would be repaired by the next writer; a reader need not meet it until then.
                    with suppress(OSError):
                        os.ftruncate(descriptor, self.mark.size)
                    raise
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.mark = Mark(self.mark.size + len(data), zlib.crc32(data, self.mark.checksum))


def append_line(path: Path, entry: Any) -> None:
    """One line to a file that several processes may write to; a torn last line is taken away first.

    Raises:
        ValueError: it cannot be written (a full disk).
    """
    with refused(path, "to be writable"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems know no locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _whole(descriptor)
            try:
                _write(descriptor, _line(entry), end)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)  # and with it the lock


def read_lines(path: Path, size: int | None = None) -> list[Any]:
    """The entries of a file; a torn last line is left out.

    Args:
        size: bytes to read; None reads all.

    Raises:
        ValueError: it cannot be read, or a line before the last is damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if size is None else file.read(size)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refusal(f"Expected {str(path)!r} to be readable: {error.strerror or error}.") from None
    return parse(data, path)[0]


def parse(data: bytes, path: Path) -> tuple[list[Any], int]:
    """(entries, bytes that they take) of what `path` holds; a torn last line is left out.

    Raises:
        ValueError: a line before the last is damaged.
    """
    *lines, torn = data.split(b"\n")
    entries, size = [], 0
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            if number == len(lines) and not torn:  # a file system may leave zeros where a crash cut a write short
                break
            raise Refusal(f"Damaged {path.name} in {str(path.parent)!r}: line {number} is no JSON.") from None
        size += len(line) + 1
    return entries, size


def cut(path: Path, mark: Mark) -> bool:
    """Take away what a file holds beyond a mark; False (and nothing is touched) where it does not hold the marked
    bytes."""
    try:
        with path.open("r+b") as file:
            if Mark(*_checksum(file, mark.size)) != mark:
                return False
            if file.seek(0, os.SEEK_END) != mark.size:
                file.truncate(mark.size)
    except FileNotFoundError:
        return mark == Mark()
    return True


def holds(path: Path, mark: Mark) -> bool:
    """Whether a file begins with the marked bytes."""
    try:
        with path.open("rb") as file:
            return Mark(*_checksum(file, mark.size)) == mark
    except OSError:
        return mark == Mark()


def encode(content: Any, indent: int | None = None) -> str:
    """Strict JSON: arrays as lists, NaN as null, infinities as numbers too large for any reader (1e999)."""
    text = json.dumps(_strict(content), indent=indent, allow_nan=False)
    written = json.dumps(_INFINITE)
    return text.replace(json.dumps("-" + _INFINITE), "-1e999").replace(written, "1e999")


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON, to the bit."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "zlib": data}


def unpack(packed: Any) -> np.ndarray:
    """The array that `pack` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        data = zlib.decompress(base64.b64decode(packed["zlib"], validate=True))
        return np.frombuffer(data, np.dtype(packed["dtype"])).reshape(packed["shape"]).copy()
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise Refusal(f"Expected a packed array, got {type(packed).__name__} ({error}).") from None


@contextmanager
def refused(path: Path, what: str) -> Iterator[None]:
    """What the operating system refuses, as one line of ours."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"Expected output={str(path)!r} {what}: {error.strerror or error}.") from None


def _line(entry: Any) -> bytes:
    return encode(entry).encode() + b"\n"


def _write(descriptor: int, data: bytes, at: int) -> None:
    """All of the data, and nothing behind it."""
    os.ftruncate(descriptor, at)
    os.lseek(descriptor, at, os.SEEK_SET)
    view = memoryview(data)
    while view:  # a disk that is nearly full takes a part
        view = view[os.write(descriptor, view) :]


def _whole(descriptor: int) -> int:
    """Bytes up to the end of the last whole line."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _checksum(file: IO[bytes], size: int) -> tuple[int, int]:
    """(bytes, CRC-32) of the first `size` bytes, or of all where there are fewer."""
    total, left = 0, size
    while left and (block := file.read(min(left, 1 << 20))):
        total, left = zlib.crc32(block, total), left - len(block)
    return size - left, total


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    if isinstance(content, np.ndarray):
        return _strict(content.tolist())
    if isinstance(content, np.generic):
        return _strict(content.item())
    # NaN is no JSON: Python writes it all the same, and other readers refuse the whole file.
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else f"{'-' if content < 0 else ''}{_INFINITE}"
    return content
