"""Reads files: whole, in ranges of bytes that threads share, or says why not."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import threading
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from .errors import FileRefused, HeaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO
    from pathlib import Path
    from typing import Literal


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file for reading, and gives it with its size in bytes.

    Raises:
        HeaderError: it is no regular file, or the system cannot read it, now or in the `with`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise HeaderError(f"{path}: this is {what}", hint="give one .safetensors file")
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: the path holds a null character
        refuse_unreadable(path, error)
    with file:
        try:
            yield file, found.st_size
        except OSError as error:
            refuse_unreadable(path, error)


def refuse_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    """Turns an error of the system into ours.

    Raises:
        HeaderError: always.
    """
    reason = getattr(error, "strerror", None) or error
    hint = "check the spelling of the path, and that you may read the file"
    raise HeaderError(f"{path}: the file cannot be read: {reason}", hint=hint) from error


class Files(contextlib.ExitStack):
    """Open files that threads share, since every access names its file and its offset.

    All that is read raises FileRefused where a file became shorter or cannot be read any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[Path, str], FileIO] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, nbytes: int) -> bytearray:
        """Returns bytes of a file, from an offset on."""
        data = bytearray(nbytes)
        self.read_into(path, start, data)
        return data

    def read_into(self, path: Path, start: int, into: bytearray | memoryview) -> None:
        """Fills a buffer with the bytes of a file, from an offset on."""
        left = memoryview(into)
        with _reading(path):
            file = self._file(path, "rb")
            while left:
                if not (count := self._read_some(file, start, left)):
                    _refuse_short(path)
                left, start = left[count:], start + count

    def mapped(self, path: Path, start: int, nbytes: int) -> memoryview:
        """Returns bytes of a file in mapped memory, for one thread.

        They outlive `self`, and a write to them never reaches the file.
        """
        with _reading(path):
            if path not in self._mapped:
                number = self._file(path, "rb").fileno()
                self._mapped[path] = mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
        view = memoryview(self._mapped[path])[start : start + nbytes]
        return view if len(view) == nbytes else _refuse_short(path)

    def write(self, path: Path, start: int, data: bytes | bytearray | memoryview) -> None:
        """Writes bytes to a file that exists, from an offset on.

        Raises:
            OSError: from the system.
        """
        left, file = memoryview(data), self._file(path, "r+b")
        while left:
            count = self._write_some(file, start, left)
            left, start = left[count:], start + count

    def _file(self, path: Path, mode: Literal["rb", "r+b"]) -> FileIO:
        with self._lock:
            if (path, mode) not in self._open:
                self._open[path, mode] = self.enter_context(path.open(mode, buffering=0))
            return self._open[path, mode]

    # Windows lacks the calls that take an offset; there, a lock keeps two threads from moving the
    # position of one file.

    def _read_some(self, file: FileIO, start: int, into: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), [into], start)
        with self._lock:
            file.seek(start)
            return file.readinto(into) or 0

    def _write_some(self, file: FileIO, start: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(file.fileno(), data, start)
        with self._lock:
            file.seek(start)
            return file.write(data) or 0


def read_range(path: Path, start: int, nbytes: int) -> bytes:
    """Returns bytes of a file, from an offset on.

    Raises:
        FileRefused: the file became shorter, or cannot be read any more.
    """
    with Files() as files:
        return bytes(files.read(path, start, nbytes))


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that holds an object.

    Raises:
        FileRefused: it cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileRefused(
            f"{path}: cannot be read as JSON: {error}", hint="check the file"
        ) from error
    if not isinstance(values, dict):
        raise FileRefused(f"{path}: holds no JSON object", hint="check the file")
    return values


class ByteCounter:
    """Adds up bytes that threads read or write, and reports every new sum.

    Attributes:
        total: bytes there will be in all.
        done: bytes so far.
    """

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self.total, self.done = total, 0
        self._report, self._lock = report, threading.Lock()

    def add(self, nbytes: int) -> None:
        """Adds bytes, and calls `report(done, total)`, in one thread at a time."""
        with self._lock:
            self.done += nbytes
            self._report(self.done, self.total)

    def finish(self) -> None:
        """Adds whatever is missing from the total."""
        self.add(self.total - self.done)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        why = getattr(error, "strerror", None) or error
        raise FileRefused(
            f"{path}: the file cannot be read any more: {why}",
            hint="another program removed it or changed its rights: put it back",
        ) from error


def _refuse_short(path: Path) -> NoReturn:
    raise FileRefused(
        f"{path}: the file became shorter while it was read",
        hint="another program is writing to it: wait until it is done",
    )
