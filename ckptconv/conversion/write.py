"""Writes the converted folder: whole, or not at all.

Everything is built in a sibling of the destination and renamed at the end. In there, a weight file
gets its header after its data, and `model_index.json` comes last, so a run that is killed leaves
nothing that a reader takes for a model.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.config import Config, model_index, versioned
from ..configs.tokenizer import tokenizer_files
from ..destination import Kind, check_room, new_folder
from ..errors import UsageError
from ..files import ByteCounter
from ..folder.names import CONFIG_FILES, DROPPED, INDEX, LAYOUT, RECORD
from ..maps.architecture import Component
from ..planning.plan import ASIDE, Plan, Slot
from ..reading.header import Header
from ..reading.view import stored
from ..streaming.stream import WeightFile, lay_out, write
from ..streaming.transfers import pieces

__all__ = ["CONVERTED", "Layout", "Report", "execute", "layout_text", "parse_size"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the weights are laid out in files.

    Attributes:
        variant: goes into the names of the weight files, such as `fp16`; empty for none.
        max_shard: bytes of tensors in one file; 0 for no limit.
        weights: false writes the configurations only.
    """

    variant: str = ""
    max_shard: int = 0
    weights: bool = True

    def __post_init__(self) -> None:
        """Checks the variant.

        Raises:
            UsageError: it is not a word that diffusers and transformers find in a file name.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]*", self.variant):
            raise UsageError(
                f"variant {self.variant!r} cannot stand in a file name",
                hint="use letters, digits, - and _, such as fp16",
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        out: the folder.
        plan: what was done with each key.
        configs: by component.
        files: sizes in bytes by path relative to the folder.
        warnings: what the user should know.
        seconds: from the first byte to the last.
    """

    out: Path
    plan: Plan
    configs: Mapping[str, Config]
    files: Mapping[str, int]
    warnings: tuple[str, ...]
    seconds: float


def parse_size(text: str) -> int:
    """Returns the bytes that a size such as `5GB` or `500MiB` means.

    Raises:
        UsageError: it is not a size.

    >>> parse_size("5GB"), parse_size("1 MiB")
    (5000000000, 1048576)
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in units or int(found[1]) == 0:
        raise UsageError(f"{text!r} is not a size", hint="write a number and a unit, such as 5GB")
    return int(found[1]) * units[found[2].upper()]


def execute(
    plan: Plan,
    built: Mapping[str, Config],
    out: Path,
    *,
    record: Mapping[str, Any],
    layout: Layout = Layout(),
    only: frozenset[str] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Runs a plan.

    Args:
        plan: complete (`Plan.require_complete`).
        built: the configurations, by component.
        out: the folder to make; the one that is there is replaced.
        record: what `ckptconv/source.json` says of the source.
        layout: how the weights are laid out.
        only: the components to write; all by default, and then `model_index.json` as well.
        progress: is called with bytes written and bytes in all, from one thread at a time.

    Raises:
        OutputError: the disk is too small, or cannot be written.
    """
    started = time.monotonic()
    components = [c.component for n, c in built.items() if only is None or n in only]
    single = plan.detection.require()[0].single

    def home(component: Component) -> Path:
        return Path() if single else Path(component.name)

    metadata = {"format": "pt"} | {
        k: v for k, v in plan.detection.header.metadata.items() if k != "format"
    }
    with new_folder(out) as partial:
        files: list[tuple[str, WeightFile]] = []
        texts: dict[str, str] = {}
        targets: dict[tuple[str, str], tuple[Path, Any]] = {}
        for component in components:
            if component.kind == "model" and layout.weights:
                slots = list(plan.tensors(component.name).values())
                made, index = _weight_files(component, slots, layout, metadata, home)
                files += [(component.name, file) for file in made]
                texts |= index
        kept = plan.tensors(ASIDE)
        if kept and layout.weights:
            files.append((ASIDE, lay_out(Path(ASIDE, DROPPED), kept.values(), {"format": "pt"})))
        for place, file in files:
            targets |= {(place, k): (partial / file.path, info) for k, info in file.tensors.items()}
        for component in components:
            texts |= _config_files(built[component.name], home)
        texts[f"{ASIDE}/{RECORD}"] = _json(record)
        texts[f"{ASIDE}/{LAYOUT}"] = layout_text(plan.detection.header)
        if only is None and not single:  # the last to be written, since a folder with it loads
            texts[INDEX] = _json(model_index(plan, built))
        need = sum(file.size for _, file in files) + sum(len(t.encode()) for t in texts.values())
        check_room(out, need, "the folder")
        for folder in {Path(name).parent for name in [*texts, *(str(f.path) for _, f in files)]}:
            (partial / folder).mkdir(exist_ok=True)
        done = ByteCounter(need, progress)
        steps = [s for s in plan.steps if any((t.place, t.key) in targets for t in s.targets)]
        warnings = write(
            [WeightFile(partial / f.path, f.beginning, f.tensors) for _, f in files],
            pieces(steps, plan.headers, targets),
            done.add,
        )
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        done.finish()
    sizes = {str(file.path): file.size for _, file in files}
    sizes |= {name: len(text.encode()) for name, text in texts.items()}
    return Report(
        out, plan, built, dict(sorted(sizes.items())), tuple(warnings), time.monotonic() - started
    )


