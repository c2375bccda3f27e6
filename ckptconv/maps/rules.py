"""The rules of a key map in trees: which one covers a key, and which of them overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .ops import RENAME, Op

Segments = tuple[str, ...]

LAST = "-1"
"""A segment of a pattern: the highest index that the file holds in this place. A `*` of another
rule in the same place then means all the others."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a map, its tables written out.

    Attributes:
        source: the pattern on the original side.
        targets: the patterns on the diffusers side; several for `split_rows`, none for `drop`.
        op: the operation.
        exact: the pattern covers one whole key; otherwise all that lies below it as well.
        reason: why the key is dropped; empty if it is not.
    """

    source: Segments
    targets: tuple[Segments, ...]
    op: Op = RENAME
    exact: bool = False
    reason: str = ""


@dataclass(slots=True)
class _Node:
    rule: tuple[Rule, int] | None = None
    below: dict[str, _Node] = field(default_factory=dict)


class Tree:
    """Patterns by segment: finds the rule for a key, and the rules that a new one overlaps."""

    def __init__(self) -> None:
        self.root = _Node()

    def add(self, pattern: Segments, rule: Rule, part: int = 0) -> Rule | None:
        """Adds a pattern of a rule and returns a rule that it overlaps, or None."""
        overlap = self.overlap(pattern, exact=rule.exact)
        node = self.root
        for segment in pattern:
            node = node.below.setdefault(segment, _Node())
        node.rule = (rule, part)
        return overlap

    def overlap(self, pattern: Segments, *, exact: bool) -> Rule | None:
        """Returns a rule that covers a key which another pattern covers as well, or None."""
        return next(_overlaps(self.root, pattern, exact), None)

    def find(self, key: Segments) -> tuple[Rule, int, Segments] | None:
        """Returns (rule, number of the pattern in it, segments that the stars stand for)."""
        if any("*" in segment for segment in key):
            return None  # no published key has one, and it would pass for that of a pattern
        return _find(self.root, key, ())


def _overlaps(node: _Node, pattern: Segments, exact: bool) -> Iterator[Rule]:
    if node.rule and (not pattern or not node.rule[0].exact):
        yield node.rule[0]
    if pattern:
        head, rest = pattern[0], pattern[1:]
        for segment, child in node.below.items():
            if _meet(segment, head):
                yield from _overlaps(child, rest, exact)
    elif not exact:
        for child in node.below.values():
            yield from _overlaps(child, (), exact)


def _meet(one: str, other: str) -> bool:
    """Whether two segments of patterns can stand for the same segment of a key."""
    if LAST in (one, other):  # the last may be any index, but the stars leave it out
        return one == other or is_index(one) or is_index(other)
    return one == other or "*" in (one, other)


def _find(node: _Node, key: Segments, stars: Segments) -> tuple[Rule, int, Segments] | None:
    if node.rule and (not key or not node.rule[0].exact):
        return (*node.rule, stars + key)
    if not key:
        return None
    found = None
    if child := node.below.get(key[0]):
        found = _find(child, key[1:], stars)
    if not found and (child := node.below.get("*")):
        found = _find(child, key[1:], (*stars, key[0]))
    return found


def is_index(segment: str) -> bool:
    """Decimal without leading zeros, and no longer than any real index."""
    return (
        segment.isascii()
        and segment.isdigit()
        and len(segment) < 6
        and str(int(segment)) == segment
    )
