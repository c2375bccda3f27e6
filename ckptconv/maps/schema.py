"""Reads plain data into frozen dataclasses by their annotations, and finds every fault at once.

A field is a word of the format. A fault is noted with the path to it, such as
`components.vae.sources[0]: unknown word 'unles'; did you mean 'unless'?`, and reading goes on.

    str, int, float, bool, None, Any, Literal    themselves; a number is no bool, an int is a float
    tuple[T, ...]                                a list
    Many[T]                                      a list, or one T without the brackets
    Named[T]                                     a mapping by name, read into a tuple
    Mapping[K, T]                                a mapping; a `name` that is `given` is the key
    A | B of dataclasses                         the one whose first word is there
    a class with `from_data`                     reads itself
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

__all__ = ["Fault", "Many", "Named", "Path", "given", "nearest", "read", "vocabulary", "word"]

T = TypeVar("T")
Many = Annotated[tuple[T, ...], "many"]
Named = Annotated[tuple[T, ...], "named"]

Path = tuple[str | int, ...]
"""The way to a value: names of entries, and numbers in lists."""

SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    NoneType: ((NoneType,), "null"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in data: where, and what."""

    path: Path
    text: str

    def __str__(self) -> str:
        where = "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in self.path)
        return f"{where.removeprefix('.')}: {self.text}" if where else self.text


def word(name: str, **options: Any) -> Any:
    """Declares a field that the format calls by another name than Python."""
    return dataclasses.field(metadata={"word": name}, **options)


def given(**options: Any) -> Any:
    """Declares a field that is no word of the format: whoever reads the record gives it."""
    return dataclasses.field(metadata={"word": ""}, **options)


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns the end of a sentence about an unknown word: the nearest that exists, or all."""
    words = list(map(str, known))
    found = difflib.get_close_matches(str(name), words, 1)
    return f"; did you mean {found[0]!r}?" if found else f", expected one of {', '.join(words)}"


def read(kind: Any, data: Any, path: Path, faults: list[Fault], /, **given: Any) -> Any:
    """Returns data as a value of a type.

    Args:
        kind: the type, see above.
        data: mappings, lists and scalars.
        path: the way to the data.
        faults: gets what is wrong. If it gets anything, the result means nothing.
        **given: fields of the record that do not stand in the data.
    """
    if kind is Any:
        return data
    if hook := getattr(kind, "from_data", None):
        return hook(data, path, faults)
    if dataclasses.is_dataclass(kind):
        whole = isinstance(kind, type) and isinstance(data, kind)  # a tag that was read before
        return data if whole else _record(kind, data, path, faults, given)
    if get_origin(kind) is Annotated:
        many, how = get_args(kind)
        if how == "named":
            table = read(Mapping[str, get_args(many)[0]], data, path, faults)  # type: ignore[misc]
            return tuple(table.values()) if isinstance(table, Mapping) else ()
        return read(many, data if isinstance(data, list) else [data], path, faults)
    return _READERS.get(get_origin(kind) or kind, _scalar)(kind, data, path, faults)


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


@functools.cache
def words(kind: Any) -> dict[str, tuple[str, Any, bool]]:
    """Returns, by word, the field of a dataclass, its type, and whether it must be there."""
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    return {
        name: (f.name, hints[f.name], f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(kind)
        if (name := f.metadata.get("word", f.name))
    }


def _record(kind: Any, data: Any, path: Path, faults: list[Fault], given: dict[str, Any]) -> Any:
    known, before = words(kind), len(faults)
    if not isinstance(data, Mapping):
        faults.append(Fault(path, f"found {data!r}, needed a mapping of {', '.join(known)}"))
        return None
    for name in data:
        if name not in known:
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


def _union(kind: Any, data: Any, path: Path, faults: list[Fault]) -> Any:
    records = [k for k in get_args(kind) if dataclasses.is_dataclass(k)]
    if not isinstance(data, Mapping) or not records:
        for each in get_args(kind):
            tried: list[Fault] = []
            value = read(each, data, path, tried)
            if not tried:
                return value
        needed = " or ".join(SCALARS[k][1] if k in SCALARS else "a record" for k in get_args(kind))
        faults.append(Fault(path, f"found {data!r}, needed {needed}"))
        return None
    first = {next(iter(words(k))): k for k in records}
    there = [name for name in first if name in data]
    there = [n for n in there if not any(n in words(first[m]) for m in there if m != n)]
    if len(there) == 1:
        return _record(first[there[0]], data, path, faults, {})
    if there:
        faults.append(Fault(path, f"has {' and '.join(map(repr, there))}, which exclude each other"))
        return None
    known = set().union(*(words(k) for k in records))
    unknown = next((name for name in data if name not in known), None)
    if unknown is None:
        faults.append(Fault(path, f"needs one of the words {', '.join(first)}"))
    else:
        faults.append(Fault(path, f"unknown word {unknown!r}{nearest(unknown, first)}"))
    return None


def _list(kind: Any, data: Any, path: Path, faults: list[Fault]) -> Any:
    if not isinstance(data, list):
        faults.append(Fault(path, f"found {data!r}, needed a list"))
        return ()
    return tuple(read(get_args(kind)[0], item, (*path, n), faults) for n, item in enumerate(data))


def _mapping(kind: Any, data: Any, path: Path, faults: list[Fault]) -> Any:
    if not isinstance(data, Mapping):
        faults.append(Fault(path, f"found {data!r}, needed a mapping"))
        return {}
    key, value = get_args(kind)
    named = dataclasses.is_dataclass(value) and any(
        f.name == "name" and f.metadata.get("word") == "" for f in dataclasses.fields(value)
    )
    return {
        read(key, name, path, faults): read(
            value, item, (*path, name), faults, **({"name": name} if named else {})
        )
        for name, item in data.items()
    }


def _literal(kind: Any, data: Any, path: Path, faults: list[Fault]) -> Any:
    if data not in get_args(kind):
        faults.append(Fault(path, f"unknown word {data!r}{nearest(data, get_args(kind))}"))
    return data


def _scalar(kind: Any, data: Any, path: Path, faults: list[Fault]) -> Any:
    types, needed = SCALARS[kind]
    if not isinstance(data, types) or (isinstance(data, bool) and bool not in types):
        quotes = ": write it in quotes" if kind is str and data is not None else ""
        faults.append(Fault(path, f"found {data!r}, needed {needed}{quotes}"))
    return data


_READERS: dict[Any, Callable[[Any, Any, Path, list[Fault]], Any]] = {
    Union: _union,
    UnionType: _union,
    tuple: _list,
    Mapping: _mapping,
    Literal: _literal,
}
