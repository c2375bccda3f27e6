"""What a conversion will do: one step for every key of the file.

A key map is abstract; a plan has the real keys, dtypes and shapes, so its inverse never guesses.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..detection.detect import Detection
from ..detection.spellings import EMA_NAMES, EMA_OF, EMA_PREFIX
from ..errors import Incomplete, UsageError
from ..maps.architecture import Architecture
from ..maps.ops import DROP
from ..reading.header import FLOATS, Header
from ..reading.view import files_of
from .adapters import Adapter, with_adapters
from .components import Donor, best_claim, donated
from .scaled import read_scales, scaled
from .step import ASIDE, Slot, Step, dropped, slot_of

__all__ = ["ASIDE", "DTYPES", "Donor", "Plan", "Slot", "Step", "build_plan"]

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""What a run may cast the weights to, and the name that safetensors uses."""

SCALED_DTYPE = "fp16"
"""What scaled weights become by default: multiplied, they are no values of fp8 any more."""

TRAINING_MAP = "shared/maps/training"


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
        adapters: that are added to the weights, in this order.
        notes: what the user should know.
    """

    detection: Detection
    headers: Mapping[str, Header]
    steps: tuple[Step, ...]
    unclaimed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    donors: Mapping[str, Donor] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back bit for bit from what is written."""
        kept = all(step.targets and not step.casts and not step.changes for step in self.steps)
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

    def _repr_html_(self) -> str:
        """Returns the summary that a notebook shows."""
        reports = importlib.import_module("ckptconv.reports.html")  # they build on this module
        return str(reports.fragment(self.detection, self))

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
    adapters: Sequence[Adapter] = (),
) -> Plan:
    """Accounts for every key of a checkpoint.

    Args:
        detection: of the checkpoint.
        ema: take the EMA copy of the UNet instead of its weights.
        only: names of the components to write; all by default.
        donors: components that come from elsewhere, by name.
        dtype: `fp16`, `bf16` or `fp32` for the float tensors; as stored by default.
        adapters: to add to the weights, in this order.

    Raises:
        NotACheckpoint: no architecture matched.
        UsageError: a component that the architecture does not have, an unknown dtype, or `ema`
            without the UNet.
        Incomplete: `ema` is set and the file has no complete EMA copy.
        FileRefused: an adapter does not fit.
    """
    architecture, _ = detection.require()
    header, donors = detection.header, donors or {}
    wanted = set(architecture.components) if only is None else set(only)
    _check_names(architecture, wanted, donors, dtype)
    own = read_scales(header)
    theirs = {n: read_scales(d.headers[0]) for n, d in donors.items() if not d.config}
    scales = {
        (slot.place, slot.key): scale
        for each in (own, *theirs.values())
        for slot, scale in each.by_slot()
    }
    steps: dict[str, Step] = {}
    given: list[Step] = []
    problems = [text for each in (own, *theirs.values()) for text in each.problems]
    absent = []
    for component in architecture.models:
        claim = best_claim(architecture, component, own.header, component.sources)
        if (name := component.name) in donors:
            donor = donors[name]
            if name in theirs:
                donor = replace(donor, headers=(theirs[name].header,))
            given += donated(architecture, component, donor, problems)
            steps |= {key: dropped(step, "replaced") for key, step in claim.steps.items()}
        elif not claim.known:
            absent.append(component.name)
        elif component.name in wanted:
            steps |= claim.steps
            problems += claim.problems
        else:
            steps |= {key: dropped(step, "left out") for key, step in claim.steps.items()}
    steps |= _rest(architecture, own.header, steps, keep=only is None)
    steps |= own.steps(header)
    if ema and "unet" not in wanted:
        raise UsageError("the EMA copy is one of the UNet, and the UNet is not to be written")
    if ema:
        steps |= _from_ema(header, steps)
    ordered = [steps[key] for key in header.tensors if key in steps] + given
    notes = []
    if scales and dtype is None:
        dtype = SCALED_DTYPE
        notes.append(
            f"the file holds {len(scales):,} weights in fp8 with a scale: the folder is {dtype}; "
            "--dtype decides otherwise"
        )
    cast = [scaled(_cast(step, dtype), scales, problems) for step in ordered]
    left_out = [c.name for c in architecture.models if c.name not in wanted]
    changed, passed_over = with_adapters(architecture, cast, adapters, left_out)
    read = [header, *(h for donor in donors.values() for h in donor.headers)]
    read += [adapter.header for adapter in adapters]
    return Plan(
        detection,
        {str(h.path): h for each in read for h in files_of(each)},
        changed,
        tuple(key for key in header.tensors if key not in steps),
        tuple(problems),
        tuple(name for name in absent if name in wanted),
        donors,
        tuple(adapters),
        (*notes, *passed_over),
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


def _rest(
    architecture: Architecture, header: Header, steps: Mapping[str, Step], *, keep: bool
) -> dict[str, Step]:
    """Returns the steps for what is no component's: EMA copies and leftovers of the training."""
    training = architecture.maps.keymap(TRAINING_MAP)
    rest = {}
    for key in header.tensors:
        if key in steps:
            continue
        slot = slot_of(header, key)
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
        names = [name + key.removeprefix(EMA_OF).replace(".", "") for name in EMA_NAMES]
        copy = next((name for name in names if name in header.tensors), names[0])
        info = header.tensors.get(copy)
        if not info:
            problems.append(f"{copy} is missing, the EMA copy of {key}")
        elif info.shape != step.sources[0].shape or copy in turned:
            problems.append(f"{copy} has shape {list(info.shape)}, unlike {key}")
        else:
            slot = slot_of(header, copy)
            targets = tuple(replace(t, dtype=info.dtype) for t in step.targets)
            turned[copy] = replace(step, sources=(slot,), targets=targets)
            turned[key] = dropped(step, "replaced")
    if problems or not turned:
        raise Incomplete(
            f"{header.path}: the file has no complete EMA copy of the UNet",
            problems=problems,
            hint="leave out --ema to take the weights that it has",
        )
    return turned


def _cast(step: Step, dtype: str | None) -> Step:
    if dtype is None or step.op is DROP or step.sources[0].dtype not in FLOATS:
        return step
    return replace(step, targets=tuple(replace(t, dtype=DTYPES[dtype]) for t in step.targets))
