"""The known architectures, read from `key_maps/`.

An architecture is a folder: `arch.yaml` says how to know it, what it is made of and what its
configurations are; `layout.json` is the header of a published file. What leaves this room are
frozen dataclasses and plain containers; the holes of a configuration are filled in
`ckptconv.configs.config`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import MapError
from ..reading.header import header_from_json
from ..reading.tensor import Header
from .keymap import KeyMap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "Architecture",
    "Component",
    "Condition",
    "KeyMaps",
    "Source",
    "Task",
    "bundled",
]

CONDITIONS: dict[str, Any] = {"has": type(None), "lacks": type(None), "rank": int, "indices": tuple}
"""The kinds of conditions, and what their `is` or `are` must be."""

KINDS = ("model", "tokenizer", "scheduler", "processor")
"""The kinds of components; a processor prepares images for a model."""

UNET_ROOT = "input_blocks.0.0.weight"
"""The first convolution of a UNet, [model channels, input channels, 3, 3]: where it is, a network
in the original layout begins, and its input channels tell the task."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One line of `detect`, about the keys of the UNet without their prefix.

    Attributes:
        kind: `has` or `lacks` the key; `rank` of the tensor; `indices` that stand for the `*`.
        key: the key, with one `*` for `indices`.
        expected: the rank or the indices; None for `has` and `lacks`.
        because: what the condition tells, for the reader of a report.
    """

    kind: str
    key: str
    expected: int | tuple[int, ...] | None = None
    because: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A place where a component may be found: the prefix of its keys, and the map to use.

    Attributes:
        prefix: of the original keys, with the dot at its end.
        keymap: name of the map.
        when: a key, without prefix, that must be there; empty for none.
        unless: a key, without prefix, that must not be there; empty for none.
    """

    prefix: str
    keymap: str
    when: str = ""
    unless: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """One folder of the converted model.

    Attributes:
        name: of the folder, as in `model_index.json`.
        kind: `model`, `tokenizer` or `scheduler`.
        library: `diffusers` or `transformers`.
        sources: where a model's weights may be, in order of preference.
        config: the configuration with its holes, as `ckptconv.configs.config` fills it.
        tasks: names of the tasks whose pipelines have it; empty for all.
        layout: the header of its tensors, where `layout.json` has none, since most files lack it.
        supply: where it may be taken from, if a file has none; for people.
        fits: by key of one of its tensors, `COMPONENT/KEY` of another's: the last axis of the one
            is as long as the first of the other, which a donor may not know.
    """

    name: str
    kind: str
    library: str
    sources: tuple[Source, ...]
    config: Mapping[str, Any]
    tasks: tuple[str, ...] = ()
    layout: str = ""
    supply: str = ""
    fits: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Stem of the weights' file name, as the library names it."""
        return "diffusion_pytorch_model" if self.library == "diffusers" else "model"


