"""Are the values of the folder those of the file, and are they finite?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

from ...dtypes import FLOATS
from ...files import ByteCounter
from ...folder.read import ComponentFolder, ModelFolder
from ...planning.plan import Plan
from ...planning.step import ASIDE, Step, Target
from ...reading.tensor import Tensor
from ...streaming.transfers import Places, Transfer, transfers
from ..compare import Found, compare, look_for_nonfinite
from ..result import Check, Problem


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

    todo: list[Transfer]
    tensors: Places
    finite: bool
    different: Mapping[tuple[str, str], Found] = field(default_factory=dict)
    nonfinite: Mapping[tuple[str, str], Found] = field(default_factory=dict)
    cancelled: bool = False

    @classmethod
    def of(cls, folder: ModelFolder, plan: Plan | None, *, finite: bool) -> Bytes:
        """Pairs the tensors of a folder with those of the file that a plan reads, if any."""
        parts = {name: part.tensors for name, part in folder.parts.items()} | {ASIDE: folder.aside}
        tensors = {(name, k): t for name, part in parts.items() for k, t in part.items()}
        steps = [s for s in (plan.steps if plan else ()) if s.targets and _fits(s, tensors)]
        return cls(list(transfers(steps, tensors)), tensors, finite)

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's tensors that are compared."""
        return sum(each.nbytes for each in self.todo)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Reads the bytes.

        Raises:
            FileRefused: a file became shorter meanwhile, or cannot be read any more.
            CancelledError: it was cancelled.
        """
        looked = sum(t.nbytes for t in self.tensors.values() if t.dtype in FLOATS)

        def report(done: int, total: int) -> None:
            if self.cancelled:
                raise CancelledError
            progress(done, total)

        counter = ByteCounter(self.nbytes + (looked if self.finite else 0), report)
        self.different = compare(self.todo, self.tensors, counter.add)
        if self.finite:
            self.nonfinite = look_for_nonfinite(self.tensors, counter.add)


def check_data(
    name: str, part: ComponentFolder | None, made: Plan, read: Bytes, *, cast: bool
) -> Check:
    """Tells whether a component has the tensors and the values that the plan gives.

    Args:
        name: of the component; `ckptconv` for the tensors that a conversion keeps aside.
        part: the component of the folder; None for those kept aside.
        made: the plan.
        read: the comparison, which ran.
        cast: the plan was told a dtype, which then is the only right one.
    """
    wanted = made.tensors(name)
    have = {key: t for (owner, key), t in read.tensors.items() if owner == name}
    problems = [Problem(key, "is missing: the file gives it") for key in wanted if key not in have]
    if part:
        problems += [
            Problem(tensor.name, "is left over: nothing in the file gives it")
            for key, tensor in part.tensors.items()
            if key not in wanted and not key.endswith(".position_ids")
        ]
    problems += [
        Problem(key, f"has shape {list(have[key].shape)}, the file gives {list(target.shape)}")
        for key, target in wanted.items()
        if key in have and have[key].shape != target.shape
    ]
    wrong, notes = _dtypes(wanted, have, cast=cast)
    problems += wrong
    problems += [
        Problem(key, f"{found.count:,} of {found.of:,} values differ, the first at {found.where}")
        for (owner, key), found in read.different.items()
        if owner == name
    ]
    nbytes = sum(info.nbytes for key, info in have.items() if key in wanted)
    extent = f"{len(wanted):,} tensors, {nbytes:,} bytes"
    return Check(name, "data", tuple(problems), tuple(notes), extent)


def check_finite(read: Bytes) -> Iterator[Check]:
    """Yields a check for every component that was looked at."""
    for name in dict.fromkeys(owner for owner, _ in read.tensors):
        problems = tuple(
            Problem(key, f"{found.count:,} of {found.of:,} values are NaN or infinite")
            for (owner, key), found in read.nonfinite.items()
            if owner == name
        )
        floats = [t for (n, _), t in read.tensors.items() if n == name and t.dtype in FLOATS]
        yield Check(name, "finite", problems, (), f"{len(floats):,} tensors of floats")


def _fits(step: Step, tensors: Places) -> bool:
    """Whether the folder has the targets, in their shapes; if not, that is a problem by itself."""
    found = [(tensors.get((t.component, t.key)), t) for t in step.targets]
    return all(tensor and tensor.shape == target.shape for tensor, target in found)


def _dtypes(
    wanted: Mapping[str, Target], have: Mapping[str, Tensor], *, cast: bool
) -> tuple[list[Problem], list[str]]:
    """Finds tensors that neither have the dtype of the file nor that of all the others.

    A conversion keeps every dtype, or casts all floats to one; so of these two readings the one
    that fewer tensors contradict is held against them.
    """
    pairs = {key: (t.dtype, have[key].dtype) for key, t in wanted.items() if key in have}
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
