"""A diffusers folder as it lies on the disk, whoever wrote it.

Libraries renamed some tensors over the years and still read the older names. Here every tensor is
known by the name that `ckptconv convert` writes, and keeps the one that it has in its file:

    embeddings.*, encoder.*, ...        -> text_model.*     (a text encoder saved by transformers 5)
    mid_block.attentions.0.query.weight -> ...to_q.weight   (the VAE of diffusers before 0.17)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..detection.spellings import current_name
from ..errors import FileRefused
from ..files import looking_into, read_config
from ..maps.architecture import KeyMaps
from ..planning.step import ASIDE
from ..reading.header import header_from_json, read_header
from ..reading.tensor import Header, Tensor
from .names import CONFIG_FILES, DROPPED, INDEX, LAYOUT, RECORD
from .record import Record, read_record
from .weights import component_headers

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class ComponentFolder:
    """One component of a folder: what can be read of it, and, as sentences, what cannot.

    Tensors go by their names of today; `unread` are weight files of other variants, which a library
    reads on request only.
    """

    folder: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A diffusers folder: its components by name, and what ckptconv left beside them.

    Attributes:
        index: content of `model_index.json`.
        record: of the conversion, such as its options.
        layout: the header of the source.
        aside: the tensors of the source that belong to no component.
        problems: what cannot be read outside the components.
        single: name of the component whose files lie in the folder itself; empty for a whole model.
    """

    path: Path
    index: Mapping[str, Any] | None
    parts: Mapping[str, ComponentFolder]
    record: Record | None
    layout: Header | None
    aside: Mapping[str, Tensor]
    problems: tuple[str, ...] = ()
    single: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file that is read."""
        headers = [header for part in self.parts.values() for header in part.headers]
        aside = (tensor.file for tensor in self.aside.values())
        return tuple(dict.fromkeys([*(header.path for header in headers), *aside]))


def read_folder(path: str | Path, maps: KeyMaps) -> ModelFolder:
    """Reads a folder: its configurations and the headers of its weights.

    Only a folder without any component is refused; lesser faults become its `problems`.
    """
    with looking_into(Path(path)):
        return _read_folder(Path(path), maps)


def _read_folder(path: Path, maps: KeyMaps) -> ModelFolder:
    if not path.is_dir():
        what = "a file" if path.exists() else "missing"
        raise FileRefused(
            f"{path}: is {what}; needed a diffusers folder",
            hint="check the path",
            code="" if path.exists() else "not-found",
        )
    problems: list[str] = []
    models = {c.name for a in maps.architectures.values() for c in a.models}
    parts, single = {}, ""
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        names = [name for name in CONFIG_FILES.values() if (folder / name).exists()]
        is_model = folder.name in models  # one that lost its configuration, too
        if names or is_model:
            parts[folder.name] = _component(folder, names[0] if names else "", weights=is_model)
    if not parts and (single := _single(path, maps)):
        for kind, name in CONFIG_FILES.items():
            if (path / name).exists():
                is_model = kind == "model"
                parts[single if is_model else kind] = _component(path, name, weights=is_model)
    if not parts:
        raise FileRefused(
            f"{path}: holds no component of a diffusers model: no subfolder has a config.json",
            hint="give the folder that holds model_index.json, or that of one component",
        )
    aside = _read_if_there(read_header, path / ASIDE / DROPPED, problems)
    return ModelFolder(
        path,
        _read_if_there(read_config, path / INDEX, problems),
        parts,
        _read_if_there(partial(read_record, maps=maps), path / ASIDE / RECORD, problems),
        _read_if_there(header_from_json, path / ASIDE / LAYOUT, problems),
        aside.tensors if aside else {},
        tuple(problems),
        single,
    )


def _single(path: Path, maps: KeyMaps) -> str:
    """Returns the name of the component that a folder is; empty if it is none that is known."""
    config = _read_if_there(read_config, path / CONFIG_FILES["model"], []) or {}
    said = config.get("_class_name") or config.get("architectures")
    return maps.singles.get(str(said[0] if isinstance(said, list) and said else said), "")


def _component(folder: Path, config: str, *, weights: bool) -> ComponentFolder:
    """Reads a component, and the headers of its weights if they are of interest."""
    problems: list[str] = []
    values = _read_if_there(read_config, folder / config, problems) if config else None
    if not config:
        problems.append(f"{folder}: holds no {CONFIG_FILES['model']}")
    headers = (_read(component_headers, folder, problems) or ()) if weights else ()
    if not headers:
        return ComponentFolder(folder, values, problems=tuple(problems))
    stored: dict[str, Tensor] = {}
    for header in headers:
        twice = stored.keys() & header.tensors.keys()
        problems += [f"{key}: is in several shards" for key in sorted(twice)]
        stored |= header.tensors
    read = {header.path for header in headers}
    return ComponentFolder(
        folder,
        values,
        {current_name(key, stored): tensor for key, tensor in stored.items()},
        tuple(problems),
        tuple(sorted(p.name for p in folder.glob("*.safetensors") if p not in read)),
        headers,
    )


def _read(reader: Callable[[Path], Content], path: Path, problems: list[str]) -> Content | None:
    """Returns what a reader makes of a file; None, with the reasons in `problems`, if it cannot."""
    try:
        return reader(path)
    except FileRefused as error:
        problems += [error.message, *error.problems]
        return None


def _read_if_there(
    reader: Callable[[Path], Content], path: Path, problems: list[str]
) -> Content | None:
    return _read(reader, path, problems) if path.exists() else None
