"""GGUF, the format of llama.cpp, in which transformers and UNets are shared quantized.

A file is `GGUF`, the version, the numbers of tensors and of metadata entries, these entries, a
description of each tensor, and, from the next multiple of `general.alignment` on, the data. Numbers
are little-endian. The axes of a tensor are listed from the fastest to the slowest. A writer of
diffusion models reshapes tensors whose rows are no whole blocks, and notes their shape in an entry.
Source: https://github.com/ggml-org/ggml, docs/gguf.md and `src/gguf.cpp`; for the shapes,
https://github.com/city96/ComfyUI-GGUF, `tools/convert.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..dtypes import BLOCKS
from ..errors import HeaderError
from ..files import open_regular, read_at
from .header import nbytes_of
from .strict_json import show
from .tensor import Header, Shape, Tensor, are_sizes, in_file_order

MAGIC = b"GGUF"
SHAPE_OF = "comfy.gguf.orig_shape."
"""The entry of the metadata that holds the true shape of a tensor, before its name."""

MAX_HEADER = 12 << 20
"""Bytes before the data: 70 kB for FLUX.1, 1 MB for T5 with its vocabulary, 6 MB for others."""
MOST = 100_000
"""Tensors, and entries of the metadata; FLUX.1 has 780 of the former."""
PIECE = 1 << 20
"""Bytes of the header that are read at a time."""
MAX_AXES = 4
MAX_ALIGNMENT = 1 << 20

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    kind: struct.Struct(f"<{letter}")
    for kind, letter in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True)
}
"""The types of metadata that are one number."""
_U32, _U64 = _NUMBERS[4], _NUMBERS[10]
TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K"},
    **{11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
"""The dtypes, by their number: `ggml_type` in ggml.h."""

_DAMAGED = (
    "the file is damaged or of a newer format: compare its size and SHA-256 with those at its "
    "source, then download it again"
)


def read_gguf(path: str | Path) -> Header:
    """Reads and checks the header of a GGUF file, and none of its data.

    The metadata are those entries that are text.

    Raises:
        HeaderError: the file cannot be read, or is not a whole, well-formed GGUF file.
    """
    path = Path(path)
    problems: list[str] = []
    with open_regular(path) as (file, size):
        cursor = _Cursor(path, file, size)
        try:
            entries, infos = _read(cursor, problems)
            alignment = _alignment(entries)
        except ValueError as error:
            raise HeaderError(
                f"{path}: this is not an intact GGUF file: {error}", hint=_DAMAGED
            ) from error
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, *info in infos:
        try:
            if name in tensors or name == "__metadata__":
                raise ValueError("the name is taken")
            tensors[name] = _tensor(path, name, info, start, alignment, entries)
        except ValueError as error:
            problems.append(f"tensor {show(name)}: {error}")
    tensors = in_file_order(tensors)
    end = start if problems else _end(tensors, start, alignment, problems)
    if not problems and size > -(-end // alignment) * alignment:
        problems.append(f"{size - end:,} bytes follow the last tensor")
    if problems:
        raise HeaderError(f"{path}: the header is malformed", problems=problems, hint=_DAMAGED)
    if size < end:
        raise cursor.truncated(f"its tensors end at byte {end:,}", end)
    texts = {key: value for key, value in entries.items() if isinstance(value, str)}
    return Header(path, tensors, texts, start, size)


class _Cursor:
    """Reads a header from its beginning to its end; no length in it is believed."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at, self._read = 0, bytearray()

    def skip(self, nbytes: int) -> int:
        """Goes on by a number of bytes, which are read; returns where they begin."""
        start, self.at = self.at, self.at + nbytes
        if self.at > self.size:
            raise self.truncated("its header needs more", self.at)
        if self.at > MAX_HEADER:
            raise ValueError(f"its header has more than {MAX_HEADER:,} bytes")
        while self.at > (have := len(self._read)):
            self._read += read_at(self.file, have, min(PIECE, self.size - have))
        return start

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self._read, self.skip(layout.size))[0]

    def text(self) -> str:
        start = self.skip(self.number(_U64))
        return self._read[start : self.at].decode()

    def value(self, kind: int) -> Any:
        """Returns an entry of the metadata; of an array, its first numbers."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"its metadata have the unknown type {kind}")
        inner, count = self.number(_U32), self.number(_U64)
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.number(_U64))
            return ()
        if inner not in _NUMBERS:
            raise ValueError(f"its metadata have an array of the unknown type {inner}")
        layout = _NUMBERS[inner]
        start, few = self.skip(layout.size * count), min(count, MAX_AXES + 1)
        return tuple(layout.unpack_from(self._read, start + n * layout.size)[0] for n in range(few))

    def truncated(self, why: str, end: int) -> HeaderError:
        return HeaderError(
            f"{self.path}: the file is truncated: {why}, but it has only {self.size:,} bytes, so "
            f"{end - self.size:,} are missing",
            hint=f"an interrupted download leaves such a file: {_DAMAGED}",
            code="truncated",
        )


def _read(cursor: _Cursor, problems: list[str]) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Returns the metadata, and the name, axes, type and offset of each tensor."""
    cursor.skip(len(MAGIC))
    version = cursor.number(_U32)
    if version not in _VERSIONS:
        big = version >> 24 in _VERSIONS and not version & 0xFFFFFF
        found = "its numbers are big-endian" if big else f"it has version {version}"
        raise ValueError(f"{found}, expected version 2 or 3, little-endian")
    tensors, lines = cursor.number(_U64), cursor.number(_U64)
    if max(tensors, lines) > MOST:
        raise ValueError(f"it has {tensors:,} tensors and {lines:,} entries, more than {MOST:,}")
    entries: dict[str, Any] = {}
    for _ in range(lines):
        key = cursor.text()
        if key in entries:
            problems.append(f"the metadata repeat the key {show(key)}")
        entries[key] = cursor.value(cursor.number(_U32))
    infos = []
    for _ in range(tensors):
        name, axes = cursor.text(), cursor.number(_U32)
        if axes > MAX_AXES:
            raise ValueError(f"tensor {show(name)} has {axes:,} axes, the format allows {MAX_AXES}")
        shape = tuple(cursor.number(_U64) for _ in range(axes))
        infos.append((name, shape[::-1], cursor.number(_U32), cursor.number(_U64)))
    return entries, infos


