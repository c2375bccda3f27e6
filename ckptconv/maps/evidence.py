"""What tells an architecture, and what tells a fact that names and shapes cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .schema import Many, word

# How to know an architecture: conditions on the keys of its network, without their prefix.


@dataclass(frozen=True, slots=True)
class Has:
    """The key is there; `because` says what that tells, for the reader of a report."""

    key: str = field(metadata=word("has"))
    because: str = ""


@dataclass(frozen=True, slots=True)
class Lacks:
    """The key is not there."""

    key: str = field(metadata=word("lacks"))
    because: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """The tensor has so many axes."""

    key: str = field(metadata=word("rank"))
    expected: int = field(metadata=word("is"))
    because: str = ""


@dataclass(frozen=True, slots=True)
class Indices:
    """The numbers that stand for the one `*` of the key are these, in order."""

    key: str = field(metadata=word("indices"))
    expected: tuple[int, ...] = field(metadata=word("is"))
    because: str = ""

    def __post_init__(self) -> None:
        if self.key.count("*") != 1:
            raise ValueError(f"'indices' needs one '*' in its key, found {self.key!r}")


Condition = Has | Lacks | Rank | Indices

# What names and shapes cannot tell: witnesses, of which the first that has an answer decides.


@dataclass(frozen=True, slots=True)
class InMetadata:
    """Entries of the header's metadata; `values` has the answers to their texts."""

    names: Many[str] = field(metadata=word("metadata"))
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Marker:
    """A tensor that is there; a `*` at either end of its name stands for any text."""

    key: str = field(metadata=word("has"))
    value: Any


@dataclass(frozen=True, slots=True)
class OfTask:
    """The task is one of these."""

    tasks: Many[str] = field(metadata=word("task"))
    value: Any
    because: str = ""


@dataclass(frozen=True, slots=True)
class LastValue:
    """The last value of a small float tensor is below a limit."""

    key: str = field(metadata=word("last"))
    below: float
    value: Any
    otherwise: Any = None


@dataclass(frozen=True, slots=True)
class SpreadOfValues:
    """The standard deviation of a small float tensor is above a limit."""

    key: str = field(metadata=word("spread"))
    above: float
    value: Any
    otherwise: Any = None


@dataclass(frozen=True, slots=True)
class PublishedSize:
    """The number of a tensor's elements; `values` has the answers to those that are published."""

    key: str = field(metadata=word("size"))
    values: Mapping[int, Any]


@dataclass(frozen=True, slots=True)
class Assumed:
    """No evidence at all; only metadata and options can tell the value from the `others` (`or`).

    It can be limited to files that have a key or are for one of some tasks.
    """

    value: Any = field(metadata=word("assume"))
    because: str
    others: Many[Any] = field(default=(), metadata=word("or"))
    key: str = field(default="", metadata=word("has"))
    tasks: Many[str] = field(default=(), metadata=word("task"))


@dataclass(frozen=True, slots=True)
class Default:
    """What holds where no witness before says otherwise."""

    value: Any
    because: str


Witness = (
    InMetadata | Marker | OfTask | LastValue | SpreadOfValues | PublishedSize | Assumed | Default
)


def answers(witness: Witness) -> tuple[Any, ...]:
    """Returns the values that a witness can give."""
    match witness:
        case InMetadata() | PublishedSize():
            return tuple(witness.values.values())
        case LastValue() | SpreadOfValues():
            return tuple(v for v in (witness.value, witness.otherwise) if v is not None)
        case Assumed():
            return (witness.value, *witness.others)
    return (witness.value,)


Facts = Mapping[str, Many[Any]]
"""Values that facts must have, any of several; `task` is a fact, too."""