def _is_converted(folder: Path) -> bool:
    """Whether a conversion made this folder (it leaves a record), or nothing is in it."""
    return folder.is_dir() and ((folder / ASIDE / RECORD).is_file() or not any(folder.iterdir()))


CONVERTED: Kind = ("a converted folder", _is_converted)


def _weight_files(
    component: Component,
    slots: list[Slot],
    layout: Layout,
    metadata: Mapping[str, str],
    home: Callable[[Component], Path],
) -> tuple[list[WeightFile], dict[str, str]]:
    """Returns a component's weight files, and the index file if there are several."""
    shards: list[list[Slot]] = [[]]
    room = layout.max_shard
    whole = lay_out(Path(), slots, {}).tensors
    for slot in slots:
        nbytes = whole[slot.key].nbytes
        if layout.max_shard and shards[-1] and nbytes > room:
            shards.append([])
            room = layout.max_shard
        shards[-1].append(slot)
        room -= nbytes
    stem = component.weights
    dotted = f".{layout.variant}" if layout.variant else ""
    folder = home(component)
    if len(shards) == 1:
        return [lay_out(folder / f"{stem}{dotted}.safetensors", slots, metadata)], {}
    files = []
    weight_map: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        name = f"{stem}{dotted}-{n:05}-of-{len(shards):05}.safetensors"
        files.append(lay_out(folder / name, shard, metadata))
        weight_map |= {slot.key: name for slot in shard}
    total = sum(info.nbytes for info in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return files, {str(folder / f"{stem}.safetensors.index{dotted}.json"): _json(index)}


def _config_files(config: Config, home: Callable[[Component], Path]) -> dict[str, str]:
    folder, kind = home(config.component), config.component.kind
    if kind == "tokenizer":
        return {str(folder / f): text for f, text in tokenizer_files(config.values).items()}
    return {str(folder / CONFIG_FILES[kind]): _json(versioned(config))}


def layout_text(header: Header) -> str:
    """Returns a header in the form of `key_maps/*/layout.json`: one tensor a line, no offsets."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps([info.dtype, info.shape])}"
        for key, info in stored(header).items()
    )
    metadata = json.dumps(dict(header.metadata))
    return f'{{"metadata": {metadata},\n "tensors": {{\n' + ",\n".join(lines) + "\n}}\n"


def _json(values: Mapping[str, Any]) -> str:
    """Writes JSON as diffusers does: sorted, two spaces, a line feed at the end."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
