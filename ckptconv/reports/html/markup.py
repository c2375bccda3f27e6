"""HTML and SVG, element by element: text becomes part of a page only through an escape.

Keys and metadata come from a file that a stranger wrote. Whatever is not `Html` is escaped, so
forgetting to escape shows as a tag on the page and never as one in it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Html", "Section", "element", "joined", "listing", "table", "text"]

_VOID = frozenset(("input", "meta"))
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)
"""Control characters and those that reorder or hide text: a reader must see that they are there."""
_LONE = re.compile("[\ud800-\udfff]")


class Html(str):
    """Markup that is safe to put into a page."""

    __slots__ = ()


def text(value: object) -> Html:
    r"""Returns a value as text of a page; markup stays as it is.

    Characters that cannot be seen, or cannot be written as UTF-8, are shown as their code points.

    >>> text("<b> & \u202e")
    '&lt;b&gt; &amp; \\u202e'
    """
    if isinstance(value, Html):
        return value
    plain = _UNSEEN.sub(_code_point, _LONE.sub(_code_point, str(value)))
    return Html(html.escape(plain))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """Returns an element.

    Args:
        tag: its name.
        *content: texts and elements; texts are escaped.
        **attributes: an underscore stands for a hyphen, and one at the end goes away (`class_`);
            None and False leave the attribute out, True gives it no value.

    >>> element("a", "1 < 2", href="#x", class_="y", hidden=False)
    '<a href="#x" class="y">1 &lt; 2</a>'
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    if tag in _VOID:
        return Html(opening)
    return Html(f"{opening}{joined(content)}</{tag}>")


def joined(parts: Iterable[object]) -> Html:
    """Returns texts and elements one after the other; texts are escaped."""
    return Html("".join(map(text, parts)))


def listing(items: Iterable[object], *, class_: str | None = None) -> Html:
    """Returns a list with an entry for each item."""
    return element("ul", *(element("li", item) for item in items), class_=class_)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, class_: str = "") -> Html:
    """Returns a table; the first cell of a row is its header.

    A cell says its column as well, since a phone shows a row as a block.

    Args:
        head: names of the columns; those that begin with a space are numbers.
        rows: a cell for each column.
        class_: of the table.
    """
    kinds = ["number" if name.startswith(" ") else None for name in head]
    names = [name.strip() for name in head]
    lines = []
    for row in rows:
        first, *others = zip(row, names, kinds, strict=True)
        cells = [element("th", first[0], scope="row")]
        cells += [element("td", cell, data_name=name, class_=kind) for cell, name, kind in others]
        lines.append(element("tr", *cells))
    columns = (
        element("th", name, scope="col", class_=kind)
        for name, kind in zip(names, kinds, strict=True)
    )
    body = element("tbody", *lines)
    return element("table", element("thead", element("tr", *columns)), body, class_=class_ or None)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a title.

    Attributes:
        ident: what a link to it says.
        title: of it.
        body: what stands under the title.
    """

    ident: str
    title: str
    body: Html

    def html(self) -> Html:
        """Returns it as an element, a landmark of the page."""
        heading = element("h2", self.title, id=f"{self.ident}-title")
        return element(
            "section", heading, self.body, id=self.ident, aria_labelledby=f"{self.ident}-title"
        )


def _code_point(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
