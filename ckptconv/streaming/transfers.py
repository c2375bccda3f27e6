"""What a plan moves, byte range by byte range.

A step lays the elements of its sources, in order, over its targets. Where the dtype stays, that is
a copy of byte ranges; neighbouring ranges become one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..planning.step import Step
from ..reading.header import DTYPE_BITS, Header, TensorInfo
from .deltas import Patch

__all__ = ["Piece", "joined", "pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements that lie together in one source and one target.

    Attributes:
        source: path and offset in bytes of the first element.
        target: likewise.
        count: number of elements.
        dtypes: of the source and of the target, as safetensors writes them.
        transposed: shape of the source if it is to be transposed; then the piece is the tensor.
        shape: of the target if its values change; then, too, the piece is the tensor.
        patches: how they change, in this order.
    """

    source: tuple[Path, int]
    target: tuple[Path, int]
    count: int
    dtypes: tuple[str, str]
    transposed: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()
    patches: tuple[Patch, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the target in bytes."""
        return _nbytes(self.count, self.dtypes[1])

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.dtypes[0] == self.dtypes[1] and not self.is_whole

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor that must not be cut."""
        return self.transposed is not None or bool(self.patches)

    def cut(self, count: int) -> Iterator[Piece]:
        """Yields parts of at most `count` elements; the piece itself if it must not be cut."""
        if self.is_whole:
            yield self
            return
        for start in range(0, self.count, count):
            yield replace(
                self,
                source=(self.source[0], self.source[1] + _nbytes(start, self.dtypes[0])),
                target=(self.target[0], self.target[1] + _nbytes(start, self.dtypes[1])),
                count=min(count, self.count - start),
            )


def pieces(
    steps: Iterable[Step],
    sources: Mapping[str, Header],
    targets: Mapping[tuple[str, str], tuple[Path, TensorInfo]],
) -> Iterator[Piece]:
    """Yields what to move for some steps.

    Args:
        steps: to run; those without targets give nothing.
        sources: the headers, by the `place` of the sources.
        targets: path and offsets of each target, by its `place` and key.
    """
    for step in steps:
        if not step.targets:
            continue
        if step.changes:
            yield from _changed(step, sources, targets)
            continue
        froms = [(sources[s.place].path, sources[s.place].tensors[s.key]) for s in step.sources]
        tos = [targets[t.place, t.key] for t in step.targets]
        if step.op.keeps_order:
            yield from _matched(froms, tos)
        else:
            ((path, info),), ((to_path, to_info),) = froms, tos
            if info.numel == 0:
                continue
            yield Piece(
                (path, info.start),
                (to_path, to_info.start),
                info.numel,
                (info.dtype, to_info.dtype),
                info.shape,
            )


def _changed(
    step: Step,
    sources: Mapping[str, Header],
    targets: Mapping[tuple[str, str], tuple[Path, TensorInfo]],
) -> Iterator[Piece]:
    """Yields one piece for each target of a step that changes values; it has one source."""
    (source,) = step.sources
    file, info = sources[source.place], sources[source.place].tensors[source.key]
    done = 0
    for slot in step.targets:
        path, place = targets[slot.place, slot.key]
        patches = tuple(
            Patch(
                change.kind,
                {
                    role: (sources[part.place].path, sources[part.place].tensors[part.key])
                    for role, part in change.parts
                },
                change.factor,
            )
            for change in step.changes
            if change.key == slot.key
        )
        start, dtypes = info.start + _nbytes(done, info.dtype), (info.dtype, place.dtype)
        transposed = None if step.op.keeps_order else info.shape
        done += place.numel
        if place.numel:
            yield Piece(
                (file.path, start),
                (path, place.start),
                place.numel,
                dtypes,
                transposed,
                slot.shape,
                patches,
            )


def _matched(
    froms: Sequence[tuple[Path, TensorInfo]], tos: Sequence[tuple[Path, TensorInfo]]
) -> Iterator[Piece]:
    """Walks along sources and targets, and cuts where either of them ends."""
    waiting = iter(tos)
    path, info = next(waiting)
    done = 0
    for from_path, from_info in froms:
        taken = 0
        while taken < from_info.numel:
            while done == info.numel:
                path, info = next(waiting)
                done = 0
            count = min(from_info.numel - taken, info.numel - done)
            yield Piece(
                (from_path, from_info.start + _nbytes(taken, from_info.dtype)),
                (path, info.start + _nbytes(done, info.dtype)),
                count,
                (from_info.dtype, info.dtype),
            )
            taken += count
            done += count


def joined(todo: Iterable[Piece]) -> Iterator[Piece]:
    """Joins copies that follow each other in the source and in the target."""
    last: Piece | None = None
    for piece in todo:
        if (
            last
            and last.is_copy
            and piece.is_copy
            and last.dtypes == piece.dtypes
            and piece.source == (last.source[0], last.source[1] + last.nbytes)
            and piece.target == (last.target[0], last.target[1] + last.nbytes)
        ):
            last = Piece(last.source, last.target, last.count + piece.count, last.dtypes)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _nbytes(count: int, dtype: str) -> int:
    return count * DTYPE_BITS[dtype] // 8
