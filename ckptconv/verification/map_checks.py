"""Do the key maps hold what they promise? For whoever writes one.

Every file is read, and every map is built, which checks its laws. Then each architecture is tried
on the header of its published file, with every number of input channels that it knows, and as a
small sample: it must be recognised, every key must have a line, every line must lead back, and the
real classes, built from the configurations that come out, must expect just these tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from ..configs.allowed import Unbuildable, defaults
from ..configs.config import Config, class_of, configs, model_index
from ..configs.original_config import OriginalConfigFile
from ..detection.detect import detect
from ..detection.facts import Hints
from ..detection.foreign import ForeignFormat
from ..errors import CkptconvError
from ..maps import schema
from ..maps.architecture import Architecture, KeyMaps, Relative, Variant
from ..maps.evidence import Witness
from ..maps.keymap import MapFile
from ..maps.ops import Shape
from ..maps.schema import Named
from ..planning.plan import Plan, build_plan
from ..planning.step import Step
from ..reading.tensor import Header, Tensor
from ..sample import Sample, layout_of
from .classes import expected, has_class
from .result import Check, Problem

FILES: dict[str, Any] = {
    "*/sample": Sample,
    "shared/configs/*": Variant,
    "shared/facts": Mapping[str, tuple[Witness, ...]],
    "shared/hints": Hints,
    "foreign": tuple[ForeignFormat, ...],
    "original-config": OriginalConfigFile,
    "relatives": Named[Relative],
}
"""What a file holds, by its name; any other with a section of a map is a map."""

MAP_WORDS = schema.words(MapFile).keys()


def check_maps(maps: KeyMaps) -> tuple[Check, ...]:
    """Checks every map and every architecture.

    Args:
        maps: the key maps.

    Returns:
        One check for the maps, one for the architectures' files, and then, for each architecture,
        one for each header that it was tried on.
    """
    checks = [_check_files(maps)]
    try:
        architectures = maps.architectures
        maps.check_architectures()
    except CkptconvError as error:
        return (*checks, Check("architectures", "arch", tuple(_problems("arch.yaml", error))))
    checks.append(Check("architectures", "arch", (), (), ", ".join(architectures)))
    for architecture in architectures.values():
        checks += _check_architecture(architecture)
    return tuple(checks)


def _check_files(maps: KeyMaps) -> Check:
    """Reads every file but `arch.yaml`, and builds every map."""
    problems: list[Problem] = []
    names = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in maps.folders
        for path in folder.rglob("*.yaml")
    }
    lines = count = 0
    for name in sorted(names):
        try:
            kind = next((k for pattern, k in FILES.items() if fnmatch(name, pattern)), None)
            if kind:
                maps.typed(kind, name)
            elif not name.endswith("/arch") and MAP_WORDS & maps.document(name).entries:
                keymap = maps.keymap(name)
                keymap.bound(".".join(key).replace("*", "0") for key in keymap.words.alternatives)
                lines += len(keymap.rules)
                count += 1
        except CkptconvError as error:
            problems += _problems(name, error)
    return Check("maps", "map", tuple(problems), (), f"{count} maps of {lines:,} lines")


def _check_architecture(architecture: Architecture) -> Iterator[Check]:
    published = _check_header(architecture, "layout", None)
    yield published
    for task in architecture.tasks:
        if not architecture.shows(task):  # an optional key more, that no published layout has
            continue
        # The published file has one of the tasks itself, but not what other files have besides.
        more = any(c.layout and task.name in c.tasks for c in architecture.models)
        if more or not published.extent.startswith(f"{task.name}:"):
            yield _check_header(architecture, "task", task.name)
    yield _check_header(architecture, "sample", None)


def _check_header(architecture: Architecture, kind: str, task: str | None) -> Check:
    problems: list[Problem] = []
    extent = ""
    try:
        header = architecture.layout()
        if kind != "layout":
            header = _header(architecture, header, task=task, full=kind == "task")
        made = _recognised(architecture, header, problems)
        if made:
            extent = f"{made.detection.require()[1].name}: {len(header.tensors):,} keys"
            problems += _check_plan(architecture, made)
            built = configs(made)
            model_index(made, built)
            problems += _check_classes(made, built)
    except CkptconvError as error:
        problems += _problems(kind, error)
    except Unbuildable as error:
        problems.append(Problem(kind, str(error)))
    return Check(architecture.name, kind, tuple(problems), (), extent)


def _header(architecture: Architecture, layout: Header, *, task: str | None, full: bool) -> Header:
    tensors = layout_of(architecture, task=task, full=full)
    found = {key: Tensor(layout.path, key, dtype, shape, 0, 0) for key, dtype, shape in tensors}
    return Header(layout.path, found, layout.metadata, 0, 0)


def _recognised(architecture: Architecture, header: Header, problems: list[Problem]) -> Plan | None:
    """Returns the plan of a header; None if it is not taken for this architecture."""
    detection = detect(header, maps=architecture.maps)
    if detection.architecture and detection.architecture.name == architecture.name:
        return build_plan(detection)
    if detection.architecture:
        what = f"is taken for {detection.architecture.name}: no line of `detect` rules that out"
        problems.append(Problem("layout.json", what))
    for verdict in detection.verdicts:
        if verdict.architecture == architecture.name:
            problems += [
                Problem("detect", f"does not hold for layout.json: {line.text}")
                for line in verdict.failing
            ]
    return None


def _check_plan(architecture: Architecture, made: Plan) -> Iterator[Problem]:
    """Yields keys without a line, and lines that do not lead back."""
    maps = architecture.maps
    sources = [(c, s) for c in architecture.models for s in c.sources]
    for text in made.problems:
        yield Problem("layout.json", text)
    for key in made.unclaimed:
        near = [s for _, s in sources if s.prefix and key.startswith(s.prefix)]
        where = maps.find(f"{near[0].keymap}.yaml") if near else "the map of its component"
        what = f"no line covers it: add one to `blocks` of {where}, or to `drop` with a reason"
        yield Problem(key, what)
    for name in made.absent:
        absent = architecture.components[name]
        if absent.layout or not absent.bundled:  # published files have none
            continue
        yield Problem(name, "no key of layout.json begins with the prefix of one of its sources")
    keymaps = {
        source: maps.keymap(source.keymap).bound_by_targets(made.tensors(component.name))
        for component, source in sources
    }
    for step in made.steps:
        for part, target in enumerate(step.targets):
            origins = [
                (source.prefix + origin.source, origin.part)
                for component, source in sources
                if component.name == target.component
                and (origin := keymaps[source].origin(target.key))
            ]
            if step.reason == "" and (step.sources[0].name, part) not in origins:
                yield Problem(target.key, f"does not lead back to {step.sources[0].name}")


def _check_classes(made: Plan, built: Mapping[str, Config]) -> Iterator[Problem]:
    """Yields where the real classes expect something else."""
    architecture, task = made.detection.require()
    library = architecture.rooted.home if architecture.single else "diffusers"
    if not has_class(library, task.pipeline):
        what = "class" if architecture.single else "pipeline"
        yield Problem("tasks", f"{library} has no {what} {task.pipeline}")
    for name, config in built.items():
        library, class_name = config.component.home, class_of(config)
        if config.component.kind != "model":
            defaults(library, class_name)
            continue
        model = expected(library, class_name, config.values)
        from_key = {t.key: s for s in made.steps for t in s.targets if t.component == name}
        have = made.tensors(name)
        lost = [key for key in model.shapes if key not in have]
        extra = [key for key in have if key not in model.shapes]
        for key in extra:
            what = (
                f"{from_key[key].sources[0].name} becomes it, but {class_name} has no such tensor"
            )
            yield Problem(f"{name}: {key}", what + _nearest(key, lost, "it expects"))
        for key in lost:
            what = f"{class_name} expects it, but no line gives it"
            yield Problem(f"{name}: {key}", what + _nearest(key, extra, "a line gives"))
        for key, shape in model.shapes.items():
            if key in have and have[key].shape != shape:
                what = f"{class_name} expects {list(shape)}, {_from(from_key[key])}"
                yield Problem(f"{name}: {key}", what + _advice(from_key[key], key, shape))


def _nearest(key: str, others: list[str], what: str) -> str:
    found = difflib.get_close_matches(key, others[:200], 1)
    return f"; the nearest that {what} is {found[0]}" if found else ""


def _from(step: Step) -> str:
    source, target = step.sources[0], step.targets[0]
    return f"{source.name} {list(source.shape)} gives {list(target.shape)}"


def _advice(step: Step, key: str, shape: Shape) -> str:
    """Says which operation would give the shape."""
    have = step.sources[0].shape
    if have == shape[::-1]:
        return f": if the name is right, write {{transpose: {key}}}"
    if have == (*shape, 1, 1):
        return f": write {{squeeze: {key}}}"
    if have[:1] == (3 * shape[0],) and have[1:] == shape[1:]:
        return ": write {split_rows: [the query's name, the key's, the value's]}"
    return ": check the line, and the configuration in arch.yaml"


def _problems(where: str, error: CkptconvError) -> list[Problem]:
    hint = f" ({error.hint})" if error.hint else ""
    if not error.problems:
        return [Problem(where, error.message + hint)]
    return [Problem(where, f"{error.message}: {problem}{hint}") for problem in error.problems]
