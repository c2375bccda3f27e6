"""One step of a plan: what becomes of one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..maps.ops import DROP, Op

__all__ = ["ASIDE", "Slot", "Step", "dropped"]

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
class Step:
    """The elements of the sources, in order, become those of the targets, in order.

    Attributes:
        op: `rename`, `squeeze`, `split_rows`, `transpose` or `drop`.
        sources: one tensor, or several in a plan that was turned round.
        targets: the tensors to write; none if a dropped tensor is not kept aside.
        reason: why the tensor is dropped; empty otherwise.
    """

    op: Op
    sources: tuple[Slot, ...]
    targets: tuple[Slot, ...]
    reason: str = ""

    @property
    def casts(self) -> bool:
        """Whether the dtype changes."""
        return bool(self.targets) and self.sources[0].dtype != self.targets[0].dtype

    def inverse(self) -> Step:
        """Returns the step that goes back; the elements keep their order."""
        return replace(self, sources=self.targets, targets=self.sources)


def dropped(step: Step, reason: str) -> Step:
    """Returns a step that leaves the tensor out for good."""
    return Step(DROP, step.sources, (), reason)