def _alignment(entries: Mapping[str, Any]) -> int:
    found = entries.get("general.alignment", 32)
    if type(found) is not int or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        raise ValueError(f"its alignment is {show(found)}, expected a power of two")
    return found


def _tensor(
    path: Path, name: str, info: list[Any], start: int, alignment: int, entries: Mapping[str, Any]
) -> Tensor:
    """Returns a tensor; ValueError if it cannot be read as it is described."""
    shape, kind, offset = info
    dtype = TYPES.get(kind)
    if dtype is None:
        raise ValueError(f"its type {kind} is unknown")
    nbytes = nbytes_of(dtype, shape, quantized=True)
    block = BLOCKS.get(dtype, (1, 0))[0]
    if block > 1 and (not shape or shape[-1] % block):
        raise ValueError(f"rows of {dtype} are whole blocks of {block} values, found {list(shape)}")
    if offset % alignment or not are_sizes(offset):
        raise ValueError(f"its offset {offset:,} is not a multiple of {alignment}")
    begin = start + offset
    return Tensor(path, name, dtype, _true_shape(name, shape, entries), begin, begin + nbytes)


def _true_shape(name: str, stored: Shape, entries: Mapping[str, Any]) -> Shape:
    """Returns the shape that a tensor had before it was reshaped."""
    noted = entries.get(SHAPE_OF + name)
    if noted is None:
        return stored
    if not isinstance(noted, tuple) or len(noted) > MAX_AXES or not are_sizes(*noted):
        raise ValueError(f"its metadata give it the shape {show(noted)}")
    if math.prod(noted) != math.prod(stored):
        raise ValueError(f"its metadata give {list(stored)} the shape {list(noted)}")
    return noted


def _end(tensors: Mapping[str, Tensor], start: int, alignment: int, problems: list[str]) -> int:
    """Returns where the last tensor ends, and adds holes and overlaps to `problems`."""
    end = start
    for name, info in tensors.items():
        if info.start < end:
            overlap = f"it overlaps the one before it by {end - info.start:,} bytes"
            problems.append(f"tensor {show(name)}: {overlap}")
        elif info.start - end >= alignment:
            hole = f"a hole of {info.start - end:,} bytes precedes it"
            problems.append(f"tensor {show(name)}: {hole}")
        end = max(end, info.end)
    return end
