"""The holes of a configuration, as values: what is to be measured or looked up, and where.

YAML writes a hole as a tag with its fields in order: `!dim [conv_in.weight, 1]`. Where `*` stands
for a number in a key, the hole is a list with one value for each number, in order. Holes are filled
in `ckptconv.configs.config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from . import schema
from .schema import Fault, Many, Path
from .yaml_files import Tag


class Hole:
    """A value that is not known before there is a file; `word` is its tag."""

    word: ClassVar[str]


@dataclass(frozen=True)
class Keyed(Hole):
    """A hole that asks for a tensor or a container."""

    key: str


@dataclass(frozen=True)
class Dim(Keyed):
    """The length of an axis of a tensor, and of the tensors `also`, as far as they are there.

    `otherwise`, if there is one, where none is there, or they differ.
    """

    word = "dim"
    axis: int
    otherwise: Any = ...
    also: Many[str] = ()


@dataclass(frozen=True)
class FactValue(Hole):
    """The value of a fact, or what `table` has for it."""

    word = "fact"
    name: str
    table: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Heads(Keyed):
    """The first axis of a tensor divided by the width of a head."""

    word = "heads"
    width: int | FactValue | Dim


@dataclass(frozen=True)
class Present(Keyed):
    """One value where there is a tensor, another where there is none."""

    word = "has"
    yes: Any = True
    no: Any = False


@dataclass(frozen=True)
class IndicesOf(Keyed):
    """The numbers that stand for the `*` of a key."""

    word = "indices"


@dataclass(frozen=True)
class Side(Keyed):
    """The edge of a square image: an axis has its patches, and what is `beside` them.

    That is a class token, unless another number is given. Counted in patches, or in pixels if a
    patch has a width. Without the tensor it is assumed.
    """

    word = "side"
    axis: int
    patch: int | Dim = 1
    assumed: int | None = None
    beside: int = 1


@dataclass(frozen=True)
class Count(Keyed):
    """The number of entries of a container, such as `down_blocks.0.resnets`."""

    word = "count"


@dataclass(frozen=True)
class Depth(Keyed):
    """The transformer blocks of each attention in a block: one number if all have the same.

    Without attention it is 1; in the last of several blocks, that of the block `last`.
    """

    word = "depth"
    last: str = ""


@dataclass(frozen=True)
class UpDepths(Hole):
    """The depths of `up_blocks`; null where they mirror those of `down_blocks`."""

    word = "up_depths"


@dataclass(frozen=True)
class Values(Keyed):
    """The values of a small tensor of the original file that is not converted.

    A list if `published` is one, else a number; `published` is assumed where there are none.
    """

    word = "values"
    published: Any


HOLES: dict[str, type[Hole]] = {
    hole.word: hole
    for hole in (Dim, FactValue, Heads, Present, IndicesOf, Side, Count, Depth, UpDepths, Values)
}
"""By the tag that YAML uses."""


def with_holes(data: Any, path: Path, faults: list[Fault]) -> Any:
    """Returns data with a hole in the place of every tag; `faults` gets what is wrong."""
    if isinstance(data, Mapping):
        return {k: with_holes(item, (*path, k), faults) for k, item in data.items()}
    if isinstance(data, list):
        return [with_holes(item, (*path, n), faults) for n, item in enumerate(data)]
    if not isinstance(data, Tag):
        return data
    if (kind := HOLES.get(data.word)) is None:
        known = schema.nearest(f"!{data.word}", (f"!{name}" for name in HOLES))
        faults.append(Fault(path, f"unknown hole '!{data.word}'{known}"))
        return None
    names = list(schema.words(kind))
    if len(data.data) > len(names):
        text = f"'!{data.word}' takes [{', '.join(names)}], found {data.data!r}"
        faults.append(Fault(path, text))
        return None
    values = zip(names, with_holes(data.data, path, faults), strict=False)
    return schema.read(kind, dict(values), path, faults)
