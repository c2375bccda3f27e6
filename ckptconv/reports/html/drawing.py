"""Where everything in the drawing of a network goes: a U for what goes down and up, else a stack.

Lengths are in pixels of the page, and `drawing.html.j2` turns a `Drawing` into SVG. A UNet is drawn
twice, for a desktop and for a phone, since text that shrinks with the picture cannot be read; the
style sheet shows one of the two.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..network import Block
from .boxes import Box, Point, Row, is_stack, rows, shared

PAD = 8
FLOW = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""What the data of a UNet pass through; everything else is conditioning."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The measures of a drawing."""

    name: str  # class in the style sheet, which sets the size of the text
    width: int  # of the whole
    box: int  # width of a box of the U
    font: int
    glyph: int  # width of the sign of a layer, at most
    indent: int  # of each level of the U, to the inside
    gap: int  # between a box and the one below
    words: bool  # whether there is room for words beside the skip connections
    pad: int = PAD  # between the edge of a box and its content
    layer: int = 8  # height of a layer in a stack


WIDE = Sizes("wide", 960, 290, 13, 32, 20, 26, words=True)
NARROW = Sizes("narrow", 352, 164, 11, 18, 0, 20, words=False)
COMPACT = replace(NARROW, name="compact")
"""As narrow, for the components that are drawn once for all screens."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """A line along points, with a head at its end."""

    kind: str
    points: tuple[Point, ...]

    @property
    def angle(self) -> float:
        """The direction of its end in degrees, clockwise from the right."""
        (x0, y0), (x, y) = self.points[-2:]
        return math.degrees(math.atan2(y - y0, x - x0))


@dataclass(slots=True)
class Drawing:
    """The drawing of a component, whose blocks are in the order of the data."""

    component: str
    blocks: Sequence[Block]
    sizes: Sizes
    height: float = 0  # of the whole; grows while it is drawn
    boxes: list[Box] = field(default_factory=list)  # in the order in which a keyboard reaches them
    arrows: list[Arrow] = field(default_factory=list)
    notes: list[tuple[float, float, str]] = field(default_factory=list)  # x of the middle, y, text

    @property
    def total(self) -> int:
        """Number of parameters; 1 where there are none, to divide by."""
        return max(sum(block.parameters for block in self.blocks), 1)

    @property
    def prefix(self) -> str:
        """What the names of all blocks in the file begin with."""
        names = [name.split(".")[:-1] for block in self.blocks for name in block.original]
        return "".join(f"{segment}." for segment in shared(names))

    def stack(self) -> None:
        """Draws one box under the other, numbered blocks as thin layers of one box."""
        top = 1.0
        for _, group in itertools.groupby(self.blocks, lambda b: re.sub(r"\d+$", "", b.name)):
            row = tuple(group)
            self.boxes.append(Box(row, 1, top, self.sizes.width - 2, self._height(row)))
            top = self.boxes[-1].bottom + self.sizes.gap
        self._flow(self.boxes)
        self.height = top - self.sizes.gap + 1

    def unet(self) -> None:
        """Draws a U: down on the left, the middle at the bottom, up on the right."""
        flow = [block for block in self.blocks if block.name.partition(".")[0] in FLOW]
        turn = next(n for n, b in enumerate(flow) if b.name.startswith(("mid_", "up_")))
        middle = tuple(block for block in flow if block.name == "mid_block")
        top = self._beside([(block,) for block in self.blocks if block not in flow])
        down, up = self._columns(flow[:turn], flow[turn + len(middle) :], top, skips=True)
        if not middle:
            self._turn(down, up)
        elif down and up:
            self._middle(down[-1], up[-1], middle)

    def autoencoder(self) -> None:
        """Draws two networks as a U: the encoder on the left, the decoder on the right."""
        sizes, names = self.sizes, [block.name for block in self.blocks]
        turn = next(n for n, name in enumerate(names) if name.startswith("decoder."))
        turn -= turn > 0 and names[turn - 1] == "post_quant_conv"
        self.notes.append((sizes.box / 2, sizes.font + 1, "encoder"))
        self.notes.append((sizes.width - sizes.box / 2, sizes.font + 1, "decoder"))
        top = sizes.font + PAD + 2
        self._turn(*self._columns(self.blocks[:turn], self.blocks[turn:], top), "latents")

    def _height(self, row: Row) -> float:
        height = 2 * PAD + 2.4 * self.sizes.font + 4
        if is_stack(row):
            return height + len(row) * self.sizes.layer + PAD
        return height + (self.sizes.font + 2 * PAD if row and row[0].resnets else 0)

    def _columns(
        self, inward: Sequence[Block], outward: Sequence[Block], top: float, *, skips: bool = False
    ) -> tuple[list[Box], list[Box]]:
        """Draws both sides of a U, level by level from the top, and returns them."""
        sizes, down, up = self.sizes, list[Box](), list[Box]()
        scale = 1  # the side of the latents, divided by that of this level
        levels = itertools.zip_longest(rows(inward), reversed(rows(outward)), fillvalue=())
        for level, (left, right) in enumerate(levels):
            height = max(self._height(row) for row in (left, right) if row)
            shift = level * sizes.indent + 1
            if left:
                down.append(Box(left, shift, top, sizes.box, height))
            if right:
                x = sizes.width - sizes.box - shift
                up.append(Box(right, x, top, sizes.box, height))
            if skips and left and right and right[0].resnets:
                self._skip(down[-1], up[-1], right[0].resnets, scale)
            scale *= 2 if left and left[0].resamples == "down" else 1
            top += height + sizes.gap
        self._flow(down)
        self._flow(up, upwards=True)
        self.boxes += down + up
        self.height = top
        return down, up

    def _beside(self, beside: list[Row]) -> float:
        """Draws what conditions the network in lines on top; returns where the next line is."""
        sizes, top = self.sizes, 1.0
        if not beside:
            return top
        step, height = sizes.box + PAD, self._height(())
        fit = sizes.width // step
        for line in (beside[n : n + fit] for n in range(0, len(beside), fit)):
            x = (sizes.width - step * len(line) + PAD) / 2
            self.boxes += [
                Box(row, x + n * step, top, sizes.box, height) for n, row in enumerate(line)
            ]
            top += height + PAD
        self.notes.append((sizes.width / 2, top + sizes.font, "into every resnet"))
        return top + sizes.font + PAD + 4

    def _middle(self, down: Box, up: Box, row: Row) -> None:
        """Draws the middle of a UNet, below both sides."""
        sizes, top, first, last = self.sizes, self.height, down.center[0], up.center[0]
        box = Box(row, (sizes.width - sizes.box) / 2, top, sizes.box, self._height(row))
        low = box.center[1]
        if first < box.x - PAD:
            self._arrow((first, down.bottom), (first, low), (box.x, low))
            self._arrow((box.right, low), (last, low), (last, up.bottom))
        else:  # no room beside it
            first, last = max(first, box.x + PAD), min(last, box.right - PAD)
            self._arrow((first, down.bottom), (first, top))
            self._arrow((last, top), (last, up.bottom))
        self.boxes.append(box)
        self.height = box.bottom + 1

    def _turn(self, down: list[Box], up: list[Box], note: str = "") -> None:
        """Draws the arrow from the end of one side to the other, if there are both."""
        if down and up:
            first, last, low = down[-1].center[0], up[-1].center[0], self.height
            self._arrow((first, down[-1].bottom), (first, low), (last, low), (last, up[-1].bottom))
            if note:
                self.notes.append((self.sizes.width / 2, low - 6, note))
            self.height += 2

    def _flow(self, column: list[Box], *, upwards: bool = False) -> None:
        """Draws the arrows between the boxes of a column."""
        for above, below in itertools.pairwise(column):
            between = (above.center[0] + below.center[0]) / 2
            ends = ((between, above.bottom), (between, below.y))
            self._arrow(*(ends[::-1] if upwards else ends))

    def _skip(self, left: Box, right: Box, count: int, scale: int) -> None:
        """Draws the skip connections of a level: one for each resnet on the way up."""
        y, x = left.center[1], self.sizes.width / 2
        self._arrow((left.right, y), (right.x, y), kind="skip")
        above, below = f"\u00d7{count}", f"1/{scale}"
        if self.sizes.words:
            above = f"{count} skip connection{'s' * (count > 1)}"
            below = f"{below} of the latent size" if scale > 1 else "at the latent size"
        self.notes.append((x, y - 6, above))
        self.notes.append((x, y + self.sizes.font + 4, below))

    def _arrow(self, *points: Point, kind: str = "flow") -> None:
        self.arrows.append(Arrow(kind, points))


def draw(component: str, blocks: Sequence[Block]) -> list[Drawing]:
    """Returns the drawings of a component: one, or one for each width of the screen."""
    names = [block.name for block in blocks]
    if not any("up_blocks" in name for name in names):
        method, sizes = Drawing.stack, [COMPACT]
    elif any(name.startswith("decoder.") for name in names):
        method, sizes = Drawing.autoencoder, [COMPACT]
    else:
        method, sizes = Drawing.unet, [WIDE, NARROW]
    drawings = [Drawing(component, blocks, each) for each in sizes]
    for drawing in drawings:
        method(drawing)
    return drawings
