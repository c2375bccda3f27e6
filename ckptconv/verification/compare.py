"""Compares tensors of several files as a stream, and looks for values that are not finite.

Elements are compared where a plan would move them (`ckptconv.streaming.transfers`), a few hundred
kB at a time. Bytes are equal or they are not; where the dtype differs, the source is cast first,
which gives the exactly rounded value, and two NaN count as equal, since a cast keeps no payload.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import Files
from ..reading.header import DTYPE_BITS, FLOATS, TensorInfo
from ..streaming.stream import converted, in_threads
from ..streaming.transfers import Piece, joined

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Mask = npt.NDArray[np.bool_]

__all__ = ["Found", "compare", "look_for_nonfinite"]

THREADS = 2
PART = 16 << 20
"""Bytes of a job."""
BUFFER = 512 << 10
"""Bytes that are compared at a time: both buffers fit the cache of a core."""
LOOK = 2 << 20
"""Bytes that are looked at for values that are not finite."""
CAST_PART = 1 << 20
"""Elements of a job that casts."""

Key = tuple[str, str]
Places = Mapping[Key, tuple[Path, TensorInfo]]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in one tensor.

    Attributes:
        count: of the elements that differ, or are not finite.
        first: number of the first of them.
        of: elements of the tensor.
        shape: of the tensor.
    """

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
    todo: Iterable[Piece], tensors: Places, progress: Callable[[int], None] = lambda _n: None
) -> dict[Key, Found]:
    """Compares what is in the targets of some pieces with what would be moved there.

    Args:
        todo: the pieces; their targets are whole tensors, cut or not.
        tensors: the tensors in the targets, by place and key.
        progress: is called from several threads with numbers of bytes of the targets.

    Returns:
        The tensors that differ, by place and key; nothing where all are equal.

    Raises:
        FileRefused: a file cannot be read any more, or became shorter.
    """
    found = _Findings(tensors)

    def run(part: Piece) -> None:
        if part.is_copy:
            _compare_bytes(part, files, found, progress)
        else:
            _compare_values(part, files, found)
            progress(part.nbytes)

    with Files() as files:
        in_threads(run, (part for piece in joined(todo) for part in _parts(piece)), THREADS)
    return found.by_key()


def look_for_nonfinite(
    tensors: Places, progress: Callable[[int], None] = lambda _n: None
) -> dict[Key, Found]:
    """Finds NaN and infinities.

    Args:
        tensors: to look at, by place and key; those that are no floats are passed over.
        progress: is called from several threads with numbers of bytes.

    Raises:
        FileRefused: a file cannot be read any more, or became shorter.
    """
    floats = {k: (p, i) for k, (p, i) in tensors.items() if i.dtype in FLOATS and i.numel}
    found = _Findings(floats)
    whole = (
        Piece((path, info.start), (path, info.start), info.numel, (info.dtype, info.dtype))
        for path, info in floats.values()
    )

    def run(part: Piece) -> None:
        import numpy as np

        data = files.read(*part.target, part.nbytes)
        bad = ~_finite(np.frombuffer(data, np.uint8), part.dtypes[1])
        if bad.any():
            found.add(part.target, np.flatnonzero(bad))
        progress(part.nbytes)

    with Files() as files:
        in_threads(run, (part for piece in whole for part in _parts(piece, LOOK)), THREADS)
    return found.by_key()


def _parts(piece: Piece, size: int = PART) -> Iterator[Piece]:
    """Cuts a piece into jobs, at elements, if it may be cut."""
    yield from piece.cut(size * 8 // DTYPE_BITS[piece.dtypes[1]] if piece.is_copy else CAST_PART)


class _Findings:
    """Collects elements by the tensor that they lie in, from several threads."""

    def __init__(self, tensors: Places) -> None:
        self._keys: dict[Path, list[tuple[int, Key]]] = {}
        for key, (path, info) in tensors.items():
            if info.numel:
                self._keys.setdefault(path, []).append((info.start, key))
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
            info = self._tensors[key][1]
            bits = DTYPE_BITS[info.dtype]
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
            for key, (_, info) in self._tensors.items()
            if key in self._found
        }


