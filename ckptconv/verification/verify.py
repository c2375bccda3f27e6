"""Proves that a folder is a file converted, without trusting whoever converted it.

Three witnesses are heard: the plan, which says what becomes of every key of the file; the real
classes of diffusers and transformers, which say what they expect; and the bytes of both sides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ..configs.config import Config, class_of, model_index
from ..configs.original_config import OriginalConfig
from ..conversion.convert import configured, plan_file
from ..conversion.restore import recorded_facts, restore
from ..conversion.write import Report
from ..detection.spellings import EMA_OF
from ..errors import FileRefused, MapError, option
from ..folder.names import LAYOUT, RECORD
from ..folder.read import ComponentFolder, ModelFolder, read_folder
from ..maps.architecture import KeyMaps
from ..options import Choices, Options, checked
from ..planning.plan import Plan, build_plan
from ..planning.step import ASIDE
from .checks.config import check_config, check_index, class_said, same
from .checks.data import Bytes, check_data, check_finite
from .checks.tokenizer import check_tokenizer
from .checks.weights import check_weights
from .result import Check, Problem, Verification


@checked
def verify(
    path: str | Path | None,
    folder: str | Path,
    *,
    finite: bool = False,
    ignore_unclaimed: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Verification:
    """Verifies a diffusers folder, whichever program made it.

    What `ckptconv/source.json` in the folder notes of the conversion need not be repeated.

    Args:
        path: the checkpoint that it should come from; None to verify the folder alone.
        folder: the folder.
        finite: look for NaN and infinities as well.
        ignore_unclaimed: keys that no map knows are no problem.
        progress: is called with bytes read and bytes in all, from one thread at a time.
        **choices: see `Options`.

    Raises:
        FileRefused: the file is not a checkpoint of a known architecture, or the folder holds no
            component.
        UsageError: the choices contradict each other or the file.
    """
    started = time.monotonic()
    options = Options.of(choices)
    found = read_folder(folder, options.maps)
    if path is None:
        return _verified(found, None, options, finite, False, progress, started)
    options, notes = _with_record(options, found.record)
    planned = plan_file(path, options)
    source = _Source(Path(path), *planned, notes)
    return _verified(found, source, options, finite, ignore_unclaimed, progress, started)


def verify_report(
    report: Report,
    path: str | Path,
    options: Options,
    *,
    ignore_unclaimed: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Verifies what a conversion has just written, by the plan that it ran."""
    source = _Source(Path(path), report.plan, report.original, [])
    found, started = read_folder(report.out, options.maps), time.monotonic()
    return _verified(found, source, options, False, ignore_unclaimed, progress, started)


@dataclass(frozen=True, slots=True)
class _Source:
    """The checkpoint that a folder is compared with."""

    path: Path
    plan: Plan
    original: OriginalConfig | None
    notes: list[str]


def _verified(
    folder: ModelFolder,
    source: _Source | None,
    options: Options,
    finite: bool,
    ignore_unclaimed: bool,
    progress: Callable[[int, int], None],
    started: float,
) -> Verification:
    checks: list[Check] = []
    only = options.only
    if source:
        plan: Plan | None = source.plan
        checks.append(_check_source(source.plan, source.notes, ignore_unclaimed=ignore_unclaimed))
    else:
        plan = _plan_of_folder(folder, options, checks)
    built = _built(plan, source.original if source else None, checks) if plan else {}
    built = {name: config for name, config in built.items() if only is None or name in only}
    read = Bytes.of(folder, source.plan if source else None, finite=finite)
    with ThreadPoolExecutor(1) as pool:  # the bytes are read while torch is being imported
        running = pool.submit(read.run, progress)
        try:
            if plan and only is None and not folder.single:
                index = model_index(plan, built) | _own_schedulers(folder, built)
                checks.append(check_index(index, folder.index, folder.parts.keys()))
            checks += _check_components(folder, plan, built, options)
            running.result()
        except BaseException:
            read.cancelled = True
            raise
    if source:
        cast = options.dtype is not None
        for name, config in built.items():
            if config.component.kind == "model" and name in folder.parts:
                checks.append(check_data(name, folder.parts[name], source.plan, read, cast=cast))
    if folder.record or folder.layout or folder.aside or folder.problems:
        noted = _record_problems(folder, source.plan, read) if source else []
        noted += _changed(folder, built)
        unread = [Problem(ASIDE, text) for text in folder.problems]
        extent = f"{len(folder.aside)} tensors kept aside"
        checks.append(Check("model", "record", (*unread, *noted), (), extent))
    if finite:
        checks += check_finite(read)
    architecture, task = plan.detection.require() if plan else (None, None)
    order = list(dict.fromkeys(["model", *built, *(check.component for check in checks)]))
    return Verification(
        folder.path,
        source.path if source else None,
        architecture.name if architecture else "",
        task.name if task else "",
        tuple(sorted(checks, key=lambda check: order.index(check.component))),
        read.nbytes,
        time.monotonic() - started,
        source.plan if source else None,
    )


