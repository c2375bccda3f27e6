"""What a plan moves, byte range by byte range.

A step lays the elements of its sources, in order, over its targets. Where the dtype stays, that is
a copy of byte ranges; neighbouring ranges become one copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..dtypes import BLOCKS, nbytes
from ..planning.step import Change, Step
from ..reading.tensor import Order, Shape, Tensor

Places = Mapping[tuple[str, str], Tensor]
"""By component and key of a target, the tensor in the file where it lies or is to lie."""

Offset = tuple[Path, int]
"""A file, and an offset in it in bytes."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Elements that lie together in one source and one target.

    If they are to be rearranged, `order` says how. Then the source is a whole tensor, of which the
    target gets `count` elements, from the element `first` of the new order on. `shape` is that of
    the target if its values are to change.
    """

    source: Offset
    target: Offset
    count: int
    dtypes: tuple[str, str]
    order: Order | None = None
    first: int = 0
    shape: Shape = ()
    changes: tuple[Change, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the target in bytes."""
        return nbytes(self.count, self.dtypes[1])

    @property
    def reads(self) -> int:
        """Number of elements to read from the source."""
        return math.prod(self.order.stored) if self.order else self.count

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.dtypes[0] == self.dtypes[1] and not self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole tensor, which must not be cut."""
        return self.order is not None or bool(self.changes)

    def cut(self, count: int) -> Iterator[Transfer]:
        """Yields parts of at most `count` elements; the whole if it must not be cut."""
        if self.is_whole:
            yield self
            return
        for start in range(0, self.count, count):
            source, target = self._at(start)
            yield replace(self, source=source, target=target, count=min(count, self.count - start))

    def continues(self, other: Transfer) -> bool:
        """Whether both are copies, and this one begins where the other ends."""
        both = self.is_copy and other.is_copy and self.dtypes == other.dtypes
        return both and (self.source, self.target) == other._at(other.count)

    def _at(self, element: int) -> tuple[Offset, Offset]:
        """Returns where an element is read and written."""
        (source, start), (target, offset) = self.source, self.target
        before, after = (nbytes(element, dtype) for dtype in self.dtypes)
        return (source, start + before), (target, offset + after)


def transfers(steps: Iterable[Step], places: Places) -> Iterator[Transfer]:
    """Yields what to move for some steps, given the places of all their targets."""
    for step in steps:
        into = [places[target.component, target.key] for target in step.targets]
        if into and step.op.order == "halves swapped":
            yield from _swapped(step, into[0])
        elif step.changes or (into and _order(step)):
            yield from _whole(step, into)
        elif into:
            yield from _matched(step.sources, into)


def _whole(step: Step, into: Sequence[Tensor]) -> Iterator[Transfer]:
    """Yields one transfer for each target of a step that has one source."""
    (source,), order = step.sources, _order(step)
    start = 0
    for target, place in zip(step.targets, into, strict=True):
        if place.numel:
            yield replace(
                _transfer(source, 0 if order else start, place, 0, place.numel),
                order=order,
                first=start if order else 0,
                shape=target.shape if step.changes else (),
                changes=tuple(change for change in step.changes if change.key == target.key),
            )
        start += place.numel


def _swapped(step: Step, place: Tensor) -> Iterator[Transfer]:
    """Yields the two halves of a tensor, each into the place of the other.

    A scale of such a step is for the whole tensor; what an adapter adds is divided by rows.
    """
    (source,), half, order = step.sources, place.numel // 2, _order(step)
    rows = place.shape[0]
    shape = (rows // 2, *place.shape[1:]) if step.changes else ()
    for taken, done in ((half, 0), (0, half)):
        if half:
            part = _transfer(source, 0 if order else taken, place, done, half)
            first = taken if order else 0
            before = rows // 2 if done else 0
            changes = tuple(replace(c, first=(c.first + before) % rows) for c in step.changes)
            yield replace(part, order=order, first=first, shape=shape, changes=changes)


def _order(step: Step) -> Order | None:
    """Returns how a step rearranges the elements of its source, if it does."""
    source = step.sources[0]
    if step.op.order != "transposed":
        # To end within a block, a target needs the values of the whole tensor.
        return Order((source.numel,), (0,)) if _cuts_blocks(step) else source.order
    stored, axes = source.order or (source.shape, tuple(range(len(source.shape))))
    return Order(stored, axes[::-1])


def _cuts_blocks(step: Step) -> bool:
    """Whether a target, or a half of it, ends within a block of a quantized tensor."""
    source = step.sources[0]
    if source.dtype not in BLOCKS:
        return False
    ends = [*itertools.accumulate(math.prod(target.shape) for target in step.targets)]
    if step.op.order == "halves swapped":
        ends = [source.numel // 2]
    return any(end % BLOCKS[source.dtype][0] for end in ends)


def _matched(sources: Sequence[Tensor], into: Sequence[Tensor]) -> Iterator[Transfer]:
    """Walks along sources and targets, and cuts where either of them ends."""
    waiting = iter(into)
    place, done = next(waiting), 0
    for source in sources:
        taken = 0
        while taken < source.numel:
            while done == place.numel:
                place, done = next(waiting), 0
            count = min(source.numel - taken, place.numel - done)
            yield _transfer(source, taken, place, done, count)
            taken += count
            done += count


def _transfer(source: Tensor, taken: int, place: Tensor, done: int, count: int) -> Transfer:
    """Returns the transfer of elements from one tensor to another, each from an element on."""
    return Transfer(
        (source.file, source.start + nbytes(taken, source.dtype)),
        (place.file, place.start + nbytes(done, place.dtype)),
        count,
        (source.dtype, place.dtype),
    )


def joined(todo: Iterable[Transfer]) -> Iterator[Transfer]:
    """Joins copies that follow each other in the source and in the target."""
    last: Transfer | None = None
    for each in todo:
        if last and each.continues(last):
            last = Transfer(last.source, last.target, last.count + each.count, last.dtypes)
            continue
        if last:
            yield last
        last = each
    if last:
        yield last
