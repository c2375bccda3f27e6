"""Are the values of the folder those of the file, and are they finite?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ...dtypes import CASTS, FLOATS, FP8, ONES
from ...files import ByteCounter, Files
from ...folder.read import ComponentFolder, ModelFolder
from ...planning.plan import Plan
from ...planning.precision import dtype_of, network_of
from ...planning.step import ASIDE, Step, Target, identity_matrix
from ...reading.tensor import Tensor
from ...streaming.transfers import Places, Transfer, transfers
from ..compare import Found, Key, compare, look_for_nonfinite
from ..result import Check, Problem

Value = TypeVar("Value")


@dataclass(slots=True)
class Bytes:
    """The reading of both sides, and, once it ran, the tensors in which it found something.

    Tensors are those of the folder, by component and current name. If `cancelled` is set, the
    reading stops soon.
    """

    todo: list[Transfer]
    tensors: Places
    finite: bool
    different: Mapping[Key, Found] = field(default_factory=dict)
    nonfinite: Mapping[Key, Found] = field(default_factory=dict)
    cancelled: bool = False

    @classmethod
    def of(cls, folder: ModelFolder, plan: Plan | None, *, finite: bool) -> Bytes:
        """Pairs the tensors of a folder with those of the file that a plan reads, if any."""
        parts = {name: part.tensors for name, part in folder.parts.items()} | {ASIDE: folder.aside}
        tensors = {(name, k): t for name, part in parts.items() for k, t in part.items()}
        steps = [s for s in (plan.steps if plan else ()) if s.targets and _fits(s, tensors)]
        return cls(list(transfers(steps, tensors)), tensors, finite)

    @property
    def looked_at(self) -> Places:
        """The tensors that a model computes with, as those that are kept aside are not."""
        return {place: tensor for place, tensor in self.tensors.items() if place[0] != ASIDE}

    @property
    def nbytes(self) -> int:
        """Bytes of the folder's tensors that are compared."""
        return sum(each.nbytes for each in self.todo)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Reads the bytes; raises CancelledError where it was cancelled."""

        def report(done: int, total: int) -> None:
            if self.cancelled:
                raise CancelledError
            progress(done, total)

        floats = self.looked_at.values() if self.finite else ()
        looked = sum(t.nbytes for t in floats if t.dtype in FLOATS)
        counter = ByteCounter(self.nbytes + looked, report)
        self.different = compare(self.todo, self.tensors, counter.add)
        if self.finite:
            self.nonfinite = look_for_nonfinite(self.looked_at, counter.add)


def check_data(
    name: str, part: ComponentFolder | None, plan: Plan, read: Bytes, *, cast: bool
) -> Check:
    """Checks that a component has the tensors and the values that the plan gives.

    The tensors that a conversion keeps aside are the component `ckptconv` without a part. With
    `cast`, a dtype was asked for, which is the only right one.
    """
    wanted, found = plan.tensors(name), _of(name, read.tensors)
    both = {key: (target, found[key]) for key, target in wanted.items() if key in found}
    nbytes = sum(have.nbytes for _, have in both.values())
    findings = [
        *(Problem(key, "is missing: the file gives it") for key in wanted if key not in found),
        *(
            Problem(tensor.name, "is left over: nothing in the file gives it")
            for key, tensor in (part.tensors if part else {}).items()
            if key not in wanted and not key.endswith(".position_ids")
        ),
        *(
            Problem(key, f"has shape {list(have.shape)}, the file gives {list(want.shape)}")
            for key, (want, have) in both.items()
            if have.shape != want.shape
        ),
        *_wrong_dtypes(both, network_of(plan.detection.require()[0]), cast=cast),
        *(
            Problem(t.key, "is not an identity matrix, as this pipeline needs it")
            for t in plan.identities
            if t.component == name and t.key in found and not _is_identity(t, found[t.key])
        ),
        *(
            Problem(key, f"{at.count:,} of {at.of:,} values differ, the first at {at.where}")
            for key, at in _of(name, read.different).items()
        ),
    ]
    return Check.of(name, "data", findings, f"{len(wanted):,} tensors, {nbytes:,} bytes")


def check_finite(read: Bytes) -> Iterator[Check]:
    """Yields a check for every component that was looked at."""
    for name in dict.fromkeys(owner for owner, _ in read.looked_at):
        problems = tuple(
            Problem(key, f"{found.count:,} of {found.of:,} values are NaN or infinite")
            for key, found in _of(name, read.nonfinite).items()
        )
        floats = [t for t in _of(name, read.tensors).values() if t.dtype in FLOATS]
        yield Check(name, "finite", problems, (), f"{len(floats):,} tensors of floats")


def _is_identity(target: Target, tensor: Tensor) -> bool:
    if tensor.shape != target.shape or tensor.dtype not in ONES:
        return False
    with Files() as files:
        return bytes(tensor.read(files)) == identity_matrix(replace(target, dtype=tensor.dtype))


def _of(component: str, values: Mapping[Key, Value]) -> dict[str, Value]:
    return {key: value for (owner, key), value in values.items() if owner == component}


def _fits(step: Step, tensors: Places) -> bool:
    """Whether the folder has the targets, in their shapes; if not, that is a problem by itself."""
    found = [(tensors.get((t.component, t.key)), t) for t in step.targets]
    return all(tensor and tensor.shape == target.shape for tensor, target in found)


def _wrong_dtypes(
    pairs: Mapping[str, tuple[Target, Tensor]], network: str, *, cast: bool
) -> Iterator[Problem | str]:
    """Yields tensors that have neither the dtype of the file nor that of all the others.

    A conversion keeps every dtype, casts all floats to one, or rounds a network to fp8. Of these
    readings, the folder is held to the one that fewer tensors contradict.
    """

    def wrong(dtype: str | None) -> dict[str, str]:
        def wanted(want: Target) -> str:
            if dtype == FP8:
                return dtype_of(want, FP8, network)
            return dtype if dtype and want.dtype in FLOATS else want.dtype

        wants = {key: wanted(want) for key, (want, _) in pairs.items()}
        return {key: want for key, want in wants.items() if want != pairs[key][1].dtype}

    casts = set() if cast else {found.dtype for _, found in pairs.values()} & FLOATS
    casts |= {FP8} if CASTS[FP8] in casts else set()
    best = min([None, *sorted(casts)], key=lambda dtype: len(wrong(dtype)))
    if best:
        yield f"the weights are cast to {best}: compared with the rounded values"
    for key, want in wrong(best).items():
        yield Problem(key, f"has dtype {pairs[key][1].dtype}, expected {want}")
