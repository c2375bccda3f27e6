"""What a conversion will do: one step for every key of the file.

A key map is abstract; a plan has the real keys, dtypes and shapes, so its inverse never guesses.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..detection.detect import Detection
from ..detection.spellings import EMA_NAMES, EMA_OF, EMA_PREFIX
from ..dtypes import CASTS, FP8
from ..errors import FileRefused, Incomplete, UsageError, option
from ..maps.architecture import Architecture
from ..maps.ops import DROP
from ..options import Options
from ..reading.source import open_header
from ..reading.tensor import Header
from .adapters import Adapter, with_adapters
from .assembly import Assembly
from .components import Donor, best_match, donor_match, fitting_places, identities
from .joints import misfits
from .precision import cast_step, kept_layers, network_of, unquantized
from .scaled import read_scales, scaled
from .step import Step, Target, dropped, targets_of
from .twins import unlike_twins

SCALED_DTYPE = "fp16"
"""What scaled weights become by default: times their scale, they are no longer values of fp8."""

SHOWN = 5
"""Keys that a warning names at most; the report has them all."""

TRAINING_MAP = "shared/maps/training"


@dataclass(frozen=True, repr=False)  # no slots: they leave no room for what is cached
class Plan:
    """Every key of the source, accounted for.

    Attributes:
        detection: of the checkpoint.
        steps: in the order of the source files.
        unclaimed: keys that no map knows; they are kept aside.
        problems: keys that are missing, or of a wrong shape; if there are none, components that do
            not fit together.
        absent: components that neither the file nor a donor has.
        incomplete: by component that is absent for that reason, what the file lacks of it.
        donors: by component, what comes from elsewhere.
        adapters: what is added to the weights, in this order.
        notes: what the user should know.
        identities: identity matrices that the classes need and no checkpoint holds.
        assembly: what the files of a folder were taken for, if the model is put together from it.
    """

    detection: Detection
    steps: tuple[Step, ...]
    unclaimed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    incomplete: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    donors: Mapping[str, Donor] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    notes: tuple[str, ...] = ()
    identities: tuple[Target, ...] = ()
    assembly: Assembly | None = None

    def __repr__(self) -> str:
        state = "lossless" if self.lossless else "not lossless"
        wrong = f", {len(self.problems):,} problems" if self.problems else ""
        path = self.detection.header.path
        return f"<Plan of {path}: {len(self.steps):,} steps, {state}{wrong}>"

    @property
    def lossless(self) -> bool:
        """Whether every tensor comes back bit for bit from what is written."""
        return all(step.targets and not step.casts and not step.changes for step in self.steps)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        headers = [self.detection.header]
        headers += [header for donor in self.donors.values() for header in donor.headers]
        headers += [adapter.header for adapter in self.adapters]
        files = [file for header in headers for file in header.files]
        files += [donor.config for donor in self.donors.values() if donor.config]
        return tuple(dict.fromkeys(files))

    def tensors(self, component: str) -> dict[str, Target]:
        """Returns the tensors to write into a component's folder, by key, in source order."""
        return dict(self._targets.get(component, {}))

    @functools.cached_property
    def _targets(self) -> Mapping[str, Mapping[str, Target]]:
        return targets_of(self.steps, self.identities)

    @functools.cached_property
    def misfits(self) -> tuple[str, ...]:
        """Where two components do not fit together."""
        return misfits(self.detection.require()[0].joints, self._targets)

    def cast(self, dtype: str) -> Plan:
        """Returns the plan with every float tensor cast to a key of `COMPUTED`."""
        identities = (replace(target, dtype=CASTS[dtype]) for target in self.identities)
        steps = tuple(cast_step(step, dtype, "") for step in self.steps)
        return replace(self, steps=steps, identities=tuple(identities))

    def lacking(self, components: Collection[str]) -> list[str]:
        """Returns what the file lacks of those of some components that are incomplete."""
        return [line for n, lines in self.incomplete.items() if n in components for line in lines]

    @property
    def fault(self) -> Incomplete | None:
        """Why the plan gives no model, if it does not."""
        try:
            self.require_complete()
        except Incomplete as error:
            return error
        return None

    def require_complete(self, *, strict: bool = False) -> None:
        """Checks that the plan gives a model.

        Args:
            strict: refuse keys that no map knows and components that are incomplete, too.

        Raises:
            Incomplete: it does not; every key is named.
        """
        path = self.detection.header.path
        if self.problems and self.problems == self.misfits:
            raise Incomplete(
                f"{path}: its components do not fit together",
                problems=self.problems,
                hint="take all of them from the same model: another file can supply a component, "
                f"as {option('vae', 'FILE')} does",
            )
        found = self.lacking(self.absent) if strict else []
        if problems := [*self.problems, *found]:
            title = self.detection.require()[0].title
            raise Incomplete(
                f"{path}: the file is not a whole {title} checkpoint",
                problems=problems,
                hint="the file is damaged, pruned, or of a relative that is not supported yet; "
                "compare its SHA-256 with the one at its source",
            )
        if self.unclaimed and strict:
            raise Incomplete(
                f"{path}: no key map knows {len(self.unclaimed):,} of the keys",
                problems=[f"{key}: unknown" for key in self.unclaimed],
                hint=f"without {option('strict', True)} they are kept aside; the report lists them",
            )

    def _repr_html_(self) -> str:
        """Returns the summary that a notebook shows."""
        reports = importlib.import_module("ckptconv.reports.html")  # they build on this module
        return str(reports.fragment(self.detection, self))


