"""The way back: the original tensors that a diffusers folder gives, by the maps read right to left.

Where two originals give the same folder, a map cannot tell which it was. Then the header decides
that ckptconv keeps beside what it writes: the prefix of the keys, and whether the attention of the
VAE was stored as 1x1 convolutions. Without it, both are as in the published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..detection.detect import Keys, detect, judge
from ..detection.facts import Fact
from ..detection.spellings import respelled, unwrapped
from ..errors import NotACheckpoint
from ..folder.names import CONFIG_FILES, INDEX
from ..folder.read import ComponentFolder, ModelFolder
from ..maps.architecture import Architecture, Component, Source
from ..maps.ops import RENAME, Op
from ..options import Options
from ..planning.components import Donor
from ..planning.plan import Plan, build_plan
from ..planning.step import Step, Target
from ..reading.tensor import Header, Tensor

DERIVED = ".embeddings.position_ids"
"""0, 1, 2, ...: what old releases of transformers save and no release needs."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """The plan of the file that a folder would give, and the steps from the folder to that file.

    The problems are tensors that have no way back, and those that are missing for one. `names` are
    those of the source, by key, where it had others than the original ones.
    """

    plan: Plan
    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    names: Mapping[str, str]


def restore(model: ModelFolder, options: Options) -> Restoration:
    """Reads the maps right to left, for the architecture that fits the folder best.

    Of the options, `maps` and `only` count here.

    Raises:
        NotACheckpoint: the folder holds no weights of the network that tells architectures apart,
            or no architecture matches.
    """
    architectures = options.maps.architectures.values()
    known = dict.fromkeys(a.single or a.main for a in architectures if a.single == model.single)
    network = next((model.parts[name] for name in known if name in model.parts), None)
    if network is None or not network.tensors:
        names = " or ".join(known) or model.single
        why = network.problems if network else ()
        raise NotACheckpoint(
            f"{model.path}: which architecture this is cannot be told: it holds no {names}",
            problems=why or (f"there is no folder {names} with weights",),
            hint="give a whole folder; one component of it can be verified against its FILE",
        )
    candidates = [
        _candidate(architecture, model)
        for architecture in architectures
        if architecture.single == model.single
        and (architecture.single or architecture.main) in model.parts
    ]
    if not candidates:
        raise NotACheckpoint(
            f"{model.path}: no known architecture is a {model.single} alone",
            hint="`ckptconv architectures` lists what is known",
        )
    best = max(candidates, key=lambda each: each.fit)
    carried = {k: v for k, v in network.headers[0].metadata.items() if k != "format"}
    metadata = model.layout.metadata if model.layout else carried
    size = sum(tensor.nbytes for step in best.steps for tensor in step.sources)
    header = Header(model.path, best.tensors, metadata, 0, size)
    said = dict(model.record.facts) if model.record else {}
    pipeline = (model.index or {}).get("_class_name")
    for task in (t for a in architectures for t in a.tasks if t.facts and t.pipeline == pipeline):
        said |= {n: Fact(n, v[0], "folder", f"{INDEX} says so") for n, v in task.facts.items()}
    detection = detect(header, maps=options.maps, suggested=said)
    own = {  # the tokenizers that are in the folder alone
        name: Donor((), model.parts[name].folder / CONFIG_FILES["tokenizer"])
        for name, component in detection.require()[0].components.items()
        if not component.bundled and name in model.parts and name in (options.only or [name])
    }
    plan = build_plan(detection, Options(only=options.only, maps=options.maps), donors=own)
    return Restoration(plan, best.steps, best.problems, best.names)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """What a folder gives by the maps of one architecture, and how well that fits."""

    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    fit: tuple[bool, int, int, int]


def _candidate(architecture: Architecture, model: ModelFolder) -> _Candidate:
    layout = model.layout and respelled(unwrapped(model.layout, architecture.maps), architecture)
    noted = layout.tensors if layout else {}
    names = {key: tensor.name for key, tensor in noted.items()}
    keys = {name: key for key, name in names.items()}
    steps: dict[str, Step] = {}
    problems: list[str] = []
    for component in architecture.models:
        if component.name in model.parts:
            part = model.parts[component.name]
            found = [_steps(architecture, component, s, part, noted) for s in component.sources]
            best, wrong = max(
                found,
                key=lambda each: (
                    sum(key in noted for key in each[0]),
                    sum(len(step.sources) for step in each[0].values()),
                ),
            )
            steps |= best
            problems += wrong
    for name, tensor in model.aside.items():
        key = keys.get(name, name)
        target = Target("", key, tensor.dtype, tensor.shape)
        steps.setdefault(key, Step(RENAME, (tensor,), (target,)))
    tensors = {
        key: Tensor(model.path, key, target.dtype, target.shape, 0, 0)
        for key, step in steps.items()
        for target in step.targets
    }
    verdict = judge(architecture, Keys(tensors))
    remembered = sum(key in noted for key in steps)
    fit = (verdict.matches, remembered, len(steps), -len(verdict.failing))
    return _Candidate(tuple(steps.values()), tuple(problems), tensors, names, fit)


def _steps(
    architecture: Architecture,
    component: Component,
    source: Source,
    part: ComponentFolder,
    noted: Mapping[str, Tensor],
) -> tuple[dict[str, Step], list[str]]:
    """Goes back from a component's folder to the keys of one of its sources.

    Returns the steps by original key, and what is wrong, as sentences.
    """
    start = source.prefix
    under = (key.removeprefix(start) for key in noted if key.startswith(start))
    keymap = architecture.maps.keymap(source.keymap)
    keymap = keymap.bound(under) if noted else keymap.bound_by_targets(part.tensors)
    groups: dict[str, tuple[Op, dict[int, Tensor]]] = {}
    steps: dict[str, Step] = {}
    problems = []
    for key, tensor in part.tensors.items():
        if origin := keymap.origin(key):
            groups.setdefault(origin.source, (origin.op, {}))[1][origin.part] = tensor
        elif not (key.endswith(DERIVED) or key in component.identity):
            problems.append(f"{component.name}: {tensor.name}: no map knows this key")
    for name, (op, parts) in groups.items():
        key, match = source.prefix + name, keymap.match(name)
        tensors = tuple(parts[n] for n in sorted(parts))
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
        steps[key] = Step(op, tensors, (Target("", key, dtypes[0], shape),))
    return steps, problems
