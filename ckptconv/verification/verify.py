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
from typing import Unpack

from ..configs.config import Config, class_of, class_said, model_index
from ..configs.original_config import OriginalConfig
from ..conversion.convert import configured, plan_file
from ..conversion.restore import restore
from ..conversion.write import Report
from ..detection.detect import option_fact
from ..detection.facts import Fact
from ..detection.spellings import EMA_OF
from ..errors import FileRefused, MapError, option
from ..folder.names import LAYOUT, RECORD
from ..folder.read import ModelFolder, read_folder
from ..folder.record import Record
from ..maps.architecture import KeyMaps
from ..options import TOKENIZERS, Choices, Options, checked
from ..planning.plan import Plan
from ..planning.step import ASIDE
from ..planning.zeros import zero_weights
from .checks.code import check_code
from .checks.config import check_config, check_index, same
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
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    **choices: Unpack[Choices],
) -> Verification:
    """Verifies a diffusers folder, whichever program made it.

    What `ckptconv/source.json` in the folder notes of the conversion need not be repeated.

    Args:
        path: the checkpoint that it should come from; None to verify the folder alone.
        folder: the folder.
        finite: look for NaN and infinities as well.
        strict: keys that no map knows and incomplete components of the file are problems.
        progress: is called with bytes read and bytes in all, from one thread at a time.
        **choices: see `Options`.

    Raises:
        FileRefused: the file is not a checkpoint of a known architecture, or the folder holds no
            component.
        UsageError: the choices contradict each other or the file.
    """
    started = time.monotonic()
    options = Options.of(choices)
    model = read_folder(folder, options.maps)
    if path is None:
        expected = _of_folder(model, options)
    else:
        options, suggested, notes = _with_record(options, model.record)
        plan, original = plan_file(path, options, suggested=suggested)
        check = _check_source(plan, notes, strict=strict)
        expected = _configured(plan, original, [check], Path(path))
    return _verified(model, expected, options, finite, progress, started)