def _own_schedulers(folder: ModelFolder, built: Mapping[str, Config]) -> dict[str, list[str]]:
    """Returns what the index should say of schedulers: which one steps is the folder's choice."""
    return {
        name: [config.component.home, str(class_said(folder.parts[name].config or {}))]
        for name, config in built.items()
        if config.component.kind == "scheduler" and name in folder.parts
    }


def _plan_of_folder(folder: ModelFolder, options: Options, checks: list[Check]) -> Plan | None:
    """Returns the plan of the file that the folder would become; None if it is no known model."""
    try:
        way = restore(folder, options.maps)
        architecture, task = way.detection.require()
    except FileRefused as error:
        problems = [Problem(folder.path.name, text) for text in (error.message, *error.problems)]
        checks.append(Check("model", "architecture", tuple(problems)))
        return None
    plan = build_plan(way.detection, Options(only=options.only, maps=options.maps))
    wrong = [Problem("the original layout", text) for text in (*way.problems, *plan.problems)]
    notes = (*way.detection.notes, *(f"the folder has no {name}" for name in plan.absent))
    extent = f"{architecture.title}, {task.name}"
    checks.append(Check("model", "architecture", tuple(wrong), notes, extent))
    return plan


def _with_record(options: Options, record: Mapping[str, Any]) -> tuple[Options, list[str]]:
    """Adds what the folder notes of its conversion to the options, and says what was added."""
    notes = []
    added: dict[str, Any] = {}
    replaced = [key for key, why in _table(record.get("dropped")).items() if why == "replaced"]
    if any(key.startswith(EMA_OF) for key in replaced) and not options.ema:
        added["ema"] = True
        notes.append(f"{RECORD} says that the EMA copy of the UNet was taken")
    for name, fact in recorded_facts(record).items():
        if fact.source in ("option", "original config") and name not in options.facts:
            added[name] = fact.value
            notes.append(f"{RECORD} says that {name} was set to {fact.value} ({fact.source})")
    for name, file in _table(record.get("donors")).items():
        if name not in options.donors:
            notes.append(
                f"{RECORD} says that {name} comes from {file}: give it with {option(name)}"
            )
    mine = [{"name": file.path.name, "scale": file.scale} for file in options.lora]
    noted = record.get("adapters")
    if noted != mine and isinstance(noted, list) and noted:
        merged = ", ".join(f"{_table(a).get('name')}:{_table(a).get('scale')}" for a in noted)
        notes.append(f"{RECORD} says that {merged} was added: give it with {option('lora')}")
    return replace(options, **added), notes


def _check_source(made: Plan, notes: list[str], *, ignore_unclaimed: bool) -> Check:
    """Tells whether every key of the file is accounted for."""
    problems = [Problem("the file", text) for text in made.problems]
    unclaimed = [Problem(key, "no key map knows it") for key in made.unclaimed]
    if ignore_unclaimed and unclaimed:
        notes.append(f"{len(unclaimed):,} unknown keys are ignored, such as {unclaimed[0].where}")
        unclaimed = []
    dropped = Counter(step.reason for step in made.steps if step.reason)
    notes += [f"tensors that are not converted ({why}): {n:,}" for why, n in dropped.items()]
    notes += [f"the file has no {name}" for name in made.absent]
    extent = f"{len(made.detection.header.tensors):,} keys"
    found = (*made.detection.notes, *notes)
    return Check("model", "source", (*problems, *unclaimed), found, extent)


