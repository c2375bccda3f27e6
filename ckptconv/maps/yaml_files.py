"""YAML files in folders, of which the first that has a file wins, and what they extend.

A section of a file is turned into data only when it is asked for: to tell what a file is takes a
few lines of every architecture, and all of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import MapError
from . import schema
from .schema import Fault

__all__ = ["Document", "Folders", "Tag", "laid_over"]

HINT = "docs/key-maps.md describes every word of the format"


@dataclass(frozen=True, slots=True)
class Tag:
    """A value with a YAML tag, such as `!dim [conv_in.weight, 1]`."""

    word: str
    data: Any


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads plain data and tags, in C where PyYAML has it; a key may not be written twice."""


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


def _tag(loader: Any, suffix: str, node: yaml.Node) -> Tag:
    if isinstance(node, yaml.SequenceNode):
        return Tag(suffix, loader.construct_sequence(node, deep=True))
    if isinstance(node, yaml.MappingNode):
        return Tag(suffix, loader.construct_mapping(node, deep=True))
    return Tag(suffix, [node.value] if node.value else [])


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_multi_constructor("!", _tag)


class Document:
    """One YAML file: a mapping, or a list, which is its only section, without a name.

    Attributes:
        path: of the file.
        sections: names of its entries.
    """

    def __init__(self, path: Path) -> None:
        """Parses a file.

        Raises:
            MapError: it cannot be read as YAML.
        """
        self.path = path
        self._nodes: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._loader = self._tried(lambda: _Loader(path.read_text(encoding="utf-8")))
        node = self._tried(self._loader.get_single_node)
        if isinstance(node, yaml.SequenceNode):
            self._nodes[""] = node
        elif not isinstance(node, yaml.MappingNode):
            raise MapError(f"{path}: needs a mapping at the top")
        elif not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value) or len(
            names := {key.value: value for key, value in node.value}
        ) < len(node.value):
            self._tried(lambda: self._loader.construct_document(node))
            raise MapError(f"{path}: not a YAML file: a name at the top is written twice")
        else:
            self._nodes = names
        self.sections = self._nodes.keys()

    def __getitem__(self, name: str) -> Any:
        """Returns the data of one entry.

        Raises:
            MapError: they are not plain data.
        """
        if name not in self._data:
            node = self._nodes[name]
            self._data[name] = self._tried(lambda: self._loader.construct_document(node))
        return self._data[name]

    @property
    def data(self) -> Any:
        """All of the data."""
        whole = {name: self[name] for name in self.sections}
        return whole.get("", whole)

    def _tried(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
            raise MapError(f"{self.path}: not a YAML file: {error}") from error


class Folders:
    """Folders in order; nothing is read until it is asked for.

    Attributes:
        folders: the first that has a file wins.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        """Takes the folders."""
        self.folders = tuple(folders)
        self._documents: dict[str, Document] = {}

    def find(self, name: str) -> Path:
        """Returns the path of a file, given relative to a folder.

        Raises:
            MapError: no folder has it.
        """
        for folder in self.folders:
            if (path := folder / name).is_file():
                return path
        looked = ", ".join(str(folder) for folder in self.folders)
        raise MapError(f"{name}: no such file in {looked}", hint="check the spelling of the name")

    def document(self, name: str) -> Document:
        """Returns a file by its path in a folder, without `.yaml`.

        Raises:
            MapError: it is missing, or cannot be read as YAML.
        """
        if name not in self._documents:
            self._documents[name] = Document(self.find(f"{name}.yaml"))
        return self._documents[name]

    def merged(self, name: str, wanted: Callable[[str], bool] = lambda _name: True) -> Any:
        """Returns the data of a file, laid over what it extends.

        Args:
            name: of the file.
            wanted: tells which entries to return; all by default.

        Raises:
            MapError: a file is missing or malformed, or extends itself.
        """
        chain = [self.document(name)]
        names = [name]
        while "extends" in chain[-1].sections:
            names.append(str(chain[-1]["extends"]))
            if names[-1] in names[:-1]:
                raise MapError(f"{names[-1]}: extends itself: {' -> '.join(names)}")
            chain.append(self.document(names[-1]))
        if "" in chain[0].sections:
            return chain[0][""]
        merged: dict[str, Any] = {}
        for document in reversed(chain):
            kept = (n for n in document.sections if n != "extends" and wanted(n))
            merged = laid_over(merged, {n: document[n] for n in kept})
        return merged

    def extended(self, data: Any) -> Any:
        """Returns data laid over the file that an entry `extends` names, if they have one.

        Mappings are joined key by key; anything else is replaced.

        Raises:
            MapError: a file is missing or malformed, or extends itself.
        """
        if not isinstance(data, Mapping) or "extends" not in data:
            return data
        own = {key: value for key, value in data.items() if key != "extends"}
        return laid_over(self.merged(str(data["extends"])), own)

    def typed(self, kind: Any, name: str, data: Any = None, /, **given: Any) -> Any:
        """Returns a file, or some of its data, as a value of a type.

        Args:
            kind: the type, for `schema.read`.
            name: of the file.
            data: the data; all by default.
            **given: fields that do not stand in the file.

        Raises:
            MapError: the file is malformed; all of its faults are listed.
        """
        faults: list[Fault] = []
        data = self.merged(name) if data is None else data
        value = schema.read(kind, data, (), faults, **given)
        if faults:
            raise self.malformed(name, faults)
        return value

    def malformed(self, name: str, faults: Iterable[Fault]) -> MapError:
        """Returns the error that lists the faults of a file, each with the file it stands in."""
        own = self.document(name)
        problems = (f"{self._owner(own, f.path) or own.path}: {f}" for f in faults)
        return MapError(
            f"{own.path}: malformed", problems=list(dict.fromkeys(problems)), hint=HINT
        )

    def _owner(self, document: Document, path: schema.Path) -> Path | None:
        """Returns the file that holds a value of a document or of what it extends."""

        def search(data: Any, file: Path, path: schema.Path) -> Path | None:
            if not path:
                return file
            head, rest = path[0], path[1:]
            if isinstance(data, list) and isinstance(head, int) and head < len(data):
                return search(data[head], file, rest)
            if not isinstance(data, Mapping):
                return None
            found = search(data[head], file, rest) if head in data else None
            if not found and isinstance(name := data.get("extends"), str):
                found = self._owner(self.document(name), path)
            return found

        return search(document.data, document.path, path)


def laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two mappings joined key by key, at any depth; anything else is replaced."""
    joined = dict(base)
    for key, value in own.items():
        below = joined.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        joined[key] = laid_over(below, value) if both else value  # type: ignore[arg-type]
    return joined