@dataclass(frozen=True, slots=True)
class Task:
    """What a file can do.

    Attributes:
        name: of the task.
        pipeline: the class that does it: a pipeline's, or that of a component which stands alone.
        channels: input channels of the network, the second axis of its root; None for any.
        key: a key, with its prefix, that the file must hold; empty for none.
    """

    name: str
    pipeline: str
    channels: int | None = None
    key: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One folder of `key_maps/`.

    Attributes:
        name: of the folder.
        title: for people.
        aliases: how the metadata of a file names it: the text begins so.
        conditions: all hold for a file of this architecture, and not for one of another.
        tasks: the first that fits a file is its task; those that need a key are asked before.
        facts: for each fact that names and shapes cannot tell, the witnesses in order.
        components: by name, in the order of `model_index.json`.
        index: further entries of `model_index.json`.
        sample: how to shrink the published layout to a small model, for `ckptconv.sample`.
        maps: where its maps are read from.
        single: the component that a file of this architecture is, so that its folder holds that
            component's files itself and no `model_index.json`; empty for a whole model.
        root: the key, without prefix, at which the network that tells architectures apart begins.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    conditions: tuple[Condition, ...]
    tasks: tuple[Task, ...]
    facts: Mapping[str, tuple[Mapping[str, Any], ...]]
    components: Mapping[str, Component]
    index: Mapping[str, Any]
    sample: Mapping[str, Any]
    maps: KeyMaps = field(repr=False)
    single: str = ""
    root: str = UNET_ROOT

    @property
    def rooted(self) -> Component:
        """The component that tells architectures apart."""
        return self.components[self.single or "unet"]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What may stand before the keys of that component, in order of preference."""
        return tuple(dict.fromkeys(source.prefix for source in self.rooted.sources))

    def for_task(self, task: Task) -> Architecture:
        """Returns the architecture with the components that a task's pipeline has."""
        return _for_task(self, task)

    @property
    def models(self) -> tuple[Component, ...]:
        """The components that have weights."""
        return tuple(c for c in self.components.values() if c.kind == "model")

    def shows(self, task: Task) -> bool:
        """Whether the layouts have what the task needs, so that a sample can be made."""
        return not task.key or task.key in self.layout(task.name).tensors

    def layout(self, task: str = "") -> Header:
        """Returns the header of a published file, with what a file for a task has besides."""
        names = [c.layout for c in self.models if c.layout and task in c.tasks]
        header = _layout(self.maps.find(f"{self.name}/layout.json"))
        for name in names:
            more = _layout(self.maps.find(f"{name}.json"))
            header = replace(header, tensors={**header.tensors, **more.tensors})
        return header


