"""What a conversion will do: one step for every key of the file.

A key map is abstract; a plan has the real keys, dtypes and shapes, so its inverse never guesses.
The keys that a plan gives are compared with the published layout of the architecture, so a file
that lacks one, or holds one too many, is found before the first byte is written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .architecture import Architecture, Component, Source
from .detect import Detection
from .errors import Incomplete, UsageError
from .header import FLOATS, Header
from .keymap import KeyMap, Rule
from .ops import DROP, RENAME, Op

__all__ = ["ASIDE", "DTYPES", "Donor", "Plan", "Slot", "Step", "build_plan"]

ASIDE = "ckptconv"
"""The folder of what no pipeline reads: the tensors that were dropped, for the way back."""

EMA_PREFIX = "model_ema."
EMA_OF = "model.diffusion_model."
"""EMA copies are named after the UNet's keys: `model_ema.` and the key from `diffusion_model` on,
all dots removed."""

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""What a run may cast the weights to, and the name that safetensors uses."""

TRAINING_MAP = "shared/maps/training"

AS_IS = "diffusers"
"""Stands for a map: the keys are in the diffusers layout already."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor in a file.

    Attributes:
        place: path of the file for an original tensor, folder for a converted one.
        key: its name.
        dtype: as safetensors writes it.
        shape: number of elements along each axis.
    """

    place: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The elements of the sources, in order, become those of the targets, in order.

    Attributes:
        op: `rename`, `squeeze`, `split_rows`, `transpose` or `drop`.
        sources: one tensor, or several in a plan that was turned round.
        targets: the tensors to write; none if a dropped tensor is not kept aside.
        reason: why the tensor is dropped; empty otherwise.
    """

    op: Op
    sources: tuple[Slot, ...]
    targets: tuple[Slot, ...]
    reason: str = ""

    @property
    def casts(self) -> bool:
        """Whether the dtype changes."""
        return bool(self.targets) and self.sources[0].dtype != self.targets[0].dtype

    def inverse(self) -> Step:
        """Returns the step that goes back; the elements keep their order."""
        return replace(self, sources=self.targets, targets=self.sources)


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
class Plan:
    """Every key of the source, accounted for.

    Attributes:
        detection: of the checkpoint.
        headers: every file that is read, by the `place` of its slots.
        steps: in the order of the source files.
        unclaimed: keys that no map knows.
        problems: keys that are missing, unknown inside a component, or of a wrong shape.
        absent: model components that neither the file nor a donor has.
        donors: by component, what comes from elsewhere.
    """

    detection: Detection
    headers: Mapping[str, Header]
    steps: tuple[Step, ...]
    unclaimed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    donors: Mapping[str, Donor] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back bit for bit from what is written."""
        kept = all(step.targets and not step.casts for step in self.steps)
        return kept and not self.unclaimed

    def tensors(self, component: str) -> dict[str, Slot]:
        """Returns the tensors to write into a component's folder, by key, in source order."""
        return {t.key: t for step in self.steps for t in step.targets if t.place == component}

    def inverse(self) -> tuple[Step, ...]:
        """Returns the steps that go back, without the tensors that are not kept."""
        return tuple(step.inverse() for step in self.steps if step.targets)

    def require_complete(self, *, ignore_unclaimed: bool = False) -> None:
        """Checks that the plan gives whole components and leaves no key out.

        Raises:
            Incomplete: it does not; every key is named.
        """
        path = self.detection.header.path
        if self.problems:
            raise Incomplete(
                f"{path}: the file is not a whole {self._title} checkpoint",
                problems=self.problems,
                hint="the file is damaged, pruned, or of a relative that is not supported yet; "
                "compare its SHA-256 with the one at its source",
            )
        if self.unclaimed and not ignore_unclaimed:
            raise Incomplete(
                f"{path}: no key map knows {len(self.unclaimed):,} of the keys",
                problems=[f"{key}: unknown" for key in self.unclaimed],
                hint="--ignore-unclaimed leaves them out; the report lists them",
            )

    @property
    def _title(self) -> str:
        return self.detection.architecture.title if self.detection.architecture else "known"


