"""Which architecture a file has, told from its header, with the evidence.

Every architecture is judged, and every verdict is kept: a report can show why a file is what it
is, and why it is not something else.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Ambiguous, NotACheckpoint, UsageError, option
from ..maps.architecture import UNET_ROOT, Architecture, KeyMaps, Task, bundled
from ..maps.evidence import Condition, Has, Indices, Lacks, Rank
from ..reading.source import open_header
from ..reading.tensor import Header, Tensor
from .facts import Fact, Hints, choices, config_beside, find_fact, hold, notes_of
from .foreign import foreign
from .spellings import STRAYS, in_original_names, is_there, respelled, unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

INDEX = re.compile(r"0|[1-9][0-9]{0,4}")
"""A number that stands for a `*`."""


@dataclass(frozen=True, slots=True)
class Line:
    """One condition, and whether it holds for a file."""

    text: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an architecture says of a file: its conditions, with the prefix that fits best.

    Attributes:
        architecture: its name.
        prefix: of the keys of the network that tells architectures apart.
        lines: the conditions.
        task: what the file can do; None where the network is missing or of no known task.
    """

    architecture: str
    prefix: str
    lines: tuple[Line, ...]
    task: Task | None = None

    @property
    def matches(self) -> bool:
        """Whether every condition holds."""
        return all(line.holds for line in self.lines)

    @property
    def failing(self) -> tuple[Line, ...]:
        """The conditions that do not hold."""
        return tuple(line for line in self.lines if not line.holds)


@dataclass(frozen=True, slots=True, repr=False)
class Detection:
    """What a file is.

    Attributes:
        header: of the file.
        verdicts: of every known architecture.
        architecture: the one that matches, or None.
        task: what the input channels tell; None without an architecture.
        facts: by name, what names and shapes cannot tell and how it was decided.
        found: the same, as the file alone tells it.
        refusal: why the file is not a known checkpoint; None with an architecture.
        notes: what else the file holds, and where its metadata or a decision disagree with it.
    """

    header: Header
    verdicts: tuple[Verdict, ...]
    architecture: Architecture | None = None
    task: Task | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    found: Mapping[str, Fact] = field(default_factory=dict)
    refusal: NotACheckpoint | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        if self.architecture is None or self.task is None:
            return f"<Detection of {self.header.path}: no known architecture>"
        return f"<Detection of {self.header.path}: {self.architecture.title}, {self.task.name}>"

    def require(self) -> tuple[Architecture, Task]:
        """Returns the architecture and the task.

        Raises:
            NotACheckpoint: none matched.
        """
        if self.refusal:
            raise self.refusal
        assert self.architecture is not None  # noqa: S101  (one or the other, by construction)
        assert self.task is not None  # noqa: S101
        return self.architecture, self.task

    def _repr_html_(self) -> str:
        """Returns the summary that a notebook shows."""
        reports = importlib.import_module("ckptconv.reports.html")  # they build on this module
        return str(reports.fragment(self))

    @property
    def evidence(self) -> tuple[str, ...]:
        """The conditions of the matching architecture, as sentences."""
        name = self.architecture.name if self.architecture else ""
        return tuple(line.text for v in self.verdicts if v.architecture == name for line in v.lines)


def inspect(path: str | Path, *, maps: KeyMaps | None = None) -> Detection:
    """Says what a file is, from its header alone (and a look at a few values).

    Args:
        path: a safetensors, PyTorch or GGUF file.
        maps: the key maps to use; those that come with ckptconv by default.

    Raises:
        FileRefused: the file cannot be read, or is neither, or it names code.
        Ambiguous: several architectures match.
    """
    return with_config_beside(detect(open_header(path), maps=maps))


