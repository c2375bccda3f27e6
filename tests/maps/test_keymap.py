"""The laws of key maps: every breach is refused, and what is accepted is injective."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckptconv.errors import MapError
from ckptconv.maps import schema
from ckptconv.maps.architecture import KeyMaps, bundled
from ckptconv.maps.keymap import KeyMap, MapFile, Match, Origin, Pattern, Rule
from ckptconv.maps.ops import DROP, OPS, RENAME
from ckptconv.maps.schema import Fault
from ckptconv.reading.header import header_from_json

FIXTURES = sorted((Path(__file__).parents[1] / "headers").glob("*.json"))
MAPS = [
    path.relative_to(folder).with_suffix("").as_posix()
    for folder in bundled().folders
    for path in [*folder.glob("shared/maps/*.yaml"), *folder.glob("*/unet.yaml")]
]


def built(data: dict[str, Any]) -> KeyMap:
    """Builds the map of a file with this content."""
    faults: list[Fault] = []
    file = schema.read(MapFile, data, (), faults)
    if faults:
        raise MapError("the.yaml: the key map is malformed", problems=list(map(str, faults)))
    return KeyMap.from_file("the.yaml", file)


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(MapError) as caught:
        built(data)
    message = str(caught.value)
    assert message.startswith("the.yaml: the key map ")
    return message


def read(folder: Path, text: str) -> KeyMap:
    (folder / "own.yaml").write_text(text)
    return KeyMaps([folder, *bundled().folders]).keymap("own")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"blocks": {"a": "x", "a.b": "y"}}, ["'a' and 'a.b' can match the same key"]),
        ({"blocks": {"a.b": "y", "a": "x"}}, ["'a.b' and 'a' can match the same key"]),
        ({"blocks": {"a.*": "x.*", "a.b": "y"}}, ["'a.*' and 'a.b' can match the same key"]),
        ({"blocks": {"a.*": "x.*", "*.b": "y.*"}}, ["'a.*' and '*.b' can match the same key"]),
        (
            {"blocks": {"a.*.c": "x.*", "a.b": {"squeeze": "y"}, "a.b.*": "z.*"}},
            ["'a.*.c' and 'a.b.*' can match the same key"],
        ),
        ({"blocks": {"a": "x"}, "drop": {"a.b": "unused"}}, ["'a' and 'a.b' can match the same"]),
        ({"blocks": {"a.5": "x"}, "drop": {"a.-1": "unused"}}, ["'a.5' and 'a.-1' can match the"]),
        ({"blocks": {"a": "x", "b": "x"}}, ["'a' and 'b' can give the same key"]),
        ({"blocks": {"a": "x", "b": "x.y"}}, ["'a' and 'b' can give the same key"]),
        ({"blocks": {"a.*": "x.*", "b": "x.y"}}, ["'a.*' and 'b' can give the same key"]),
        (
            {"blocks": {"a": {"split_rows": ["x", "y"]}, "b": {"squeeze": "y"}}},
            ["'a' and 'b' can give the same key"],
        ),
        ({"blocks": {"a": {"split_rows": ["x", "x"]}}}, ["'a' and 'a' can give the same key"]),
        ({"blocks": {"a.*": "x"}}, ["'a.*': the two sides need the same number of '*'"]),
        ({"blocks": {"a": "x.*"}}, ["'a': the two sides need the same number of '*'"]),
        ({"blocks": {"a.-1": "x"}}, ["'a.-1': '-1' may stand once, in 'drop', with no '*'"]),
        ({"drop": {"*.-1": "unused"}}, ["'*.-1': '-1' may stand once, in 'drop', with no '*'"]),
        ({"drop": {"a.-1.-1": "unused"}}, ["'a.-1.-1': '-1' may stand once"]),
        ({"blocks": {"a": "x.-1"}}, ["'a': '-1' may stand once"]),
        (
            {"blocks": {"a": "x", "b": "x", "a.c": "y"}},
            ["'a' and 'b' can give the same key", "'a' and 'a.c' can match the same key"],
        ),
    ],
)
def test_a_map_that_breaks_a_law_is_refused_with_the_lines_at_fault(
    data: dict[str, Any], lines: list[str]
) -> None:
    message = refusal(data)
    assert message.startswith("the.yaml: the key map breaks a law\n")
    for line in lines:
        assert f"  - {line}" in message


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"block": {}}, ["unknown word 'block'; did you mean 'blocks'?"]),
        ({"blocks": ["a"]}, ["blocks: found ['a'], needed a mapping"]),
        ({"repeats": "layers"}, ["repeats: found 'layers', needed a list"]),
        ({"optional": [3]}, ["optional[0]: needs a dotted name (a number in quotes), found 3"]),
        (
            {"drop": {"a": "boring"}},
            ["drop.a: unknown word 'boring', expected one of training, de"],
        ),
        ({"drop": {"a": "unsed"}}, ["drop.a: unknown word 'unsed'; did you mean 'unused'?"]),
        ({"drop": {"a": ["unused"]}}, ["drop.a: unknown word ['unused']"]),
        ({"blocks": {"a": {"kin": "x"}}}, ["a: 'kin' is neither a kind of this map nor an opera"]),
        ({"blocks": {"a": {"rename": "x"}}}, ["a: 'rename' is neither a kind of this map nor an"]),
        ({"blocks": {"a": {"drop": "x"}}}, ["a: 'drop' is neither a kind of this map nor an op"]),
        ({"blocks": {"a": 7}}, ["blocks.a: needs a name or {kind or operation: name}, found 7"]),
        (
            {"blocks": {"a": {"squeeze": "x", "rename": "y"}}},
            ["blocks.a: needs a name or {kind or oper"],
        ),
        ({"blocks": {1: "x"}}, ["blocks: needs a dotted name (a number in quotes), found 1"]),
        (
            {"blocks": {"a..b": "x"}},
            ["blocks: needs a dotted name (a number in quotes), found 'a..b"],
        ),
        ({"blocks": {"a": {"squeeze": ["x", "y"]}}}, ["blocks.a: squeeze needs one name"]),
        ({"blocks": {"a": {"split_rows": "x"}}}, ["blocks.a: split_rows needs several names"]),
        ({"kinds": {"squeeze": {}}}, ["kinds.squeeze: has the name of an operation"]),
        ({"kinds": {"resnet": "conv"}}, ["kinds.resnet: found 'conv', needed a mapping"]),
        (
            {"kinds": {"k": {"a": "b"}}, "blocks": {"a": {"k": ["x"]}}},
            ["blocks.a: k needs one name, found ['x']"],
        ),
        (
            {"kinds": {"k": {"a": {"k": "b"}}}, "blocks": {"a": {"k": "x"}}},
            ["a: 'k' is neither a kind of this map nor an operation"],
        ),
        (
            {"bloks": {}, "drop": {"a": "why"}, "blocks": {"b": 1}},
            ["unknown word 'bloks'", "drop.a: unknown word 'why'", "blocks.b: needs a name"],
        ),
    ],
)
def test_a_malformed_map_is_refused_with_every_line_at_fault(
    data: dict[str, Any], lines: list[str]
) -> None:
    message = refusal(data)
    assert message.startswith("the.yaml: the key map is malformed\n")
    for line in lines:
        assert f"  - {line}" in message


LAUGHS = "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10 if n else 'lol'}]\n" for n in range(12))
"""A file of 1 kB whose aliases stand for 10**11 values."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blocks:\n  a: x\n  a: y\n", "own.yaml: not a YAML file: 'a' is written twice"),
        ("blocks: [", "own.yaml: not a YAML file: while parsing"),
        ("blocks: {a: !!binary eHg=}", "own.yaml: not a YAML file: could not determine a const"),
        ("blocks: {a: !!set {b}}", "own.yaml: not a YAML file: could not determine a constructor"),
        ("blocks: {a: .inf}", "own.yaml: not a YAML file: .inf is no number of JSON"),
        ("blocks: &a {a: *a}", "own.yaml: not a YAML file: aliases make more than 1,000,000 v"),
        (LAUGHS, "own.yaml: not a YAML file: aliases make more than 1,000,000 values"),
        ("blocks: {[a]: x}", "own.yaml: not a YAML file: ['a'] is no name"),
        ("- a\n", "own.yaml: found ['a'], needed a mapping of kinds, blocks, drop, optional, r"),
        ("", "own.yaml: needs a mapping at the top"),
        ("extends: own\n", "own: extends itself: own -> own"),
        ("extends: shared/maps/nowhere\n", "shared/maps/nowhere.yaml: no such file in "),
        ("extends: ../own\n", "../own.yaml: leads out of the folders of key maps"),
        ("extends: /etc/own\n", "/etc/own.yaml: leads out of the folders of key maps"),
    ],
)
def test_a_file_that_holds_no_map_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(MapError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


def test_a_map_that_is_not_there_names_the_folders_that_were_searched(tmp_path: Path) -> None:
    with pytest.raises(MapError) as caught:
        KeyMaps([tmp_path]).keymap("shared/maps/vea")
    message = str(caught.value)
    assert message.startswith(f"shared/maps/vea.yaml: no such file in {tmp_path}\n")
    assert message.endswith("hint: check the spelling of the name")


def test_an_extending_map_adds_to_what_it_extends_and_replaces_lines(tmp_path: Path) -> None:
    keymap = read(tmp_path, "extends: shared/maps/clip\nblocks: {own: mine}\nrepeats: [rows]\n")
    assert keymap.match("own.weight") == Match(("mine.weight",), RENAME)
    assert keymap.match("text_model.final_layer_norm.bias") is not None
    assert keymap.words.repeats == ("rows",)


@pytest.mark.parametrize("name", MAPS)
def test_every_bundled_map_keeps_the_laws(name: str) -> None:
    assert bundled().keymap(name).rules


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_origin_leads_back_to_every_key_of_the_published_files(path: Path) -> None:
    keys = list(header_from_json(path).tensors)
    inverted = 0
    for architecture in bundled().architectures.values():
        for source in (s for model in architecture.models for s in model.sources):
            prefix = source.prefix
            short = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
            keymap = bundled().keymap(source.keymap).bound(short)
            given_keys = set()
            for key in short:
                match = keymap.match(key)
                if not match or match.op is DROP:
                    continue
                for part, target in enumerate(match.targets):
                    origin = keymap.origin(target)
                    assert origin == Origin(key, match.op, part, len(match.targets))
                    assert target not in given_keys
                    given_keys.add(target)
                inverted += 1
    assert inverted > 1000


def test_a_star_carries_its_segment_and_a_rename_carries_the_rest() -> None:
    keymap = built(
        {
            "kinds": {"k": {"in.w": {"split_rows": ["q.w", "k.w"]}, "out": "proj"}},
            "blocks": {"rows.*.cols.*": {"k": "r.*.c.*"}, "conv": {"squeeze": "linear"}},
        },
    )
    split = OPS["split_rows"]
    assert keymap.match("rows.3.cols.x.in.w") == Match(("r.3.c.x.q.w", "r.3.c.x.k.w"), split)
    assert keymap.origin("r.3.c.x.k.w") == Origin("rows.3.cols.x.in.w", split, 1, 2)
    assert keymap.match("rows.3.cols.x.out.a.b") == Match(("r.3.c.x.proj.a.b",), RENAME)
    assert keymap.match("rows.3.cols.x.in.w.more") is None, "an operation covers one whole key"
    assert keymap.match("conv") == Match(("linear",), OPS["squeeze"])
    assert keymap.match("rows.3.other") is None
    assert keymap.origin("nothing") is None


@pytest.mark.parametrize(
    ("indices", "last"), [(range(24), "23"), ([0], "0"), ([2, 10, 9], "10"), (["07", 3], "3")]
)
def test_minus_one_is_the_last_index_of_the_file_and_the_star_the_others(
    indices: list[Any], last: str
) -> None:
    rows = {"rows.*": "r.*"}
    keymap = built({"blocks": rows, "drop": {"rows.-1": "unused"}})
    bound = keymap.bound([f"rows.{i}.w" for i in indices] + ["rows", "rows.x", "other.99"])
    for i in map(str, indices):
        match = bound.match(f"rows.{i}.w")
        assert match is not None
        assert (match.op is DROP) == (i == last)
        assert match.targets == (() if i == last else (f"r.{i}.w",))


def test_a_map_without_minus_one_is_bound_to_every_file() -> None:
    keymap = bundled().keymap("shared/maps/vae")
    assert keymap.bound(["encoder.conv_in.weight"]) is keymap


def test_template_replaces_the_indices_of_containers_only() -> None:
    words = MapFile(optional=(Pattern(("time", "cond")),), repeats=("layers",))
    keymap = KeyMap("the.yaml", [], words)
    assert keymap.template("a.layers.11.b.2.layers.0") == "a.layers.*.b.2.layers.*"
    assert keymap.template("a.layers.x.layers") == "a.layers.x.layers"
    assert keymap.template("a.layers.01") == "a.layers.01"
    assert keymap.is_optional("time.cond")
    assert keymap.is_optional("time.cond.weight")
    assert not keymap.is_optional("time")


# Random rule sets over few segments, judged by trying every key of up to four segments. `z` is in
# no pattern: it stands for all that a star or a rename can meet.

SEGMENTS = ("a", "b", "*")
KEYS = [key for n in range(1, 5) for key in itertools.product(("a", "b", "z"), repeat=n)]
PATTERNS = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(tuple)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    source = draw(PATTERNS)
    op = draw(st.sampled_from([RENAME, RENAME, OPS["squeeze"], OPS["split_rows"], DROP]))
    count = {"split_rows": 2, "drop": 0}.get(op.name, 1)
    stars = source.count("*")
    targets = []
    for _ in range(count):
        names = draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=3))
        places = draw(st.permutations([*names, *"*" * stars]))
        targets.append(tuple(places))
    exact = op is not RENAME and op is not DROP
    return Rule(source, tuple(targets), op, exact, "unused" if op is DROP else "")


