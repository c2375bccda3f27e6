"""A key map: which original key becomes which diffusers key, as data.

The format is described in `docs/key-maps.md`. Patterns are dotted names; `*` stands for one
segment and is carried into the target, in order. A rename covers the key and all that lies below
it; any other operation covers one whole key.

Laws, checked when a map is built:

1. No two sources can match one key and no two targets can collide, so a map is injective and its
   inverse is the same file read right to left.
2. A map is abstract: it knows no shapes. Those come with the plan (`ckptconv.plan`).
3. A key that nothing matches is reported by the plan, never skipped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import MapError
from . import schema
from .ops import DROP, OPS, RENAME, SPLIT_ROWS, Op, split_rows
from .rules import LAST, Rule, Segments, Tree, is_index
from .schema import GIVEN, Fault, Many

Reason = Literal["training", "derived", "unused"]
"""Why a key may be dropped: needed by training only, computed from the configuration, or not used
by the pipeline."""


class Pattern(tuple[str, ...]):
    """The segments of a dotted name; `*` stands for one."""

    __slots__ = ()

    @classmethod
    def from_data(cls, data: Any, path: schema.Path, faults: list[Fault]) -> Pattern:
        """Reads a dotted name."""
        if not isinstance(data, str) or not all(data.split(".")):
            faults.append(Fault(path, f"needs a dotted name (a number in quotes), found {data!r}"))
            return cls()
        return cls(data.split("."))


@dataclass(frozen=True, slots=True)
class Line:
    """The right-hand side of a line: a kind or an operation, none for a rename, and its targets."""

    word: str = field(metadata=GIVEN)
    targets: tuple[Pattern, ...] = field(metadata=GIVEN)
    shares: tuple[int, ...] = field(default=(), metadata=GIVEN)

    @classmethod
    def from_data(cls, data: Any, path: schema.Path, faults: list[Fault]) -> Line:
        """Reads a name, or a mapping of one kind or operation."""
        word, names = "", data
        if isinstance(data, Mapping) and len(data) == 1:
            ((word, names),) = data.items()
            many = word == SPLIT_ROWS
            if many != isinstance(names, list | dict) or (many and len(names) < 2):
                needed = "several names" if many else "one name"
                faults.append(Fault(path, f"{word} needs {needed}, found {names!r}"))
                return cls(word, ())
        elif not isinstance(data, str):
            text = f"needs a name or {{kind or operation: name}}, found {data!r}"
            faults.append(Fault(path, text))
            return cls(word, ())
        shares = tuple(names.values()) if isinstance(names, dict) else ()
        if bad := [share for share in shares if type(share) is not int or share < 1]:
            faults.append(Fault(path, f"{word} needs a number of shares, found {bad[0]!r}"))
        names = [*names] if isinstance(names, list | dict) else [names]
        return cls(str(word), tuple(Pattern.from_data(n, path, faults) for n in names), shares)


@dataclass(frozen=True, slots=True)
class MapFile:
    """The content of a map's file, as docs/key-maps.md describes it."""

    kinds: Mapping[str, Mapping[Pattern, Line]] = field(default_factory=dict)
    blocks: Mapping[Pattern, Line] = field(default_factory=dict)
    drop: Mapping[Pattern, Reason] = field(default_factory=dict)
    optional: tuple[Pattern, ...] = ()
    repeats: tuple[str, ...] = ()
    root: Many[str] = ()
    alternatives: Mapping[Pattern, Line] = field(default_factory=dict)
    spellings: Mapping[Pattern, Pattern] = field(default_factory=dict)
    shortcuts: Mapping[str, str] = field(default_factory=dict)

    def rules(self, faults: list[Fault]) -> Iterator[Rule]:
        """Yields every line, with the lines of its kind written out."""
        words = ["", *(name for name in OPS if name not in (DROP.name, RENAME.name))]
        for kind in self.kinds.keys() & OPS.keys():
            faults.append(Fault(("kinds", kind), "has the name of an operation"))
        for section, kinds in (
            *((table, {}) for table in self.kinds.values()),
            (self.alternatives, {}),
            (self.blocks, self.kinds),
        ):
            for source, line in section.items():
                if line.word not in (*words, *kinds):
                    known = schema.nearest(line.word, [*kinds, *words[1:]])
                    text = f"{line.word!r} is neither a kind of this map nor an operation{known}"
                    faults.append(Fault((".".join(source),), text))
        if faults:
            return
        for source, line in self.blocks.items():
            if line.word not in self.kinds:
                yield _rule(source, line)
                continue
            (place,) = line.targets
            for rule in itertools.starmap(_rule, self.kinds[line.word].items()):
                targets = tuple(place + target for target in rule.targets)
                yield dataclasses.replace(rule, source=source + rule.source, targets=targets)
        for source, reason in self.drop.items():
            yield Rule(source, (), DROP, reason=reason)