def build_plan(
    detection: Detection,
    *,
    ema: bool = False,
    only: Iterable[str] | None = None,
    donors: Mapping[str, Donor] | None = None,
    dtype: str | None = None,
) -> Plan:
    """Accounts for every key of a checkpoint.

    Args:
        detection: of the checkpoint.
        ema: take the EMA copy of the UNet instead of its weights.
        only: names of the components to write; all by default.
        donors: components that come from elsewhere, by name.
        dtype: `fp16`, `bf16` or `fp32` for the float tensors; as stored by default.

    Raises:
        NotACheckpoint: no architecture matched.
        UsageError: a component that the architecture does not have, or an unknown dtype.
        Incomplete: `ema` is set and the file has no complete EMA copy.
    """
    architecture, _ = detection.require()
    header, donors = detection.header, donors or {}
    wanted = set(architecture.components) if only is None else set(only)
    _check_names(architecture, wanted, donors, dtype)
    steps: dict[str, Step] = {}
    given: list[Step] = []
    problems: list[str] = []
    absent = []
    for component in architecture.models:
        claim = _best_claim(architecture, component, header, component.sources)
        if component.name in donors:
            given += _given(architecture, component, donors[component.name], problems)
            steps |= {key: _dropped(step, "replaced") for key, step in claim.steps.items()}
        elif not claim.known:
            absent.append(component.name)
        elif component.name in wanted:
            steps |= claim.steps
            problems += claim.problems
        else:
            steps |= {key: _dropped(step, "left out") for key, step in claim.steps.items()}
    steps |= _rest(architecture, header, steps, keep=only is None)
    if ema:
        steps |= _from_ema(header, steps)
    ordered = [steps[key] for key in header.tensors if key in steps] + given
    headers = [header, *(h for donor in donors.values() for h in donor.headers)]
    return Plan(
        detection,
        {str(h.path): h for h in headers},
        tuple(_cast(step, dtype) for step in ordered),
        tuple(key for key in header.tensors if key not in steps),
        tuple(problems),
        tuple(name for name in absent if name in wanted),
        donors,
    )


