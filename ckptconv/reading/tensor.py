"""What a header says: tensors, each of which knows the file that it lies in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..files import Files


Shape = tuple[int, ...]


def are_sizes(*values: object) -> bool:
    """Whether all are integers from 0 to 2**63 - 1; bool does not count as one."""
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


class Order(NamedTuple):
    """Elements that are stored in another order of axes than that of their tensor.

    Attributes:
        stored: the shape that the data have as they lie there.
        axes: for each axis of the tensor, its number among those of `stored`.
    """

    stored: Shape
    axes: Shape

    @classmethod
    def of(cls, shape: Shape, by_stride: list[int]) -> Order:
        """Returns the order of a tensor, given its axes of several elements as they are stored."""
        ordered = [*(axis for axis in range(len(shape)) if axis not in by_stride), *by_stride]
        axes = tuple(ordered.index(axis) for axis in range(len(shape)))
        return cls(tuple(shape[axis] for axis in ordered), axes)

    def arranged(self, data: bytearray | memoryview) -> memoryview:
        """Returns the elements in the order of the tensor."""
        import numpy as np

        elements = np.frombuffer(data, f"u{len(data) // math.prod(self.stored)}")
        tensor = elements.reshape(self.stored).transpose(self.axes)
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        name: the name of the tensor in that file.
        dtype: a key of `ckptconv.dtypes.BITS` or `BLOCKS`.
        shape: number of elements along each axis; `()` is a scalar.
        start: offset of the first byte of the data in the file.
        end: offset of the byte after the last one.
        order: of the elements, if it is not that of the axes.
    """

    file: Path
    name: str
    dtype: str
    shape: Shape
    start: int
    end: int
    order: Order | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    def read(self, files: Files) -> bytearray | memoryview:
        """Returns the elements in the order of the axes; raises as `files` does."""
        data = files.read(self.file, self.start, self.nbytes)
        return self.order.arranged(data) if self.order else data


@dataclass(frozen=True, slots=True, repr=False)
class Header:
    """The header of a checkpoint.

    Attributes:
        path: the file, or the index of a sharded checkpoint.
        tensors: by key, in the order of the data. The key is the tensor's own name, unless the
            checkpoint is read under other names.
        metadata: the entry `__metadata__`; empty if the file has none.
        data_start: offset of the first byte after the header.
        size: size of the file, or of all shards, in bytes.
        notes: sentences on what the file holds beside tensors and metadata.
        twins: by key, the key of the tensor that it is another spelling of.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    notes: tuple[str, ...] = ()
    twins: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values())) or (self.path,)

    def has_data(self, tensor: Tensor) -> bool:
        """Whether a tensor can be read, unlike those of a header saved without its file."""
        return self.data_start > 0 or tensor.file != self.path

    def __repr__(self) -> str:
        return f"<Header of {self.path}: {len(self.tensors):,} tensors, {self.size:,} bytes>"


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the order of their data."""
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
