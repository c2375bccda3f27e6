"""Reads files whole or in ranges of bytes, in several threads; writes ranges."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import stat
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import FileRefused, HeaderError, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO
    from pathlib import Path
    from typing import Literal

MOST_JSON = 10**8
"""Bytes of a JSON file: it may repeat the header of a checkpoint, which safetensors limits so."""
MOST_CONFIG = 10**6
"""Bytes of a configuration; the published ones have a few thousand."""
MOST_TOKENS = 32 * 10**6
"""Bytes of a file of a tokenizer; that of CLIP has 4 million."""
MOST_YAML = 10**6
"""Bytes of a YAML file; the published ones have a few thousand."""
ONE_FILE = "give one .safetensors file"


_noted: ContextVar[dict[Path, tuple[int, ...]] | None] = ContextVar("_noted", default=None)


@contextlib.contextmanager
def noting_files() -> Iterator[None]:
    """Notes the state of every file that `open_regular` opens, for `require_unchanged`."""
    token = _noted.set({})
    try:
        yield
    finally:
        _noted.reset(token)


def require_unchanged() -> None:
    """Raises FileRefused if a noted file was overwritten or replaced since it was first opened."""
    changed = []
    for path, state in (_noted.get() or {}).items():
        try:
            same = _state(path.stat()) == state
        except OSError:
            same = False
        changed += [] if same else [str(path)]
    if changed:
        raise FileRefused(
            f"{', '.join(changed)}: another program changed it while it was read",
            hint="wait until that program has finished, and start again",
        )


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file, and yields it with its size in bytes.

    HeaderError if it is not regular or cannot be read, now or inside the `with`.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (below)
    except IsADirectoryError as error:
        raise HeaderError(f"{path}: this is a folder", hint=ONE_FILE, code="unreadable") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            what = f"{path}: this is not a regular file"
            raise HeaderError(what, hint=ONE_FILE, code="unreadable")
        if (noted := _noted.get()) is not None:
            noted.setdefault(path, _state(found))
        try:
            yield file, found.st_size
        except OSError as error:
            raise _unreadable(path, error) from error


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to does not stop us."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_small(path: Path, most: int) -> bytes:
    """Returns a whole file that is not the checkpoint, such as a configuration.

    Args:
        path: of the file.
        most: bytes that a file of its kind may have.

    Raises:
        FileRefused: it is not a regular file, is larger, or cannot be read.
    """
    try:
        with open_regular(path) as (file, size):
            if size <= most:
                return file.read(most)
    except HeaderError as error:
        raise FileRefused(error.message, hint="check the file", code=error.code) from error
    raise FileRefused(
        f"{path}: has {size:,} bytes; a file of this kind has at most {most:,}",
        hint="check the file",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of a configuration file; raises as `read_json` does."""
    return read_json(path, MOST_CONFIG)


@contextlib.contextmanager
def looking_into(folder: Path) -> Iterator[None]:
    """Turns what the system says of a folder into FileRefused."""
    try:
        yield
    except OSError as error:
        raise FileRefused(
            f"{error.filename or folder}: cannot be read: {reason(error)}",
            hint="check that you may read the folder and its files",
            code="not-found" if isinstance(error, FileNotFoundError) else "",
        ) from error


def lend(path: Path, name: Path) -> None:
    """Gives a file a second name: a link, or a copy where the system allows no link.

    Windows lets only administrators and developers make symbolic links.
    """
    for give in (name.symlink_to, name.hardlink_to):
        with contextlib.suppress(OSError):
            return give(path.resolve())
    shutil.copyfile(path, name)
    return None


def read_at(file: BinaryIO, start: int, nbytes: int) -> bytes:
    """Returns a range of bytes of an open file; HeaderError if the file became shorter."""
    file.seek(start)
    data = file.read(nbytes)
    if len(data) < nbytes:
        raise _became_shorter(file.name)
    return data


def read_range(path: Path, start: int, nbytes: int) -> bytes:
    """Returns a range of bytes of a file; raises as `Files` does."""
    with Files() as files:
        return bytes(files.read(path, start, nbytes))


class Files(contextlib.ExitStack):
    """Open files that threads share, since every access names its file and its offset.

    Every method that reads raises FileRefused if the file became shorter or can no longer be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[Path, str], FileIO] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, nbytes: int) -> bytearray:
        """Returns a range of bytes."""
        data = bytearray(nbytes)
        self.read_into(path, start, data)
        return data

    def read_into(self, path: Path, start: int, into: bytearray | memoryview) -> None:
        """Fills a buffer with the bytes from an offset on."""
        left = memoryview(into)
        with _reading(path):
            file = self._file(path, "rb")
            while left:
                if not (count := self._read_some(file, start, left)):
                    raise _became_shorter(path)
                left, start = left[count:], start + count

    def mapped(self, path: Path, start: int, nbytes: int) -> memoryview:
        """Maps a range of bytes into memory, for one thread.

        The view outlives `self`, and a write to it never reaches the file.
        """
        with _reading(path):
            if path not in self._mapped:
                number = self._file(path, "rb").fileno()
                self._mapped[path] = mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
        view = memoryview(self._mapped[path])[start : start + nbytes]
        if len(view) < nbytes:
            raise _became_shorter(path)
        return view

    def write(self, path: Path, start: int, data: bytes | bytearray | memoryview) -> None:
        """Writes bytes to an existing file from an offset on; raises OSError."""
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
            return int(os.preadv(file.fileno(), [into], start))
        with self._lock:
            file.seek(start)
            return file.readinto(into) or 0

    def _write_some(self, file: FileIO, start: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return int(os.pwrite(file.fileno(), data, start))
        with self._lock:
            file.seek(start)
            return file.write(data) or 0


def read_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """Returns the object that a JSON file holds; FileRefused if it cannot be read or has none."""
    try:
        text = read_small(path, most)
        values = json.loads(text)
        if rb"\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except (ValueError, RecursionError) as error:
        what = f"{path}: cannot be read as JSON: {error}"
        raise FileRefused(what, hint="check the file") from error
    if not isinstance(values, dict):
        raise FileRefused(f"{path}: holds no JSON object", hint="check the file")
    return values


class ByteCounter:
    """Counts the bytes that threads read or write, of a known total, and reports every new sum."""

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
        raise FileRefused(
            f"{path}: the file cannot be read any more: {reason(error)}",
            hint="another program removed it or changed its permissions: put it back",
            code="changed",
        ) from error


def _unreadable(path: Path, error: OSError | ValueError) -> HeaderError:
    hint = "check the spelling of the path, and that you may read the file"
    what = f"{path}: the file cannot be read: {reason(error)}"
    missing = isinstance(error, FileNotFoundError)
    return HeaderError(what, hint=hint, code="not-found" if missing else "unreadable")


def _became_shorter(path: Path | str) -> HeaderError:
    return HeaderError(
        f"{path}: the file became shorter while it was read",
        hint="another program is writing to it: wait until it is done",
        code="changed",
    )
