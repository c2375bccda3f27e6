"""Compares tensors of several files as a stream, and looks for values that are not finite.

Elements are compared where a plan would move them (`ckptconv.streaming.transfers`), a few hundred
kB at a time. Bytes are equal or they are not; where the dtype differs, the source is cast first,
which gives the exactly rounded value, and two NaN count as equal, since a cast keeps no payload.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import BITS, FLOATS, LIBRARY_NAMES, numpy_dtype
from ..files import Files
from ..streaming.stream import converted, in_threads
from ..streaming.transfers import Places, Transfer, joined

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


THREADS = 2
PART = 16 << 20
"""Bytes of a job."""
BUFFER = 512 << 10
"""Bytes that are compared at a time: both buffers fit the cache of a core."""
LOOK = 2 << 20
"""Bytes that are looked at for values that are not finite."""
CAST_PART = 1 << 20
"""Elements of a job that casts."""

LOOKED_AT = FLOATS & LIBRARY_NAMES.keys()
"""Every other dtype has finite values only."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Found:
    """How many elements `of` a tensor differ or are not finite, and the first of them."""

    count: int
    first: int
    of: int
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        """The index of the first element, as text."""
        index, rest = [], self.first
        for n in reversed(self.shape):
            index.append(rest % n)
            rest //= n
        return str(index[::-1])


def compare(
    todo: Iterable[Transfer], tensors: Places, progress: Callable[[int], None] = lambda _n: None
) -> dict[Key, Found]:
    """Compares `tensors` with what transfers would move there; returns those that differ.

    `progress` is called from several threads with numbers of bytes of the targets.
    """

    def run(part: Transfer) -> None:
        if part.is_copy:
            _compare_bytes(part, files, found, progress)
        else:
            _compare_values(part, files, found)
            progress(part.nbytes)

    found = _Findings(tensors)
    with Files() as files:
        in_threads(run, (part for each in joined(todo) for part in _parts(each)), THREADS)
    return found.by_key()


def look_for_nonfinite(
    tensors: Places, progress: Callable[[int], None] = lambda _n: None
) -> dict[Key, Found]:
    """Finds NaN and infinities in those tensors that are floats."""

    def run(part: Transfer) -> None:
        import numpy as np

        data = files.read(*part.target, part.nbytes)
        bad = ~np.isfinite(_values(np.frombuffer(data, np.uint8), part.dtypes[1]))
        found.add(part.target, np.flatnonzero(bad))
        progress(part.nbytes)

    floats = {k: t for k, t in tensors.items() if t.dtype in LOOKED_AT and t.numel}
    found = _Findings(floats)
    whole = (
        Transfer((t.file, t.start), (t.file, t.start), t.numel, (t.dtype, t.dtype))
        for t in floats.values()
    )
    with Files() as files:
        in_threads(run, (part for each in whole for part in _parts(each, LOOK)), THREADS)
    return found.by_key()


def _parts(whole: Transfer, size: int = PART) -> Iterator[Transfer]:
    """Cuts a transfer into jobs, at elements, if it may be cut."""
    yield from whole.cut(size * 8 // BITS[whole.dtypes[1]] if whole.is_copy else CAST_PART)


class _Findings:
    """Collects elements by the tensor that they lie in, from several threads."""

    def __init__(self, tensors: Places) -> None:
        self._keys: dict[Path, list[tuple[int, Key]]] = {}
        for key, tensor in tensors.items():
            if tensor.numel:
                self._keys.setdefault(tensor.file, []).append((tensor.start, key))
        for keys in self._keys.values():
            keys.sort()
        self._tensors = tensors
        self._found: dict[Key, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, start: tuple[Path, int], elements: npt.NDArray[np.intp]) -> None:
        """Adds elements of one dtype, numbered from the byte `start` on."""
        path, offset = start
        keys = self._keys[path]
        at = bisect.bisect_right(keys, offset, key=lambda item: item[0]) - 1
        for _, key in keys[at:]:
            if not len(elements):
                break
            info = self._tensors[key]
            bits = BITS[info.dtype]
            shift = (offset - info.start) * 8 // bits  # number in the tensor of the first element
            here = elements[elements < info.numel - shift] + shift
            elements = elements[len(here) :]
            if len(here):
                with self._lock:
                    count, first = self._found.get(key, (0, info.numel))
                    self._found[key] = (count + len(here), min(first, int(here[0])))

    def by_key(self) -> dict[Key, Found]:
        """Returns what was found, in the order of the tensors."""
        return {
            key: Found(*self._found[key], info.numel, info.shape)
            for key, info in self._tensors.items()
            if key in self._found
        }


def _compare_bytes(
    part: Transfer, files: Files, found: _Findings, progress: Callable[[int], None]
) -> None:
    (source, start), (target, offset) = part.source, part.target
    bits = BITS[part.dtypes[1]]
    want, have = bytearray(), bytearray()
    for done in range(0, part.nbytes, BUFFER):
        count = min(BUFFER, part.nbytes - done)
        if count != len(want):
            want, have = bytearray(count), bytearray(count)
        files.read_into(source, start + done, want)
        files.read_into(target, offset + done, have)
        if want != have:
            unequal = _unequal(want, have, max(bits // 8, 1))
            found.add((target, offset + done), unequal.nonzero()[0] * (8 // min(bits, 8)))
        progress(count)


def _compare_values(part: Transfer, files: Files, found: _Findings) -> None:
    """Does once more what the conversion does to a part, and compares the result."""
    import numpy as np

    want, _ = converted(part, files)
    have = files.read(*part.target, part.nbytes)
    if have == want:
        return
    unequal = _unequal(want, have, len(have) // part.count)
    dtype = part.dtypes[1]
    if part.dtypes[0] != dtype and dtype in FLOATS:
        nan = [np.isnan(_values(np.frombuffer(raw, np.uint8), dtype)) for raw in (want, have)]
        unequal &= ~(nan[0] & nan[1])
    found.add(part.target, np.flatnonzero(unequal))


def _unequal(want: bytearray | memoryview, have: bytearray, width: int) -> npt.NDArray[np.bool_]:
    """Returns which elements, of `width` bytes each, differ."""
    import numpy as np

    unequal = np.frombuffer(want, np.uint8) != np.frombuffer(have, np.uint8)
    return np.asarray(unequal.reshape(-1, width).any(axis=1))


def _values(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    return raw.view(numpy_dtype(dtype))