def detect(
    header: Header,
    *,
    maps: KeyMaps | None = None,
    decided: Mapping[str, Fact] | None = None,
    suggested: Mapping[str, Fact] | None = None,
) -> Detection:
    """Compares a header with every architecture.

    Args:
        header: of the file.
        maps: the key maps to use; those that come with ckptconv by default.
        decided: facts that an option or an original configuration decides.
        suggested: facts that decide where the file allows them; a note names the others.

    Raises:
        Ambiguous: several architectures match.
        UsageError: an option decides what the file cannot be.
    """
    maps = maps or bundled()
    given, header = header, in_original_names(unwrapped(header, maps), maps)
    keys = Keys(header.tensors)
    verdicts = tuple(judge(a, keys) for a in maps.architectures.values())
    matching = [v for v in verdicts if v.matches]
    if len(matching) > 1:
        raise Ambiguous(
            f"{header.path}: several architectures match",
            problems=[
                f"{v.architecture}: {'; '.join(line.text for line in v.lines)}" for v in matching
            ],
            hint="their conditions in arch.yaml overlap: add one that only one of them meets",
        )
    refusal = foreign(header, maps, deciding=True)
    if not (refusal or matching):
        refusal = _refusal(header, given, verdicts, maps)
    if refusal:
        return Detection(given, verdicts, refusal=refusal, notes=given.notes)
    architecture, task = maps.architectures[matching[0].architecture], matching[0].task
    assert task is not None  # noqa: S101  (without one, a line fails)
    architecture = architecture.for_task(task)
    header = respelled(header, architecture)
    found = {
        name: find_fact(name, witnesses, header, task.name)
        for name, witnesses in architecture.facts.items()
    }
    decided, suggested = decided or {}, suggested or {}
    facts, unfit = dict(found), []
    for name in [name for name in found if name in decided or name in suggested]:
        possible = choices(architecture.facts[name], header, task.name)
        fact, why = decided.get(name) or suggested[name], found[name].detail
        if not possible or fact.value in possible:
            facts[name] = fact
        elif name not in decided:
            unfit.append(f"{name} = {fact.value} ({fact.detail}) does not fit: {why}")
        else:
            raise UsageError(
                f"{header.path}: {option(name, fact.value)} does not fit: {why}",
                hint=f"it can be {' or '.join(map(str, possible))}",
            )
    for other in (t for t in architecture.tasks if t.facts and t.channels == task.channels):
        if hold(other.facts, facts):
            task, architecture = other, architecture.for_task(other)
    overruled = [_overruled(found[name], fact) for name, fact in facts.items()]
    facts["task"] = Fact("task", task.name, "structure", _why(architecture, task))
    return Detection(
        header,
        verdicts,
        architecture,
        task,
        facts,
        found,
        notes=(
            *header.notes,
            *_disagreements(header, architecture, maps),
            *filter(None, overruled),
            *unfit,
            *(
                ()
                if architecture.single
                else notes_of(header, facts, maps.typed(Hints, "shared/hints"))
            ),
        ),
    )


def with_config_beside(detection: Detection) -> Detection:
    """Adds a note of the original configuration that lies beside a checkpoint, if there is one."""
    note = "" if detection.refusal else config_beside(detection.header.path)
    return replace(detection, notes=(*detection.notes, note)) if note else detection


def option_fact(name: str, value: Any) -> Fact:
    """Returns a fact that the user has set."""
    return Fact(name, value, "option", "set by an option")


