"""Reads plain data into frozen dataclasses by their annotations, and finds every fault at once.

A field is a word of the format. A fault is noted with the path to it, such as
`components.vae.sources[0]: unknown word 'unles'; did you mean 'unless'?`, and reading goes on.

    str, int, float, bool, None, Any, Literal    themselves; a number is no bool, an int is a float
    tuple[T, ...], Mapping[K, T]                 a list; a mapping, whose key is the field `name`
    Many[T]                                      a list, or one T without the brackets
    Named[T]                                     a mapping by name, read into a tuple
    A | B                                        of dataclasses, the one whose first word is there
    a class with `from_data`                     reads itself
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")
Many = Annotated[tuple[T, ...], "many"]
Named = Annotated[tuple[T, ...], "named"]

Path = tuple[str | int, ...]
"""The way to a value: names of entries, and numbers in lists."""

SCALARS: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
    NoneType: (NoneType, "null"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in data: where, and what."""

    path: Path
    text: str

    def __str__(self) -> str:
        where = "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in self.path)
        return f"{where.removeprefix('.')}: {self.text}" if where else self.text


def word(name: str) -> dict[str, str]:
    """Returns the metadata of a field that the format calls by another name than Python."""
    return {"word": name}


GIVEN = word("")
"""The metadata of a field that is no word of the format: whoever reads the record gives it."""


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns the end of a sentence about an unknown word: the nearest that exists, or all."""
    words = list(map(str, known))
    found = difflib.get_close_matches(str(name), words, 1)
    return f"; did you mean {found[0]!r}?" if found else f", expected one of {', '.join(words)}"


def words(kind: Any) -> dict[str, tuple[str, Any, bool]]:
    """Returns, by word, the field of a dataclass, its type, and whether it must be there."""
    return _words(kind)


@functools.cache
def _words(kind: Any) -> dict[str, tuple[str, Any, bool]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        name: (f.name, hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(kind)
        if (name := f.metadata.get("word", f.name))
    }


def vocabulary(*kinds: Any) -> set[str]:
    """Returns every word of the format that the types know."""
    found: set[str] = set()
    for kind in kinds:
        if get_origin(kind) is Literal:
            found |= set(map(str, get_args(kind)))
        elif dataclasses.is_dataclass(kind):
            own = words(kind)
            found |= own.keys() | vocabulary(*(hint for _, hint, _ in own.values()))
        else:
            found |= vocabulary(*get_args(kind))
    return found


def read(kind: Any, data: Any, path: Path, faults: list[Fault], /, **given: Any) -> Any:
    """Returns data as a value of a type.

    Args:
        kind: the type, see above.
        data: mappings, lists and scalars.
        path: the way to the data.
        faults: gets what is wrong. If it gets anything, the result means nothing.
        **given: fields of the record that are not in the data.
    """
    if kind is Any or (isinstance(kind, type) and dataclasses.is_dataclass(data)):
        if kind is not Any and not isinstance(data, kind):
            faults.append(Fault(path, f"cannot be {type(data).__name__}"))
        return data
    if hook := getattr(kind, "from_data", None):
        return hook(data, path, faults)
    if dataclasses.is_dataclass(kind):
        return _record(kind, data, path, faults, given)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated and args[1] == "many":
        return read(args[0], data if isinstance(data, list) else [data], path, faults)
    if origin is Annotated:
        named = read(Mapping[str, get_args(args[0])[0]], data, path, faults)  # type: ignore[misc]
        return tuple(named.values())
    if origin in (Union, UnionType):
        return _union(args, data, path, faults)
    if origin is tuple:
        items = data if _is(list, "a list", data, path, faults) else []
        return tuple(read(args[0], item, (*path, n), faults) for n, item in enumerate(items))
    if origin is Mapping:
        return _mapping(args, data, path, faults)
    if origin is Literal:
        if data not in args:
            faults.append(Fault(path, f"unknown word {data!r}{nearest(data, args)}"))
        return data
    types, needed = SCALARS[kind]
    quotes = ": write it in quotes" if kind is str and isinstance(data, int | float) else ""
    _is(types, needed + quotes, data, path, faults)
    return data


def _is(types: Any, needed: str, data: Any, path: Path, faults: list[Fault]) -> bool:
    found = isinstance(data, types) and (types is bool or not isinstance(data, bool))
    if not found:
        faults.append(Fault(path, f"found {data!r}, needed {needed}"))
    return found


def _record(kind: Any, data: Any, path: Path, faults: list[Fault], given: dict[str, Any]) -> Any:
    known, before = words(kind), len(faults)
    if not _is(Mapping, f"a mapping of {', '.join(known)}", data, path, faults):
        return None
    for name in (name for name in data if name not in known):
        faults.append(Fault(path, f"unknown word {name!r}{nearest(name, known)}"))
    values = dict(given)
    for name, (field, hint, needed) in known.items():
        if name in data:
            values[field] = read(hint, data[name], (*path, name), faults)
        elif needed:
            faults.append(Fault(path, f"{name!r} is missing"))
    if len(faults) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:  # what its fields mean together
        faults.append(Fault(path, str(error)))
        return None


def _union(kinds: tuple[Any, ...], data: Any, path: Path, faults: list[Fault]) -> Any:
    first = {next(iter(words(k))): k for k in kinds if dataclasses.is_dataclass(k)}
    if isinstance(data, Mapping) and first:
        there = [name for name in first if name in data]
        there = [n for n in there if not any(n in words(first[m]) for m in there if m != n)]
        if len(there) == 1:  # and if that is a slip, the one with the most of the words
            likely = (first[there[0]], *first.values())
            kind = max(likely, key=lambda k: len(words(k).keys() & data.keys()))
            return read(kind, data, path, faults)
        unknown = next((n for n in data if not any(n in words(k) for k in first.values())), None)
        if there:
            text = f"has {' and '.join(map(repr, there))}, which exclude each other"
        elif unknown is None:
            text = f"needs one of the words {', '.join(first)}"
        else:
            text = f"unknown word {unknown!r}{nearest(unknown, first)}"
        faults.append(Fault(path, text))
        return None
    for kind in kinds:
        tried: list[Fault] = []
        value = read(kind, data, path, tried)
        if not tried:
            return value
    needed = [SCALARS[k][1] for k in kinds if k in SCALARS]
    needed += [f"a mapping with one of {', '.join(first)}"] if first else []
    faults.append(Fault(path, f"found {data!r}, needed {' or '.join(needed)}"))
    return None


def _mapping(kinds: tuple[Any, ...], data: Any, path: Path, faults: list[Fault]) -> dict[Any, Any]:
    key, kind = kinds
    if not _is(Mapping, "a mapping", data, path, faults):
        return {}
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    named = any(f.name == "name" and f.metadata.get("word") == "" for f in fields)
    return {
        read(key, name, path, faults): read(
            kind, item, (*path, name), faults, **({"name": name} if named else {})
        )
        for name, item in data.items()
    }
