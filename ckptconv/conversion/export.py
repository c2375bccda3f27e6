"""A diffusers folder becomes a single file in the original layout.

What a conversion keeps aside (`ckptconv/dropped.safetensors`) goes back as well, and so does the
header that it notes (`ckptconv/layout.json`): where all of its tensors are there, they are written
in its order, so that the file of a program that uses the safetensors library comes back byte for
byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..destination import Destination, check_room
from ..detection.detect import Detection
from ..dtypes import BLOCKS, CASTS, FLOATS, FP8
from ..errors import FileRefused, UsageError, option
from ..files import ByteCounter, noting_files, require_unchanged
from ..folder.read import ModelFolder, read_folder
from ..maps.architecture import Architecture, KeyMaps
from ..maps.ops import DROP
from ..options import Options
from ..planning.plan import build_plan
from ..planning.step import Step, Target
from ..reading.header import encode_header
from ..reading.tensor import Header
from ..streaming.stream import WeightFile, lay_out, write
from ..streaming.transfers import transfers
from .restore import Restoration, restore

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries of the metadata that hold for the tensors as they were, and for no others."""

SCHEDULER_FACTS: dict[tuple[str, str | bool], tuple[str, str, str]] = {
    ("prediction_type", "epsilon"): ("prediction_type", "modelspec.prediction_type", "epsilon"),
    ("prediction_type", "v_prediction"): ("prediction_type", "modelspec.prediction_type", "v"),
    ("rescale_betas_zero_snr", False): ("zero_terminal_snr", "ss_zero_terminal_snr", "False"),
    ("rescale_betas_zero_snr", True): ("zero_terminal_snr", "ss_zero_terminal_snr", "True"),
}
"""By entry and value of a scheduler's configuration, the fact of this value that it states and no
tensor does, and the entry of the metadata that states it."""

IN_FILE = ("metadata", "marker", "values", "task", "assumed")
"""Sources of facts that whoever reads the exported file finds in it again."""


