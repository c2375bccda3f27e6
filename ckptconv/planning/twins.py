"""Tensors that are in a file twice, in two spellings."""

from __future__ import annotations

from ..files import Files, read_range
from ..reading.tensor import Header, Tensor

COMPARED = 1 << 20
"""Bytes of two tensors that are compared at a time."""


def unlike_twins(header: Header) -> list[str]:
    """Returns the names of each two spellings of one tensor whose values differ."""
    return [
        f"{header.tensors[twin].name} and {header.tensors[key].name}"
        for twin, key in header.twins.items()
        if header.has_data(header.tensors[key])
        and not _same(header.tensors[twin], header.tensors[key])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.nbytes) != (other.dtype, other.nbytes):  # a layer may be linear or 1 x 1
        return False
    if one.order != other.order:
        with Files() as files:
            return one.read(files) == other.read(files)
    return all(
        read_range(one.file, one.start + done, count)
        == read_range(other.file, other.start + done, count)
        for done in range(0, one.nbytes, COMPARED)
        for count in (min(COMPARED, one.nbytes - done),)
    )
