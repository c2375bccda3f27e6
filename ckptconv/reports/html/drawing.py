"""The network as inline SVG: a U for what goes down and up again, a stack for the rest.

Lengths are in pixels of the page. A UNet is drawn twice, for a desktop and for a phone, since text
that shrinks with the picture cannot be read; the style sheet shows one of the two.
"""

from __future__ import annotations

import itertools
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..network import Block
from ..numbers import millions
from .markup import Html, joined
from .svg import Canvas, Point

__all__ = ["draw", "places"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Measures of a drawing.

    Attributes:
        name: class of the drawing in the style sheet, which sets the size of the text.
        width: of the whole.
        box: width of a box of the U.
        font: size of the text.
        glyph: width of the sign of a layer, at most.
        indent: by which a level stands further inside than the one above.
        gap: between two boxes, one above the other.
        words: whether there is room for words beside the skip connections.
    """

    name: str
    width: int
    box: int
    font: int
    glyph: int
    indent: int
    gap: int
    words: bool


WIDE = Sizes("wide", 960, 290, 13, 32, 20, 26, words=True)
NARROW = Sizes("narrow", 352, 164, 11, 18, 0, 20, words=False)
COMPACT = replace(NARROW, name="compact")
"""As narrow, for the components that are drawn once for all screens."""

PAD = 8
LAYER = 8
"""Height of one layer in a stack."""
FLOW = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""What the data of a UNet pass through; everything else conditions it."""
NORM = "conv_norm_out"
"""Normalizes in front of the last convolution, and shares its box."""
RESAMPLES = {"down": "\u2193", "up": "\u2191"}

Row = tuple[Block, ...]
"""What one box shows: a block, a block behind its normalization, or a stack of layers."""


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a row is drawn."""

    row: Row
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class _Sides:
    """The parts of a U.

    Attributes:
        left: the way down, from the top.
        right: the way up, from the top.
        middle: at the bottom; empty if the way down leads straight into the way up.
        beside: what conditions the network.
        apart: the sides are two networks, an encoder and a decoder, with latents in between.
    """

    left: list[Row]
    right: list[Row]
    middle: Row = ()
    beside: tuple[Row, ...] = ()
    apart: bool = False


def draw(component: str, blocks: Sequence[Block]) -> Html:
    """Returns the drawing of a component, with a title and a description for a screen reader.

    Every box is a link to `#find=...`, which searches the table of the keys.

    Args:
        component: such as `unet`.
        blocks: from `ckptconv.network.blocks`.
    """
    if not any("up_blocks" in block.name for block in blocks):
        return _Picture(component, blocks, COMPACT).stack()
    if any(block.name.startswith("decoder.") for block in blocks):
        return _Picture(component, blocks, COMPACT).u()
    return joined(_Picture(component, blocks, sizes).u() for sizes in (WIDE, NARROW))


def places(originals: Iterable[str]) -> str:
    """Returns where original blocks stand, in short.

    >>> places(["input_blocks.10.0", "input_blocks.10.1", "input_blocks.9.0"])
    'input_blocks.9-10'
    >>> places(["time_embed.0", "time_embed.2"])
    'time_embed.0, 2'
    """
    keys = [name.split(".") for name in originals]
    shared = _shared(keys)
    following = sorted({key[len(shared)] for key in keys if len(key) > len(shared)})
    start = ".".join(shared)
    if not following or not all(part.isdecimal() for part in following):
        return start or ", ".join(following)
    numbers = sorted(map(int, following))
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{start}.{numbers[0]}-{numbers[-1]}"
    return f"{start}.{', '.join(map(str, numbers))}"


def _sides(blocks: Sequence[Block]) -> _Sides:
    """Lays blocks that stand in the order of the data out as a U."""
    if any(block.name.startswith("decoder.") for block in blocks):  # two networks, no middle
        turn = next(n for n, block in enumerate(blocks) if block.name.startswith("decoder."))
        turn -= turn > 0 and blocks[turn - 1].name == "post_quant_conv"
        return _Sides(_rows(blocks[:turn]), _rows(blocks[turn:])[::-1], apart=True)
    flow = [block for block in blocks if block.name.partition(".")[0] in FLOW]
    turn = next(n for n, block in enumerate(flow) if block.name.startswith(("mid_", "up_")))
    middle = tuple(block for block in flow if block.name == "mid_block")
    after = flow[turn + len(middle) :]
    beside = tuple((block,) for block in blocks if block not in flow)
    return _Sides(_rows(flow[:turn]), _rows(after)[::-1], middle, beside)


def _rows(blocks: Sequence[Block]) -> list[Row]:
    """Puts a normalization into the box of the convolution that follows."""
    rows: list[Row] = []
    before: Row = ()
    for block in blocks:
        if block.name.endswith(NORM):
            before = (block,)
        else:
            rows.append((*before, block))
            before = ()
    return rows + [before] * bool(before)


class _Picture:
    """Draws the blocks of one component."""

    def __init__(self, component: str, blocks: Sequence[Block], sizes: Sizes) -> None:
        self.component, self.blocks, self.sizes = component, blocks, sizes
        self.total = sum(block.parameters for block in blocks)
        names = [name.split(".")[:-1] for block in blocks for name in block.original]
        self.prefix = "".join(f"{segment}." for segment in _shared(names))
        self.canvas = Canvas()

    def u(self) -> Html:
        """Draws a U: down on the left, the middle at the bottom, up on the right."""
        sizes, sides = self.sizes, _sides(self.blocks)
        top: float = self._captions() if sides.apart else self._beside(sides.beside)
        down: list[_Box] = []
        up: list[_Box] = []
        scale = 1  # the side of the latents, divided by that of this level
        for level, (left, right) in enumerate(itertools.zip_longest(sides.left, sides.right)):
            height = max(self._height(row) for row in (left, right) if row)
            shift = level * sizes.indent
            if left:
                down.append(_Box(left, shift + 1, top, sizes.box, height))
            if right:
                x = sizes.width - sizes.box - shift - 1
                up.append(_Box(right, x, top, sizes.box, height))
            if not sides.apart and left and right and right[0].resnets:
                self._skip(down[-1], up[-1], scale)
            scale *= 2 if left and left[0].resamples == "down" else 1
            top += height + sizes.gap
        for column, upwards in ((down, False), (up, True)):
            for above, below in itertools.pairwise(column):
                between = (above.middle[0] + below.middle[0]) / 2
                ends = [(between, above.bottom), (between, below.y)]
                self.canvas.arrow(ends[::-1] if upwards else ends)
            for box in column:
                self._box(box)
        return self._svg(self._turn(down[-1], up[-1], sides, top) if down and up else top)

    def stack(self) -> Html:
        """Draws a stack: one box under the other, numbered blocks as thin layers of one box."""
        top = 1.0
        last: _Box | None = None
        for _, group in itertools.groupby(
            self.blocks, lambda block: re.sub(r"\d+$", "", block.name)
        ):
            row = tuple(group)
            box = _Box(row, 1, top, self.sizes.width - 2, self._height(row))
            if last:
                self.canvas.arrow([(last.middle[0], last.bottom), (box.middle[0], box.y)])
            self._box(box)
            top, last = box.bottom + self.sizes.gap, box
        return self._svg(top - self.sizes.gap + 1)

    def _height(self, row: Row) -> float:
        height = 2 * PAD + 2.4 * self.sizes.font + 4
        if _is_stack(row):
            return height + len(row) * LAYER + PAD
        return height + (self.sizes.font + 2 * PAD if row and row[0].resnets else 0)

    def _captions(self) -> float:
        sizes = self.sizes
        for x, name in ((sizes.box / 2, "encoder"), (sizes.width - sizes.box / 2, "decoder")):
            self.canvas.text("note", x, sizes.font + 1, name)
        return sizes.font + PAD + 2.0

    def _beside(self, rows: tuple[Row, ...]) -> float:
        """Draws what conditions the network in lines on top; returns where the next line is."""
        sizes, top = self.sizes, 1.0
        if not rows:
            return top
        step, height = sizes.box + PAD, self._height(())
        fit = sizes.width // step
        for start in range(0, len(rows), fit):
            line = rows[start : start + fit]
            x = (sizes.width - step * len(line) + PAD) / 2
            for n, row in enumerate(line):
                self._box(_Box(row, x + n * step, top, sizes.box, height))
            top += height + PAD
        self.canvas.text("note", sizes.width / 2, top + sizes.font, "into every resnet")
        return top + sizes.font + PAD + 4

    def _turn(self, down: _Box, up: _Box, sides: _Sides, top: float) -> float:
        """Draws the bottom of the U; returns where it ends."""
        sizes = self.sizes
        first, last = down.middle[0], up.middle[0]
        if not sides.middle:
            self.canvas.arrow([(first, down.bottom), (first, top), (last, top), (last, up.bottom)])
            if sides.apart:
                self.canvas.text("note", sizes.width / 2, top - 6, "latents")
            return top + 2
        x, height = (sizes.width - sizes.box) / 2, self._height(sides.middle)
        box = _Box(sides.middle, x, top, sizes.box, height)
        low = box.middle[1]
        if first < box.x - PAD:
            self.canvas.arrow([(first, down.bottom), (first, low), (box.x, low)])
            self.canvas.arrow([(box.right, low), (last, low), (last, up.bottom)])
        else:  # no room beside it
            first, last = max(first, box.x + PAD), min(last, box.right - PAD)
            self.canvas.arrow([(first, down.bottom), (first, top)])
            self.canvas.arrow([(last, top), (last, up.bottom)])
        self._box(box)
        return box.bottom + 1

    def _skip(self, left: _Box, right: _Box, scale: int) -> None:
        """Draws the skip connections of a level: one for each resnet on the way up."""
        count = right.row[0].resnets
        y, x = left.middle[1], self.sizes.width / 2
        self.canvas.arrow([(left.right, y), (right.x, y)], "skip")
        size = f"1/{scale}"
        said = (
            f"{count} skip connection{'s' * (count > 1)}",
            f"{size} of the latent size" if scale > 1 else "at the latent size",
        )
        above, below = said if self.sizes.words else (f"\u00d7{count}", size)
        self.canvas.text("note", x, y - 6, above)
        self.canvas.text("note", x, y + self.sizes.font + 4, below)

    def _box(self, box: _Box) -> None:
        """Draws a row as a link: name, signs of the layers, where it stands, its share."""
        names = [block.name for block in box.row]
        find = "|".join(f"{self.component}/{name}." for name in names)
        with self.canvas.link(f"#find={urllib.parse.quote(find)}", self._sentence(box.row)):
            self.canvas.rect("box", box.x, box.y, box.width, box.height, rx=5)
            self._content(box)

    def _content(self, box: _Box) -> None:
        font, row, canvas = self.sizes.font, box.row, self.canvas
        width, x, right = box.width - 2 * PAD, box.x + PAD, box.right - PAD
        top, low = box.y + PAD + font - 2, box.bottom - PAD - 3
        canvas.text("name", x, top, _name(row))
        if row[-1].channels:
            canvas.text("name end", right, top, f"{row[-1].channels:,}")
        if row[0].resnets:
            self._glyphs(row[0], x, top + PAD, width)
        for n in range(len(row) if _is_stack(row) else 0):
            canvas.rect("attention", x, top + PAD + n * LAYER, width, LAYER - 3)
        parameters = sum(block.parameters for block in row)
        originals = _originals(row if _is_stack(row) else row[-1:])
        canvas.text("where", x, low, places(o.removeprefix(self.prefix) for o in originals))
        canvas.text("where end", right, low, millions(parameters))
        canvas.rect("track", x, low + 5, width, 2)
        canvas.rect("share", x, low + 5, width * parameters / max(self.total, 1), 2)

    def _glyphs(self, block: Block, x: float, y: float, width: float) -> None:
        """Draws the layers of a block in their order: a resnet, its attention, and so on."""
        signs: list[tuple[str, str]] = []
        for n in range(max(block.resnets, len(block.attention))):
            if n < block.resnets:
                signs.append(("resnet", "R"))
            if n < len(block.attention):
                signs.append(("attention", str(block.attention[n] or "A")))
        if block.resamples:
            signs.append(("resample", RESAMPLES[block.resamples]))
        step = min(self.sizes.glyph + 3, width / len(signs))
        height = self.sizes.font + 6
        for n, (kind, sign) in enumerate(signs):
            self.canvas.rect(kind, x + n * step, y, step - 3, height, rx=2)
            center = x + n * step + (step - 3) / 2
            self.canvas.text(f"sign on-{kind}", center, y + height - 5, sign)

    def _sentence(self, row: Row) -> str:
        """Says what a box shows."""
        block, parameters = row[-1], sum(block.parameters for block in row)
        depth = "+".join(str(n) for n in block.attention if n)
        words = [
            f"{block.channels} channels" if block.channels else "",
            f"{block.resnets} resnets" if block.resnets else "",
            f"attention of {depth} transformer blocks" if depth else "",
            f"{len(block.attention)} attention" if block.attention and not depth else "",
            f"{block.resamples}sample" if block.resamples else "",
            f"{parameters:,} parameters, {parameters / max(self.total, 1):.1%} of the component",
        ]
        originals = _originals(row)
        names = [b.name for b in row]
        return (
            f"{places(names) if _is_stack(row) else ', '.join(names)}: "
            f"{', '.join(filter(None, words))}. In the file: "
            f"{places(originals) if len(originals) > 8 else ', '.join(originals)}"
        )

    def _svg(self, height: float) -> Html:
        """Returns what was drawn."""
        return self.canvas.svg(
            f"{self.component}-{self.sizes.name}",
            (self.sizes.width, height),
            f"network {self.sizes.name}",
            f"{self.component}, block by block",
            f"In the order of the data: {', '.join(block.name for block in self.blocks)}",
        )


def _is_stack(row: Row) -> bool:
    return len(row) > 1 and not row[0].name.endswith(NORM)


def _name(row: Row) -> str:
    if _is_stack(row):
        return places(block.name for block in row)
    return re.sub(r"^(en|de)coder\.", "", row[-1].name) + " + norm" * (len(row) == 2)


def _originals(row: Row) -> list[str]:
    return list(dict.fromkeys(name for block in row for name in block.original))


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Returns the segments with which all names begin."""
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return [column[0] for column in equal]
