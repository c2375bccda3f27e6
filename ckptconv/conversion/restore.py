"""The way back: the original tensors that a diffusers folder gives, by the maps read right to left.

Where two originals give the same folder, a map cannot tell which it was. Then the layout decides
that ckptconv notes beside what it writes: the prefix of the keys, and whether the attention of the
VAE was stored as 1x1 convolutions. Without that note, it is as in the published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..detection.detect import Detection, Keys, detect, judge
from ..detection.facts import Fact
from ..errors import NotACheckpoint
from ..folder.read import ModelFolder
from ..maps.architecture import Architecture, Component, KeyMaps, Source
from ..maps.ops import RENAME, Op
from ..options import FACTS
from ..planning.step import Step, Target
from ..reading.tensor import Header, Tensor

DERIVED = ".embeddings.position_ids"
"""0, 1, 2, ...: what old releases of transformers save and no release needs."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """What a folder is in the original layout.

    Attributes:
        architecture: the one whose maps were read: the nearest, if none matches.
        detection: of the original file that the folder would give.
        steps: from the tensors of the folder to those of the file.
        problems: tensors that have no way back, and those that are missing for one.
    """

    architecture: Architecture
    detection: Detection
    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()


def restore(folder: ModelFolder, maps: KeyMaps) -> Restoration:
    """Reads the maps right to left, for the architecture that fits the folder best.

    Raises:
        NotACheckpoint: the folder holds no weights of the network that tells architectures apart.
    """
    part = folder.parts.get(folder.single or "unet")
    if part is None or not part.tensors:
        raise NotACheckpoint(
            f"{folder.path}: which architecture this is cannot be told: it holds no UNet",
            problems=(part.problems if part else ()) or ("there is no folder unet with weights",),
            hint="give a whole folder; one component of it can be verified against its FILE",
        )
    candidates = [
        _attempt(architecture, folder)
        for architecture in maps.architectures.values()
        if architecture.single == folder.single
    ]
    if not candidates:
        raise NotACheckpoint(
            f"{folder.path}: no known architecture is a {folder.single} alone",
            hint="`ckptconv architectures` lists what is known",
        )
    best = max(candidates, key=lambda each: each.fit)
    metadata = folder.layout.metadata if folder.layout else _carried_metadata(folder)
    size = sum(tensor.nbytes for step in best.steps for tensor in step.sources)
    header = Header(folder.path, best.tensors, metadata, 0, size)
    detection = detect(header, maps=maps, decided=recorded_facts(folder.record))
    return Restoration(best.architecture, detection, best.steps, best.problems)


def recorded_facts(record: Mapping[str, Any]) -> dict[str, Fact]:
    """Returns the facts that `ckptconv/source.json` notes, without those that make no sense."""
    noted = record.get("facts")
    return {
        name: Fact(name, fact["value"], str(fact.get("source", "")), str(fact.get("detail", "")))
        for name, fact in (noted.items() if isinstance(noted, dict) else ())
        if name in FACTS and isinstance(fact, dict) and fact.get("value") in FACTS[name]
    }


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What a folder gives by the maps of one architecture, and how well that fits."""

    architecture: Architecture
    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    fit: tuple[bool, int, int, int]


def _attempt(architecture: Architecture, folder: ModelFolder) -> _Attempt:
    steps: dict[str, Step] = {}
    problems: list[str] = []
    for component in architecture.models:
        if component.name in folder.parts:
            found = [_component(architecture, component, s, folder) for s in component.sources]
            best = max(found, key=lambda each: (_remembered(each[0], folder), _count(each[0])))
            steps |= {step.targets[0].key: step for step in best[0]}
            problems += best[1]
    for key, tensor in folder.aside.items():
        target = Target("", key, tensor.dtype, tensor.shape)
        steps.setdefault(key, Step(RENAME, (tensor,), (target,)))
    tensors = {
        key: Tensor(folder.path, key, target.dtype, target.shape, 0, 0)
        for key, step in steps.items()
        for target in step.targets
    }
    verdict = judge(architecture, Keys(tensors))
    made = tuple(steps.values())
    fit = (verdict.matches, _remembered(made, folder), len(made), -len(verdict.failing))
    return _Attempt(architecture, made, tuple(problems), tensors, fit)


def _component(
    architecture: Architecture, component: Component, source: Source, folder: ModelFolder
) -> tuple[tuple[Step, ...], list[str]]:
    """Goes back from a component's folder to the keys of one of its sources."""
    keymap = architecture.maps.keymap(source.keymap)
    noted = folder.layout.tensors if folder.layout else {}
    groups: dict[str, tuple[Op, dict[int, Tensor]]] = {}
    steps, problems = [], []
    for key, tensor in folder.parts[component.name].tensors.items():
        if origin := keymap.origin(key):
            groups.setdefault(origin.source, (origin.op, {}))[1][origin.part] = tensor
        elif not key.endswith(DERIVED):
            problems.append(f"{component.name}: {tensor.name}: no map knows this key")
    for name, (op, parts) in groups.items():
        key = source.prefix + name
        match = keymap.match(name)
        tensors = [parts[n] for n in sorted(parts)]
        lost = [t for n, t in enumerate(match.targets if match else ()) if n not in parts]
        dtypes = sorted({tensor.dtype for tensor in tensors})
        if lost or len(dtypes) > 1:
            why = f"{', '.join(lost)} missing" if lost else f"its parts are {' and '.join(dtypes)}"
            problems.append(f"{component.name}: {key} cannot be put together: {why}")
            continue
        try:
            known = noted[key].shape if key in noted else None
            shape = op.backward([tensor.shape for tensor in tensors], known)
        except ValueError as error:
            problems.append(f"{component.name}: {tensors[0].name}: {error}")
            continue
        steps.append(Step(op, tuple(tensors), (Target("", key, dtypes[0], shape),)))
    return tuple(steps), problems


def _count(steps: tuple[Step, ...]) -> int:
    """How many tensors of the folder have a way back."""
    return sum(len(step.sources) for step in steps)


def _remembered(steps: tuple[Step, ...], folder: ModelFolder) -> int:
    """How many of the keys the source had, as far as that was noted."""
    noted = folder.layout.tensors if folder.layout else {}
    return sum(step.targets[0].key in noted for step in steps)


def _carried_metadata(folder: ModelFolder) -> dict[str, str]:
    """Returns the metadata that the weights of the network carry."""
    headers = folder.parts[folder.single or "unet"].headers
    return {k: v for k, v in headers[0].metadata.items() if k != "format"} if headers else {}
