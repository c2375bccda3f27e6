"""The safetensors format: reading and writing its header, never its data.

A file is the header's length in bytes (8 bytes, little-endian, unsigned), the header (JSON, UTF-8),
then the data of all tensors back to back, C-contiguous and little-endian. The header maps each
tensor's name to its dtype, shape and `data_offsets`, which count from the end of the header; its
entry `__metadata__` maps str to str. Source: https://github.com/huggingface/safetensors, README.md
("Format") and `safetensors/src/tensor.rs` (`read_metadata`, `validate`).

Whatever the safetensors library 0.8 refuses is refused here, and also: a repeated name of a tensor
or key of the metadata, a field that the format does not define, an entry that is a list, white
space before the first brace, and sizes of 2**63 and more in a tensor without elements.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import BITS, BLOCKS
from ..errors import HeaderError
from ..files import open_regular, read_at
from .formats import ENOUGH, other_format
from .strict_json import Repeated, is_unicode, show, strict_loads
from .tensor import Header, Tensor, are_sizes, in_file_order

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # bytes: `MAX_HEADER_SIZE` in safetensors/src/tensor.rs
_MAX_BITS = 2**63  # a tensor has fewer bits, so that sizes and offsets fit 64 bits
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"

_DOWNLOAD = "download the file again, then compare its size and SHA-256 with those at its source"
_DAMAGED = (
    "the file is damaged or a faulty program wrote it: compare its SHA-256 with the one at its "
    "source, then download it again or save it again with the safetensors library"
)


def read_header(path: str | Path) -> Header:
    """Reads and checks the header of a safetensors file, and none of its data.

    Its tensors cover the file from `data_start` to `size` without hole or overlap, and each one has
    as many bytes as its dtype and shape need.

    Raises:
        HeaderError: if the file cannot be read or is not a whole, well-formed safetensors file.
    """
    path = Path(path)
    raw, size = _read_raw(path)
    data_start = _LENGTH_BYTES + len(raw)
    entries = _parse(path, raw)
    problems: list[str] = []
    metadata = _check_metadata(entries.pop(_METADATA, {}), problems)
    tensors = _check_tensors(path, entries, data_start, problems)
    end = data_start if problems else _check_layout(tensors, data_start, problems)
    if problems:
        raise HeaderError(f"{path}: the header is malformed", problems=problems, hint=_DAMAGED)
    if size < end:
        raise HeaderError(
            f"{path}: the file is truncated: its tensors end at byte {end:,}, but it has only "
            f"{size:,}, so {end - size:,} bytes are missing",
            hint=f"an interrupted download leaves such a file: {_DOWNLOAD}",
            code="truncated",
        )
    if size > end:
        raise HeaderError(
            f"{path}: {size - end:,} bytes follow the last tensor: the tensors end at byte "
            f"{end:,}, where the file of {size:,} bytes should end",
            hint=_DAMAGED,
        )
    return Header(path, tensors, metadata, data_start, size)


def header_from_json(path: str | Path) -> Header:
    """Reads a header that was saved without its file; HeaderError if it cannot be read.

    The JSON is `{"metadata": {key: value}, "tensors": {name: [dtype, [shape]]}}`. The tensors lie
    back to back in the order listed, and their offsets count from the first of them.
    """
    path = Path(path)
    problems: list[str] = []
    with open_regular(path) as (file, _):
        document = _parse(path, file.read())
    try:
        metadata = _check_metadata(document["metadata"], problems)
        entries = ((name, *entry) for name, entry in document["tensors"].items())
        tensors = _lay_out(path, entries, 0, quantized=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    if problems:
        raise HeaderError(
            f"{path}: not a saved header",
            problems=problems,
            hint='the form is {"metadata": {key: value}, "tensors": {name: [dtype, [shape]]}}',
        )
    return Header(path, tensors, metadata, 0, sum(info.nbytes for info in tensors.values()))


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    path: Path = Path(),
) -> tuple[bytes, dict[str, Tensor]]:
    """Returns the bytes of a safetensors file before its data, and its tensors by name.

    The data must follow back to back in the order of `tensors`, from a multiple of 8 bytes on.
    Readers that map the file want each tensor aligned to its elements: give those of wider dtypes
    first, as the safetensors library does. `path` is the file to be written.

    Raises:
        ValueError: if a name is repeated, reserved or not valid Unicode, a dtype is unknown, a
            shape is not valid, or the header would be longer than the format allows (100 MB).
    """
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    for name, info in _lay_out(path, tensors, 0).items():
        offsets = (info.start, info.end)
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > _MAX_HEADER:
        raise ValueError(f"the header has {len(raw):,} bytes; the format allows {_MAX_HEADER:,}")
    beginning = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
    return beginning, _lay_out(path, tensors, len(beginning))


def _read_raw(path: Path) -> tuple[bytes, int]:
    """Returns the bytes of the header, not yet parsed, and the size of the file."""
    with open_regular(path) as (file, size):
        length = _check_length(path, file.read(ENOUGH), size)
        return read_at(file, _LENGTH_BYTES, length), size


def _check_length(path: Path, beginning: bytes, size: int) -> int:
    """Returns the length of the header, if it agrees with the format and the size of the file."""
    length = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    header = beginning[_LENGTH_BYTES:]
    odd = length > _MAX_HEADER or not header.startswith(b"{")
    if odd and (other := other_format(beginning)):  # a real length may begin like another format
        what = f"{path}: this is {other.what}"
        raise HeaderError(what, hint=other.hint, code="not-a-checkpoint")
    missing = _LENGTH_BYTES + length - size
    for wrong, code, message in (
        (size == 0, "truncated", "the file is empty (0 bytes)"),
        (
            not header,
            "truncated",
            f"the file is truncated: it has {size} bytes, but a safetensors file begins with "
            f"{_LENGTH_BYTES} bytes for the length of its header, then the header",
        ),
        (
            odd,
            "not-a-checkpoint",
            "this is neither a safetensors file nor a PyTorch checkpoint: it begins with "
            f"{beginning[:16]!r}, not with the length of a header (8 bytes) and '{{'",
        ),
        (
            missing > 0,
            "truncated",
            f"the file is truncated: its header takes {length:,} bytes, but {missing:,} of them "
            "are missing",
        ),
    ):
        if wrong:
            raise HeaderError(f"{path}: {message}", hint=_DOWNLOAD, code=code)
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    """Parses a JSON object; inner objects that repeat keys are `Repeated`."""
    try:
        document = strict_loads(raw)
    except (RecursionError, ValueError) as error:
        faults = {
            RecursionError: "the JSON is nested too deeply",
            UnicodeDecodeError: f"the header is not UTF-8: {error}",
        }
        fault = faults.get(type(error), f"the header is not JSON: {error}")
        raise HeaderError(f"{path}: {fault}", hint=_DAMAGED) from error
    if isinstance(document, Repeated):
        problems = [f"{show(key)} occurs more than once" for key in document.keys]
        raise HeaderError(f"{path}: the header repeats keys", problems=problems, hint=_DAMAGED)
    if not isinstance(document, dict):
        raise HeaderError(f"{path}: the JSON is not an object", hint=_DAMAGED)
    return document


def _check_metadata(value: object, problems: list[str]) -> dict[str, str]:
    """Returns the metadata, and adds what is wrong with it to `problems`."""
    if isinstance(value, Repeated):
        problems += [f"{_METADATA} repeats the key {show(key)}" for key in value.keys]
        return {}
    if value is None:  # for the library, null is none at all
        return {}
    if not isinstance(value, dict):
        problems.append(f"{_METADATA} is {show(value)}, not an object")
        return {}
    for key, item in value.items():
        if not isinstance(item, str):
            problems.append(f"{_METADATA}: the value of {show(key)} is {show(item)}, not a str")
        elif not (is_unicode(key) and is_unicode(item)):
            problems.append(f"{_METADATA}: {show(key)} holds half of a surrogate pair")
    return value


def _check_tensors(
    path: Path, entries: dict[str, Any], data_start: int, problems: list[str]
) -> dict[str, Tensor]:
    """Returns the valid tensors in the order of the data, and adds the others to `problems`."""
    tensors = {}
    for name, entry in entries.items():
        try:
            tensors[name] = _check_entry(path, name, entry, data_start)
        except ValueError as error:
            problems.append(f"tensor {show(name)}: {error}")
    return in_file_order(tensors)


def _check_entry(path: Path, name: str, entry: object, data_start: int) -> Tensor:
    if not is_unicode(name):
        raise ValueError("the name holds half of a surrogate pair")
    if isinstance(entry, Repeated):
        raise ValueError(f"the entry repeats the field {show(entry.keys[0])}")
    if not isinstance(entry, dict):
        raise ValueError(f"the entry is {show(entry)}, not an object")
    if entry.keys() != _FIELDS:
        raise ValueError(f"the fields are {show(sorted(entry))}, not {sorted(_FIELDS)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    nbytes = nbytes_of(dtype, shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not are_sizes(*offsets):
        raise ValueError(f"data_offsets are {show(offsets)}, not two integers from 0 to 2**63 - 1")
    start, end = offsets
    if end - start != nbytes:
        raise ValueError(
            f"data_offsets {show(offsets)} hold {end - start:,} bytes, but {dtype} of shape "
            f"{show(shape)} needs {nbytes:,}"
        )
    return Tensor(path, name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_layout(tensors: Mapping[str, Tensor], data_start: int, problems: list[str]) -> int:
    """Returns the offset where the last tensor ends, and adds holes and overlaps to `problems`."""
    end, last = data_start, ""
    for name, info in tensors.items():
        if info.start > end:
            hole = f"a hole of {info.start - end:,} bytes precedes it"
            problems.append(f"tensor {show(name)}: {hole}")
        elif info.start < end:
            overlap = f"it overlaps {show(last)} by {min(end, info.end) - info.start:,} bytes"
            problems.append(f"tensor {show(name)}: {overlap}")
        if info.end >= end:
            end, last = info.end, name
    return end


def _lay_out(
    path: Path,
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    start: int,
    *,
    quantized: bool = False,
) -> dict[str, Tensor]:
    """Places tensors back to back from an offset on; ValueError if one of them is not valid."""
    placed: dict[str, Tensor] = {}
    for name, dtype, shape in tensors:
        if name in placed or name == _METADATA:
            raise ValueError(f"tensor {show(name)}: the name is taken")
        end = start + nbytes_of(dtype, shape, quantized=quantized)
        placed[name] = Tensor(path, name, dtype, tuple(shape), start, end)
        start = end
    return placed


def nbytes_of(dtype: object, shape: object, *, quantized: bool = False) -> int:
    """Returns how many bytes a tensor needs; ValueError if its dtype or shape is not valid."""
    values, size = BLOCKS.get(str(dtype), (1, 0)) if quantized else (1, 0)
    if not isinstance(dtype, str) or not (size or dtype in BITS):
        raise ValueError(f"{show(dtype)} is not a dtype of the format, such as F16 or F32")
    if not isinstance(shape, list | tuple) or not are_sizes(*shape):
        raise ValueError(f"the shape {show(shape)} is not a list of integers from 0 to 2**63 - 1")
    bits = size * 8 or BITS[dtype]
    if size and math.prod(shape) % values:
        raise ValueError(f"{dtype} of shape {show(shape)} is not whole blocks of {values} values")
    for count in shape:
        bits *= count
        if bits >= _MAX_BITS:
            raise ValueError(f"{dtype} of shape {show(shape)} overflows: 2**63 bits or more")
    bits //= values
    if bits % 8:
        raise ValueError(f"{dtype} of shape {show(shape)} is {bits} bits, not whole bytes")
    return bits // 8
