"""YAML files in folders, of which the first that has a file wins, and what they extend.

An entry at the top of a file is turned into data only when it is asked for: to tell what a file is
takes a few lines of every architecture, and all of one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar, TypeVar

import yaml

from ..errors import FileRefused, MapError
from ..files import MOST_YAML, read_small
from . import schema
from .schema import Fault

T = TypeVar("T")

ENTRY = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
"""Where an entry begins at the top of a file."""
ODD = re.compile(r"^(?![A-Za-z_][\w-]*:(?:\s|$))[^\s#]", re.MULTILINE)
"""A line at the top that begins no entry with a plain name: such a file is parsed as a whole."""

MOST_NODES = 10**6
"""Values in a file, those that aliases repeat included."""

HINT = "docs/key-maps.md describes every word of the format"


@dataclass(frozen=True, slots=True)
class Tag:
    """A value with a YAML tag, such as `!dim [conv_in.weight, 1]`."""

    word: str
    data: Any


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads data that JSON has too, and tags, in C where PyYAML has it; no key stands twice."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {}


def check_aliases(text: str) -> None:
    """Raises a YAMLError if aliases make YAML much larger than its text, or without end."""
    if "&" in text and (node := yaml.compose(text, PlainLoader)):
        _count(node, {})


def _count(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Returns the number of nodes below one, with those that aliases repeat."""
    if node not in counted:
        if isinstance(node, yaml.MappingNode):
            below = [each for pair in node.value for each in pair]
        else:
            below = node.value if isinstance(node, yaml.SequenceNode) else []
        counted[node] = MOST_NODES + 1  # a node that holds itself never ends
        counted[node] = 1 + sum(_count(each, counted) for each in below)
        if counted[node] > MOST_NODES:
            problem = f"aliases make more than {MOST_NODES:,} values of it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return counted[node]


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [
        (loader.construct_object(k, True), loader.construct_object(v, True)) for k, v in node.value
    ]
    names = [key for key, _ in pairs]
    if bad := [name for name in names if not isinstance(name, str | int)]:
        problem = f"{bad[0]!r} is no name"
    elif len(found := dict(pairs)) < len(pairs):
        problem = f"{next(n for n in names if names.count(n) > 1)!r} is written twice"
    else:
        return found
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _tag(loader: Any, name: str, node: yaml.Node) -> Tag:
    if isinstance(node, yaml.SequenceNode):
        return Tag(name, loader.construct_sequence(node, deep=True))
    return Tag(name, [node.value] if isinstance(node, yaml.ScalarNode) and node.value else [])


def _float(loader: Any, node: yaml.ScalarNode) -> float:
    value: float = loader.construct_yaml_float(node)
    if not math.isfinite(value):
        problem = f"{node.value} is no number of JSON"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


CONSTRUCTORS: Mapping[str | None, Callable[[Any, Any], Any]] = {
    "map": _mapping,
    "float": _float,
    "timestamp": yaml.SafeLoader.construct_yaml_str,
    **{
        name: getattr(yaml.SafeLoader, f"construct_yaml_{name}")
        for name in ("null", "bool", "int", "str", "seq")
    },
}
for _name, _constructor in CONSTRUCTORS.items():
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _constructor)
PlainLoader.add_constructor(None, yaml.SafeLoader.construct_undefined)
PlainLoader.add_multi_constructor("!", _tag)


def _load(text: str) -> Any:
    check_aliases(text)
    return yaml.load(text, PlainLoader)  # noqa: S506  (a safe loader)