def _check_names(
    architecture: Architecture, wanted: set[str], donors: Mapping[str, Donor], dtype: str | None
) -> None:
    known = list(architecture.components)
    if unknown := sorted(wanted - set(known)):
        raise UsageError(
            f"{architecture.name} has no component {', '.join(unknown)}",
            hint=f"its components are {', '.join(known)}",
        )
    models = [c.name for c in architecture.models]
    if unknown := [name for name in donors if name not in models or name not in wanted]:
        raise UsageError(
            f"{', '.join(unknown)} is given, but it is not a component to write",
            hint=f"the components of {architecture.name} with weights are {', '.join(models)}",
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown", hint=f"it is one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class _Claim:
    """What one source of a component makes of a header.

    Attributes:
        known: how many of the keys that it gives are in the published layout.
        steps: by original key.
        problems: keys that are missing, unknown or of a wrong shape.
    """

    known: int
    steps: Mapping[str, Step]
    problems: tuple[str, ...]


def _best_claim(
    architecture: Architecture, component: Component, header: Header, sources: Iterable[Source]
) -> _Claim:
    claims = [_claim(architecture, component, header, source) for source in sources]
    return max(claims, key=lambda claim: claim.known)


def _claim(
    architecture: Architecture, component: Component, header: Header, source: Source
) -> _Claim:
    keymap = _bound(architecture, component, source, header)
    if not keymap:
        return _Claim(0, {}, ())
    layout = _layout(architecture, component)
    steps: dict[str, Step] = {}
    problems: list[str] = []
    known, given = 0, set[str]()
    for key, info in header.tensors.items():
        short = key.removeprefix(source.prefix)
        match = keymap.match(short) if key.startswith(source.prefix) else None
        if not match:
            continue
        slot = Slot(str(header.path), key, info.dtype, info.shape)
        if match.op is DROP:
            steps[key] = Step(DROP, (slot,), (replace(slot, place=ASIDE),), match.reason)
            continue
        given.update(match.targets)
        ranks = [layout.get(keymap.template(target)) for target in match.targets]
        if None not in ranks:
            known += 1
        elif not keymap.is_optional(short):
            problems.append(f"{key}: not a key of a {architecture.title} {component.name}")
        try:
            shapes = match.op.shapes(info.shape, len(match.targets))
        except ValueError as error:
            problems.append(f"{key}: {match.op.name} {error}")
            continue
        for shape, rank in zip(shapes, ranks, strict=True):
            if rank not in (None, len(shape)):
                problems.append(f"{key}: has shape {list(info.shape)}, needed {rank} axes")
        targets = zip(match.targets, shapes, strict=True)
        written = tuple(Slot(component.name, name, info.dtype, shape) for name, shape in targets)
        steps[key] = Step(match.op, (slot,), written)
    problems += [f"{component.name}: {line}" for line in _missing(layout, given, keymap)]
    return _Claim(known, steps, tuple(problems))


def _bound(
    architecture: Architecture, component: Component, source: Source, header: Header
) -> KeyMap | None:
    """Returns the map of a source for this header, or None if the source is not there."""
    prefix = source.prefix
    keys = [key[len(prefix) :] for key in header.tensors if key.startswith(prefix)]
    if not keys or (source.when and source.when not in keys) or source.unless in keys:
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
    header = architecture.layout()
    best: dict[str, int] = {}
    for source in component.sources:
        if not (keymap := _bound(architecture, component, source, header)):
            continue
        ranks: dict[str, int] = {}
        for key, info in header.tensors.items():
            short = key.removeprefix(source.prefix)
            match = keymap.match(short) if key.startswith(source.prefix) else None
            if match and match.op is not DROP:
                shapes = match.op.shapes(info.shape, len(match.targets))
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


def _given(
    architecture: Architecture, component: Component, donor: Donor, problems: list[str]
) -> list[Step]:
    """Returns the steps for a component that comes from elsewhere."""
    if donor.config:  # a folder in the diffusers layout: its own configuration describes it
        slots = [
            Slot(str(header.path), key, info.dtype, info.shape)
            for header in donor.headers
            for key, info in header.tensors.items()
        ]
        return [Step(RENAME, (s,), (replace(s, place=component.name),)) for s in slots]
    (header,) = donor.headers
    elsewhere = [
        source
        for other in architecture.maps.architectures.values()
        for model in other.models
        for source in model.sources
        if model.name == component.name
    ]
    alone = [replace(source, prefix="") for source in component.sources]
    sources = dict.fromkeys([*elsewhere, *alone, Source("", AS_IS)])
    claim = _best_claim(architecture, component, header, sources)
    if claim.known:
        problems += claim.problems
    else:
        problems.append(f"{component.name}: {header.path} holds none in a layout that is known")
    return [_dropped(s, s.reason) if s.op is DROP else s for s in claim.steps.values()]


def _rest(
    architecture: Architecture, header: Header, steps: Mapping[str, Step], *, keep: bool
) -> dict[str, Step]:
    """Returns the steps for what is no component's: EMA copies and leftovers of the training."""
    training = architecture.maps.keymap(TRAINING_MAP)
    rest = {}
    for key, info in header.tensors.items():
        slot = Slot(str(header.path), key, info.dtype, info.shape)
        if key in steps:
            continue
        if key.startswith(EMA_PREFIX):
            rest[key] = Step(DROP, (slot,), (), "training")
        elif match := training.match(key):
            aside = (replace(slot, place=ASIDE),) if keep else ()
            rest[key] = Step(DROP, (slot,), aside, match.reason)
    return rest


def _from_ema(header: Header, steps: Mapping[str, Step]) -> dict[str, Step]:
    """Returns the UNet's steps with the EMA copies as sources, and drops for its own weights.

    Raises:
        Incomplete: a copy is missing or has another shape.
    """
    turned: dict[str, Step] = {}
    problems = []
    for key, step in steps.items():
        if not key.startswith(EMA_OF) or step.op is DROP:
            continue
        copy = EMA_PREFIX + key.removeprefix("model.").replace(".", "")
        info = header.tensors.get(copy)
        if not info:
            problems.append(f"{copy} is missing, the EMA copy of {key}")
        elif info.shape != step.sources[0].shape or copy in turned:
            problems.append(f"{copy} has shape {list(info.shape)}, unlike {key}")
        else:
            slot = Slot(str(header.path), copy, info.dtype, info.shape)
            targets = tuple(replace(t, dtype=info.dtype) for t in step.targets)
            turned[copy] = replace(step, sources=(slot,), targets=targets)
            turned[key] = _dropped(step, "replaced")
    if problems or not turned:
        raise Incomplete(
            f"{header.path}: the file has no complete EMA copy of the UNet",
            problems=problems,
            hint="leave out --ema to take the weights that it has",
        )
    return turned


def _dropped(step: Step, reason: str) -> Step:
    """Returns a step that leaves the tensor out for good."""
    return Step(DROP, step.sources, (), reason)


def _cast(step: Step, dtype: str | None) -> Step:
    if dtype is None or step.op is DROP or step.sources[0].dtype not in FLOATS:
        return step
    return replace(step, targets=tuple(replace(t, dtype=DTYPES[dtype]) for t in step.targets))