@dataclass(frozen=True, slots=True, repr=False)
class Exported:
    """What an export did.

    Attributes:
        out: the file.
        architecture: whose layout it has.
        task: name of the task.
        tensors: how many were written.
        size: of the file in bytes.
        restored: keys that were kept aside by a conversion.
        lost: by key, why a tensor of the source, or of the published file where the source is not
            known, is not there.
        as_source: the header is that of the source, tensor for tensor and in its order.
        notes: what the user should know.
        seconds: from the first byte to the last.
    """

    out: Path
    architecture: Architecture
    task: str
    tensors: int
    size: int
    restored: tuple[str, ...]
    lost: Mapping[str, str]
    as_source: bool
    notes: tuple[str, ...]
    seconds: float

    def __repr__(self) -> str:
        return f"<Exported {self.out}: {self.tensors:,} tensors, {self.size:,} bytes>"

    def as_data(self) -> dict[str, Any]:
        """Returns plain data, for JSON."""
        return {
            "out": str(self.out),
            "architecture": self.architecture.name,
            "task": self.task,
            "tensors": self.tensors,
            "size": self.size,
            "restored": list(self.restored),
            "lost": dict(self.lost),
            "as_source": self.as_source,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


@noting_files()
def export(
    folder: str | Path,
    out: str | Path,
    *,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
    maps: KeyMaps | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Exported:
    """Turns a diffusers folder into one file in the original layout.

    Args:
        folder: made by ckptconv, diffusers or another program.
        out: the file to make.
        dtype: `fp16`, `bf16` or `fp32` for the float tensors of the model's components; as stored
            by default.
        metadata: entries of the header, which win over those of the source.
        maps: the key maps to use; those that come with ckptconv by default.
        overwrite: replace a file that is there.
        progress: is called with bytes written and bytes in all, from one thread at a time.

    Raises:
        FileRefused: the folder is no whole model of a known architecture, or a tensor in it has
            no way back, or a file in it changed while it was read.
        UsageError: the dtype is unknown.
        OutputError: the file exists or cannot be written.
    """
    started = time.monotonic()
    out, options = Path(out), Options.of({"maps": maps, "dtype": dtype})
    if options.dtype == FP8:
        hint = f"convert the file with {option('dtype', FP8)}, and export what comes out"
        raise UsageError("a file in the original layout is not cast to fp8", hint=hint)
    model = read_folder(folder, options.maps)
    destination = Destination(out, overwrite, inputs=model.files, closed=model.path)
    destination.check()
    restoration = restore(model, options)
    architecture, task = restoration.plan.detection.require()
    notes = _require_whole(restoration, model)
    spelled = restoration.names
    steps = [
        replace(
            step, targets=tuple(replace(t, key=spelled.get(t.key, t.key)) for t in step.targets)
        )
        for step in _cast(restoration.steps, architecture, options.dtype)
    ]
    targets = {step.targets[0].key: step.targets[0] for step in steps}
    adapters = [str(name) for name, _ in model.record.adapters] if model.record else []
    if adapters:
        names = ", ".join(adapters)
        notes.append(f"the weights are those of the source with {names} added, which stays in them")
    layout = model.layout.tensors.values() if model.layout else ()
    if blocks := sorted({info.dtype for info in layout if info.dtype in BLOCKS}):
        notes.append(f"the source is quantized ({', '.join(blocks)}): the file has its values only")
    as_source = _is_layout(targets, model.layout) and not adapters
    kept, hints = _metadata(model, restoration.plan.detection, keep_hashes=as_source)
    entries = kept | dict(metadata or {})
    with destination.new() as hidden:
        if as_source and model.layout:
            ordered = [
                (key, targets[key].dtype, targets[key].shape) for key in model.layout.tensors
            ]
            file = WeightFile(hidden, *encode_header(ordered, entries, hidden))
        else:
            file = lay_out(hidden, targets.values(), entries)
        check_room(out, file.size, "the file")
        done = ByteCounter(file.size, progress)
        places = {("", key): tensor for key, tensor in file.tensors.items()}
        warnings = write([file], transfers(steps, places), done.add)
        done.finish()
        require_unchanged()
    aside = {tensor.file for tensor in model.aside.values()}
    return Exported(
        out,
        architecture,
        task.name,
        len(targets),
        file.size,
        tuple(s.targets[0].key for s in steps if s.sources[0].file in aside),
        _lost(model, restoration.plan.detection, targets),
        as_source,
        (*notes, *hints, *restoration.plan.detection.notes, *warnings),
        time.monotonic() - started,
    )


def _require_whole(restoration: Restoration, model: ModelFolder) -> list[str]:
    """Refuses a folder of which tensors would be lost; returns notes on what is left out."""
    plan = restoration.plan
    architecture, _ = plan.detection.require()
    title = architecture.title
    models = {c.name: model.parts[c.name] for c in architecture.models if c.name in model.parts}
    problems = [*model.problems, *restoration.problems]
    problems += [problem for part in models.values() for problem in part.problems]
    problems = problems or [*plan.problems, *plan.lacking(models)]  # which follow from the others
    if problems:
        raise FileRefused(
            f"{model.path}: this is not a whole {title} model, so it cannot become one file",
            problems=problems,
            hint="`ckptconv verify DIR` lists all that is wrong with the folder",
        )
    absent = [c.name for c in architecture.models if c.name in plan.absent]
    notes = [f"{model.path} holds no {name}, so the file has none" for name in absent]
    for name, part in sorted(model.parts.items()):
        if name in models and part.unread:
            notes.append(f"{name}: {', '.join(part.unread)} is left out: another variant is read")
        if name not in architecture.components:
            notes.append(f"{name} has no place in a {title} file and is left out")
    return notes


def _cast(steps: Iterable[Step], architecture: Architecture, dtype: str | None) -> list[Step]:
    """Changes the dtype of what belongs to a component; the noise schedule keeps its own."""
    prefixes = tuple(s.prefix for c in architecture.models for s in c.sources if s.prefix)
    return [
        replace(step, targets=(replace(target, dtype=CASTS[dtype]),))
        if dtype and target.dtype in FLOATS and target.key.startswith(prefixes)
        else step
        for step in steps
        for target in step.targets
    ]


def _is_layout(targets: Mapping[str, Target], layout: Header | None) -> bool:
    """Whether these are the tensors of the source."""
    have = {key: (target.dtype, target.shape) for key, target in targets.items()}
    return layout is not None and have == {
        key: (info.dtype, info.shape) for key, info in layout.tensors.items()
    }


def _metadata(
    model: ModelFolder, detection: Detection, *, keep_hashes: bool
) -> tuple[dict[str, str], list[str]]:
    """Returns the metadata of the source with what the folder says besides, and notes on that."""
    entries = dict(detection.header.metadata)
    notes = []
    if not keep_hashes and (stale := [key for key in HASHES if entries.pop(key, None)]):
        notes.append(f"{', '.join(stale)} is left out: it holds for other tensors")
    scheduler = model.parts.get("scheduler")
    config = (scheduler.config if scheduler else None) or {}
    noted = model.record.facts if model.record else {}
    for (entry, value), (fact, key, text) in SCHEDULER_FACTS.items():
        found = config.get(entry)
        if fact not in detection.found or type(found) is not type(value) or found != value:
            continue
        known = noted.get(fact)
        if known is None or known.source not in IN_FILE:
            known = detection.found[fact]
        if known.value != value:
            entries[key] = text
            notes.append(f"the scheduler says {fact} = {value}: the metadata say {key} = {text}")
    return entries, notes


def _lost(
    model: ModelFolder, detection: Detection, targets: Mapping[str, Target]
) -> dict[str, str]:
    """Returns the keys that the file does not have, and why."""
    if model.layout:
        noted = model.record.dropped if model.record else {}
        reasons = {key: str(noted.get(key, "left out")) for key in model.layout.tensors}
    else:
        published = build_plan(replace(detection, header=detection.require()[0].layout()))
        reasons = {s.sources[0].name: s.reason for s in published.steps if s.op is DROP}
    return {key: reason for key, reason in reasons.items() if key not in targets}
