"""One step of a plan: what becomes of one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..dtypes import ONES
from ..maps.ops import DROP, Op
from ..reading.tensor import Shape, Tensor

ASIDE = "ckptconv"
"""The folder for what no pipeline reads: the dropped tensors that an export needs."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to write into the folder of a component; `component` is empty in a single file."""

    component: str
    key: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the values of one target, besides moving and casting them.

    Attributes:
        key: of the target.
        kind: a key of `ckptconv.streaming.deltas.KINDS`.
        parts: the tensors that the change is computed from, by role.
        factor: multiplies what is added.
        first: row of the product that goes to the first row of the target; after the last row, the
            first one follows.
    """

    key: str
    kind: str
    parts: tuple[tuple[str, Tensor], ...]
    factor: float = 1.0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The elements of the sources, in order, become those of the targets, in order.

    Attributes:
        op: from the key map.
        sources: one tensor; in an export, as many as the operation had targets.
        targets: the tensors to write; none for a dropped tensor that is not kept.
        reason: why the tensor is dropped; empty otherwise.
        changes: applied to the values in this order.
    """

    op: Op
    sources: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    reason: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def casts(self) -> bool:
        """Whether the dtype changes."""
        return bool(self.targets) and self.sources[0].dtype != self.targets[0].dtype


def targets_of(
    steps: Iterable[Step], identities: Iterable[Target] = ()
) -> dict[str, dict[str, Target]]:
    """Returns the tensors to write, by component and key: those of steps, in source order, first.

    Args:
        steps: of a plan.
        identities: of the plan.
    """
    found: dict[str, dict[str, Target]] = defaultdict(dict)
    for target in (*(target for step in steps for target in step.targets), *identities):
        found[target.component][target.key] = target
    return found


def identity_matrix(target: Target) -> bytes:
    """Returns the data of an identity matrix."""
    width, one = target.shape[0], ONES[target.dtype]
    return (one + bytes(len(one) * width)) * (width - 1) + one


def dropped(tensor: Tensor, reason: str, *, keep: bool = False) -> Step:
    """Returns the step of a tensor that is not converted; `keep` writes it aside."""
    aside = (Target(ASIDE, tensor.name, tensor.dtype, tensor.shape),) if keep else ()
    return Step(DROP, (tensor,), aside, reason)
