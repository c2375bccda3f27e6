"""A canvas for inline SVG: rectangles, texts, arrows and links, styled by classes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from .markup import Html, element

__all__ = ["Canvas", "Point"]

Point = tuple[float, float]

HEAD = (6.0, 3.5)
"""Length and half the width of an arrow's head, in pixels."""


class Canvas:
    """Collects the shapes of one drawing."""

    def __init__(self) -> None:
        self._shapes: list[Html] = []

    def rect(
        self, kind: str, x: float, y: float, width: float, height: float, *, rx: int = 1
    ) -> None:
        """Draws a rectangle of a class, with corners rounded by `rx`."""
        size = {"x": _n(x), "y": _n(y), "width": _n(width), "height": _n(height)}
        self._shapes.append(element("rect", class_=kind, rx=rx, **size))

    def text(self, kind: str, x: float, y: float, content: str) -> None:
        """Writes a text of a class; the style sheet says which end of it is at `x`."""
        self._shapes.append(element("text", content, class_=kind, x=_n(x), y=_n(y)))

    def arrow(self, points: Sequence[Point], kind: str = "flow") -> None:
        """Draws a line along points, with a head at its end; it ends level or upright."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = ((x > x0) - (x < x0), (y > y0) - (y < y0))
        back, side = HEAD
        head = [
            (x, y),
            (x - back * dx + side * dy, y - back * dy + side * dx),
            (x - back * dx - side * dy, y - back * dy - side * dx),
        ]
        self._shapes.append(element("polyline", class_=kind, points=_points(points)))
        self._shapes.append(element("polygon", class_=f"head {kind}", points=_points(head)))

    @contextlib.contextmanager
    def link(self, href: str, title: str) -> Iterator[None]:
        """Makes what is drawn inside a link with a title."""
        outside, self._shapes = self._shapes, []
        yield
        outside.append(element("a", element("title", title), *self._shapes, href=href))
        self._shapes = outside

    def svg(self, ident: str, size: tuple[float, float], kind: str, title: str, desc: str) -> Html:
        """Returns the drawing.

        Args:
            ident: begins the ids of title and description; unique on the page.
            size: width and height in pixels.
            kind: its class.
            title: its name, for a screen reader.
            desc: what is to be seen, likewise.
        """
        return element(
            "svg",
            element("title", title, id=f"{ident}-title"),
            element("desc", desc, id=f"{ident}-desc"),
            *self._shapes,
            role="group",  # an "img" would hide the links in it
            class_=kind,
            viewBox=f"0 0 {_n(size[0])} {_n(size[1])}",
            aria_labelledby=f"{ident}-title",
            aria_describedby=f"{ident}-desc",
        )


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
