"""Proves that a folder is a file converted, without trusting whoever converted it.

Three witnesses are heard: the plan, which says what becomes of every key of the file; the real
classes of diffusers and transformers, which say what they expect; and the bytes of both sides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

from ..configs.config import Config, class_of, model_index
from ..configs.original_config import OriginalConfig, read_original_config
from ..conversion.convert import Choices, configured, plan
from ..conversion.restore import backwards, recorded_facts
from ..detection.spellings import EMA_OF
from ..errors import FileRefused, MapError
from ..folder.names import LAYOUT, RECORD
from ..folder.read import Part, Saved, read_saved
from ..maps.architecture import KeyMaps, bundled
from ..planning.adapters import read_adapter
from ..planning.plan import ASIDE, Plan, build_plan
from ..reading.view import stored
from .checks.config import check_config, check_index, class_said, same
from .checks.data import Bytes, check_data, check_finite
from .checks.tokenizer import check_tokenizer
from .checks.weights import check_weights
from .result import Check, Problem, Verification

__all__ = ["verify"]


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

    Args:
        path: the checkpoint that it should come from; None to verify the folder alone.
        folder: the folder.
        finite: look for NaN and infinities as well.
        ignore_unclaimed: keys that no map knows are no problem.
        progress: is called with bytes read and bytes in all, from one thread at a time.
        **choices: what the conversion was told (see `Choices`); what `ckptconv/source.json` notes
            of them need not be repeated.

    Raises:
        FileRefused: the file is not a checkpoint of a known architecture, or the folder holds no
            component.
        UsageError: the choices contradict each other or the file.
    """
    started = time.monotonic()
    maps = choices.get("maps") or bundled()
    if (only := choices.get("only")) is not None:
        only = choices["only"] = frozenset(only)
    saved = read_saved(folder, maps)
    checks: list[Check] = []
    original = None
    if path is None:
        made = _plan_of_folder(saved, choices, checks)
    else:
        notes = _take_record(choices, saved.record)
        made = plan(path, **choices)
        checks.append(_check_source(made, notes, ignore_unclaimed=ignore_unclaimed))
        if yaml := choices.get("original_config"):
            original = read_original_config(Path(yaml), maps)
    built = _built(made, original, checks) if made else {}
    if only is not None:
        built = {name: config for name, config in built.items() if name in only}
    read = Bytes.of(saved, made if path is not None else None, finite=finite)
    with ThreadPoolExecutor(1) as pool:  # the bytes are read while torch is being imported
        running = pool.submit(read.run, progress)
        try:
            if made and only is None and not saved.single:
                index = model_index(made, built) | _own_schedulers(saved, built)
                checks.append(check_index(index, saved.index, saved.parts.keys()))
            checks += _check_components(saved, made, built, only, maps)
            running.result()
        except BaseException:
            read.cancelled = True
            raise
    if path is not None and made:
        cast = choices.get("dtype") is not None
        for name, config in built.items():
            if config.component.kind == "model" and name in saved.parts:
                checks.append(check_data(name, saved.parts[name], made, read, cast=cast))
    if saved.record or saved.layout or saved.aside or saved.problems:
        noted = _record_problems(saved, made, read) if path is not None and made else []
        noted += _changed(saved, built)
        unread = [Problem(ASIDE, text) for text in saved.problems]
        extent = f"{len(saved.aside)} tensors kept aside"
        checks.append(Check("model", "record", (*unread, *noted), (), extent))
    if finite:
        checks += check_finite(read)
    detection = made.detection if made else None
    order = list(dict.fromkeys(["model", *built, *(check.component for check in checks)]))
    return Verification(
        Path(folder),
        None if path is None else Path(path),
        detection.architecture.name if detection and detection.architecture else "",
        detection.task.name if detection and detection.task else "",
        tuple(sorted(checks, key=lambda check: order.index(check.component))),
        read.nbytes,
        time.monotonic() - started,
    )


def _own_schedulers(saved: Saved, built: Mapping[str, Config]) -> dict[str, list[str]]:
    """Returns what the index should say of schedulers: which one steps is the folder's choice."""
    return {
        name: [config.component.home, str(class_said(saved.parts[name].config or {}))]
        for name, config in built.items()
        if config.component.kind == "scheduler" and name in saved.parts
    }


def _plan_of_folder(saved: Saved, choices: Choices, checks: list[Check]) -> Plan | None:
    """Returns the plan of the file that the folder would become; None if it is no known model."""
    try:
        way = backwards(saved, choices.get("maps") or bundled())
        architecture, task = way.detection.require()
    except FileRefused as error:
        problems = [Problem(saved.path.name, text) for text in (error.message, *error.problems)]
        checks.append(Check("model", "architecture", tuple(problems)))
        return None
    made = build_plan(way.detection, only=choices.get("only"))
    wrong = [Problem("the original layout", text) for text in (*way.problems, *made.problems)]
    notes = (*way.detection.notes, *(f"the folder has no {name}" for name in made.absent))
    extent = f"{architecture.title}, {task.name}"
    checks.append(Check("model", "architecture", tuple(wrong), notes, extent))
    return made


