"""The files of `key_maps/` that are about all architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .architecture import Facts
from .schema import Many, given, word

__all__ = ["ForeignFormat", "Hint", "Hints", "OriginalConfigFile", "Relative", "first_match"]


@dataclass(frozen=True, slots=True)
class Hint:
    """What a report notes of a file that looks like another.

    Attributes:
        text: the note.
        words: phrases in the name of the file or its metadata.
        keys: patterns of keys.
        facts: that hold together.
    """

    text: str = word("hint")
    words: tuple[str, ...] = ()
    keys: tuple[str, ...] = word("has", default=())
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hints:
    """`shared/hints.yaml`: the hints, and the entries of the metadata that they look into."""

    metadata: tuple[str, ...]
    hints: tuple[Hint, ...]


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """One entry of `foreign.yaml`: a kind of file that is no checkpoint.

    Attributes:
        keys: patterns, of which such a file has one.
        what: it is.
        hint: what to do with it.
    """

    keys: tuple[str, ...] = word("has")
    what: str
    hint: str


@dataclass(frozen=True, slots=True)
class Relative:
    """One entry of `relatives.yaml`: a model that people hold, and what it is taken for."""

    name: str = given()
    architecture: str
    task: str


@dataclass(frozen=True, slots=True)
class FactPath:
    """Where an original configuration tells a fact, and what its texts mean."""

    paths: Many[str] = word("path")
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ValuePath:
    """Where an original configuration tells a value.

    Attributes:
        paths: of the entry; the first that there is counts.
        times: of an entry that multiplies each number of a list.
        divides: another value of the component, each number of which the entry divides.
    """

    paths: Many[str] = word("path")
    times: Many[str] = ()
    divides: str = ""


@dataclass(frozen=True, slots=True)
class OriginalConfigFile:
    """`original-config.yaml`: by name of a fact, or COMPONENT.NAME of a value, where it is told."""

    facts: Mapping[str, Many[FactPath]]
    values: Mapping[str, Many[ValuePath]]


def first_match(keys: Mapping[str, Any], patterns: tuple[str, ...]) -> str | None:
    """Returns the first key that a pattern matches: `*` at either end stands for any text."""
    whole = {pattern for pattern in patterns if "*" not in pattern}
    starts = tuple(p.removesuffix("*") for p in patterns if p.endswith("*"))
    ends = tuple(p.removeprefix("*") for p in patterns if p.startswith("*"))
    found = (k for k in keys if k in whole or k.startswith(starts) or k.endswith(ends))
    return next(found, None)
