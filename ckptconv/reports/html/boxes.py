"""The boxes of a drawing: which blocks share one, where it stands, and what it says of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..network import Block

NORM = "conv_norm_out"
"""Normalizes the input of the last convolution, and shares its box."""
RESAMPLES = {"down": "\u2193", "up": "\u2191"}

Point = tuple[float, float]
Row = tuple[Block, ...]
"""The content of a box: a block, a block after its normalization, or a stack of layers."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box, and the blocks in it."""

    row: Row
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + self.height

    @property
    def center(self) -> Point:
        """The point in the middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def parameters(self) -> int:
        """Number of parameters of all blocks."""
        return sum(block.parameters for block in self.row)

    @property
    def layers(self) -> int:
        """Number of layers of a stack; 0 for anything else."""
        return len(self.row) if is_stack(self.row) else 0

    @property
    def names(self) -> str:
        """The blocks as diffusers names them."""
        names = [block.name for block in self.row]
        return places(names) if self.layers else ", ".join(names)

    @property
    def originals(self) -> str:
        """The blocks as the file names them, in short where they are many."""
        names = list(dict.fromkeys(name for block in self.row for name in block.original))
        return places(names) if len(names) > 8 else ", ".join(names)

    @property
    def name(self) -> str:
        """The headline."""
        if self.layers:
            return self.names
        return re.sub(r"^(en|de)coder\.", "", self.row[-1].name) + " + norm" * (len(self.row) == 2)

    @property
    def signs(self) -> list[tuple[str, str]]:
        """Kind and sign of each layer, in their order: a resnet, its attention, and so on."""
        block = self.row[0]
        if not block.resnets:
            return []
        resnets = [("resnet", "R")] * block.resnets
        attention = [("attention", str(depth or "A")) for depth in block.attention]
        pairs = itertools.zip_longest(resnets, attention)
        resample = [("resample", RESAMPLES[block.resamples])] if block.resamples else []
        return [sign for pair in pairs for sign in pair if sign] + resample

    def find(self, component: str) -> str:
        """Returns what to search the table of the keys for."""
        return "|".join(f"{component}/{block.name}." for block in self.row)

    def place(self, prefix: str) -> str:
        """Returns in short where the blocks are in the file, less what all blocks begin with."""
        row = self.row if self.layers else self.row[-1:]
        return places(name.removeprefix(prefix) for block in row for name in block.original)


def rows(blocks: Sequence[Block]) -> list[Row]:
    """Returns a row for each block; a normalization joins the convolution that follows."""
    found: list[Row] = []
    for block in blocks:
        if found and found[-1][-1].name.endswith(NORM):
            found[-1] += (block,)
        else:
            found.append((block,))
    return found


def is_stack(row: Row) -> bool:
    """Returns whether a row is a stack of layers."""
    return len(row) > 1 and not row[0].name.endswith(NORM)


def places(names: Iterable[str]) -> str:
    """Returns names of blocks in short.

    >>> places(["input_blocks.10.0", "input_blocks.10.1", "input_blocks.9.0"])
    'input_blocks.9-10'
    >>> places(["time_embed.0", "time_embed.2"])
    'time_embed.0, 2'
    """
    keys = [name.split(".") for name in names]
    start = shared(keys)
    following = sorted({key[len(start)] for key in keys if len(key) > len(start)})
    if not following or not all(part.isdecimal() for part in following):
        return ".".join(start) or ", ".join(following)
    numbers = sorted(map(int, following))
    first, last = numbers[0], numbers[-1]
    whole = len(numbers) > 1 and numbers == list(range(first, last + 1))
    return ".".join([*start, f"{first}-{last}" if whole else ", ".join(map(str, numbers))])


def shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Returns the segments with which all names begin."""
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return [column[0] for column in equal]