class Keys:
    """The keys of a file; what several architectures ask of them is looked up once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._indices: dict[str, tuple[int, ...]] = {}

    def indices(self, pattern: str) -> tuple[int, ...]:
        """Returns, in order, the numbers that stand for the `*` in the keys."""
        if pattern not in self._indices:
            before, after = pattern.split("*")
            middles = (
                key[len(before) : -len(after) or None]
                for key in self.tensors
                if key.startswith(before) and key.endswith(after)
            )
            found = sorted(int(m) for m in middles if INDEX.fullmatch(m))
            self._indices[pattern] = tuple(found)
        return self._indices[pattern]


def judge(architecture: Architecture, keys: Keys) -> Verdict:
    """Tries the prefixes that the network may have, and keeps the one that fits best."""
    verdicts, network = [], _network(architecture)
    for prefix in architecture.prefixes:
        task, line = _task(architecture, prefix, keys.tensors)
        lines = [line, *(_test(c, prefix, keys, network) for c in architecture.conditions)]
        if architecture.single and all(line.holds for line in lines):
            lines.append(_alone(architecture, prefix, keys.tensors))
        verdicts.append(Verdict(architecture.name, prefix, tuple(lines), task))
    # Where there is no network, conditions that ask for less than there is hold for no reason.
    return max(
        verdicts,
        key=lambda v: (v.prefix + architecture.root in keys.tensors, sum(x.holds for x in v.lines)),
    )


def _task(
    architecture: Architecture, prefix: str, tensors: Mapping[str, Tensor]
) -> tuple[Task | None, Line]:
    """Returns the first task that fits, and why; None, and why not, if none does."""
    root = tensors.get(prefix + architecture.root)
    what = _network(architecture)
    if root is None:
        missing = f"{architecture.root} is missing: the file holds no {what} in the original layout"
        return None, Line(missing, False)
    counts = [task.channels for task in architecture.tasks]
    if architecture.root == UNET_ROOT and None not in counts and len(root.shape) != 4:
        found = f"{architecture.root} has shape {list(root.shape)}, needed a 4-D convolution"
        return None, Line(found, False)
    told = [task for task in architecture.tasks if not task.facts]
    for task in sorted(told, key=lambda task: not task.key):
        if (task.channels is None or root.shape[1:2] == (task.channels,)) and (
            not task.key or task.key in tensors
        ):
            count = f"has {task.channels} input channels" if task.channels else "is there"
            also = f", and the file holds {task.key}" if task.key else ""
            return task, Line(f"the {what} {count}{also}: {task.name}", True)
    by_channels = [task for task in told if not task.key]
    known = ", ".join(f"{task.channels} ({task.name})" for task in by_channels)
    channels = root.shape[1] if len(root.shape) > 1 else "no"
    return None, Line(f"the {what} has {channels} input channels, needed {known}", False)


def _why(architecture: Architecture, task: Task) -> str:
    if task.key:
        return f"the file holds {task.key}"
    if task.facts:
        return " and ".join(f"{name} is {' or '.join(task.facts[name])}" for name in task.facts)
    tells = f"the {_network(architecture)}'s input channels tell the task"
    return tells if task.channels else "it has no other"


def _alone(architecture: Architecture, prefix: str, tensors: Mapping[str, Tensor]) -> Line:
    """Whether a component is all of a file, but for strays, and not a part of something else."""
    known = {key for key in tensors if key.startswith(prefix)}
    if not prefix:
        names = {s.keymap for s in architecture.rooted.sources}
        maps = [architecture.maps.keymap(name).bound(tensors) for name in names]
        known = {key for key in known if any(m.match(m.spelled(key)) for m in maps)}
    others = [key for key in tensors if key not in known]
    if len(others) * STRAYS <= len(tensors):
        return Line("nothing else is in the file", True)
    return Line(f"the file holds other things, such as {others[0]}, needed none", False)


def _network(architecture: Architecture) -> str:
    """Returns what people call the network that tells an architecture."""
    if architecture.root == UNET_ROOT:
        return "UNet"
    name = architecture.single or architecture.main
    return "VAE" if name == "vae" else name.replace("_", " ")


def _test(condition: Condition, prefix: str, keys: Keys, network: str) -> Line:
    key = condition.key
    because = f" ({condition.because})" if condition.because else ""
    found: Any
    match condition:
        case Has() | Lacks():
            there = prefix + key in keys.tensors
            text = f"the {network} {'has' if there else 'lacks'} {key}"
            if there == isinstance(condition, Has):
                return Line(text + because, True)
            return Line(f"{text}, needed {'none' if there else 'the key'}", False)
        case Rank(expected=expected):
            info = keys.tensors.get(prefix + key)
            found = len(info.shape) if info else None
            text = f"{key} has rank {found}" if info else f"{key} is missing"
            needed = str(expected)
        case Indices(expected=expected):
            found = keys.indices(prefix + key)
            text = f"{key}: * is {', '.join(map(str, found)) or 'nothing'}"
            needed = ", ".join(map(str, expected)) or "nothing"
    if found == expected:
        return Line(text + because, True)
    return Line(f"{text}, needed {needed}{because}", False)


def _refusal(
    header: Header, given: Header, verdicts: tuple[Verdict, ...], maps: KeyMaps
) -> NotACheckpoint:
    """Says what the file is instead, or which architecture is nearest and where it fails.

    Args:
        header: of the file, under original names.
        given: the same, under its own.
        verdicts: of every architecture.
        maps: the key maps.
    """
    if not header.tensors:
        return NotACheckpoint(f"{header.path}: the file holds no tensors", hint="check its source")
    whole = [v for v in verdicts if not maps.architectures[v.architecture].single]
    nearest = min(whole, key=lambda verdict: len(verdict.failing))
    if not any(is_there(maps.architectures[v.architecture], v.prefix, header) for v in whole):
        if found := foreign(given, maps):
            return found
        some = ", ".join(list(given.tensors)[:3])
        return NotACheckpoint(
            f"{header.path}: this is no checkpoint that is known: no key belongs to one",
            problems=[f"the keys of the file ({len(header.tensors):,}) are such as {some}"],
            hint="`ckptconv architectures` lists what is known",
        )
    return NotACheckpoint(
        f"{header.path}: no known architecture matches; the nearest is {nearest.architecture}",
        problems=[line.text for line in nearest.failing],
        hint="`ckptconv inspect --verdicts FILE` shows what every architecture says of the file",
        code="unknown-architecture",
    )


def _disagreements(header: Header, architecture: Architecture, maps: KeyMaps) -> Iterator[str]:
    """Yields where the metadata names another architecture; names and shapes win."""
    for key in ("modelspec.architecture", "ss_base_model_version", "general.architecture"):
        said = header.metadata.get(key, "")
        every = (alias for other in maps.architectures.values() for alias in other.aliases)
        named = max(filter(said.startswith, every), key=len, default=None)
        if named and named not in architecture.aliases:
            yield f"the metadata says {key} = {said}, the keys are those of {architecture.name}"


def _overruled(found: Fact, used: Fact) -> str:
    """Says where a decision differs from what the file says; empty if it does not."""
    if used.value == found.value or (used.source, found.source) == ("option", "assumed"):
        return ""
    return (
        f"{used.name} is {used.value} ({used.detail}), where the file alone gives {found.value} "
        f"({found.detail})"
    )
