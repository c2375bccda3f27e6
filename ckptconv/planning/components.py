"""The components of a file: which keys belong to which, what they become, and what is wrong.

The resulting keys are compared with those of the published layout, so that a file that lacks a key
or holds one too many is found before anything is written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..detection.detect import Detection
from ..detection.spellings import current_name
from ..maps.architecture import Architecture, Component, Source
from ..maps.keymap import KeyMap, MapFile, Match
from ..maps.ops import DROP, RENAME
from ..maps.rules import Rule
from ..options import DONORS
from ..reading.tensor import Header, Shape, Tensor
from .step import Step, Target, dropped

TRANSFORMERS_MAP = "shared/maps/transformers"

AS_IS = "diffusers"
"""Stands for a map: the keys are in the diffusers layout already."""


@dataclass(frozen=True, slots=True)
class Donor:
    """A component that comes from elsewhere.

    Attributes:
        headers: of its weight files; a tokenizer has none.
        config: its own configuration file, if it is a folder in the diffusers layout.
        detection: what the file is, if it is one.
    """

    headers: tuple[Header, ...]
    config: Path | None = None
    detection: Detection | None = None

    @property
    def name(self) -> str:
        """Of its first weight file, or of a tokenizer's folder."""
        (path,) = [header.path for header in self.headers[:1]] or [(self.config or Path()).parent]
        return path.name


@dataclass(frozen=True, slots=True)
class ComponentMatch:
    """What becomes of the keys of a component, if its weights are where a source says.

    Attributes:
        known: how many of the resulting keys are in the published layout.
        steps: by original key.
        problems: tensors of a wrong shape.
        missing: what the network lacks.
        strays: how many keys inside the network it does not have.
    """

    known: int
    steps: Mapping[str, Step]
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    strays: int = 0


def best_match(
    architecture: Architecture, component: Component, header: Header, sources: Iterable[Source]
) -> ComponentMatch:
    """Returns the match of the source that fits best."""
    matches = [_match(architecture, component, header, source) for source in sources]
    return max(matches, key=lambda m: (m.known, -len(m.problems + m.missing) - m.strays))


def _match(
    architecture: Architecture, component: Component, header: Header, source: Source
) -> ComponentMatch:
    keymap = _bound(architecture, component, source, header)
    if not keymap:
        return ComponentMatch(0, {})
    steps: dict[str, Step] = {}
    problems: list[str] = []
    found: dict[str, Shape] = {}
    for key, tensor, match in _matched(header, source, keymap):
        if match.op is DROP:
            steps[key] = dropped(tensor, match.reason, keep=True)
            continue
        try:
            shapes = match.op.forward(tensor.shape, len(match.targets))
        except ValueError as error:
            problems.append(f"{key}: {match.op.name} {error}")
            shapes = ((),) * len(match.targets)
        found |= zip(match.targets, shapes, strict=True)
        targets = (Target(component.name, t, tensor.dtype, found[t]) for t in match.targets)
        steps[key] = Step(match.op, (tensor,), tuple(targets))
    usual = architecture.maps.keymap(source.keymap) if source.keymap != AS_IS else keymap
    for key in header.tensors if usual.words.alternatives else ():
        name = key.removeprefix(source.prefix)
        if key.startswith(source.prefix) and usual.match(name) and not keymap.match(name):
            problems.append(f"{key}: the file has its tensors in another spelling, too")
    layout = _fitting(_layout(architecture, component), found, keymap)
    shorter = _lacked_by_last(architecture, component)
    strays, known = set[str](), 0
    for key, step in steps.items():
        ranks = [layout.get(keymap.template(target.key)) for target in step.targets]
        if step.op is DROP:
            continue
        if None not in ranks:
            known += len(ranks)
        elif not keymap.is_optional(key.removeprefix(source.prefix)):
            strays.add(key)
        for target, rank in zip(step.targets, ranks, strict=True):
            if target.shape and rank not in (None, len(target.shape)):
                shape = list(step.sources[0].shape)
                problems.append(f"{key}: has shape {shape}, needed {rank} axes")
    return ComponentMatch(
        known,
        {key: step for key, step in steps.items() if key not in strays},
        tuple(problems),
        tuple(f"{component.name}: {line}" for line in _missing(layout, found, keymap, shorter)),
        len(strays),
    )


def _fitting(
    layout: Mapping[str, int], found: Mapping[str, Shape], keymap: KeyMap
) -> dict[str, int]:
    """Returns a layout with shortcuts where the widths of a file change, and nowhere else."""
    fitting = dict(layout)
    for shortcut, beside in keymap.words.shortcuts.items():
        for key, shape in found.items():
            block, _, rest = key.rpartition(f".{beside}.")
            if rest != "weight" or keymap.template(key) not in layout or len(shape) < 2:
                continue
            for leaf, rank in (("weight", len(shape)), ("bias", 1)):
                name = keymap.template(f"{block}.{shortcut}.{leaf}")
                if shape[0] != shape[1]:
                    fitting[name] = rank
                else:
                    fitting.pop(name, None)
    return fitting


def _bound(
    architecture: Architecture, component: Component, source: Source, header: Header
) -> KeyMap | None:
    """Returns the map of a source for this header, or None if the source is not there."""
    prefix = source.prefix
    keys = [key[len(prefix) :] for key in header.tensors if key.startswith(prefix)]
    lacks = source.has and source.has not in keys
    if not keys or lacks or (source.lacks and source.lacks in keys):
        return None
    if source.keymap == AS_IS:
        published = _layout(architecture, component)
        roots = dict.fromkeys(name.partition(".")[0] for name in published)
        words = architecture.maps.keymap(component.sources[0].keymap).words
        words = MapFile(repeats=words.repeats, shortcuts=words.shortcuts)
        return KeyMap(AS_IS, [Rule((root,), ((root,),)) for root in roots], words)
    return architecture.maps.keymap(source.keymap).bound(keys)