def build_plan(
    detection: Detection,
    options: Options | None = None,
    *,
    donors: Mapping[str, Donor] | None = None,
) -> Plan:
    """Accounts for every key of a checkpoint.

    The donors are those that the options name. Of the options themselves, `dtype`, `ema`, `only`
    and `lora` count here.

    Raises:
        NotACheckpoint: no architecture matched.
        UsageError: a component that the architecture does not have, or `ema` without the UNet.
        Incomplete: `ema` is set and the file has no complete EMA copy.
        FileRefused: an adapter cannot be read or does not fit, or a donor lacks what it is to give.
    """
    architecture, _ = detection.require()
    header, donors, options = detection.header, donors or {}, options or Options()
    only, dtype = options.only, options.dtype
    wanted = frozenset(architecture.components) if only is None else only
    _check_names(architecture, wanted, donors)
    own = read_scales(header)
    theirs = {n: read_scales(d.headers[0]) for n, d in donors.items() if not d.config}
    every = (own, *theirs.values())
    scales = {weight: scale for each in every for weight, scale in each.by_weight.items()}
    problems = [problem for each in every for problem in each.problems]
    steps: dict[str, Step] = {}
    from_donors: list[Step] = []
    absent = []
    incomplete: dict[str, tuple[str, ...]] = {}
    unfit: dict[Path, list[str]] = {}
    keep = only is None
    for component in architecture.models:
        name = component.name
        match = best_match(architecture, component, own.header, component.sources)
        if donor := donors.get(name):
            headers = (theirs[name].header,) if name in theirs else donor.headers
            bare = replace(donor, headers=headers)
            donated = donor_match(architecture, component, bare)
            from_donors += donated.steps.values()
            if donated.problems:
                path, lines = donor.headers[0].path, list(donated.problems)
                if others := fitting_places(architecture, bare):
                    lines = [f"{name}: the file fits {option(next(iter(others)), str(path))}"]
                unfit.setdefault(path, []).extend(lines)
            steps |= {key: dropped(s.sources[0], "replaced") for key, s in match.steps.items()}
        elif not match.known:
            absent.append(name)
            if component is architecture.rooted and name in wanted:
                problems.append(f"{name}: none of its keys is in the file")
        elif name not in wanted:
            steps |= {key: dropped(s.sources[0], "left out") for key, s in match.steps.items()}
        elif match.missing and not match.problems and keep and component is not architecture.rooted:
            absent.append(name)
            incomplete[name] = match.missing
            for key, step in match.steps.items():
                steps[key] = dropped(step.sources[0], "incomplete", keep=True)
        else:
            steps |= match.steps
            problems += match.problems + match.missing
    if unfit:
        raise FileRefused(
            f"{', '.join(map(str, unfit))}: cannot give what it is to give",
            problems=[line for lines in unfit.values() for line in lines],
            hint="give a file or folder that holds this component of such a model whole",
        )
    supplied = (name for name, c in architecture.components.items() if not c.bundled)
    absent += [name for name in supplied if name not in donors]
    steps |= _rest(architecture, own.header, steps, keep=keep)
    steps |= own.steps
    if options.ema:
        if "unet" not in wanted:
            raise UsageError("the EMA copy is one of the UNet, and the UNet is not to be written")
        steps |= _from_ema(header, steps)
    unclaimed = [key for key in header.tensors if key not in steps]
    if unlike := unlike_twins(header):
        what = "in two spellings that differ, of which one has to go"
        problems.append(f"{what}: {_some(unlike)}")
    written = [c for c in architecture.models if c.name in wanted and c.name not in absent]
    inside = {
        component.name: [key for key in unclaimed if key.startswith(prefixes)]
        for component in written
        if (
            prefixes := tuple(
                s.prefix for s in component.sources if s.prefix or architecture.single
            )
        )
    }
    steps |= {key: dropped(header.tensors[key], "unknown", keep=keep) for key in unclaimed}
    ordered = [steps[key] for key in header.tensors] + from_donors
    notes = list(_oddities(architecture, unclaimed, inside, incomplete))
    network = network_of(architecture)
    if scales and dtype in (None, FP8):
        ordered = [cast_step(step, SCALED_DTYPE, network) for step in ordered]
        notes.append(
            f"the file holds {len(scales):,} weights in fp8 with a scale: the folder is "
            f"{SCALED_DTYPE}{' beside fp8' if dtype else ''}; {option('dtype')} decides otherwise"
        )
    ordered, quantized = unquantized(ordered, dtype, network)
    notes += quantized
    if dtype == FP8:
        if network not in wanted:
            what = f"{architecture.title} has no such network" if not network else "it is left out"
            raise UsageError(f"fp8 is for a UNet or transformer, and {what}")
        notes.append(kept_layers(targets_of(ordered)[network].values(), network))
    cast = [scaled(cast_step(step, dtype, network), scales, problems) for step in ordered]
    adapters = tuple(Adapter(open_header(file.path), file.scale) for file in options.lora)
    left_out = [c.name for c in architecture.models if c.name not in wanted]
    changed, passed_over = with_adapters(architecture, cast, adapters, left_out)
    plan = Plan(
        detection,
        changed,
        tuple(unclaimed),
        tuple(problems),
        tuple(name for name in absent if name in wanted),
        incomplete,
        donors,
        adapters,
        (*notes, *passed_over),
        tuple(identities(written, donors, targets_of(changed))),
    )
    return plan if problems else replace(plan, problems=plan.misfits)