class Document:
    """One YAML file: a mapping, or a list, which is the only entry and has no name."""

    def __init__(self, path: Path) -> None:
        """Reads a file.

        Raises:
            MapError: it cannot be read as YAML.
        """
        self.path = path
        self._data: dict[str, Any] = {}
        try:
            self._text = read_small(path, MOST_YAML).decode()
        except (ValueError, FileRefused) as error:
            raise self._refusal(error) from error
        texts = ENTRY.split(self._text)[1:] if not ODD.search(self._text) else []
        self._entries = {text.partition(":")[0]: text for text in texts}
        if not texts or len(self._entries) < len(texts):
            self._parse()
        self.entries = self._entries.keys() or self._data.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self._data:
            try:
                data = _load(self._entries[name])
                self._data[name] = data.get(name)
            except (yaml.YAMLError, ValueError, RecursionError):
                self._parse()  # says which line of the file is wrong
        return self._data[name]

    @property
    def data(self) -> Any:
        """All of the data."""
        return self[""] if "" in self.entries else {name: self[name] for name in self.entries}

    def _parse(self) -> None:
        try:
            data = _load(self._text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise self._refusal(error) from error
        if not isinstance(data, dict | list):
            raise MapError(f"{self.path}: needs a mapping at the top")
        self._data = data if isinstance(data, dict) else {"": data}

    def _refusal(self, error: Exception) -> MapError:
        return MapError(f"{self.path}: not a YAML file: {error}")


class Folders:
    """Folders in order, of which the first that has a file wins.

    A file is named by its path in a folder, without `.yaml`. All methods raise a MapError if one
    is missing, cannot be read as YAML, or extends itself.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        """Takes the folders; nothing is read yet."""
        self.folders = tuple(folders)
        self._documents: dict[str, Document] = {}

    def find(self, name: str) -> Path:
        """Returns the path of a file, given relative to a folder and with its suffix."""
        relative = PurePath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name:
            raise MapError(
                f"{name}: leads out of the folders of key maps",
                hint="name the file by its path in one of the folders, without .yaml",
            )
        for folder in self.folders:
            if (path := folder / relative).is_file():
                return path
        looked = ", ".join(str(folder) for folder in self.folders)
        raise MapError(f"{name}: no such file in {looked}", hint="check the spelling of the name")

    def document(self, name: str) -> Document:
        """Returns a file."""
        if name not in self._documents:
            self._documents[name] = Document(self.find(f"{name}.yaml"))
        return self._documents[name]

    def merged(
        self, name: str, wanted: Callable[[str], bool] = bool, within: tuple[str, ...] = ()
    ) -> Any:
        """Returns the data of a file, laid over what it extends.

        Args:
            name: of the file.
            wanted: tells which entries to return; all by default.
            within: the files that extend this one.
        """
        if name in within:
            raise MapError(f"{name}: extends itself: {' -> '.join((*within, name))}")
        document = self.document(name)
        if "" in document.entries:
            return document[""]
        own = {n: document[n] for n in document.entries if n != "extends" and wanted(n)}
        if "extends" not in document.entries:
            return own
        return laid_over(self.merged(str(document["extends"]), wanted, (*within, name)), own)

    def extended(self, data: Any) -> Any:
        """Returns data laid over the file that an entry `extends` names, if they have one."""
        if not isinstance(data, Mapping) or "extends" not in data:
            return data
        own = {key: value for key, value in data.items() if key != "extends"}
        return laid_over(self.merged(str(data["extends"])), own)

    def typed(self, kind: type[T], name: str, data: Any = None, /, **given: Any) -> T:
        """Returns a file as a value of a type.

        Args:
            kind: the type, for `schema.read`.
            name: of the file.
            data: what to read of it; all by default.
            **given: fields that are not in the file.

        Raises:
            MapError: the data are malformed; all faults are listed.
        """
        faults: list[Fault] = []
        value: T = schema.read(
            kind, self.merged(name) if data is None else data, (), faults, **given
        )
        if faults:
            raise self.malformed(name, faults)
        return value

    def malformed(self, name: str, faults: Iterable[Fault]) -> MapError:
        """Returns the error that lists the faults of a file, each with the file it stands in."""
        path = self.document(name).path
        problems = dict.fromkeys(
            f"{self._owner(name, fault.path) or path}: {fault}" for fault in faults
        )
        return MapError(f"{path}: malformed", problems=list(problems), hint=HINT)

    def _owner(self, name: str, path: schema.Path) -> Path | None:
        """Returns the path of the file that holds a value: this one, or one that it extends."""

        def search(data: Any, path: schema.Path) -> Path | None:
            if not path:
                return self.document(name).path
            found = None
            if isinstance(data, list):
                found = search(data[int(path[0])], path[1:])
            elif isinstance(data, Mapping) and path[0] in data:
                found = search(data[path[0]], path[1:])
            if not found and isinstance(data, Mapping) and isinstance(data.get("extends"), str):
                found = self._owner(data["extends"], path)
            return found

        return search(self.document(name).data, path)


def laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two mappings joined key by key, at any depth; anything else is replaced."""
    joined = dict(base)
    for key, value in own.items():
        below = joined.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        joined[key] = laid_over(below, value) if both else value  # type: ignore[arg-type]
    return joined
