"""A diffusers folder becomes a single file in the original layout.

What a conversion keeps aside (`ckptconv/dropped.safetensors`) goes back as well, and so does the
header that it notes (`ckptconv/layout.json`): where all of its tensors are there, they are written
in its order, so that the file of a program that uses the safetensors library comes back byte for
byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..destination import check_destination, check_room, new_file
from ..detection.detect import detect
from ..dtypes import CASTS, FLOATS, cast_name
from ..errors import FileRefused
from ..files import ByteCounter
from ..folder.read import ModelFolder, read_folder
from ..maps.architecture import Architecture, KeyMaps, bundled
from ..maps.ops import DROP
from ..planning.plan import build_plan
from ..planning.step import Step, Target
from ..reading.header import encode_header
from ..reading.tensor import Header
from ..streaming.stream import WeightFile, lay_out, write
from ..streaming.transfers import transfers
from .restore import Restoration, recorded_facts, restore

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries of the metadata that hold for the tensors as they were, and for no others."""

TELLS: dict[str, dict[Any, tuple[str, str]]] = {
    "prediction_type": {
        "epsilon": ("modelspec.prediction_type", "epsilon"),
        "v_prediction": ("modelspec.prediction_type", "v"),
    },
    "zero_terminal_snr": {
        False: ("ss_zero_terminal_snr", "False"),
        True: ("ss_zero_terminal_snr", "True"),
    },
}
"""How metadata say what a scheduler's configuration says and no tensor does."""


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
            no way back.
        UsageError: the dtype is unknown.
        OutputError: the file exists or cannot be written.
    """
    started = time.monotonic()
    out, maps = Path(out), maps or bundled()
    dtype = None if dtype is None else cast_name(dtype)
    saved = read_folder(folder, maps)
    check_destination(out, overwrite=overwrite, inputs=saved.files)
    way = restore(saved, maps)
    notes = _require_whole(way, saved)
    steps = [_cast(step, way.architecture, dtype) for step in way.steps]
    targets = {step.targets[0].key: step.targets[0] for step in steps}
    added = _adapters(saved)
    as_source = _is_layout(targets, saved.layout) and not added
    said, hints = _metadata(saved, way, keep_hashes=as_source)
    said |= dict(metadata or {})
    with new_file(out) as hidden:
        file = _lay_out(hidden, targets, saved.layout if as_source else None, said)
        check_room(out, file.size, "the file")
        done = ByteCounter(file.size, progress)
        places = {("", key): tensor for key, tensor in file.tensors.items()}
        warnings = write([file], transfers(steps, places), done.add)
        done.finish()
    aside = {tensor.file for tensor in saved.aside.values()}
    return Exported(
        out,
        way.architecture,
        way.detection.require()[1].name,
        len(targets),
        file.size,
        tuple(s.targets[0].key for s in steps if s.sources[0].file in aside),
        _lost(saved, way, targets),
        as_source,
        (*notes, *added, *hints, *way.detection.notes, *warnings),
        time.monotonic() - started,
    )


def _require_whole(way: Restoration, saved: ModelFolder) -> list[str]:
    """Checks that nothing of the folder is left behind, and returns what the file will not have.

    Raises:
        FileRefused: a tensor has no way back, or the file would lack some.
    """
    way.detection.require()
    title = way.architecture.title
    problems = [*saved.problems, *way.problems]
    names = [component.name for component in way.architecture.models]
    for name in names:
        problems += saved.parts[name].problems if name in saved.parts else ()
    plan = build_plan(way.detection)
    problems += plan.problems if not problems else ()
    problems += [f"{key}: no map knows this key" for key in plan.unclaimed]
    if problems:
        raise FileRefused(
            f"{saved.path}: this is not a whole {title} model, so it cannot become one file",
            problems=problems,
            hint="`ckptconv verify DIR` lists all that is wrong with the folder",
        )
    notes = [f"{saved.path} holds no {name}, so the file has none" for name in plan.absent]
    for name in sorted(saved.parts):
        part = saved.parts[name]
        if name in names and part.unread:
            notes.append(f"{name}: {', '.join(part.unread)} is left out: another variant is read")
        if name not in way.architecture.components:
            notes.append(f"{name} has no place in a {title} file and is left out")
    return notes


def _cast(step: Step, architecture: Architecture, dtype: str | None) -> Step:
    """Changes the dtype of what belongs to a component; the noise schedule keeps its own."""
    prefixes = tuple(s.prefix for c in architecture.models for s in c.sources if s.prefix)
    (target,) = step.targets
    if dtype is None or target.dtype not in FLOATS or not target.key.startswith(prefixes):
        return step
    return replace(step, targets=(replace(target, dtype=CASTS[dtype]),))


def _adapters(saved: ModelFolder) -> list[str]:
    """Returns a sentence if the conversion added adapters: the source does not come back."""
    noted = saved.record.get("adapters")
    if not isinstance(noted, list) or not noted:
        return []
    names = ", ".join(str(entry.get("name")) for entry in noted if isinstance(entry, dict))
    return [f"the weights are those of the source with {names} added, which stays in them"]


def _is_layout(targets: Mapping[str, Target], layout: Header | None) -> bool:
    """Whether these are the tensors of the source."""
    have = {key: (target.dtype, target.shape) for key, target in targets.items()}
    return layout is not None and have == {
        key: (info.dtype, info.shape) for key, info in layout.tensors.items()
    }


def _lay_out(
    out: Path, targets: Mapping[str, Target], layout: Header | None, metadata: Mapping[str, str]
) -> WeightFile:
    if layout is None:
        return lay_out(out, targets.values(), metadata)
    ordered = [(key, targets[key].dtype, targets[key].shape) for key in layout.tensors]
    return WeightFile(out, *encode_header(ordered, metadata, out))


def _metadata(
    saved: ModelFolder, way: Restoration, *, keep_hashes: bool
) -> tuple[dict[str, str], list[str]]:
    """Returns the metadata of the source, and what the folder says that no tensor does."""
    said = dict(way.detection.header.metadata)
    notes = []
    if not keep_hashes and (stale := [key for key in HASHES if said.pop(key, None)]):
        notes.append(f"{', '.join(stale)} is left out: it holds for other tensors")
    scheduler = saved.parts["scheduler"].config if "scheduler" in saved.parts else None
    told = {n: f.value for n, f in recorded_facts(saved.record).items() if f.source in _OF_FILE}
    alone = {name: fact.value for name, fact in way.detection.found.items()}
    for name, value in _of_scheduler(scheduler or {}).items():
        if name in alone and told.get(name, alone[name]) != value:
            key, text = TELLS[name][value]
            said[key] = text
            notes.append(f"the scheduler says {name} = {value}: the metadata say {key} = {text}")
    return said, notes


_OF_FILE = ("metadata", "marker", "values", "task", "assumed")
"""Sources of facts that whoever reads the exported file finds in it again."""


def _of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that a scheduler's configuration states."""
    entries = {"prediction_type": "prediction_type", "zero_terminal_snr": "rescale_betas_zero_snr"}
    stated = {fact: config[entry] for fact, entry in entries.items() if entry in config}
    return {fact: v for fact, v in stated.items() if isinstance(v, str | bool) and v in TELLS[fact]}


def _lost(saved: ModelFolder, way: Restoration, targets: Mapping[str, Target]) -> dict[str, str]:
    """Returns the keys that the file does not have, and why."""
    if saved.layout:
        noted = saved.record.get("dropped")
        reasons = noted if isinstance(noted, dict) else {}
        return {
            k: str(reasons.get(k, "left out")) for k in saved.layout.tensors if k not in targets
        }
    published = build_plan(detect(way.architecture.layout(), maps=way.architecture.maps))
    dropped = [(step.sources[0].name, step.reason) for step in published.steps if step.op is DROP]
    return {key: reason for key, reason in dropped if key not in targets}
