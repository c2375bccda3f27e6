"""What a pipeline is made of, read from a checkpoint or a diffusers folder before any weight is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

from ..configs.allowed import Unbuildable, kept, notes_on_code, own_name, require_class, roles
from ..configs.config import model_index
from ..conversion.convert import configured, option_for, plan_file
from ..detection.facts import Fact
from ..dtypes import BLOCKS, CASTS, COMPUTED, FLOATS, FP8
from ..errors import FileRefused, Incomplete, UsageError, option
from ..files import looking_into, read_config
from ..folder.names import CONFIG_FILES, INDEX, RECORD
from ..folder.record import read_record
from ..folder.weights import component_headers
from ..maps.architecture import Architecture
from ..maps.ops import RENAME
from ..options import Options
from ..planning.plan import Plan
from ..planning.step import ASIDE, Step, Target
from ..planning.zeros import require_filled
from ..reading.tensor import Tensor

EXACT_IN_FP16 = {"F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Dtypes whose every value is a value of float16."""

DECIDING = "transformer"
"""The component whose dtype all weights are loaded in. Of a file of 17 GB that holds it in fp8, and
some norms or the VAE in fp32, nobody wants 48 GB; and bf16 has the range of fp32."""

FOR_FOLDERS = ("dtype", "ignore_zeros", "maps")
"""The options that make sense for a diffusers folder."""

