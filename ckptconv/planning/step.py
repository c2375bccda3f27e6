"""One step of a plan: what becomes of one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..maps.ops import DROP, Op
from ..reading.header import Header

__all__ = ["ASIDE", "Change", "Slot", "Step", "dropped", "slot_of"]

ASIDE = "ckptconv"
"""The folder of what no pipeline reads: the tensors that were dropped, for the way back."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor in a file.

    Attributes:
        place: path of the file for an original tensor, folder for a converted one.
        key: its name.
        dtype: as safetensors writes it.
        shape: number of elements along each axis.
    """

    place: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the values of a target, beside moving and casting them.

    Attributes:
        key: of the target.
        kind: a key of `ckptconv.streaming.deltas.KINDS`: how the values change.
        parts: the tensors that say by how much, by their role.
        factor: multiplies what is added.
    """

    key: str
    kind: str
    parts: tuple[tuple[str, Slot], ...]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """The elements of the sources, in order, become those of the targets, in order.

    Attributes:
        op: `rename`, `squeeze`, `split_rows`, `transpose` or `drop`.
        sources: one tensor, or several in a plan that was turned round.
        targets: the tensors to write; none if a dropped tensor is not kept aside.
        reason: why the tensor is dropped; empty otherwise.
        changes: what is done to the values, in this order.
    """

    op: Op
    sources: tuple[Slot, ...]
    targets: tuple[Slot, ...]
    reason: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def casts(self) -> bool:
        """Whether the dtype changes."""
        return bool(self.targets) and self.sources[0].dtype != self.targets[0].dtype

    def inverse(self) -> Step:
        """Returns the step that goes back; the elements keep their order, and their new values."""
        return replace(self, sources=self.targets, targets=self.sources, changes=())


def slot_of(header: Header, key: str) -> Slot:
    """Returns a tensor of a header, where it lies."""
    owner, name = header.locate(key)
    info = header.tensors[key]
    return Slot(str(owner.path), name, info.dtype, info.shape)


def dropped(step: Step, reason: str) -> Step:
    """Returns a step that leaves the tensor out for good."""
    return Step(DROP, step.sources, (), reason)
