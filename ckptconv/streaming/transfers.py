"""What a plan moves, byte range by byte range.

A step lays the elements of its sources, in order, over its targets. Where the dtype stays, that is
a copy of byte ranges; neighbouring ranges become one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..dtypes import nbytes
from ..planning.step import Change, Step
from ..reading.tensor import Shape, Tensor

Places = Mapping[tuple[str, str], Tensor]
"""By component and key of a target, where it lies, or is to lie, in a file."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Elements that lie together in one source and one target.

    Attributes:
        source: file, and offset in bytes of the first element.
        target: likewise.
        count: number of elements.
        dtypes: of the source and of the target, as safetensors writes them.
        transposed: shape of the source if it is to be transposed; then the transfer is the tensor.
        shape: of the target if its values change; then, too, the transfer is the tensor.
        changes: how they change, in this order.
    """

    source: tuple[Path, int]
    target: tuple[Path, int]
    count: int
    dtypes: tuple[str, str]
    transposed: Shape | None = None
    shape: Shape = ()
    changes: tuple[Change, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the target in bytes."""
        return nbytes(self.count, self.dtypes[1])

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.dtypes[0] == self.dtypes[1] and not self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor that must not be cut."""
        return self.transposed is not None or bool(self.changes)

    def cut(self, count: int) -> Iterator[Transfer]:
        """Yields parts of at most `count` elements; the whole if it must not be cut."""
        if self.is_whole:
            yield self
            return
        for start in range(0, self.count, count):
            yield replace(
                self,
                source=(self.source[0], self.source[1] + nbytes(start, self.dtypes[0])),
                target=(self.target[0], self.target[1] + nbytes(start, self.dtypes[1])),
                count=min(count, self.count - start),
            )


def transfers(steps: Iterable[Step], places: Places) -> Iterator[Transfer]:
    """Yields what to move for some steps.

    Args:
        steps: to run; those without targets give nothing.
        places: of all targets.
    """
    for step in steps:
        into = [places[target.component, target.key] for target in step.targets]
        if step.changes or (into and not step.op.keeps_order):
            yield from _whole(step, into)
        elif into:
            yield from _matched(step.sources, into)


def _whole(step: Step, into: Sequence[Tensor]) -> Iterator[Transfer]:
    """Yields one transfer for each target of a step that has one source."""
    (source,) = step.sources
    transposed = None if step.op.keeps_order else source.shape
    start = source.start
    for target, place in zip(step.targets, into, strict=True):
        if place.numel:
            changes = tuple(change for change in step.changes if change.key == target.key)
            yield Transfer(
                (source.file, start),
                (place.file, place.start),
                place.numel,
                (source.dtype, place.dtype),
                transposed,
                target.shape if step.changes else (),
                changes,
            )
        start += nbytes(place.numel, source.dtype)


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
            yield Transfer(
                (source.file, source.start + nbytes(taken, source.dtype)),
                (place.file, place.start + nbytes(done, place.dtype)),
                count,
                (source.dtype, place.dtype),
            )
            taken += count
            done += count


def joined(todo: Iterable[Transfer]) -> Iterator[Transfer]:
    """Joins copies that follow each other in the source and in the target."""
    last: Transfer | None = None
    for each in todo:
        if (
            last
            and last.is_copy
            and each.is_copy
            and last.dtypes == each.dtypes
            and each.source == (last.source[0], last.source[1] + last.nbytes)
            and each.target == (last.target[0], last.target[1] + last.nbytes)
        ):
            last = Transfer(last.source, last.target, last.count + each.count, last.dtypes)
            continue
        if last:
            yield last
        last = each
    if last:
        yield last
