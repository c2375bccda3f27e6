"""One step of a plan: what becomes of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

from ..maps.ops import DROP, Op
from ..reading.tensor import Shape, Tensor

ASIDE = "ckptconv"
"""The folder of what no pipeline reads: the tensors that were dropped, for the way back."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to write.

    Attributes:
        component: the folder that it goes to; empty in a single file.
        key: its name there.
        dtype: a key of `ckptconv.dtypes.BITS`.
        shape: number of elements along each axis.
    """

    component: str
    key: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the values of a target, besides moving and casting them.

    Attributes:
        key: of the target.
        kind: how the values change: a key of `ckptconv.streaming.deltas.KINDS`.
        parts: the tensors that say by how much, by their role.
        factor: multiplies what is added.
    """

    key: str
    kind: str
    parts: tuple[tuple[str, Tensor], ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """The elements of the sources, in order, become those of the targets, in order.

    Attributes:
        op: from the key map.
        sources: one tensor; on the way back, as many as the operation had targets.
        targets: the tensors to write; none if a dropped tensor is not kept.
        reason: why the tensor is dropped; empty otherwise.
        changes: what is done to the values, in this order.
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


def dropped(tensor: Tensor, reason: str, *, keep: bool = False) -> Step:
    """Returns the step of a tensor that is not converted.

    Args:
        tensor: of the file.
        reason: why.
        keep: write it beside the components, for the way back.
    """
    aside = (Target(ASIDE, tensor.name, tensor.dtype, tensor.shape),) if keep else ()
    return Step(DROP, (tensor,), aside, reason)
