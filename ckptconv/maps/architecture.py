"""The known architectures, as `key_maps/` describes them.

An architecture is a folder: `arch.yaml` says how to know it, what it is made of and what its
configurations are; `layout.json` is the header of a published file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import MapError
from ..reading.header import header_from_json
from ..reading.tensor import Header
from . import schema
from .evidence import Condition, Facts, Witness, answers
from .holes import FactValue, with_holes
from .keymap import KeyMap, MapFile
from .schema import GIVEN, Fault, Many, Named, word
from .yaml_files import HINT, Folders, laid_over

CLASS_ENTRIES = (
    *("_class_name", "architectures", "tokenizer_class"),
    *("image_processor_type", "feature_extractor_type"),
)
"""Where a configuration says which class it is for."""

UNET_ROOT = "input_blocks.0.0.weight"
"""The first convolution of a UNet, [model channels, input channels, 3, 3]: where it is, a network
in the original layout begins, and its input channels tell the task."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings for models of certain facts, or of configurations that say so (COMPONENT/ENTRY)."""

    values: Mapping[str, int | float]
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """What a file can do, as docs/key-maps.md describes it; `key` is the word `has`.

    One with `facts` takes the place of the task that the channels tell, if they hold.
    """

    name: str = field(metadata=GIVEN)
    pipeline: str
    channels: int | None = None
    key: str = field(default="", metadata=word("has"))
    also: Mapping[str, str] = field(default_factory=dict)
    scale: int | None = 1
    defaults: tuple[Defaults, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """A place where a component may be found, if it has one key and lacks another (or "")."""

    prefix: str
    keymap: str = field(metadata=word("map"))
    has: str = ""
    lacks: str = ""


@dataclass(frozen=True, slots=True)
class Variant:
    """A configuration with its holes, laid over the file `extends`, for files of certain facts."""

    values: Mapping[str, Any] = field(metadata=GIVEN)
    extends: str = ""
    facts: Facts = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Any, path: schema.Path, faults: list[Fault]) -> Variant:
        """Reads the two words that are no entries of the configuration, and its holes."""
        if not isinstance(data, Mapping):
            faults.append(Fault(path, f"found {data!r}, needed a mapping"))
            return cls({})
        extends = schema.read(str, data.get("extends", ""), (*path, "extends"), faults)
        facts = schema.read(Facts, data.get("facts", {}), (*path, "facts"), faults)
        own = {key: value for key, value in data.items() if key not in ("extends", "facts")}
        return cls(with_holes(own, path, faults), extends, facts)


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """One folder of the converted model, as docs/key-maps.md describes it."""

    name: str = field(metadata=GIVEN)
    library: Literal["diffusers", "transformers"]
    kind: Literal["model", "tokenizer", "scheduler", "processor"] = "model"
    package: str = ""
    sources: tuple[Source, ...] = ()
    config: Many[Variant] = ()
    tasks: Many[str] = ()
    donors: Many[str] = ()
    layout: str = ""
    supply: str = field(default="", metadata=word("hint"))
    brings: Mapping[str, Any] = field(default_factory=dict)
    aliases: Many[str] = ()
    identity: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.sources) != (self.kind == "model"):
            raise ValueError("a model needs 'sources', and nothing else has them")

    @property
    def bundled(self) -> bool:
        """Whether it needs no supply; a tokenizer with a hint does."""
        return self.kind != "tokenizer" or not self.supply

    @property
    def home(self) -> str:
        """Where its class is, as `model_index.json` says it."""
        return self.package or self.library

    @property
    def weights(self) -> str:
        """Stem of the weights' file name, as the library names it."""
        return "diffusion_pytorch_model" if self.library == "diffusers" else "model"


@dataclass(frozen=True, slots=True)
class Entry:
    """A further entry of `model_index.json` that is written only if facts hold."""

    facts: Facts
    value: Any


@dataclass(frozen=True, slots=True)
class Joint:
    """Axes of one length, because one component reads what others give.

    Keys are COMPONENT/KEY of converted tensors, with the number of the axis. Each length in
    `reads` (the word `of`) is the sum of those in `gives` (`is`), times `times`, plus `plus`.
    """

    reads: Mapping[str, int] = field(metadata=word("has"))
    gives: Mapping[str, int] = field(metadata=word("is"))
    times: int = 1
    plus: int = 0
    tasks: Many[str] = ()
    because: str = ""


