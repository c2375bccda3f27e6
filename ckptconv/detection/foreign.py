"""What a file is that no architecture describes, by the table `foreign.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import NotACheckpoint
from ..maps.architecture import KeyMaps
from ..maps.schema import word
from ..reading.tensor import Header
from .facts import first_match


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """One entry of `foreign.yaml`; one that `decides` is right even if an architecture matches.

    The keys of one that is `quantized` may fit an architecture, its values do not.
    """

    keys: tuple[str, ...] = field(metadata=word("has"))
    title: str
    hint: str
    decides: bool = False
    quantized: bool = False


def foreign(given: Header, maps: KeyMaps, *, deciding: bool = False) -> NotACheckpoint | None:
    """Says what a file of another kind is; `deciding` asks only the entries that decide."""
    known = maps.typed(tuple[ForeignFormat, ...], "foreign")
    entries = [entry for entry in known if entry.decides or not deciding]
    if not first_match(given.tensors, [key for entry in entries for key in entry.keys]):
        return None  # as for every checkpoint: one pass over the keys tells
    for entry in entries:
        if key := first_match(given.tensors, entry.keys):
            return NotACheckpoint(
                f"{given.path}: this is {entry.title}",
                problems=[f"it holds the key {key!r}"],
                hint=entry.hint,
                code="quantized" if entry.quantized else "",
            )
    return None
