"""The closed set of tensor operations that a key map may name.

Every operation reads the elements of its sources, in order, and lays them out over its targets,
in order. All but `transpose` keep that order, so they are copies of byte ranges and run without
an array library. That makes the way back trivial: swap sources and targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DROP", "OPS", "RENAME", "TRANSPOSE", "Op", "Shape"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: its shape rule, and what it does to the order of the elements.

    Attributes:
        name: as a key map writes it.
        shapes: from the shape of the one source and the number of targets to the targets'
            shapes; raises ValueError, saying what was needed, where the shape does not fit.
        keeps_order: the targets are consecutive byte ranges of the source.
    """

    name: str
    shapes: Callable[[Shape, int], tuple[Shape, ...]]
    keeps_order: bool = True


def _same(shape: Shape, count: int) -> tuple[Shape, ...]:
    return (shape,) * count


def _nothing(_shape: Shape, _count: int) -> tuple[Shape, ...]:
    return ()


def _squeeze(shape: Shape, _count: int) -> tuple[Shape, ...]:
    if len(shape) == 2:  # stored as a linear layer already
        return (shape,)
    if len(shape) != 4 or shape[2:] != (1, 1):
        raise ValueError(f"needs shape [out, in, 1, 1] or [out, in], found {list(shape)}")
    return (shape[:2],)


def _split_rows(shape: Shape, count: int) -> tuple[Shape, ...]:
    if not shape or shape[0] % count:
        raise ValueError(f"needs rows that divide by {count}, found {list(shape)}")
    return ((shape[0] // count, *shape[1:]),) * count


def _row(shape: Shape, _count: int) -> tuple[Shape, ...]:
    if len(shape) == 1:
        return ((1, *shape),)
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"needs shape [n] or [1, n], found {list(shape)}")
    return (shape,)


def _transpose(shape: Shape, _count: int) -> tuple[Shape, ...]:
    if len(shape) != 2:
        raise ValueError(f"needs a matrix, found {list(shape)}")
    return (shape[::-1],)


RENAME = Op("rename", _same)
TRANSPOSE = Op("transpose", _transpose, keeps_order=False)
DROP = Op("drop", _nothing)

OPS = {
    op.name: op
    for op in (
        RENAME,
        Op("squeeze", _squeeze),
        Op("split_rows", _split_rows),
        Op("row", _row),
        TRANSPOSE,
        DROP,
    )
}
"""By the name a key map uses. `drop` is written in a map's `drop` table, not on a block."""