@dataclass(frozen=True, slots=True)
class Content:
    """The part of `arch.yaml` that is read of the architecture that a file has."""

    components: Mapping[str, Component]
    facts: Mapping[str, tuple[Witness, ...]] = field(default_factory=dict)
    index: Mapping[str, Entry | bool | int | float | str | None] = field(default_factory=dict)
    joints: Mapping[str, Joint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Relative:
    """One entry of `relatives.yaml`: a model that people hold, and what it is taken for."""

    name: str = field(metadata=GIVEN)
    architecture: str
    task: str


@dataclass(frozen=True, eq=False)
class Architecture:
    """One folder of `key_maps/`; what takes more than recognising it is read when it is asked for.

    Attributes:
        name: of the folder.
        maps: where its files are read from.
        title: for people.
        conditions: all hold for a file of this architecture, and not for one of another.
        tasks: the first that fits a file is its task; those that need a key are asked before.
        aliases: how the metadata of a file names it: the text begins so.
        single: the component that a file of this architecture is, so that its folder holds that
            component's files itself and no `model_index.json`; empty for a whole model.
        main: the component of a whole model that tells architectures apart.
        root: the key, without prefix, at which the network that tells architectures apart begins.
        prefixes: what may stand before the keys of that network, in order of preference.
        task: whose components it has; None for those of all tasks.
    """

    name: str = field(metadata=GIVEN)
    maps: KeyMaps = field(repr=False, metadata=GIVEN)
    title: str
    conditions: tuple[Condition, ...] = field(metadata=word("detect"))
    tasks: Named[Task]
    aliases: tuple[str, ...] = ()
    single: str = ""
    main: str = "unet"
    root: str = UNET_ROOT
    prefixes: Many[str] = field(default=("model.diffusion_model.", ""), metadata=word("prefix"))
    task: Task | None = field(default=None, metadata=GIVEN)

    def __repr__(self) -> str:
        return f"<Architecture {self.name}: {self.title}>"

    @functools.cached_property
    def components(self) -> Mapping[str, Component]:
        """By name, in the order of `model_index.json`."""
        every = self.maps.content(self.name).components
        if self.task is None:
            return every
        task = self.task.name
        return {name: c for name, c in every.items() if not c.tasks or task in c.tasks}

    @property
    def facts(self) -> Mapping[str, tuple[Witness, ...]]:
        """For each fact that names and shapes cannot tell, the witnesses in order."""
        return self.maps.content(self.name).facts

    @property
    def index(self) -> Mapping[str, Any]:
        """Further entries of `model_index.json`, some of them an `Entry`."""
        return self.maps.content(self.name).index

    @property
    def joints(self) -> tuple[Joint, ...]:
        """Where components are joined, for the task or for any."""
        task, every = self.task and self.task.name, self.maps.content(self.name).joints.values()
        return tuple(joint for joint in every if not joint.tasks or task in joint.tasks)

    @property
    def rooted(self) -> Component:
        """The component that tells architectures apart."""
        return self.components[self.single or self.main]

    def for_task(self, task: Task) -> Architecture:
        """Returns the architecture with the components that a task's pipeline has."""
        return _for_task(self, task.name)

    @functools.cached_property
    def models(self) -> tuple[Component, ...]:
        """The components that have weights."""
        return tuple(c for c in self.components.values() if c.kind == "model")

    def shows(self, task: Task) -> bool:
        """Whether the layouts have what the task needs, so that a sample can be made."""
        return not task.facts and (not task.key or task.key in self.layout(task.name).tensors)

    def layout(self, task: str = "") -> Header:
        """Returns the header of a published file, with what a file for a task has besides."""
        names = [c.layout for c in self.models if c.layout and task in c.tasks]
        header = _layout(self.maps.find(f"{self.name}/layout.json"))
        for name in names:
            more = _layout(self.maps.find(f"{name}.json"))
            header = replace(header, tensors={**header.tensors, **more.tensors})
        return header


class KeyMaps(Folders):
    """The folders that architectures and maps are read from.

    All methods raise a MapError if a file is missing or malformed; all of its faults are listed.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        """Takes the folders in order; nothing is read yet."""
        super().__init__(folders)
        self._contents: dict[str, Content] = {}
        self._keymaps: dict[str, KeyMap] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as the names of its folders: ours lie elsewhere on another machine."""
        own = tuple(path for path in self.folders if path not in bundled().folders)
        return _with_bundled, (own,)

    @functools.cached_property
    def architectures(self) -> dict[str, Architecture]:
        """Every architecture by name, in alphabetical order."""
        try:
            return {name: self._recognised(name) for name in self._names()}
        except MapError:
            self.check_architectures()
            raise

    def _names(self) -> list[str]:
        paths = (path for folder in self.folders for path in folder.glob("*/arch.yaml"))
        return sorted({path.parent.name for path in paths})

    def check_architectures(self) -> None:
        """Reads every `arch.yaml` as a whole."""
        found = []
        for name in self._names():
            for read in (self._recognised, self.content):
                try:
                    read(name)
                except MapError as error:
                    found.append(error)
        if len(found) == 1:
            raise found[0]
        if found:
            problems = dict.fromkeys(p for e in found for p in e.problems or [e.message])
            raise MapError("the key maps are malformed", problems=list(problems), hint=HINT)

    def _recognised(self, name: str) -> Architecture:
        """Reads what it takes to recognise an architecture."""
        file = f"{name}/arch"
        data = self.merged(file, lambda word: word not in schema.words(Content))
        return self.typed(Architecture, file, data, name=name, maps=self)

    def content(self, name: str) -> Content:
        """Returns what an architecture is made of."""
        if name not in self._contents:
            file = f"{name}/arch"
            words = {"single", "main", *schema.words(Content)}
            data = self.merged(file, lambda word: word in words)
            single = "unet"
            if isinstance(data, dict):
                main = data.pop("main", single)
                single = data.pop("single", main)
                for part in ("facts", "joints"):
                    data[part] = self.extended(data.get(part, {}))
                if isinstance(parts := data.get("components"), dict):
                    data["components"] = {part: self.extended(c) for part, c in parts.items()}
            content = self.typed(Content, file, data)
            if single not in content.components:
                fault = Fault(
                    ("components",), f"there is no {single!r}, which tells architectures apart"
                )
                raise self.malformed(file, [fault])
            self._contents[name] = content
        return self._contents[name]

    def keymap(self, name: str) -> KeyMap:
        """Returns a map by its path without suffix, such as `shared/maps/vae`."""
        if name not in self._keymaps:
            path = str(self.find(f"{name}.yaml"))
            self._keymaps[name] = KeyMap.from_file(path, self.typed(MapFile, name))
        return self._keymaps[name]

    def values(self, variant: Variant) -> dict[str, Any]:
        """Returns the values of a configuration with their holes, with those that it extends."""
        base = self.typed(Variant, variant.extends).values if variant.extends else {}
        return laid_over(base, variant.values)

    def classes(self, component: Component) -> tuple[str, ...]:
        """Returns the classes that a component may be of, as its configurations name them."""
        found: list[Any] = []
        for variant in component.config:
            values = self.values(variant)
            said = next((values[entry] for entry in CLASS_ENTRIES if entry in values), None)
            for name in said if isinstance(said, list) else [said]:
                found += (name.table or {}).values() if isinstance(name, FactValue) else [name]
        return tuple(dict.fromkeys(str(name) for name in found if name))

    @functools.cached_property
    def model_classes(self) -> dict[str, str]:
        """The classes with weights that the architectures are made of, and where they are."""
        models = (c for a in self.architectures.values() for c in a.models)
        return {name: c.home for c in models for name in self.classes(c)}

    @functools.cached_property
    def known_facts(self) -> dict[str, tuple[Any, ...]]:
        """The values that witnesses can give, by fact."""
        found: dict[str, tuple[Any, ...]] = {}
        for architecture in self.architectures.values():
            for name, witnesses in architecture.facts.items():
                found[name] = (*found.get(name, ()), *(a for w in witnesses for a in answers(w)))
        return found

    @functools.cached_property
    def pipelines(self) -> dict[str, Task]:
        """The tasks by the class that does them, of which the first architecture's counts."""
        tasks = [task for a in self.architectures.values() for task in a.tasks]
        return {task.pipeline: task for task in reversed(tasks)}

    @functools.cached_property
    def singles(self) -> dict[str, str]:
        """By class, the component that a folder without `model_index.json` is."""
        return {
            t.pipeline: a.single for a in self.architectures.values() if a.single for t in a.tasks
        }


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
def _for_task(architecture: Architecture, task: str) -> Architecture:
    (found,) = (t for t in architecture.tasks if t.name == task)
    return replace(architecture, task=found)