def _built(made: Plan, original: OriginalConfig | None, checks: list[Check]) -> dict[str, Config]:
    """Returns the configurations as they should be; none if they cannot be measured."""
    try:
        return configured(made, original)[0]
    except (MapError, FileRefused) as error:
        problem = Problem("the configurations", f"cannot be worked out: {error.message}")
        checks.append(Check("model", "config", (problem,)))
        return {}


def _check_components(
    folder: ModelFolder, made: Plan | None, built: Mapping[str, Config], options: Options
) -> Iterator[Check]:
    """Yields the checks that need no source, component by component."""
    for name, config in built.items():
        component, part = config.component, folder.parts.get(name)
        if part is None:
            yield Check(name, "config", (Problem(name, "the folder is missing"),))
        elif component.kind == "tokenizer":
            yield check_tokenizer(config, part, ours=bool(folder.record))
        else:
            yield check_config(config, part, ours=bool(folder.record))
            if component.kind == "model":
                yield check_weights(name, part, component.home, class_of(config))
    for name, part in folder.parts.items():
        if name not in built and options.only is None and (part.tensors or part.problems):
            yield from _check_unexpected(name, part, made if built else None, options.maps)


def _check_unexpected(
    name: str, part: ComponentFolder, made: Plan | None, maps: KeyMaps
) -> Iterator[Check]:
    """Yields the check of a model that the plan, if there is one, does not give."""
    said = class_said(part.config or {})
    if made:
        architecture, _ = made.detection.require()
        what = f"a {architecture.title} model has no such component"
        if name in architecture.components:
            what = f"the file has none: say with {option(name)} where it comes from"
        yield Check(name, "data", (Problem(name, what),))
    elif isinstance(said, str) and (home := maps.model_classes.get(said)):
        yield check_weights(name, part, home, said)


def _record_problems(folder: ModelFolder, made: Plan, read: Bytes) -> list[Problem]:
    """Compares what ckptconv left beside the components with the file."""
    problems = []
    header = made.detection.header
    if folder.layout:
        noted = {key: (info.dtype, info.shape) for key, info in folder.layout.tensors.items()}
        actual = {t.name: (t.dtype, t.shape) for t in header.tensors.values()}
        for key in dict.fromkeys([*actual, *noted]):
            if noted.get(key) != actual.get(key):
                found, want = _tensor(noted.get(key)), _tensor(actual.get(key))
                problems.append(Problem(key, f"is {found} in {LAYOUT}, {want} in the file"))
        if folder.layout.metadata != header.metadata:
            problems.append(Problem("__metadata__", f"{LAYOUT} has others than the file"))
    architecture = made.detection.require()[0].name
    if folder.record and folder.record.get("architecture") != architecture:
        what = f"is {folder.record.get('architecture')!r} in {RECORD}, expected {architecture!r}"
        problems.append(Problem("architecture", what))
    if folder.aside:
        problems += check_data(ASIDE, None, made, read, cast=True).problems
    return problems


def _changed(folder: ModelFolder, built: Mapping[str, Config]) -> Iterator[Problem]:
    """Yields assumed values that somebody changed since: no other check knows them to be wrong."""
    for name, assumed in _table(folder.record.get("assumed")).items():
        component, _, entry = name.partition(".")
        config, part = built.get(component), folder.parts.get(component)
        if not config or not part or not part.config or config.origins.get(entry) != "assumed":
            continue
        if not same(part.config.get(entry), assumed):
            what = (
                f"of {component} is {part.config.get(entry)!r}, {assumed!r} was assumed ({RECORD})"
            )
            yield Problem(entry, what)


def _tensor(info: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{info[0]} {list(info[1])}" if info else "missing"


def _table(value: object) -> Mapping[str, Any]:
    """Returns what a JSON file should hold as an object; nothing if it is something else."""
    return value if isinstance(value, Mapping) else {}