ABSENT = [None, None]
"""What `model_index.json` says of a component that is not there."""
VERIFY = "`ckptconv verify` shows what is wrong with a folder"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What one component is built from.

    Attributes:
        library: `diffusers`, `transformers`, or a package of `diffusers.pipelines`.
        name: of its class.
        kind: as in `ckptconv.maps.architecture.Component`.
        config: the content of its configuration file.
        folder: of a component in the diffusers layout, which its library can load, too.
    """

    library: str
    name: str
    kind: str
    config: Mapping[str, Any]
    folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a pipeline is made of.

    Attributes:
        path: the checkpoint, or the folder.
        index: the content of `model_index.json`.
        blueprints: of the components to build, by name.
        steps: bring the tensors from their files to the components.
        dtype: of the weights: a key of `COMPUTED`.
        notes: what the user should know.
        identities: identity matrices that components get besides.
        facts: what was decided of the file, also of that which a folder was converted from.
    """

    path: Path
    index: Mapping[str, Any]
    blueprints: Mapping[str, Blueprint]
    steps: tuple[Step, ...]
    dtype: str
    notes: tuple[str, ...] = ()
    identities: tuple[Target, ...] = ()
    facts: Mapping[str, Fact] = field(default_factory=dict)

    def entry(self, place: str) -> Any:
        """Returns an entry of a configuration, by COMPONENT/ENTRY."""
        component, _, name = place.partition("/")
        blueprint = self.blueprints.get(component)
        return blueprint.config.get(name) if blueprint else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline is made with beside the components that are built, which are None."""
        named = {name: value for name, value in self.index.items() if not name.startswith("_")}
        return {n: None if isinstance(v, list) else v for n, v in named.items()}


def open_model(
    path: str | Path,
    options: Options,
    *,
    given: Collection[str] = (),
) -> Model:
    """Reads what a pipeline is made of, all but the weights.

    Args:
        path: a checkpoint, or a folder with `model_index.json`.
        options: that decide what is read; a folder takes those of `FOR_FOLDERS` only.
        given: names of components that are not needed from it.

    Raises:
        FileRefused: the file, the folder, a donor or the original configuration cannot be used.
        UsageError: the options contradict each other or the file.
    """
    path = Path(path)
    if options.dtype == FP8:
        raise UsageError(
            "no layer computes in fp8", hint=f"{option('storage', FP8)} keeps weights in it"
        )
    with looking_into(path):
        read = _from_folder if is_pipeline_folder(path, options) else _from_file
        model = read(path, options, given)
    if not options.ignore_zeros:
        require_filled(path, model.steps)
    return model


def is_pipeline_folder(path: Path, options: Options) -> bool:
    """Whether `open_model` reads a path as a diffusers folder, not as files to put together."""
    return path.is_dir() and not options.assemble


def _from_file(path: Path, options: Options, given: Collection[str]) -> Model:
    """Plans the conversion of a checkpoint."""
    made, original = plan_file(path, options, without=given)
    path = made.detection.header.path  # with `assemble`, of the folder's main file
    _refuse_single(path, made.detection.require()[0])
    if made.absent:
        supplies = ", ".join(option_for(made, name) for name in made.absent)
        raise Incomplete(
            f"{path}: the file has no {' and no '.join(made.absent)}, which its pipeline needs",
            problems=made.lacking(made.absent),
            hint=f"supply what is missing: {supplies}; or, in Python, load_pipeline(..., "
            f"components={{{made.absent[0]!r}: None}}) leaves it out",
        )
    donors = {name for name, donor in made.donors.items() if donor.config}
    changed = {step.targets[0].component for step in made.steps if step.changes}
    if lost := ", ".join(sorted(donors & changed)):
        raise UsageError(
            f"an adapter changes {lost}, which comes from a diffusers folder",
            hint=f"convert the file with {option('lora')}, and load the folder that comes out",
        )
    stored, dtype = _dtypes(made), options.dtype or loading_dtype(made)
    if {d for each in stored.values() for d in each} != {CASTS[dtype]}:
        log.info("%s: the weights become %s", path, dtype)
        made = made.cast(dtype)
    made.require_complete()
    built, notes = configured(made, original)
    index = model_index(made, built)
    blueprints = {}
    for name, config in built.items():
        if name not in given and (options.only is None or name in options.only):
            donor, (library, cls) = made.donors.get(name), index[name]
            folder = donor.config.parent if donor and donor.config else None
            blueprints[name] = Blueprint(library, cls, config.component.kind, config.values, folder)
    notes += [] if options.dtype else _loading_note(stored, dtype, _deciding(made))
    if made.assembly:
        notes.insert(0, f"put together from {'; '.join(made.assembly.lines)}")
    said = (*made.notes, *notes)
    facts = made.detection.facts
    return Model(path, index, blueprints, made.steps, dtype, said, made.identities, facts)


def _refuse_single(path: Path, architecture: Architecture) -> None:
    if architecture.single:
        raise FileRefused(
            f"{path}: is no pipeline: it holds a {architecture.single.replace('_', ' ')} alone",
            hint="give the checkpoint that it belongs to; `ckptconv convert` makes a folder of it, "
            "which load_pipeline(..., components=) can take in",
        )


def loading_dtype(made: Plan) -> str:
    """Returns the dtype, a key of `COMPUTED`, that a plan's weights are loaded in by default."""
    return _one_dtype(_dtypes(made), _deciding(made))


def _deciding(made: Plan) -> str:
    """Returns the component that decides in which dtype all weights are loaded, if it is there."""
    blocks = (step.targets for step in made.steps if step.sources[0].dtype in BLOCKS)
    names = {target.component for targets in blocks for target in targets}
    return "unet" if "unet" in names else DECIDING


def _dtypes(made: Plan) -> dict[str, Counter[str]]:
    """Returns, by component, the float dtypes of its tensors and the elements of each."""
    models = {component.name for component in made.detection.require()[0].models}
    targets = (target for step in made.steps for target in step.targets)
    return _counted((t.component, t) for t in targets if t.component in models)


