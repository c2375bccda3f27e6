"""A diffusers folder as it lies on the disk, whoever wrote it.

Libraries changed the names of some tensors over the years and still read the older ones. Here
every tensor is known by the name that `ckptconv convert` writes, and keeps the one that it has in
its file:

    embeddings.*, encoder.*, ...        -> text_model.*     (transformers 5 saves a text encoder so)
    mid_block.attentions.0.query.weight -> ...to_q.weight   (the VAE of diffusers before 0.17)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..detection.spellings import present_name
from ..errors import FileRefused
from ..files import read_json
from ..folder.names import CONFIG_FILES, DROPPED, INDEX, LAYOUT, RECORD
from ..maps.architecture import KeyMaps
from ..planning.step import ASIDE
from ..reading.header import header_from_json, read_header
from ..reading.tensor import Header, Tensor
from .weights import component_headers

FLAT = "embeddings.token_embedding.weight"
"""In a text encoder: its names lack the segment `text_model.`."""


@dataclass(frozen=True, slots=True)
class ComponentFolder:
    """One component of a folder.

    Attributes:
        folder: its path.
        config: content of its configuration; None if it cannot be read.
        tensors: by the name that the tensor has today. Empty for tokenizers and schedulers.
        problems: what cannot be read, as sentences.
        unread: further weight files, which a library reads only if told to.
        headers: of the weight files that are read.
    """

    folder: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    headers: tuple[Header, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A diffusers folder.

    Attributes:
        path: the folder.
        index: content of `model_index.json`; None without that file.
        parts: the components, by name.
        record: what ckptconv noted of the source (`ckptconv/source.json`); empty without it.
        layout: the header of the source, as ckptconv noted it; None without it.
        aside: the tensors that ckptconv kept aside, by name.
        problems: what cannot be read outside the components.
        single: name of the component whose files lie in the folder itself; empty for a whole model.
    """

    path: Path
    index: Mapping[str, Any] | None
    parts: Mapping[str, ComponentFolder]
    record: Mapping[str, Any]
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

    Args:
        path: the folder.
        maps: their components with weights are of interest.

    Raises:
        FileRefused: it is no folder, or holds no component.
    """
    path = Path(path)
    if not path.is_dir():
        what = "a file" if path.exists() else "missing"
        raise FileRefused(f"{path}: is {what}; needed a diffusers folder", hint="check the path")
    problems: list[str] = []
    index = _json(path / INDEX, problems) if (path / INDEX).exists() else None
    models = {c.name for a in maps.architectures.values() for c in a.models}
    parts = {
        folder.name: _part(folder, weights=folder.name in models)
        for folder in sorted(path.iterdir())
        if folder.is_dir() and any((folder / name).exists() for name in CONFIG_FILES.values())
    }
    for name in sorted(models - parts.keys()):  # a folder that lost its configuration
        if (path / name).is_dir():
            parts[name] = _part(path / name, weights=True)
    single = "" if parts else _single(path, maps)
    for kind, name in CONFIG_FILES.items() if single else ():
        if (path / name).exists():
            part = single if kind == "model" else kind
            parts[part] = _part(path, weights=kind == "model", config=name)
    if not parts:
        raise FileRefused(
            f"{path}: holds no component of a diffusers model: no subfolder has a config.json",
            hint="give the folder that holds model_index.json, or that of one component",
        )
    aside: Mapping[str, Tensor] = {}
    layout = record = None
    try:
        if (path / ASIDE / DROPPED).exists():
            aside = read_header(path / ASIDE / DROPPED).tensors
        if (path / ASIDE / LAYOUT).exists():
            layout = header_from_json(path / ASIDE / LAYOUT)
    except FileRefused as error:
        problems += _sentences(error)
    if (path / ASIDE / RECORD).exists():
        record = _json(path / ASIDE / RECORD, problems)
    return ModelFolder(path, index, parts, record or {}, layout, aside, tuple(problems), single)


def _single(path: Path, maps: KeyMaps) -> str:
    """Returns the name of the component that a folder is; empty if it is none that is known."""
    config = _json(path / CONFIG_FILES["model"], [])
    said = (config or {}).get("_class_name") or (config or {}).get("architectures")
    return maps.singles.get(str(said[0] if isinstance(said, list) and said else said), "")


def _part(folder: Path, *, weights: bool, config: str | None = None) -> ComponentFolder:
    """Reads a component; `config` names its configuration where the folder holds several."""
    problems: list[str] = []
    names = [n for n in CONFIG_FILES.values() if (folder / n).exists() and config in (None, n)]
    values = _json(folder / names[0], problems) if names else None
    if not names:
        problems.append(f"{folder}: holds no {CONFIG_FILES['model']}")
    if not weights:
        return ComponentFolder(folder, values, problems=tuple(problems))
    try:
        headers = component_headers(folder)
    except FileRefused as error:
        return ComponentFolder(folder, values, problems=(*problems, *_sentences(error)))
    stored: dict[str, Tensor] = {}
    for header in headers:
        twice = stored.keys() & header.tensors.keys()
        problems += [f"{key}: is in several shards" for key in sorted(twice)]
        stored |= header.tensors
    read = {header.path for header in headers}
    return ComponentFolder(
        folder,
        values,
        {_current(key, stored): tensor for key, tensor in stored.items()},
        tuple(problems),
        tuple(sorted(p.name for p in folder.glob("*.safetensors") if p not in read)),
        headers,
    )


def _current(key: str, stored: Mapping[str, Tensor]) -> str:
    """Returns the name that a tensor has today."""
    if FLAT in stored and not key.startswith("text_projection."):
        return f"text_model.{key}"
    return present_name(key)


def _json(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    try:
        return read_json(path)
    except FileRefused as error:
        problems += _sentences(error)
        return None


def _sentences(error: FileRefused) -> list[str]:
    return [error.message, *error.problems]
