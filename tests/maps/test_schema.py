"""Plain data become values of types, every fault is named, and every word is documented."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ckptconv.configs.original_config import OriginalConfigFile
from ckptconv.detection.facts import Hints
from ckptconv.detection.foreign import ForeignFormat
from ckptconv.maps.architecture import Architecture, Content, Relative, Variant
from ckptconv.maps.holes import HOLES
from ckptconv.maps.keymap import MapFile
from ckptconv.maps.ops import DROP, OPS, RENAME
from ckptconv.maps.schema import GIVEN, Fault, Many, Named, read, vocabulary, word
from ckptconv.sample import Sample

DOCUMENT = (Path(__file__).parents[2] / "docs" / "key-maps.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Pet:
    kind: Literal["cat", "dog"]
    name: str = field(metadata=GIVEN)
    legs: int = 4
    weight: float | None = None
    friends: Many[str] = ()
    tame: bool = field(default=True, metadata=word("is_tame"))
    toys: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class House:
    house: str
    rooms: int


@dataclass(frozen=True)
class Tree:
    tree: str


def typed(kind: Any, data: Any) -> tuple[Any, list[str]]:
    faults: list[Fault] = []
    return read(kind, data, (), faults), list(map(str, faults))


def test_data_become_values() -> None:
    data = {"Tom": {"kind": "cat", "weight": 4, "friends": "Rex", "toys": {1: "ball"}}}
    tom = Pet("cat", "Tom", weight=4, friends=("Rex",), toys={1: "ball"})
    assert typed(Mapping[str, Pet], data) == ({"Tom": tom}, [])
    assert typed(Named[Pet], data) == ((tom,), [])
    assert typed(tuple[House | Tree, ...], [{"tree": "x"}, {"house": "y", "rooms": 2}]) == (
        (Tree("x"), House("y", 2)),
        [],
    )


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        (Named[Pet], {"Tom": {"knd": "cat"}}, ["Tom: unknown word 'knd'; did you mean 'kind'?"]),
        (Named[Pet], {"Tom": {"knd": "cat"}}, ["Tom: 'kind' is missing"]),
        (
            Named[Pet],
            {"Tom": {"kind": "cta"}},
            ["Tom.kind: unknown word 'cta'; did you mean 'cat'"],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "name": "x"}},
            ["Tom: unknown word 'name', expected "],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "legs": True}},
            ["Tom.legs: found True, needed a who"],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "legs": 4.5}},
            ["Tom.legs: found 4.5, needed a whole"],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "is_tame": 1}},
            ["Tom.is_tame: found 1, needed true "],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "weight": "x"}},
            ["found 'x', needed a number or nul"],
        ),
        (
            Named[Pet],
            {"Tom": {"kind": "cat", "friends": [3]}},
            ["Tom.friends[0]: found 3, needed "],
        ),
        (Named[Pet], {"Tom": {"kind": "cat", "toys": {"a": 1}}}, ["found 'a', needed a whole num"]),
        (Named[Pet], {"Tom": 3}, ["Tom: found 3, needed a mapping of kind, legs, weight, friends"]),
        (Named[Pet], [], ["found [], needed a mapping"]),
        (House | Tree, {"house": "x", "tree": "y"}, ["has 'house' and 'tree', which exclude each"]),
        (House | Tree, {"hose": "x"}, ["unknown word 'hose'; did you mean 'house'?"]),
        (House | Tree, {"rooms": 1}, ["needs one of the words house, tree"]),
        (House | Tree, "x", ["found 'x', needed a mapping with one of house, tree"]),
        (
            Mapping[str, House],
            {"a": {"house": 1, "romms": 2}, "b": {"house": "x", "rooms": "y"}},
            [
                "a: unknown word 'romms'; did you mean 'rooms'?",
                "a.house: found 1",
                "b.rooms: found ",
            ],
        ),
    ],
)
def test_every_fault_is_named_with_its_place(kind: Any, data: Any, said: list[str]) -> None:
    _, faults = typed(kind, data)
    for text in said:
        assert any(text in fault for fault in faults), faults


FORMATS = (
    *(Architecture, Content, Variant, Sample, MapFile, Hints, ForeignFormat, Relative),
    OriginalConfigFile,
)


def words() -> set[str]:
    operations = OPS.keys() - {DROP.name, RENAME.name}
    return vocabulary(*FORMATS) | operations | HOLES.keys()


def test_the_vocabulary_is_small() -> None:
    # 80 for UNets; transformers need `main`, `swap_halves`, `defaults`, and `or` for look-alikes;
    # and there are files that are `quantized`.
    assert len(words()) <= 86, sorted(words())


def test_every_word_is_documented_and_no_other() -> None:
    parts = DOCUMENT.split("```")
    code = " ".join([*parts[1::2], *re.findall(r"`[^`]+`", " ".join(parts[::2]))])
    assert words() - set(re.findall(r"[a-z_]+", code)) == set()
    rows = re.findall(r"^\| (`.*?`) \|", DOCUMENT, flags=re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`[{!]?([a-z_]+)", row)}
    assert explained - words() == {"source"}  # the left-hand side of a line of a map
    assert len(explained) > 40