def verify_report(
    report: Report,
    path: str | Path,
    options: Options,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verification:
    """Verifies what a conversion has just written, by the plan that it ran."""
    started = time.monotonic()
    check = _check_source(report.plan, [], strict=strict)
    expected = _Expected(report.plan, report.configs, [check], Path(path))
    model = read_folder(report.out, options.maps)
    return _verified(model, expected, options, False, progress, started)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a folder should be, by its file or by itself, and how that was found out.

    Without a known architecture there is no plan; where nothing can be measured, no configurations.
    """

    plan: Plan | None
    configs: Mapping[str, Config]
    checks: list[Check]
    source: Path | None = None


def _of_folder(model: ModelFolder, options: Options) -> _Expected:
    """Recognises the file that the folder would become."""
    try:
        restoration = restore(model, options)
    except FileRefused as error:
        problems = [Problem(model.path.name, text) for text in (error.message, *error.problems)]
        return _Expected(None, {}, [Check.of("model", "architecture", problems)])
    plan = restoration.plan
    architecture, task = plan.detection.require()
    findings: list[Problem | str] = [
        *(Problem("the original layout", t) for t in (*restoration.problems, *plan.problems)),
        *(Problem("the original layout", line) for line in plan.lacking(model.parts)),
        *plan.detection.notes,
        *plan.notes,
        *(f"the folder has no {name}" for name in plan.absent),
    ]
    extent = f"{architecture.title}, {task.name}"
    expected = _configured(plan, None, [Check.of("model", "architecture", findings, extent)])
    configs = dict(expected.configs)
    for name in configs.keys() & (model.record.donors.keys() if model.record else ()):
        unsure = dict.fromkeys(configs[name].component.brings, "assumed")
        configs[name] = replace(configs[name], origins={**configs[name].origins, **unsure})
    return replace(expected, configs=configs)


def _configured(
    plan: Plan, original: OriginalConfig | None, checks: list[Check], source: Path | None = None
) -> _Expected:
    configs: Mapping[str, Config] = {}
    try:
        configs, _ = configured(plan, original)
    except (MapError, FileRefused) as error:
        problem = Problem("the configurations", f"cannot be worked out: {error.message}")
        checks = [*checks, Check("model", "config", (problem,))]
    return _Expected(plan, configs, checks, source)


def _verified(
    model: ModelFolder,
    expected: _Expected,
    options: Options,
    finite: bool,
    progress: Callable[[int, int], None],
    started: float,
) -> Verification:
    only, plan, checks = options.only, expected.plan, list(expected.checks)
    configs = {n: c for n, c in expected.configs.items() if only is None or n in only}
    file_plan = plan if expected.source else None
    read = Bytes.of(model, file_plan, finite=finite)
    with ThreadPoolExecutor(1) as pool:  # the bytes are read while torch is being imported
        running = pool.submit(read.run, progress)
        try:
            if plan and only is None and not model.single:
                index = model_index(plan, configs) | _own_schedulers(model, configs)
                checks.append(check_index(index, model.index, model.parts.keys()))
            checks += [*check_code(model), *_check_components(model, configs)]
            if only is None:
                checks += _check_unexpected(model, plan, configs, options.maps)
            running.result()
        except BaseException:
            read.cancelled = True
            raise
    if file_plan:
        cast = options.dtype is not None
        for name, config in configs.items():
            if config.component.kind == "model" and name in model.parts:
                checks.append(check_data(name, model.parts[name], file_plan, read, cast=cast))
    if model.record or model.layout or model.aside or model.problems:
        wrong = [Problem(ASIDE, text) for text in model.problems]
        wrong += _record_problems(model, file_plan, read) if file_plan else ()
        wrong += _changed_assumptions(model, configs)
        extent = f"{len(model.aside)} tensors kept aside"
        checks.append(Check.of("model", "record", wrong, extent))
    checks += check_finite(read) if finite else ()
    checks += _check_zeros(model, ignore=options.ignore_zeros)
    architecture, task = plan.detection.require() if plan else (None, None)
    order = list(dict.fromkeys(["model", *configs, *(check.component for check in checks)]))
    return Verification(
        model.path,
        expected.source,
        architecture.name if architecture else "",
        task.name if task else "",
        tuple(sorted(checks, key=lambda check: order.index(check.component))),
        read.nbytes,
        time.monotonic() - started,
        file_plan,
    )


def _with_record(
    options: Options, record: Record | None
) -> tuple[Options, dict[str, Fact], list[str]]:
    """Returns the options with what the folder notes of its conversion, its facts, and notes."""
    if record is None:
        return options, {}, []
    suggested = {}
    notes = []
    taken = (key for key, why in record.dropped.items() if why == "replaced")
    if not options.ema and any(key.startswith(EMA_OF) for key in taken):
        options = replace(options, ema=True)
        notes.append("the EMA copy of the UNet was taken")
    for name, fact in record.facts.items():
        if fact.source in ("option", "original config") and name not in options.facts:
            suggested[name] = replace(option_fact(name, fact.value), detail=f"{RECORD} says so")
            notes.append(f"{name} was set to {fact.value} ({fact.source})")
    for name, file in record.donors.items():
        if name not in options.donors and (name in TOKENIZERS or not options.assemble):
            what = "FOLDER" if name in TOKENIZERS else "FILE"
            notes.append(f"{name} comes from {file}: give it with {option(name, what)}")
    adapters = tuple((file.path.name, file.scale) for file in options.lora)
    if record.adapters and record.adapters != adapters:
        merged = ", ".join(f"{name}:{scale}" for name, scale in record.adapters)
        notes.append(f"{merged} was added: give it with {option('lora', 'FILE:SCALE')}")
    return options, suggested, [f"{RECORD} says that {note}" for note in notes]


def _check_source(plan: Plan, notes: list[str], *, strict: bool) -> Check:
    """Checks that every key of the file is accounted for."""
    findings: list[Problem | str] = [Problem("the file", text) for text in plan.problems]
    findings += [*plan.detection.notes, *notes]
    if strict:
        findings += [Problem(key, "no key map knows it") for key in plan.unclaimed]
        findings += [Problem("the file", line) for line in plan.lacking(plan.absent)]
    findings += [*(plan.assembly.lines if plan.assembly else ()), *plan.notes]
    dropped = Counter(step.reason for step in plan.steps if step.reason)
    findings += [f"tensors that are not converted ({why}): {n:,}" for why, n in dropped.items()]
    findings += [f"the file has no {name}" for name in plan.absent]
    return Check.of("model", "source", findings, f"{len(plan.detection.header.tensors):,} keys")


def _own_schedulers(model: ModelFolder, configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """Returns what the index should say of schedulers: which one steps is the folder's choice."""
    return {
        name: [config.component.home, str(class_said(model.parts[name].config or {}))]
        for name, config in configs.items()
        if config.component.kind == "scheduler" and name in model.parts
    }


def _check_components(model: ModelFolder, configs: Mapping[str, Config]) -> Iterator[Check]:
    """Yields the checks that need no source, component by component."""
    ours = model.record is not None
    for name, config in configs.items():
        component, part = config.component, model.parts.get(name)
        if part is None:
            yield Check(name, "config", (Problem(name, "the folder is missing"),))
        elif component.kind == "tokenizer":
            yield check_tokenizer(config, part, ours=ours)
        else:
            yield check_config(config, part, ours=ours)
            if component.kind == "model":
                yield check_weights(name, part, component.home, class_of(config))


def _check_unexpected(
    model: ModelFolder, plan: Plan | None, configs: Mapping[str, Config], maps: KeyMaps
) -> Iterator[Check]:
    """Yields the checks of models that the plan does not give, or of all if nothing is known."""
    for name, part in model.parts.items():
        if name in configs or not (part.tensors or part.problems):
            continue
        said = class_said(part.config or {})
        # where the folder is told alone, the plan leaves out what it holds and is incomplete
        own = plan is not None and plan.detection.header.path == model.path
        if plan and configs and not (own and name in plan.incomplete):
            architecture, _ = plan.detection.require()
            what = f"a {architecture.title} model has no such component"
            if name in architecture.components:
                what = f"the file has none: say with {option(name)} where it comes from"
            yield Check(name, "data", (Problem(name, what),))
        elif isinstance(said, str) and (home := maps.model_classes.get(said)):
            yield check_weights(name, part, home, said)


def _check_zeros(model: ModelFolder, *, ignore: bool) -> Iterator[Check]:
    """Yields a check for every component with weights that an unfinished download left zero."""
    for name, part in model.parts.items():
        if found := list(zero_weights(part.tensors.items())):
            problems = [Problem(tensor.name, f"is {how}") for tensor, how in found]
            note = f"{len(found):,} large weights are zero, such as {found[0][0].name}"
            yield Check.of(name, "zeros", [note] if ignore else problems)


def _record_problems(model: ModelFolder, plan: Plan, read: Bytes) -> Iterator[Problem]:
    """Compares what ckptconv left beside the components with the file."""
    header = plan.detection.header
    if model.layout:
        noted, actual = (
            {t.name: f"{t.dtype} {list(t.shape)}" for t in tensors.values()}
            for tensors in (model.layout.tensors, header.tensors)
        )
        for key in dict.fromkeys([*actual, *noted]):
            found, want = noted.get(key, "missing"), actual.get(key, "missing")
            if found != want:
                yield Problem(key, f"is {found} in {LAYOUT}, {want} in the file")
        if model.layout.metadata != header.metadata:
            yield Problem("__metadata__", f"{LAYOUT} has others than the file")
    architecture = plan.detection.require()[0].name
    if model.record and model.record.architecture != architecture:
        what = f"is {model.record.architecture!r} in {RECORD}, expected {architecture!r}"
        yield Problem("architecture", what)
    if model.aside:
        yield from check_data(ASIDE, None, plan, read, cast=True).problems


def _changed_assumptions(model: ModelFolder, configs: Mapping[str, Config]) -> Iterator[Problem]:
    """Yields assumed values that somebody changed since: no other check knows them to be wrong."""
    for name, assumed in (model.record.assumed if model.record else {}).items():
        component, _, entry = name.partition(".")
        config, part = configs.get(component), model.parts.get(component)
        if not config or not part or not part.config or config.origins.get(entry) != "assumed":
            continue
        if not same(found := part.config.get(entry), assumed):
            what = f"of {component} is {found!r}, {assumed!r} was assumed ({RECORD})"
            yield Problem(entry, what)
