"""The way back: which original tensors a diffusers folder gives, by the maps read right to left.

What a map cannot tell, because two originals give the same folder, comes from the layout that
ckptconv notes beside what it writes, where there is one: the prefix of the keys, and whether the
attention of the VAE was stored as 1x1 convolutions. Without it, it is as in the published files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..detection.detect import FACT_VALUES, Detection, detect
from ..detection.facts import Fact
from ..errors import NotACheckpoint
from ..folder.read import Saved
from ..maps.architecture import Architecture, Component, KeyMaps, Source
from ..maps.ops import OPS, RENAME, TRANSPOSE, Op, Shape
from ..planning.plan import Slot, Step
from ..reading.header import Header
from ..streaming.stream import lay_out

__all__ = ["Backwards", "backwards", "recorded_facts"]

DERIVED = ".embeddings.position_ids"
"""0, 1, 2, ...: what old releases of transformers save and no release needs."""


@dataclass(frozen=True, slots=True)
class Backwards:
    """What a folder is in the original layout.

    Attributes:
        architecture: the one whose maps were read, the nearest if none matches.
        detection: of the original file that the folder would give.
        steps: from the tensors of the folder to those of the file.
        problems: tensors that have no way back, and those that are missing for one.
    """

    architecture: Architecture
    detection: Detection
    steps: tuple[Step, ...]
    problems: tuple[str, ...] = ()


def backwards(saved: Saved, maps: KeyMaps) -> Backwards:
    """Reads the maps right to left, and puts the result to every architecture.

    Args:
        saved: the folder.
        maps: the key maps to use.

    Raises:
        NotACheckpoint: the folder holds no weights of a UNet, which is what tells architectures
            apart.
    """
    part = saved.parts.get(saved.single or "unet")
    if part is None or not part.tensors:
        raise NotACheckpoint(
            f"{saved.path}: which architecture this is cannot be told: it holds no UNet",
            problems=(part.problems if part else ()) or ("there is no folder unet with weights",),
            hint="give a whole folder; one component of it can be verified against its FILE",
        )
    decided = recorded_facts(saved.record)
    read = [
        _read(architecture, saved, maps, decided)
        for architecture in maps.architectures.values()
        if architecture.single == saved.single
    ]
    if not read:
        raise NotACheckpoint(
            f"{saved.path}: no known architecture is a {saved.single} alone",
            hint="`ckptconv architectures` lists what is known",
        )
    return max(
        read,
        key=lambda b: (
            _is(b.detection, b.architecture),
            _remembered(b.steps, saved),
            len(b.steps),
            -min(len(v.failing) for v in b.detection.verdicts),
        ),
    )


def _is(detection: Detection, architecture: Architecture) -> bool:
    return detection.architecture is not None and detection.architecture.name == architecture.name


def recorded_facts(record: Mapping[str, Any]) -> dict[str, Fact]:
    """Returns the facts that `ckptconv/source.json` notes, without those that make no sense."""
    noted = record.get("facts")
    facts = {}
    for name, fact in noted.items() if isinstance(noted, dict) else ():
        if (
            name in FACT_VALUES
            and isinstance(fact, dict)
            and fact.get("value") in FACT_VALUES[name]
        ):
            source, detail = str(fact.get("source", "")), str(fact.get("detail", ""))
            facts[name] = Fact(name, fact["value"], source, detail)
    return facts


def _read(
    architecture: Architecture, saved: Saved, maps: KeyMaps, decided: Mapping[str, Fact]
) -> Backwards:
    steps: dict[str, Step] = {}
    problems: list[str] = []
    for component in architecture.models:
        if component.name in saved.parts:
            found = [_component(architecture, component, s, saved) for s in component.sources]
            best = max(found, key=lambda each: (_remembered(each.steps, saved), each.tensors))
            steps |= {step.targets[0].key: step for step in best.steps}
            problems += best.problems
    for key, slot in saved.aside.items():
        steps.setdefault(key, Step(RENAME, (slot,), (replace(slot, place=""),)))
    targets = [step.targets[0] for step in steps.values()]
    tensors = lay_out(Path(), targets, {}).tensors
    size = max((info.end for info in tensors.values()), default=0)
    header = Header(saved.path, tensors, _metadata(saved), 0, size)
    detection = detect(header, maps=maps, decided=decided)
    return Backwards(architecture, detection, tuple(steps.values()), tuple(problems))


@dataclass(frozen=True, slots=True)
class _Component:
    steps: tuple[Step, ...]
    problems: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """How many tensors of the folder have a way back."""
        return sum(len(step.sources) for step in self.steps)


def _component(
    architecture: Architecture, component: Component, source: Source, saved: Saved
) -> _Component:
    """Goes back from a component's folder to the keys of one of its sources."""
    keymap = architecture.maps.keymap(source.keymap)
    groups: dict[str, tuple[Op, dict[int, Slot]]] = {}
    steps, problems = [], []
    for key, slot in saved.parts[component.name].tensors.items():
        if origin := keymap.origin(key):
            groups.setdefault(origin.source, (origin.op, {}))[1][origin.part] = slot
        elif not key.endswith(DERIVED):
            problems.append(f"{component.name}: {slot.key}: no map knows this key")
    for name, (op, parts) in groups.items():
        key = source.prefix + name
        match = keymap.match(name)
        wanted = match.targets if match else ()
        slots = [parts[n] for n in sorted(parts)]
        lost = [target for n, target in enumerate(wanted) if n not in parts]
        kinds = sorted({slot.dtype for slot in slots})
        if lost or len(kinds) > 1:
            why = f"{', '.join(lost)} missing" if lost else f"its parts are {' and '.join(kinds)}"
            problems.append(f"{component.name}: {key} cannot be put together: {why}")
            continue
        try:
            shape = _original(op, [slot.shape for slot in slots], _noted_shape(saved, key))
        except ValueError as error:
            problems.append(f"{component.name}: {slots[0].key}: {error}")
            continue
        steps.append(Step(op, tuple(slots), (Slot("", key, kinds[0], shape),)))
    return _Component(tuple(steps), tuple(problems))