def _check_names(
    architecture: Architecture, wanted: Iterable[str], donors: Mapping[str, Donor]
) -> None:
    known = list(architecture.components)
    if unknown := sorted(set(wanted) - set(known)):
        raise UsageError(
            f"{architecture.name} has no component {', '.join(unknown)}",
            hint=f"its components are {', '.join(known)}",
        )
    components = architecture.components.values()
    possible = [c.name for c in components if c.kind in ("model", "tokenizer")]
    if unknown := [name for name in donors if name not in possible or name not in wanted]:
        raise UsageError(
            f"{', '.join(unknown)} is given, but it is not a component to write",
            hint=f"the components of {architecture.name} that can be given are "
            f"{', '.join(possible)}",
        )


def _rest(
    architecture: Architecture, header: Header, steps: Mapping[str, Step], *, keep: bool
) -> dict[str, Step]:
    """Returns the steps for what belongs to no component: EMA copies and remains of training."""
    training = architecture.maps.keymap(TRAINING_MAP)
    rest = {}
    for key in header.tensors.keys() - steps.keys():
        if key in header.twins:
            rest[key] = dropped(header.tensors[key], f"the same as {header.twins[key]}", keep=keep)
        elif key.startswith(EMA_PREFIX):
            rest[key] = dropped(header.tensors[key], "training")
        elif match := training.match(key):
            rest[key] = dropped(header.tensors[key], match.reason, keep=keep)
    return rest


def _oddities(
    architecture: Architecture,
    unclaimed: Collection[str],
    inside: Mapping[str, Collection[str]],
    incomplete: Mapping[str, Collection[str]],
) -> Iterator[str]:
    """Yields what is odd about a file and does not stop its conversion."""
    for name, missing in incomplete.items():
        yield f"the {name} is incomplete, so it is left out: {_some(missing)}"
    for name, keys in inside.items():
        if keys:
            yield (
                f"a {architecture.title} {name} has no {_some(keys)}: kept aside; if the network "
                "computes with that, what is written computes something else"
            )
    within = {key for keys in inside.values() for key in keys}
    if others := [key for key in unclaimed if key not in within]:
        yield f"no key map knows {_some(others)}: kept aside"


def _some(lines: Collection[str]) -> str:
    """Names the first few of some lines, and how many there are."""
    more = len(lines) - SHOWN
    return ", ".join([*lines][:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _from_ema(header: Header, steps: Mapping[str, Step]) -> dict[str, Step]:
    """Returns the UNet's steps with the EMA copies as sources, and drops for its own weights."""
    turned: dict[str, Step] = {}
    problems = []
    for key, step in steps.items():
        if not key.startswith(EMA_OF) or step.op is DROP:
            continue
        names = [name + key.removeprefix(EMA_OF).replace(".", "") for name in EMA_NAMES]
        copy = next((name for name in names if name in header.tensors), names[0])
        tensor = header.tensors.get(copy)
        if not tensor:
            problems.append(f"{copy} is missing, the EMA copy of {key}")
        elif tensor.shape != step.sources[0].shape or copy in turned:
            problems.append(f"{copy} has shape {list(tensor.shape)}, unlike {key}")
        else:
            targets = tuple(replace(t, dtype=tensor.dtype) for t in step.targets)
            turned[copy] = replace(step, sources=(tensor,), targets=targets)
            turned[key] = dropped(step.sources[0], "replaced")
    if problems or not turned:
        raise Incomplete(
            f"{header.path}: the file has no complete EMA copy of the UNet",
            problems=problems,
            hint=f"leave out {option('ema')} to take the weights that it has",
        )
    return turned