def _compare_bytes(
    part: Piece, files: Files, found: _Findings, progress: Callable[[int], None]
) -> None:
    (source, start), (target, offset) = part.source, part.target
    done, ours, theirs = 0, bytearray(), bytearray()
    while done < part.nbytes:
        count = min(BUFFER, part.nbytes - done)
        if count != len(ours):
            ours, theirs = bytearray(count), bytearray(count)
        files.read_into(source, start + done, ours)
        files.read_into(target, offset + done, theirs)
        if ours != theirs:
            _add_different(ours, theirs, part, done, found)
        done += count
        progress(count)


def _add_different(
    source: bytearray, target: bytearray, part: Piece, done: int, found: _Findings
) -> None:
    import numpy as np

    width = max(DTYPE_BITS[part.dtypes[1]] // 8, 1)
    bits = min(DTYPE_BITS[part.dtypes[1]], 8)
    unequal = np.frombuffer(source, np.uint8) != np.frombuffer(target, np.uint8)
    elements = np.flatnonzero(unequal.reshape(-1, width).any(axis=1)) * (8 // bits)
    found.add((part.target[0], part.target[1] + done), elements)


def _compare_values(part: Piece, files: Files, found: _Findings) -> None:
    """Compares after all that a conversion does to a piece: it is done once more."""
    import numpy as np

    view, _ = converted(part, files)
    have = files.read(*part.target, part.nbytes)
    if have == view:
        return
    width = len(have) // part.count
    rows = [np.frombuffer(raw, np.uint8).reshape(-1, width) for raw in (view, have)]
    unequal = (rows[0] != rows[1]).any(axis=1)
    if part.dtypes[0] != part.dtypes[1] and part.dtypes[1] in FLOATS:
        unequal &= ~(
            _nan(rows[0].reshape(-1), part.dtypes[1]) & _nan(rows[1].reshape(-1), part.dtypes[1])
        )
    if unequal.any():
        found.add(part.target, np.flatnonzero(unequal))


_IEEE = {
    "F64": ("<u8", 0x7FF << 52, (1 << 52) - 1),
    "F32": ("<u4", 0xFF << 23, (1 << 23) - 1),
    "F16": ("<u2", 0x1F << 10, (1 << 10) - 1),
    "BF16": ("<u2", 0xFF << 7, (1 << 7) - 1),
    "F8_E5M2": ("u1", 0x1F << 2, 3),
}
"""Type of the bits, exponent and mantissa: all ones in the exponent are an infinity or NaN."""
_NAN_ONLY = {
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E4M3FNUZ": (0xFF, 0x80),
    "F8_E5M2FNUZ": (0xFF, 0x80),
    "F8_E8M0": (0xFF, 0xFF),
}
"""Mask and value of the only NaN (but for its sign) of dtypes without infinities."""


def _finite(raw: npt.NDArray[np.uint8], dtype: str) -> Mask:
    import numpy as np

    if dtype in _IEEE:
        kind, exponent, _ = _IEEE[dtype]
        bits = raw.view(kind)
        return np.asarray((bits & bits.dtype.type(exponent)) != exponent)
    return ~_nan(raw, dtype)


def _nan(raw: npt.NDArray[np.uint8], dtype: str) -> Mask:
    import numpy as np

    if dtype in _IEEE:
        kind, _, mantissa = _IEEE[dtype]
        bits = raw.view(kind)
        return ~_finite(raw, dtype) & np.asarray((bits & bits.dtype.type(mantissa)) != 0, np.bool_)
    mask, value = _NAN_ONLY.get(dtype, (0, 1))  # every other dtype has finite values only
    return np.asarray((raw & np.uint8(mask)) == value)