def _take_record(choices: Choices, record: Mapping[str, Any]) -> list[str]:
    """Adds to the choices what the folder notes of its conversion, and says what was added."""
    notes = []
    replaced = [key for key, why in _table(record.get("dropped")).items() if why == "replaced"]
    if any(key.startswith(EMA_OF) for key in replaced) and not choices.get("ema"):
        choices["ema"] = True
        notes.append(f"{RECORD} says that the EMA copy of the UNet was taken")
    for name, fact in recorded_facts(record).items():
        if fact.source in ("option", "original config") and choices.get(name) is None:
            choices[name] = fact.value  # type: ignore[literal-required]
            notes.append(f"{RECORD} says that {name} was set to {fact.value} ({fact.source})")
    for name, file in _table(record.get("donors")).items():
        if not choices.get(name):
            option = f"--{name.replace('_', '-')}"
            notes.append(f"{RECORD} says that {name} comes from {file}: give it with {option}")
    given = [read_adapter(text) for text in choices.get("lora") or ()]
    mine = [{"name": a.header.path.name, "scale": a.scale} for a in given]
    noted = record.get("adapters")
    if noted != mine and isinstance(noted, list) and noted:
        merged = ", ".join(f"{_table(a).get('name')}:{_table(a).get('scale')}" for a in noted)
        notes.append(f"{RECORD} says that {merged} was added: give it with --lora")
    return notes


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
    saved: Saved,
    made: Plan | None,
    built: Mapping[str, Config],
    only: Collection[str] | None,
    maps: KeyMaps,
) -> Iterator[Check]:
    """Yields the checks that need no source, component by component."""
    for name, config in built.items():
        component, part = config.component, saved.parts.get(name)
        if part is None:
            yield Check(name, "config", (Problem(name, "the folder is missing"),))
        elif component.kind == "tokenizer":
            yield check_tokenizer(config, part, ours=bool(saved.record))
        else:
            yield check_config(config, part, ours=bool(saved.record))
            if component.kind == "model":
                yield check_weights(name, part, component.home, class_of(config), saved.headers)
    for name, part in saved.parts.items():
        if name not in built and only is None and (part.tensors or part.problems):
            yield from _check_unexpected(name, part, saved, made if built else None, maps)


def _check_unexpected(
    name: str, part: Part, saved: Saved, made: Plan | None, maps: KeyMaps
) -> Iterator[Check]:
    """Yields the check of a model that the plan, if there is one, does not give."""
    said = class_said(part.config or {})
    if made:
        architecture, _ = made.detection.require()
        what = f"a {architecture.title} model has no such component"
        if name in architecture.components:
            option = f"--{name.replace('_', '-')}"
            what = f"the file has none: say with {option} where it comes from"
        yield Check(name, "data", (Problem(name, what),))
    elif isinstance(said, str) and (home := maps.model_classes.get(said)):
        yield check_weights(name, part, home, said, saved.headers)


def _record_problems(saved: Saved, made: Plan, read: Bytes) -> list[Problem]:
    """Compares what ckptconv left beside the components with the file."""
    problems = []
    header = made.detection.header
    if saved.layout:
        noted = {key: (info.dtype, info.shape) for key, info in saved.layout.tensors.items()}
        actual = {key: (info.dtype, info.shape) for key, info in stored(header).items()}
        for key in dict.fromkeys([*actual, *noted]):
            if noted.get(key) != actual.get(key):
                found, want = _tensor(noted.get(key)), _tensor(actual.get(key))
                problems.append(Problem(key, f"is {found} in {LAYOUT}, {want} in the file"))
        if saved.layout.metadata != header.metadata:
            problems.append(Problem("__metadata__", f"{LAYOUT} has others than the file"))
    architecture = made.detection.require()[0].name
    if saved.record and saved.record.get("architecture") != architecture:
        what = f"is {saved.record.get('architecture')!r} in {RECORD}, expected {architecture!r}"
        problems.append(Problem("architecture", what))
    if saved.aside:
        problems += check_data(ASIDE, None, made, read, cast=True).problems
    return problems


def _changed(saved: Saved, built: Mapping[str, Config]) -> Iterator[Problem]:
    """Yields assumed values that somebody changed since: no other check knows them to be wrong."""
    for name, assumed in _table(saved.record.get("assumed")).items():
        component, _, entry = name.partition(".")
        config, part = built.get(component), saved.parts.get(component)
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