def _remembered(steps: tuple[Step, ...], saved: Saved) -> int:
    """Returns how many of the keys the source had, as far as that was noted."""
    noted = saved.layout.tensors if saved.layout else {}
    return sum(step.targets[0].key in noted for step in steps)


def _noted_shape(saved: Saved, key: str) -> Shape | None:
    info = saved.layout.tensors.get(key) if saved.layout else None
    return info.shape if info else None


def _original(op: Op, shapes: list[Shape], noted: Shape | None) -> Shape:
    """Returns the shape of the one original of some converted tensors.

    Raises:
        ValueError: the operation gives no tensors of these shapes.
    """
    first = shapes[0]
    if op is TRANSPOSE:
        if len(first) != 2:
            raise ValueError(f"needs a matrix, found {list(first)}")
        return first[::-1]
    if op is OPS["squeeze"]:
        if len(first) != 2:
            raise ValueError(f"needs shape [out, in], found {list(first)}")
        return first if noted == first else (*first, 1, 1)
    if op is OPS["split_rows"]:
        if not first or len(set(shapes)) > 1:
            raise ValueError(
                f"needs parts of one shape, found {', '.join(map(str, map(list, shapes)))}"
            )
        return (len(shapes) * first[0], *first[1:])
    return first


def _metadata(saved: Saved) -> dict[str, str]:
    """Returns the metadata of the source: as noted, else what its weights carry."""
    if saved.layout:
        return dict(saved.layout.metadata)
    return {k: v for k, v in _carried(saved) if k != "format"}


def _carried(saved: Saved) -> Iterator[tuple[str, str]]:
    for slot in saved.parts[saved.single or "unet"].tensors.values():
        yield from saved.headers[slot.place].metadata.items()
        return