def covers(pattern: tuple[str, ...], exact: bool, key: tuple[str, ...]) -> bool:
    fits = len(key) == len(pattern) if exact else len(key) >= len(pattern)
    return fits and all(p in ("*", k) for p, k in zip(pattern, key, strict=False))


def has_overlap(patterns: list[tuple[tuple[str, ...], bool]]) -> bool:
    return any(sum(covers(p, exact, key) for p, exact in patterns) > 1 for key in KEYS)


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(rules(), min_size=1, max_size=4))
def test_a_rule_set_is_refused_exactly_if_two_rules_can_meet(drawn: list[Rule]) -> None:
    sources = [(rule.source, rule.exact) for rule in drawn]
    targets = [(target, rule.exact) for rule in drawn for target in rule.targets]
    # A longer target would need longer keys to meet another.
    assume(all(len(target) <= 4 for target, _ in targets))
    lawful = not has_overlap(sources) and not has_overlap(targets)
    try:
        keymap = KeyMap("random", drawn)
    except MapError:
        keymap = None
    assert (keymap is not None) == lawful
    if not keymap:
        return
    given_by: dict[str, str] = {}
    for segments in KEYS:
        key = ".".join(segments)
        match = keymap.match(key)
        assert (match is not None) == any(covers(*source, segments) for source in sources)
        for part, target in enumerate(match.targets if match else ()):
            assert given_by.setdefault(target, key) == key, "two keys give one"
            origin = keymap.origin(target)
            assert origin is not None
            assert (origin.source, origin.part) == (key, part)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(rules(), max_size=3), st.data())
def test_an_injected_overlap_is_refused(drawn: list[Rule], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([key for key in KEYS if len(key) <= 3]))
    twice = [Rule(key, (("one",),)), Rule(tuple("*" for _ in key), (("two", *"*" * len(key)),))]
    mixed = data.draw(st.permutations([*drawn, *twice]))
    with pytest.raises(MapError, match="can match the same key"):
        KeyMap("random", mixed)
