"""Moves tensors from file to file without holding one in memory.

A copy of byte ranges passes through a small buffer. A cast goes through small chunks. Only a new
order of the elements and a change of the values hold a whole tensor, one for each thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..dtypes import BITS, BLOCKS, nbytes
from ..files import Files
from ..planning.step import Target
from ..reading.header import encode_header
from ..reading.tensor import Tensor
from .deltas import merged
from .transfers import Transfer, joined

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 2
CHUNK = 8 << 20
"""Bytes that a thread copies at a time: enough to cost nothing, few enough for a smooth bar."""
BUFFER = 256 << 10
"""Bytes of the buffer of a copy: they stay in a processor's second-level cache."""
CAST_CHUNK = 256 << 10
"""Elements that are cast at a time, for the same reason."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file to write: its bytes before the data, and its tensors by key."""

    path: Path
    beginning: bytes
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return max([len(self.beginning), *(info.end for info in self.tensors.values())])


def lay_out(path: Path, targets: Iterable[Target], metadata: Mapping[str, str]) -> WeightFile:
    """Plans a file for some tensors.

    They stay in order, so that neighbours stay neighbours, but wide dtypes come before narrow ones,
    so that each tensor is aligned to its elements.
    """
    ordered = sorted(targets, key=lambda target: -BITS[target.dtype])
    entries = [(t.key, t.dtype, t.shape) for t in ordered]
    return WeightFile(path, *encode_header(entries, metadata, path))


def write(
    files: Sequence[WeightFile],
    todo: Iterable[Transfer],
    progress: Callable[[int], None],
    constants: Iterable[tuple[Tensor, bytes]] = (),
) -> list[str]:
    """Writes files, none of which may exist, and returns what went wrong with single values.

    The beginning of a file is written last, when its data are whole: a run that is interrupted
    leaves files that no reader takes for weights. Several threads tell `progress` how many bytes
    they wrote. `constants` are tensors of the files that come from no other file, with their data.

    Raises:
        OSError: from the system, such as a full disk.
        FileRefused: a source became shorter meanwhile, or can no longer be read.
    """
    for file in files:
        with file.path.open("xb") as out:
            _reserve(out.fileno(), file.size)
    with Files() as opened:
        parts = [part for each in joined(todo) for part in each.cut(_elements(each))]
        counts = in_threads(lambda part: _move(part, opened, progress), parts, THREADS)
        for place, data in constants:
            opened.write(place.file, place.start, data)
        for file in files:
            opened.write(file.path, 0, file.beginning)
    overflows = [(part.target, n) for part, n in zip(parts, counts, strict=True) if n]
    return [*_overflowed(files, overflows)] if overflows else []


def _elements(whole: Transfer) -> int:
    """Returns how many elements of a transfer are moved at a time."""
    return CHUNK * 8 // BITS[whole.dtypes[0]] if whole.is_copy else CAST_CHUNK


def in_threads(run: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """Runs a function on items, some at a time; after an exception it begins no other."""
    stop = threading.Event()

    def one(item: Item) -> Result:
        if stop.is_set():
            return None  # type: ignore[return-value]  # nobody sees it: the exception comes out
        try:
            return run(item)
        except BaseException:
            stop.set()
            raise

    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(one, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _overflowed(
    files: Iterable[WeightFile], overflows: Sequence[tuple[tuple[Path, int], int]]
) -> Iterator[str]:
    """Yields a sentence for every tensor that held values which a cast could not hold."""
    for file in files:
        for key, info in file.tensors.items():
            inside = range(info.start, info.end)
            count = sum(n for (path, at), n in overflows if path == file.path and at in inside)
            if count:
                name = f"{file.path.parent.name}/{key}"
                now = "infinite" if BITS[info.dtype] > 8 else "its largest value"
                yield f"{name}: {count:,} values are too large for {info.dtype}: {now} now"


def _reserve(descriptor: int, size: int) -> None:
    """Takes the room on the disk, so that a full disk shows before the first byte is copied."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _move(part: Transfer, files: Files, progress: Callable[[int], None]) -> int:
    """Makes one transfer; returns how many values became infinite."""
    overflows = 0
    if part.is_copy:
        _copy(part, files)
    else:
        view, overflows = converted(part, files)
        files.write(*part.target, view)
    progress(part.nbytes)
    return overflows


def converted(part: Transfer, files: Files) -> tuple[memoryview, int]:
    """Reads a part, then dequantizes, rearranges, changes and casts it as the transfer says.

    Returns the bytes of the target, and how many finite values became infinite. FileRefused if a
    source became shorter, can no longer be read, or adds what is not finite.
    """
    from .cast import cast

    dtype, wanted = part.dtypes
    view = memoryview(files.read(*part.source, nbytes(part.reads, dtype)))
    if part.order:
        if dtype in BLOCKS:  # whose values have no order of their own
            view, dtype = cast(view, dtype, "F32")[0], "F32"
        start = nbytes(part.first, dtype)
        view = part.order.arranged(view)[start : start + nbytes(part.count, dtype)]
    if part.changes:
        view, dtype = merged(view, dtype, part, files)
    if dtype == wanted:
        return view, 0
    return cast(view, dtype, wanted)


def _copy(part: Transfer, files: Files) -> None:
    """Copies bytes through a buffer that stays in the processor's cache.

    Into a file whose room is reserved, that takes two thirds of the time of `copy_file_range`,
    which moves page by page; and it works on every file system.
    """
    (source, start), (target, offset) = part.source, part.target
    buffer = memoryview(bytearray(min(part.nbytes, BUFFER)))
    for done in range(0, part.nbytes, BUFFER):
        filled = buffer[: part.nbytes - done]
        files.read_into(source, start + done, filled)
        files.write(target, offset + done, filled)
