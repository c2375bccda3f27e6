"""Moves tensors from file to file without holding one in memory.

A copy of byte ranges passes through a small buffer. A cast goes through small chunks. Only a
transposition and a change of the values hold a whole tensor, one for each thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..dtypes import BITS
from ..errors import FileRefused
from ..planning.step import Target
from ..reading.header import encode_header
from ..reading.tensor import Tensor
from .deltas import merged
from .transfers import Transfer, joined

__all__ = [
    "Files",
    "WeightFile",
    "converted",
    "lay_out",
    "read_exactly",
    "refuse_short",
    "write",
]

THREADS = 2
CHUNK = 8 << 20
"""Bytes that a thread copies at a time: enough to cost nothing, few enough for a smooth bar."""
BUFFER = 256 << 10
"""Bytes of the buffer of a copy: they stay in a processor's second-level cache."""
CAST_CHUNK = 256 << 10
"""Elements that are cast at a time, for the same reason."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file to write.

    Attributes:
        path: of the file.
        beginning: its bytes before the data.
        tensors: by key, the offsets in the file.
    """

    path: Path
    beginning: bytes
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return max([len(self.beginning), *(info.end for info in self.tensors.values())])


def lay_out(path: Path, targets: Iterable[Target], metadata: Mapping[str, str]) -> WeightFile:
    """Plans a file for some tensors.

    The order of the source is kept, so that neighbours stay neighbours, but wide dtypes come
    before narrow ones, so that each tensor is aligned to its elements.
    """
    ordered = sorted(targets, key=lambda target: -BITS[target.dtype])
    entries = [(t.key, t.dtype, t.shape) for t in ordered]
    return WeightFile(path, *encode_header(entries, metadata, path))


def write(
    files: Sequence[WeightFile], todo: Iterable[Transfer], progress: Callable[[int], None]
) -> list[str]:
    """Writes files and returns what went wrong with single values.

    The beginning of a file is written last, when its data are whole: a run that is interrupted
    leaves files that no reader takes for weights.

    Args:
        files: to make; none of them may exist.
        todo: what goes into them.
        progress: is called from several threads with numbers of bytes written.

    Returns:
        Sentences on values that a cast could not hold.

    Raises:
        OSError: from the system, such as a full disk.
        FileRefused: a source became shorter meanwhile, or cannot be read any more.
    """
    for file in files:
        with file.path.open("xb") as out:
            _reserve(out.fileno(), file.size)
    jobs: list[tuple[Transfer, Future[int]]] = []
    with Files() as opened, ThreadPoolExecutor(THREADS) as pool:
        stop = threading.Event()

        def run(part: Transfer) -> int:
            if stop.is_set():
                return 0
            try:
                return _move(part, opened, progress)
            except BaseException:
                stop.set()
                raise

        try:
            for each in joined(todo):
                count = CHUNK * 8 // BITS[each.dtypes[0]] if each.is_copy else CAST_CHUNK
                jobs += [(part, pool.submit(run, part)) for part in each.cut(count)]
            overflows = [(part.target, count) for part, job in jobs if (count := job.result())]
        except BaseException:
            stop.set()
            raise
    for file in files:
        with file.path.open("r+b") as whole:
            whole.write(file.beginning)
    return [*_overflowed(files, overflows)] if overflows else []