class KeyMaps:
    """The folders that architectures and maps are read from; the first that has a file wins."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """Takes the folders in order; nothing is read yet."""
        self.folders = tuple(folders)
        self._keymaps: dict[str, KeyMap] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as the names of its folders: ours lie elsewhere on another machine."""
        own = tuple(path for path in self.folders if path not in bundled().folders)
        return _with_bundled, (own,)

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

    def read(self, name: str) -> dict[str, Any]:
        """Returns the content of a YAML file, its holes unfilled.

        Raises:
            MapError: the file is missing or is not a YAML mapping.
        """
        path = self.find(f"{name}.yaml")
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a safe loader)
        except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
            raise MapError(f"{path}: not a YAML file: {error}") from error
        if not isinstance(data, dict):
            raise MapError(f"{path}: needs a mapping at the top")
        return data

    def extended(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `data` laid over the file that its entry `extends` names, if it has one.

        Mappings are joined key by key; anything else is replaced.

        Raises:
            MapError: a file is missing or malformed, or extends itself.
        """
        return self._extended(data, ())

    def _extended(self, data: Mapping[str, Any], within: tuple[str, ...]) -> dict[str, Any]:
        own = {key: value for key, value in data.items() if key != "extends"}
        if "extends" not in data:
            return own
        name = str(data["extends"])
        if name in within:
            raise MapError(f"{name}: extends itself: {' -> '.join((*within, name))}")
        return _laid_over(self._extended(self.read(name), (*within, name)), own)

    def keymap(self, name: str) -> KeyMap:
        """Returns a map by its path without suffix, such as `shared/maps/vae`.

        Raises:
            MapError: it is missing, malformed or breaks a law.
        """
        if name not in self._keymaps:
            data = self.extended(self.read(name))
            self._keymaps[name] = KeyMap.from_dict(str(self.find(f"{name}.yaml")), data)
        return self._keymaps[name]

    @functools.cached_property
    def architectures(self) -> dict[str, Architecture]:
        """Every architecture by name, in alphabetical order."""
        names = {path.parent.name for folder in self.folders for path in folder.glob("*/arch.yaml")}
        return {name: self._architecture(name) for name in sorted(names)}

    def _architecture(self, name: str) -> Architecture:
        where = f"{name}/arch"
        data = self.extended(self.read(where))
        try:
            single = data.get("single", "")
            if (single or "unet") not in data["components"]:
                raise ValueError(
                    f"there is no component {single or 'unet'!r}, which tells architectures apart"
                )
            return Architecture(
                name=name,
                title=data["title"],
                aliases=tuple(data["aliases"]),
                conditions=tuple(_condition(line) for line in data["detect"]),
                tasks=tuple(_tasks(data["tasks"])),
                facts={k: tuple(v) for k, v in self.extended(data["facts"]).items()},
                components={n: _component(n, part) for n, part in data["components"].items()},
                index=data["index"],
                sample=data["sample"],
                maps=self,
                single=single,
                root=data.get("root", UNET_ROOT),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MapError(
                f"{self.find(f'{where}.yaml')}: malformed: {type(error).__name__}: {error}",
                hint="docs/key-maps.md describes every section of arch.yaml",
            ) from error


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads plain data, in C where PyYAML has it, and refuses a key that is written twice.

    OmegaConf would do the same; it takes 150 ms longer for all of our files, which `inspect` feels.
    """


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


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@functools.cache
def bundled() -> KeyMaps:
    """Returns the key maps that come with ckptconv: in the wheel, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "key_maps"
    return KeyMaps([inside if inside.is_dir() else package.parent / "key_maps"])


@functools.cache
def _with_bundled(own: tuple[Path, ...]) -> KeyMaps:
    return KeyMaps([*own, *bundled().folders]) if own else bundled()


_layout = functools.cache(header_from_json)


@functools.cache
def _for_task(architecture: Architecture, task: Task) -> Architecture:
    kept = {n: c for n, c in architecture.components.items() if not c.tasks or task.name in c.tasks}
    all_kept = len(kept) == len(architecture.components)
    return architecture if all_kept else replace(architecture, components=kept)


def _laid_over(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for key, value in own.items():
        below = joined.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            joined[key] = _laid_over(below, value)
        else:
            joined[key] = value
    return joined


def _condition(line: Mapping[str, Any]) -> Condition:
    kinds = CONDITIONS.keys() & line.keys()
    if len(kinds) != 1 or line.keys() - CONDITIONS.keys() - {"is", "are", "because"}:
        raise ValueError(f"not a condition: {dict(line)}")
    kind = kinds.pop()
    expected = line.get("is", line.get("are"))
    if isinstance(expected, list):
        expected = tuple(expected)
    if not isinstance(expected, CONDITIONS[kind]) or line[kind].count("*") != (kind == "indices"):
        raise ValueError(
            "'has' and 'lacks' stand alone, 'rank' needs 'is' and a number, 'indices' needs one "
            f"'*' in its key, 'are' and a list: {dict(line)}"
        )
    return Condition(kind, line[kind], expected, line.get("because", ""))


def _tasks(data: Mapping[Any, Any]) -> Iterator[Task]:
    """Yields the tasks: by the number of input channels, one or a list; `any` for any number."""
    for channels, entries in data.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            number = None if channels == "any" else int(channels)
            yield Task(entry["name"], entry["pipeline"], number, entry.get("key", ""))


def _component(name: str, part: Mapping[str, Any]) -> Component:
    sources = tuple(
        Source(s["prefix"], s["map"], s.get("when", ""), s.get("unless", ""))
        for s in part.get("sources", ())
    )
    kind = part.get("kind", "model")
    if kind not in KINDS:
        raise ValueError(f"component {name!r}: kind {kind!r} is not one of {', '.join(KINDS)}")
    if bool(sources) != (kind == "model"):
        raise ValueError(f"component {name!r}: a model needs sources, and nothing else has them")
    tasks = tuple(part.get("tasks", ()))
    more = part.get("layout", ""), part.get("supply", ""), part.get("fits", {})
    return Component(name, kind, part["library"], sources, part["config"], tasks, *more)