def _counted(tensors: Iterable[tuple[str, Target | Tensor]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for component, tensor in tensors:
        if tensor.dtype in FLOATS:
            found.setdefault(component, Counter())[tensor.dtype] += prod(tensor.shape)
    return found


def _one_dtype(stored: Mapping[str, Counter[str]], deciding: str = DECIDING) -> str:
    """Returns the one dtype that weights are loaded in; fp32 if there are none.

    A pipeline computes in one dtype: no layer takes the output of a layer of another, and in fp8
    there are no layers at all. A transformer, or a quantized UNet, decides for all; elsewhere, no
    value may change.
    """
    names = {dtype: name for name, dtype in COMPUTED.items()}
    every = {dtype for each in stored.values() for dtype in each}
    if len(every) == 1 and (name := names.get(*every)):
        return name
    if own := stored.get(deciding):
        return names.get(own.most_common(1)[0][0], "bf16")
    wide = every - {CASTS[FP8]}  # every value of which is one of fp16 and of bf16
    if len(wide) == 1 and (name := names.get(*wide)):
        return name
    return "fp16" if every and every <= EXACT_IN_FP16 else "fp32"


def _loading_note(
    stored: Mapping[str, Counter[str]], dtype: str, deciding: str = DECIDING
) -> list[str]:
    """Returns a sentence on weights that are loaded in another dtype because one part decides."""
    others = {d for each in stored.values() for d in each} - {CASTS[dtype]}
    if deciding not in stored or not others:
        return []
    return [
        f"the {deciding} decides that all weights are loaded as {dtype}, those in "
        f"{', '.join(sorted(others))} too; {option('dtype')} decides otherwise"
    ]


def _from_folder(path: Path, options: Options, given: Collection[str]) -> Model:
    """Reads the configurations and the headers of a diffusers folder."""
    default = Options()
    names = [field.name for field in fields(Options) if field.name not in FOR_FOLDERS]
    if unfit := sorted(n for n in names if getattr(options, n) != getattr(default, n)):
        raise UsageError(
            f"{', '.join(unfit)}: for a checkpoint only, and {path} is a folder",
            hint="its configuration files say it all: edit them, or convert the checkpoint anew",
        )
    if not (path / INDEX).is_file():
        raise FileRefused(
            f"{path}: holds no {INDEX}", hint="give a checkpoint, or a whole diffusers folder"
        )
    index, known = read_config(path / INDEX), roles(options.maps)
    entries = {
        name: entry
        for name, entry in index.items()
        if name in known and name not in given and entry not in (None, ABSENT)
    }
    if missing := [name for name in entries if not (path / name).is_dir()]:
        raise FileRefused(
            f"{path}: diffusers cannot load the folder: it has no {', '.join(missing)}",
            hint=f"copy the folder again from its source, or correct {INDEX}",
        )
    blueprints: dict[str, Blueprint] = {}
    tensors: dict[tuple[str, str], Tensor] = {}
    notes: list[str] = []
    for name in entries:
        role, file = known[name], path / name / CONFIG_FILES[known[name].kind]
        library, cls = require_class(path / INDEX, name, role, index)
        values = read_config(file)
        notes += notes_on_code(file, values)
        try:
            config = kept(library, cls, values)
            config |= own_name(library, cls) if role.kind in ("model", "scheduler") else {}
        except Unbuildable as error:
            raise FileRefused(f"{file}: {error}", hint=VERIFY) from error
        blueprints[name] = Blueprint(library, cls, role.kind, config, file.parent)
        for header in component_headers(file.parent) if role.kind == "model" else ():
            tensors |= {(name, key): tensor for key, tensor in header.tensors.items()}
    # What else the index names is given to nobody; a pipeline that needs it says so.
    index = {
        name: value
        for name, value in index.items()
        if name in entries or value == ABSENT or not isinstance(value, list | dict)
    }
    stored = _counted((name, tensor) for (name, _), tensor in tensors.items())
    dtype = options.dtype or _one_dtype(stored)
    notes += [] if options.dtype else _loading_note(stored, dtype)
    steps = []
    for place, tensor in tensors.items():
        stored_as = CASTS[dtype] if tensor.dtype in FLOATS else tensor.dtype
        steps.append(Step(RENAME, (tensor,), (Target(*place, stored_as, tensor.shape),)))
    try:
        facts = read_record(path / ASIDE / RECORD).facts
    except FileRefused:  # it is absent or damaged; facts only decide defaults
        facts = {}
    return Model(path, index, blueprints, tuple(steps), dtype, tuple(notes), facts=facts)
