"""The components of a file: which of its keys are whose, what becomes of them, and what is wrong.

The keys that come out are compared with those of the published layout, so that a file that lacks
one, or holds one too many, is found before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..maps.architecture import Architecture, Component, Source
from ..maps.keymap import KeyMap, Rule
from ..maps.ops import DROP, RENAME
from ..reading.tensor import Header
from .step import Step, Target, dropped

TRANSFORMERS_MAP = "shared/maps/transformers"

AS_IS = "diffusers"
"""Stands for a map: the keys are in the diffusers layout already."""


@dataclass(frozen=True, slots=True)
class Donor:
    """A component that comes from elsewhere.

    Attributes:
        headers: of its weight files.
        config: its own config.json, if it is a folder in the diffusers layout.
    """

    headers: tuple[Header, ...]
    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """What becomes of the keys of a component, if its weights are where one of its sources says.

    Attributes:
        known: how many of the keys that it gives are in the published layout.
        steps: by original key.
        problems: keys that are missing, unknown or of a wrong shape.
    """

    known: int
    steps: Mapping[str, Step]
    problems: tuple[str, ...]


def best_match(
    architecture: Architecture, component: Component, header: Header, sources: Iterable[Source]
) -> Match:
    """Returns the match of the source that fits best.

    Args:
        architecture: whose published layout counts.
        component: of the architecture.
        header: of the file.
        sources: to try.
    """
    matches = [_match(architecture, component, header, source) for source in sources]
    return max(matches, key=lambda match: (match.known, -len(match.problems)))


def _match(
    architecture: Architecture, component: Component, header: Header, source: Source
) -> Match:
    keymap = _bound(architecture, component, source, header)
    if not keymap:
        return Match(0, {}, ())
    layout = _layout(architecture, component)
    steps: dict[str, Step] = {}
    problems: list[str] = []
    known, given = 0, set[str]()
    for key, tensor in header.tensors.items():
        short = key.removeprefix(source.prefix)
        found = keymap.match(short) if key.startswith(source.prefix) else None
        if not found:
            continue
        if found.op is DROP:
            steps[key] = dropped(tensor, found.reason, keep=True)
            continue
        given.update(found.targets)
        ranks = [layout.get(keymap.template(target)) for target in found.targets]
        if None not in ranks:
            known += len(ranks)
        elif not keymap.is_optional(short):
            problems.append(f"{key}: not a key of a {architecture.title} {component.name}")
        try:
            shapes = found.op.forward(tensor.shape, len(found.targets))
        except ValueError as error:
            problems.append(f"{key}: {found.op.name} {error}")
            continue
        for shape, rank in zip(shapes, ranks, strict=True):
            if rank not in (None, len(shape)):
                problems.append(f"{key}: has shape {list(tensor.shape)}, needed {rank} axes")
        targets = tuple(
            Target(component.name, name, tensor.dtype, shape)
            for name, shape in zip(found.targets, shapes, strict=True)
        )
        steps[key] = Step(found.op, (tensor,), targets)
    problems += [f"{component.name}: {line}" for line in _missing(layout, given, keymap)]
    return Match(known, steps, tuple(problems))


def _bound(
    architecture: Architecture, component: Component, source: Source, header: Header
) -> KeyMap | None:
    """Returns the map of a source for this header, or None if the source is not there."""
    prefix = source.prefix
    keys = [key[len(prefix) :] for key in header.tensors if key.startswith(prefix)]
    if not keys or (source.has and source.has not in keys) or source.lacks in keys:
        return None
    if source.keymap == AS_IS:
        published = _layout(architecture, component)
        roots = dict.fromkeys(name.partition(".")[0] for name in published)
        repeats = architecture.maps.keymap(component.sources[0].keymap).repeats
        return KeyMap(AS_IS, [Rule((root,), ((root,),)) for root in roots], repeats=repeats)
    return architecture.maps.keymap(source.keymap).bound(keys)


@functools.cache
def _layout(architecture: Architecture, component: Component) -> dict[str, int]:
    """Returns the templates of a component's published keys, and the rank of each."""
    header = architecture.layout(component.tasks[0] if component.layout else "")
    best: dict[str, int] = {}
    for source in component.sources:
        if not (keymap := _bound(architecture, component, source, header)):
            continue
        ranks: dict[str, int] = {}
        for key, info in header.tensors.items():
            short = key.removeprefix(source.prefix)
            match = keymap.match(short) if key.startswith(source.prefix) else None
            if match and match.op is not DROP:
                shapes = match.op.forward(info.shape, len(match.targets))
                for target, shape in zip(match.targets, shapes, strict=True):
                    ranks[keymap.template(target)] = len(shape)
        best = max(best, ranks, key=len)
    return best


def _missing(layout: Mapping[str, int], given: set[str], keymap: KeyMap) -> Iterator[str]:
    """Yields the keys of the layout that are not given, for every entry of a container."""
    entries: dict[str, set[int]] = {}
    for key in given:
        before, star, _ = keymap.template(key).partition("*")
        if star:
            entries.setdefault(before, set()).add(int(key[len(before) :].partition(".")[0]))
    for before, found in entries.items():
        if len(found) <= max(found):
            yield f"{before}* has only the entries {', '.join(map(str, sorted(found)))}"
    for template in layout:
        before, star, after = template.partition("*")
        names = [f"{before}{n}{after}" for n in sorted(entries.get(before, ()))]
        for name in names if star and names else [template]:
            if name not in given:
                yield f"{name} is missing"


def donated(
    architecture: Architecture, component: Component, donor: Donor, problems: list[str]
) -> list[Step]:
    """Returns the steps for a component that comes from elsewhere."""
    if donor.config:  # a folder in the diffusers layout: its own configuration describes it
        return [
            Step(RENAME, (tensor,), (Target(component.name, key, tensor.dtype, tensor.shape),))
            for header in donor.headers
            for key, tensor in header.tensors.items()
        ]
    (header,) = donor.headers
    readable = {source.keymap for source in component.sources}
    elsewhere = [
        source
        for other in architecture.maps.architectures.values()
        for model in other.models
        for source in model.sources
        if model.name == component.name and source.keymap in readable
    ]
    alone = [replace(source, prefix="") for source in component.sources]
    as_is = [Source("", AS_IS)]
    if component.library == "transformers":
        as_is.insert(0, Source("", TRANSFORMERS_MAP))
    sources = dict.fromkeys([*component.sources, *elsewhere, *alone, *as_is])
    match = best_match(architecture, component, header, sources)
    if match.known:
        problems += match.problems
    else:
        problems.append(f"{component.name}: {header.path} holds none in a layout that is known")
    return [replace(s, targets=()) if s.op is DROP else s for s in match.steps.values()]