class Files:
    """Open file descriptors, shared by the threads: all access names its offset."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, int], int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def source(self, path: Path) -> int:
        """Returns the descriptor of a file to read."""
        try:
            return self._get(path, os.O_RDONLY)
        except OSError as error:
            raise FileRefused(
                f"{path}: the file cannot be read any more: {error.strerror}",
                hint="another program removed it or changed its rights: put it back",
            ) from error

    def target(self, path: Path) -> int:
        """Returns the descriptor of a file to write."""
        return self._get(path, os.O_WRONLY)

    def _get(self, path: Path, flags: int) -> int:
        with self._lock:
            if (path, flags) not in self._open:
                self._open[path, flags] = os.open(path, flags)
            return self._open[path, flags]


def _overflowed(
    files: Iterable[WeightFile], overflows: Sequence[tuple[tuple[Path, int], int]]
) -> Iterator[str]:
    """Yields a sentence for every tensor that holds values which a cast made infinite."""
    for file in files:
        for key, info in file.tensors.items():
            inside = range(info.start, info.end)
            count = sum(n for (path, at), n in overflows if path == file.path and at in inside)
            if count:
                name = f"{file.path.parent.name}/{key}"
                yield f"{name}: {count:,} values are too large for {info.dtype}: infinite now"


def _reserve(descriptor: int, size: int) -> None:
    """Takes the room on the disk at once: a full disk is found before the first byte is copied."""
    if sys.platform == "linux" and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _move(part: Transfer, files: Files, progress: Callable[[int], None]) -> int:
    """Makes one transfer; returns how many values became infinite."""
    target = files.target(part.target[0])
    if part.is_copy:
        _copy(files.source(part.source[0]), part.source, target, part.target[1], part.nbytes)
        progress(part.nbytes)
        return 0
    view, overflows = converted(part, files)
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done:], part.target[1] + done)
    progress(part.nbytes)
    return overflows


def converted(part: Transfer, files: Files) -> tuple[memoryview, int]:
    """Reads a part, and does to it all that is to be done.

    Returns:
        The bytes of the target, and how many finite values became infinite.

    Raises:
        FileRefused: a source became shorter meanwhile, cannot be read any more, or says to add what
            is not finite.
    """

    def read(path: Path, start: int, nbytes: int) -> bytearray:
        return read_exactly(files.source(path), (path, start), nbytes)

    dtype, wanted = part.dtypes
    data = read(*part.source, part.count * BITS[dtype] // 8)
    if part.transposed is not None:
        data = _transposed(data, part.transposed)
    view = memoryview(data)
    if part.changes:
        view, dtype = merged(
            data, dtype, part.shape, part.changes, lambda t: read(t.file, t.start, t.nbytes)
        )
    if dtype == wanted:
        return view, 0
    from .cast import cast

    return cast(view, dtype, wanted)


def _copy(source: int, start: tuple[Path, int], target: int, offset: int, nbytes: int) -> None:
    """Copies bytes through a buffer that stays in the processor's cache.

    Into a file whose room is reserved, that takes two thirds of the time of `copy_file_range`,
    which moves page by page; and it works on every file system.
    """
    path, position = start
    view, done = memoryview(bytearray(min(nbytes, BUFFER))), 0
    while done < nbytes:
        got = _copy_some(source, position + done, target, offset + done, view[: nbytes - done])
        if got == 0:
            refuse_short(path)
        done += got


def _copy_some(source: int, start: int, target: int, offset: int, buffer: memoryview) -> int:
    """Copies at most a buffer of bytes; returns how many, 0 at the end of the source."""
    got = os.preadv(source, [buffer], start)
    return os.pwrite(target, buffer[:got], offset) if got else 0


def read_exactly(source: int, start: tuple[Path, int], nbytes: int) -> bytearray:
    """Returns bytes of an open file, from an offset on; FileRefused if it has fewer."""
    path, position = start
    data = bytearray(nbytes)
    view, done = memoryview(data), 0
    while done < nbytes:
        got = os.preadv(source, [view[done:]], position + done)
        if got == 0:
            refuse_short(path)
        done += got
    return data


def refuse_short(path: Path) -> None:
    """Raises FileRefused: the file has fewer bytes than its header says."""
    raise FileRefused(
        f"{path}: the file became shorter while it was read",
        hint="another program is writing to it: wait until it is done",
    )


def _transposed(data: bytearray, shape: tuple[int, ...]) -> bytearray:
    """Returns the bytes of a matrix, transposed.

    Args:
        data: the elements, row by row.
        shape: rows and columns.
    """
    import numpy as np

    rows, columns = shape
    if not data:
        return data
    width = len(data) // (rows * columns)
    matrix = np.frombuffer(data, dtype=f"V{width}").reshape(rows, columns)
    return bytearray(np.ascontiguousarray(matrix.T).tobytes())
