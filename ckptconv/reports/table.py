"""Rows as text, for a terminal of any width."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence

from ..errors import printable

GAP = "  "
NUMBER = re.compile(r"[\d.,]+( [kMGT]?B?)?")
"""A cell of a column that is aligned to the right, such as `1,680` or `6.94 GB`."""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Returns a table that is no wider than `width` and breaks no word.

    Where the columns are too wide together, long cells go on in further lines. Where even their
    words are, each row becomes a list of titles and cells.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(len(word) for cell in column for word in cell.split()) for column in columns]
    for _ in range(sum(widths) + len(GAP) * (len(titles) - 1) - width):
        spare = [(w > word, w) for w, word in zip(widths, words, strict=True)]
        widths[spare.index(max(spare))] -= 1
    if any(w < word for w, word in zip(widths, words, strict=True)):
        return "\n".join(_listed(titles, row, width) for row in rows)
    right = [all(map(NUMBER.fullmatch, column[1:])) for column in columns]

    def lines(row: Sequence[str]) -> list[str]:
        wrapped = (wrap(cell, w) for cell, w in zip(row, widths, strict=True))
        return [
            GAP.join(
                part.rjust(w) if r else part.ljust(w)
                for part, w, r in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in itertools.zip_longest(*wrapped, fillvalue="")
        ]

    rule = GAP.join("-" * w for w in widths)
    return "\n".join([*lines(titles), rule, *(line for row in rows for line in lines(row))])


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Returns the lines of a text, which is broken between words only."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def _listed(titles: Sequence[str], row: Sequence[str], width: int) -> str:
    pairs = [f"{title}: {cell}" for title, cell in zip(titles, row, strict=True) if cell]
    return "\n".join(
        [pairs[0], *(f"  {line}" for pair in pairs[1:] for line in wrap(pair, width - 2, GAP))]
    )