@dataclass(frozen=True, slots=True)
class Match:
    """What a map says of one original key."""

    targets: tuple[str, ...]
    op: Op
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a map, read right to left, says of one diffusers key: part `part` of `source`."""

    source: str
    op: Op
    part: int
    parts: int


def _fill(pattern: Segments, carried: Segments) -> str:
    """Writes the carried segments in place of the stars, and what is left of them at the end."""
    rest = iter(carried)
    return ".".join([*(next(rest) if s == "*" else s for s in pattern), *rest])


class KeyMap:
    """A map that keeps the laws.

    Attributes:
        name: for messages: the path of its file.
        rules: every line, tables written out.
        words: what else its file says, such as `root`, the keys that are there wherever the
            network is.
    """

    def __init__(self, name: str, rules: Iterable[Rule], words: MapFile | None = None) -> None:
        """Builds the map.

        Raises:
            MapError: a law is broken; all breaches are listed.
        """
        self.name = name
        self.rules = tuple(rules)
        self.words = words or MapFile()
        self._sources, self._targets = Tree(), Tree()
        self._last_sources, self._last_targets = Tree(), Tree()
        self._optional, self._spellings, self._alternatives = Tree(), Tree(), Tree()
        self._bound: dict[frozenset[Rule], KeyMap] = {}
        problems = []
        for rule in self.rules:
            if not _last_is_placed(rule):
                problems.append(
                    f"{_line(rule)}: '-1' may stand once on each side, with no '*' before it"
                )
            if clash := self._sources.add(rule.source, rule):
                problems.append(f"{_line(clash)} and {_line(rule)} can match the same key")
            for part, target in enumerate(rule.targets):
                if target.count("*") != rule.source.count("*"):
                    problems.append(f"{_line(rule)}: the two sides need the same number of '*'")
                if clash := self._targets.add(target, rule, part):
                    problems.append(f"{_line(clash)} and {_line(rule)} can give the same key")
        for pattern in self.words.optional:
            self._optional.add(pattern, Rule(pattern, ()))
        for source, line in self.words.alternatives.items():
            self._alternatives.add(source, _rule(source, line))
        for other, usual in self.words.spellings.items():
            rule = Rule(other, (usual,))
            self._spellings.add(other, rule)
            if clash := self._sources.overlap(other, exact=False):
                problems.append(f"{_line(clash)} covers keys that {_line(rule)} spells otherwise")
        if problems:
            raise MapError(f"{name}: the key map breaks a law", problems=problems)

    @classmethod
    def from_file(cls, name: str, file: MapFile) -> KeyMap:
        """Builds a map from the content of its file.

        Raises:
            MapError: a line has a word that there is not, or a law is broken.
        """
        faults: list[Fault] = []
        rules = tuple(file.rules(faults))
        if faults:
            raise MapError(f"{name}: the key map is malformed", problems=list(map(str, faults)))
        return cls(name, rules, file)

    def bound(self, keys: Iterable[str]) -> KeyMap:
        """Returns the map for a file of `keys`: with its alternatives, an index for each `-1`."""
        split = [tuple(key.split(".")) for key in keys]
        used = self.words.alternatives and frozenset(
            found[0] for key in split if (found := self._alternatives.find(key))
        )
        chosen = self._with(used) if used else self
        return chosen._with_last(split, lambda rule: [rule.source])

    def bound_by_targets(self, keys: Iterable[str]) -> KeyMap:
        """Returns the map for a component of `keys`, with an index for each `-1`."""
        return self._with_last([tuple(key.split(".")) for key in keys], lambda rule: rule.targets)

    def _with_last(
        self, keys: Sequence[Segments], patterns: Callable[[Rule], Sequence[Segments]]
    ) -> KeyMap:
        """Returns the map with an index for each `-1`, given keys that match some patterns."""
        last = [rule for rule in self.rules if LAST in rule.source]
        if not last:
            return self
        bound = object.__new__(KeyMap)
        bound.__dict__.update(self.__dict__)
        bound._last_sources, bound._last_targets = Tree(), Tree()
        for rule in last:
            indices = [
                int(key[at])
                for pattern in patterns(rule)
                for at in [pattern.index(LAST)]
                for key in keys
                if key[:at] == pattern[:at] and key[at : at + 1] and is_index(key[at])
            ]
            index = str(max(indices)) if indices else LAST
            source, *targets = (
                tuple(index if segment == LAST else segment for segment in pattern)
                for pattern in (rule.source, *rule.targets)
            )
            found = dataclasses.replace(rule, source=source, targets=tuple(targets))
            bound._last_sources.add(source, found)
            for part, target in enumerate(targets):
                bound._last_targets.add(target, found, part)
        return bound

    def _with(self, used: frozenset[Rule]) -> KeyMap:
        """Returns the map with alternatives in the place of the rules that give the same keys."""
        if used not in self._bound:
            new = Tree()
            for rule in used:
                for target in rule.targets:
                    new.add(target, rule)
            kept = [
                r for r in self.rules if not any(new.overlap(t, exact=r.exact) for t in r.targets)
            ]
            self._bound[used] = KeyMap(self.name, [*kept, *used], self.words)
        return self._bound[used]

    def match(self, key: str) -> Match | None:
        """Returns what becomes of an original key, or None if no rule covers it."""
        segments = tuple(key.split("."))
        found = self._last_sources.find(segments) or self._sources.find(segments)
        if not found:
            return None
        rule, _, carried = found
        return Match(tuple(_fill(t, carried) for t in rule.targets), rule.op, rule.reason)

    def spelled(self, key: str) -> str:
        """Returns the usual name of an original key that may have another spelling."""
        found = self._spellings.find(tuple(key.split(".")))
        return _fill(found[0].targets[0], found[2]) if found else key

    def origin(self, key: str) -> Origin | None:
        """Returns where a diffusers key comes from, or None if no rule gives it."""
        segments = tuple(key.split("."))
        found = self._last_targets.find(segments) or self._targets.find(segments)
        if not found:
            return None
        rule, part, carried = found
        return Origin(_fill(rule.source, carried), rule.op, part, len(rule.targets))

    def is_optional(self, key: str) -> bool:
        """Tells whether an original key may be there without being in the published layout."""
        return self._optional.find(tuple(key.split("."))) is not None

    def template(self, key: str) -> str:
        """Returns a key with `*` for each index into a container of `repeats`."""
        segments = key.split(".")
        for i in range(1, len(segments)):
            if segments[i - 1] in self.words.repeats and is_index(segments[i]):
                segments[i] = "*"
        return ".".join(segments)


def _line(rule: Rule) -> str:
    return repr(".".join(rule.source))


def _last_is_placed(rule: Rule) -> bool:
    here = LAST in rule.source
    return all(
        (LAST in pattern) == here
        and pattern.count(LAST) <= 1
        and "*" not in pattern[: pattern.index(LAST) if here else 0]
        for pattern in (rule.source, *rule.targets)
    )


def _rule(source: Segments, line: Line) -> Rule:
    op = split_rows(line.shares) if line.shares else OPS[line.word or RENAME.name]
    return Rule(source, line.targets, op, exact=bool(line.word))
