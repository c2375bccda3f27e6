"""The closed set of tensor operations that a key map may name.

Every operation reads the elements of its source, in order, and lays them out over its targets, in
order. All but `transpose` and `swap_halves` keep that order, and all but `transpose` are copies of
byte ranges, which need no array library. The way back lays the elements of the targets out over the
source; only the shape of the source has to be found, which is what `backward` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        name: as a key map writes it.
        forward: from the shape of the source and the number of targets to the shapes of the
            targets.
        backward: from the shapes of the targets, and the shape that the source is known to have
            had (None if nobody noted it), to the shape of the source. Without a note, it is the
            shape of the published files.
        order: of the elements, beside that of the source.

    Both functions raise ValueError, saying what was needed, where a shape does not fit.
    """

    name: str
    forward: Callable[[Shape, int], tuple[Shape, ...]]
    backward: Callable[[Sequence[Shape], Shape | None], Shape]
    order: Literal["kept", "transposed", "halves swapped"] = "kept"

    @property
    def keeps_order(self) -> bool:
        """Whether the targets are consecutive byte ranges of the source."""
        return self.order == "kept"


def _needs(holds: bool, needed: str, found: object) -> None:
    if not holds:
        raise ValueError(f"needs {needed}, found {found}")


def _same(shape: Shape, count: int) -> tuple[Shape, ...]:
    return (shape,) * count


def _from_same(shapes: Sequence[Shape], _noted: Shape | None) -> Shape:
    return shapes[0]


def _squeezed(shape: Shape, _count: int) -> tuple[Shape, ...]:
    flat = shape[:-2] if shape[2 - len(shape) % 2 :] == (1, 1) else shape
    _needs(len(flat) in (1, 2), "shape [out, in, 1, 1], [out, in], [out, 1, 1] or [out]", [*shape])
    return (flat,)


def _unsqueezed(shapes: Sequence[Shape], noted: Shape | None) -> Shape:
    (shape,) = shapes
    _needs(len(shape) in (1, 2), "shape [out, in] or [out]", list(shape))
    published = (*shape, 1, 1) if len(shape) == 2 else shape
    return noted if noted and _squeezed(noted, 1) == (shape,) else published


@functools.cache
def split_rows(shares: Shape = ()) -> Op:
    """Returns the operation that divides rows among its targets: by these shares, or equally."""

    def forward(shape: Shape, count: int) -> tuple[Shape, ...]:
        parts = shares or (1,) * count
        fits = bool(shape) and shape[0] % sum(parts) == 0
        _needs(fits, f"rows that divide by {sum(parts)}", list(shape))
        return tuple((shape[0] // sum(parts) * part, *shape[1:]) for part in parts)

    def backward(shapes: Sequence[Shape], _noted: Shape | None) -> Shape:
        parts = shares or (1,) * len(shapes)
        whole = (sum(sum(shape[:1]) for shape in shapes), *shapes[0][1:])
        fits = whole[0] % sum(parts) == 0 and forward(whole, len(shapes)) == tuple(shapes)
        needed = f"rows as {':'.join(map(str, shares))}" if shares else "parts of one shape"
        _needs(fits, needed, ", ".join(str(list(shape)) for shape in shapes))
        return whole

    return Op(SPLIT_ROWS, forward, backward)


def _halved(shape: Shape, _count: int) -> tuple[Shape, ...]:
    _needs(bool(shape) and shape[0] % 2 == 0, "two halves of rows", list(shape))
    return (shape,)


def _as_row(shape: Shape, _count: int) -> tuple[Shape, ...]:
    fits = len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)
    _needs(fits, "shape [n] or [1, n]", list(shape))
    return ((1, shape[-1]),)


def _from_row(shapes: Sequence[Shape], noted: Shape | None) -> Shape:
    (shape,) = shapes
    _needs(len(shape) == 2 and shape[0] == 1, "shape [1, n]", list(shape))
    return shape if noted == shape else shape[1:]


def _transposed(shape: Shape, _count: int) -> tuple[Shape, ...]:
    _needs(len(shape) == 2, "a matrix", list(shape))
    return (shape[::-1],)


SPLIT_ROWS = "split_rows"
"""The operation that has several targets; every other has one."""

RENAME = Op("rename", _same, _from_same)
DROP = Op("drop", lambda _shape, _count: (), _from_same)

OPS = {
    op.name: op
    for op in (
        RENAME,
        Op("squeeze", _squeezed, _unsqueezed),
        split_rows(),
        Op("row", _as_row, _from_row),
        Op(
            "transpose",
            _transposed,
            lambda shapes, _noted: _transposed(shapes[0], 1)[0],
            order="transposed",
        ),
        Op(
            "swap_halves",
            _halved,
            lambda shapes, _noted: _halved(shapes[0], 1)[0],
            order="halves swapped",
        ),
        DROP,
    )
}
"""By the name a key map uses; `split_rows` depends on its targets. `drop` is written in a map's
`drop` table, not on a block."""
