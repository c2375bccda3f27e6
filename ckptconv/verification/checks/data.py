"""Are the values of the folder those of the file, and are they finite?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path

from ...files import ByteCounter
from ...folder.read import Part, Saved
from ...planning.plan import ASIDE, Plan, Slot, Step
from ...reading.header import FLOATS, TensorInfo
from ...streaming.transfers import Piece, pieces
from ..compare import Found, compare, look_for_nonfinite
from ..result import Check, Problem

__all__ = ["Bytes", "check_data", "check_finite"]

Places = Mapping[tuple[str, str], tuple[Path, TensorInfo]]


@dataclass(slots=True)
class Bytes:
    """The reading of both sides, and what it found.

    Attributes:
        todo: what to compare.
        tensors: of the folder, by component and current name: all that are compared or looked at.
        finite: whether to look for NaN and infinities.
        different: tensors that differ, once it ran.
        nonfinite: tensors that hold NaN or infinities, once it ran.
        cancelled: set it, and the reading stops soon.
    """

    todo: list[Piece]
    tensors: Places
    finite: bool
    different: Mapping[tuple[str, str], Found] = field(default_factory=dict)
    nonfinite: Mapping[tuple[str, str], Found] = field(default_factory=dict)
    cancelled: bool = False

    @classmethod
    def of(cls, saved: Saved, made: Plan | None, *, finite: bool) -> Bytes:
        """Pairs the tensors of a folder with those of the file that a plan reads, if any."""
        tensors = {
            (name, key): (saved.headers[s.place].path, saved.headers[s.place].tensors[s.key])
            for name, slots in _slots(saved).items()
            for key, s in slots.items()
        }
        todo: list[Piece] = []
        if made:
            steps = [step for step in made.steps if step.targets and _fits(step, tensors)]
            todo = list(pieces(steps, made.headers, tensors))
        return cls(todo, tensors, finite)

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's tensors that are compared."""
        return sum(piece.nbytes for piece in self.todo)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Reads the bytes.

        Raises:
            FileRefused: a file became shorter meanwhile, or cannot be read any more.
            CancelledError: it was cancelled.
        """
        looked = sum(info.nbytes for _, info in self.tensors.values() if info.dtype in FLOATS)

        def report(done: int, total: int) -> None:
            if self.cancelled:
                raise CancelledError
            progress(done, total)

        counter = ByteCounter(self.nbytes + (looked if self.finite else 0), report)
        self.different = compare(self.todo, self.tensors, counter.add)
        if self.finite:
            self.nonfinite = look_for_nonfinite(self.tensors, counter.add)


def check_data(name: str, part: Part | None, made: Plan, read: Bytes, *, cast: bool) -> Check:
    """Tells whether a component has the tensors and the values that the plan gives.

    Args:
        name: of the component; `ckptconv` for the tensors that a conversion keeps aside.
        part: the component of the folder; None for those kept aside.
        made: the plan.
        read: the comparison, which ran.
        cast: the plan was told a dtype, which then is the only right one.
    """
    wanted = made.tensors(name)
    have = {key: info for (place, key), (_, info) in read.tensors.items() if place == name}
    problems = [Problem(key, "is missing: the file gives it") for key in wanted if key not in have]
    if part:
        problems += [
            Problem(slot.key, "is left over: nothing in the file gives it")
            for key, slot in part.tensors.items()
            if key not in wanted and not key.endswith(".position_ids")
        ]
    problems += [
        Problem(key, f"has shape {list(have[key].shape)}, the file gives {list(slot.shape)}")
        for key, slot in wanted.items()
        if key in have and have[key].shape != slot.shape
    ]
    wrong, notes = _dtypes(wanted, have, cast=cast)
    problems += wrong
    problems += [
        Problem(key, f"{found.count:,} of {found.of:,} values differ, the first at {found.where}")
        for (place, key), found in read.different.items()
        if place == name
    ]
    nbytes = sum(info.nbytes for key, info in have.items() if key in wanted)
    extent = f"{len(wanted):,} tensors, {nbytes:,} bytes"
    return Check(name, "data", tuple(problems), tuple(notes), extent)


def check_finite(read: Bytes) -> Iterator[Check]:
    """Yields a check for every component that was looked at."""
    for name in dict.fromkeys(place for place, _ in read.tensors):
        problems = tuple(
            Problem(key, f"{found.count:,} of {found.of:,} values are NaN or infinite")
            for (place, key), found in read.nonfinite.items()
            if place == name
        )
        floats = [i for (p, _), (_, i) in read.tensors.items() if p == name and i.dtype in FLOATS]
        yield Check(name, "finite", problems, (), f"{len(floats):,} tensors of floats")


def _slots(saved: Saved) -> dict[str, Mapping[str, Slot]]:
    return {name: part.tensors for name, part in saved.parts.items()} | {ASIDE: saved.aside}


def _fits(step: Step, tensors: Places) -> bool:
    """Whether the folder has the targets, in their shapes; if not, that is a problem by itself."""
    found = [tensors.get((t.place, t.key)) for t in step.targets]
    return all(f and f[1].shape == t.shape for f, t in zip(found, step.targets, strict=True))


def _dtypes(
    wanted: Mapping[str, Slot], have: Mapping[str, TensorInfo], *, cast: bool
) -> tuple[list[Problem], list[str]]:
    """Finds tensors that neither have the dtype of the file nor that of all the others.

    A conversion keeps every dtype, or casts all floats to one; so of these two readings the one
    that fewer tensors contradict is held against them.
    """
    pairs = {key: (slot.dtype, have[key].dtype) for key, slot in wanted.items() if key in have}
    wrong = {key: want for key, (want, found) in pairs.items() if want != found}
    notes = []
    if not cast:
        for dtype in sorted({found for _, found in pairs.values()} & FLOATS):
            other = {
                key: dtype if want in FLOATS else want
                for key, (want, found) in pairs.items()
                if found != (dtype if want in FLOATS else want)
            }
            if len(other) < len(wrong):
                wrong = other
                notes = [f"the weights are cast to {dtype}: compared with the rounded values"]
    problems = [
        Problem(key, f"has dtype {pairs[key][1]}, expected {want}") for key, want in wrong.items()
    ]
    return problems, notes