def _matched(header: Header, source: Source, keymap: KeyMap) -> Iterator[tuple[str, Tensor, Match]]:
    """Yields every tensor under the prefix of a source that the map covers."""
    for key, tensor in header.tensors.items():
        if key.startswith(source.prefix) and (match := keymap.match(key[len(source.prefix) :])):
            yield key, tensor, match


@functools.cache
def _layout(architecture: Architecture, component: Component) -> dict[str, int]:
    """Returns the templates of a component's published keys, and the rank of each."""
    keymap, shapes = _published(architecture, component)
    return {keymap.template(key): len(shape) for key, shape in shapes.items()} if keymap else {}


@functools.cache
def _lacked_by_last(architecture: Architecture, component: Component) -> frozenset[str]:
    """Returns the templates of keys that the last entry of their container does not have."""
    keymap, shapes = _published(architecture, component)
    entries = _entries(shapes, keymap) if keymap else {}
    lacked = set()
    for template in _layout(architecture, component):
        before, star, after = template.partition("*")
        if star and "*" not in after and f"{before}{max(entries[before])}{after}" not in shapes:
            lacked.add(template)
    return frozenset(lacked)


def _entries(keys: Iterable[str], keymap: KeyMap) -> dict[str, set[int]]:
    """Returns the indices that keys have, by what stands before the first of each."""
    entries: dict[str, set[int]] = {}
    for key in keys:
        before, star, _ = keymap.template(key).partition("*")
        if star:
            entries.setdefault(before, set()).add(int(key[len(before) :].partition(".")[0]))
    return entries


@functools.cache
def _published(
    architecture: Architecture, component: Component
) -> tuple[KeyMap | None, dict[str, Shape]]:
    """Returns a component's published keys with their shapes, and the map that gives them."""
    header = architecture.layout(component.tasks[0] if component.layout else "")
    layouts: list[tuple[KeyMap | None, dict[str, Shape]]] = [(None, {})]
    for source in component.sources:
        if keymap := _bound(architecture, component, source, header):
            shapes: dict[str, Shape] = {}
            for _, tensor, match in _matched(header, source, keymap):
                given = match.op.forward(tensor.shape, len(match.targets))
                shapes |= zip(match.targets, given, strict=True)
            layouts.append((keymap, shapes))
    return max(layouts, key=lambda each: len(each[1]))


def _missing(
    layout: Mapping[str, int], found: Collection[str], keymap: KeyMap, shorter: Collection[str]
) -> Iterator[str]:
    """Yields the keys of the layout that were not found, for every entry of a container.

    The last entry need not have keys of the templates `shorter`.
    """
    entries = _entries(found, keymap)
    for before, held in entries.items():
        if len(held) <= max(held):
            yield f"{before}* has only the entries {', '.join(map(str, sorted(held)))}"
    for template in layout:
        before, star, after = template.partition("*")
        indices = sorted(entries.get(before, ()))[: -1 if template in shorter else None]
        names = [f"{before}{n}{after}" for n in indices]
        for name in names if star and entries.get(before) else [template]:
            origin = None if name in found else keymap.origin(name)
            if name not in found and not (origin and keymap.is_optional(origin.source)):
                yield f"{name} is missing"


def donor_match(architecture: Architecture, component: Component, donor: Donor) -> ComponentMatch:
    """Matches a component that comes from elsewhere, in any layout that a map of it can read."""
    if donor.config:  # a folder in the diffusers layout: its own configuration describes it
        stored = {key: t for header in donor.headers for key, t in header.tensors.items()}
        steps = {}
        for key, tensor in stored.items():
            name = current_name(key, stored)
            name = key if name in stored else name
            target = Target(component.name, name, tensor.dtype, tensor.shape)
            steps[key] = Step(RENAME, (tensor,), (target,))
        return ComponentMatch(len(steps), steps)
    refusal = donor.detection and donor.detection.refusal
    if refusal and refusal.code == "quantized":  # its keys fit, its values do not
        what = refusal.message.removeprefix(f"{donor.headers[0].path}: ")
        return ComponentMatch(0, {}, (f"{component.name}: {what}; {refusal.hint}",))
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
    steps = {k: replace(s, targets=()) if s.op is DROP else s for k, s in match.steps.items()}
    if not match.known:
        problem = f"{component.name}: the file holds none that {architecture.title} can have"
        return ComponentMatch(0, steps, (problem,))
    return replace(match, steps=steps, problems=match.problems + match.missing)


def fitting_places(architecture: Architecture, donor: Donor) -> dict[str, ComponentMatch]:
    """Returns the components that most of a file can be, of those that a donor may give."""
    found = {}
    for component in architecture.models:
        if component.name in DONORS and not donor.config:
            match = donor_match(architecture, component, donor)
            most = 2 * len(match.steps) > len(donor.headers[0].tensors)
            if match.known and most and not match.problems:
                found[component.name] = match
    return found


def published_elements(architecture: Architecture, component: Component) -> int:
    """Returns how many elements a component of the published file has."""
    return sum(map(math.prod, _published(architecture, component)[1].values()))


def identities(
    written: Iterable[Component],
    donors: Mapping[str, Donor],
    targets: Mapping[str, Mapping[str, Target]],
) -> Iterator[Target]:
    """Yields the identity matrices that components get, as wide as one of their tensors."""
    for component in written:
        own, donor = targets.get(component.name, {}), donors.get(component.name)
        for key, like in component.identity.items():
            if like in own and not (donor and donor.config):  # a folder has its own
                width = own[like].shape[0]
                yield Target(component.name, key, own[like].dtype, (width, width))
