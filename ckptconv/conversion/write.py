"""Writes the converted folder: whole, or not at all.

Everything is built in a sibling of the destination and renamed at the end. In there, a weight file
gets its header after its data, and `model_index.json` comes last, so a run that is killed leaves
nothing that a reader takes for a model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..configs.config import Config, model_index, versioned
from ..configs.tokenizer import copied_tokenizer, tokenizer_files
from ..destination import Destination, Kind, check_room
from ..dtypes import nbytes
from ..errors import FileRefused, UsageError
from ..files import ByteCounter, noting_files, read_json, require_unchanged
from ..folder.names import CONFIG_FILES, DROPPED, INDEX, LAYOUT, RECORD
from ..folder.record import record_of, recorded_files
from ..planning.plan import Plan
from ..planning.step import ASIDE, Target, identity_matrix
from ..reading.tensor import Header
from ..streaming.stream import WeightFile, lay_out, write
from ..streaming.transfers import transfers


@dataclass(frozen=True, slots=True)
class Packaging:
    """How the weights are divided among files, and what these are called.

    Attributes:
        variant: goes into the names of the weight files, such as `fp16`; empty for none.
        max_shard_size: bytes of tensors in one file; 0 for no limit.
        weights: False writes the configurations only.
    """

    variant: str = ""
    max_shard_size: int = 0
    weights: bool = True

    @classmethod
    def of(
        cls, variant: str | None, max_shard_size: str | int | None, *, configs_only: bool = False
    ) -> Packaging:
        """Returns the packaging that the keywords of diffusers' `save_pretrained` mean.

        A variant must be a word that diffusers and transformers find in the name of a file.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]*", variant or ""):
            raise UsageError(
                f"variant {variant!r} cannot stand in a file name",
                hint="use letters, digits, - and _, such as fp16",
            )
        return cls(variant or "", parse_size(max_shard_size or 0), not configs_only)


@dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        total = sum(self.files.values())
        return f"<Report on {self.out}: {len(self.files)} files, {total:,} bytes>"

    def as_data(self) -> dict[str, Any]:
        """Returns plain data, for JSON."""
        detection = self.plan.detection
        architecture, task = detection.require()
        return {
            "out": str(self.out),
            "architecture": architecture.name,
            "task": task.name,
            "pipeline": task.pipeline,
            "assembly": self.plan.assembly and self.plan.assembly.as_data(),
            "lossless": self.plan.lossless,
            "facts": {
                name: {"value": f.value, "source": f.source} for name, f in detection.facts.items()
            },
            "missing": list(self.plan.absent),
            "unclaimed": list(self.plan.unclaimed),
            "files": dict(self.files),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def parse_size(size: str | int) -> int:
    """Returns the bytes that a size means.

    >>> parse_size("5GB"), parse_size("1 MiB"), parse_size("2.5 GB")
    (5000000000, 1048576, 2500000000)
    """
    if isinstance(size, int) and size >= 0:
        return size
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,3})?)\s*([A-Za-z]*)", str(size).strip())
    count = int(float(found[1]) * units.get(found[2].upper(), 0)) if found else 0
    if not count:
        raise UsageError(f"{size!r} is not a size", hint="write a number and a unit, such as 5GB")
    return count


def write_folder(
    plan: Plan,
    configs: Mapping[str, Config],
    out: Destination,
    packaging: Packaging,
    only: frozenset[str] | None,
    progress: Callable[[int, int], None],
) -> Report:
    """Runs a plan that is complete; all of it, with `model_index.json`, where `only` is None.

    Raises:
        FileRefused: a file that is read changed meanwhile.
        OutputError: the disk is too small, or cannot be written.
    """
    started = time.monotonic()
    single = plan.detection.require()[0].single
    header = plan.detection.header
    metadata = {"format": "pt"} | {k: v for k, v in header.metadata.items() if k != "format"}
    with out.new() as partial:
        partial.mkdir()
        files: list[tuple[str, WeightFile]] = []
        texts: dict[str, str] = {}
        for name, config in configs.items():
            if only is not None and name not in only:
                continue
            folder = "" if single else f"{name}/"
            written = _config_files(config)
            if config.component.kind == "model" and packaging.weights:
                targets = list(plan.tensors(name).values())
                stem = partial / folder / config.component.weights
                weights, index = _weight_files(stem, targets, packaging, metadata)
                files += [(name, file) for file in weights]
                written |= index
            texts |= {f"{folder}{file}": text for file, text in written.items()}
        kept = plan.tensors(ASIDE)
        if kept and packaging.weights:
            aside = lay_out(partial / ASIDE / DROPPED, kept.values(), {"format": "pt"})
            files.append((ASIDE, aside))
        texts[f"{ASIDE}/{LAYOUT}"] = layout_text(header)
        last = {f"{ASIDE}/{RECORD}": ""}
        if only is None and not single:  # the last to be written, since a folder with it loads
            last[INDEX] = _json(model_index(plan, configs))
        names = {file.path.relative_to(partial).as_posix() for _, file in files}
        last[f"{ASIDE}/{RECORD}"] = _json(
            record_of(plan, configs, names | texts.keys() | last.keys())
        )
        texts |= last
        contents = {partial / name: text.encode() for name, text in texts.items()}
        sizes = {path: len(content) for path, content in contents.items()}
        sizes |= {file.path: file.size for _, file in files}
        check_room(out.path, sum(sizes.values()), "the folder")
        for path in sizes:
            path.parent.mkdir(exist_ok=True)
        done = ByteCounter(sum(sizes.values()), progress)
        places = {(name, key): t for name, file in files for key, t in file.tensors.items()}
        steps = [s for s in plan.steps if any((t.component, t.key) in places for t in s.targets)]
        identities = [
            (places[t.component, t.key], identity_matrix(t))
            for t in plan.identities
            if (t.component, t.key) in places
        ]
        todo = transfers(steps, places)
        warnings = write([file for _, file in files], todo, done.add, identities)
        for path, content in contents.items():
            path.write_bytes(content)
        done.finish()
        require_unchanged()
    return Report(
        out.path,
        plan,
        configs,
        dict(sorted((path.relative_to(partial).as_posix(), n) for path, n in sizes.items())),
        tuple(warnings),
        time.monotonic() - started,
    )


def _recorded(folder: Path) -> frozenset[str]:
    """Returns the files that the record of a folder lists."""
    with noting_files(), contextlib.suppress(FileRefused):  # what is replaced is no input
        return recorded_files(read_json(folder / ASIDE / RECORD))
    return frozenset()


def _is_converted(folder: Path) -> bool:
    """Whether a conversion made this folder and listed its files, or nothing is in it."""
    return folder.is_dir() and (bool(_recorded(folder)) or not any(folder.iterdir()))


def _strangers(folder: Path) -> list[str]:
    """Returns what is in a converted folder and was not written by the conversion."""

    def fail(error: OSError) -> NoReturn:
        raise error  # what cannot be looked into may hold anything

    found = []
    for inside, folders, files in os.walk(folder, onerror=fail):
        paths = [Path(inside, name) for name in (*folders, *files)]
        found += [path for path in paths if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix() for path in found if path.name not in CLUTTER}
    return sorted(names - _recorded(folder))


CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""Files that desktops leave wherever somebody looks."""

CONVERTED = Kind("a converted folder that lists its files", _is_converted, _strangers)


def _weight_files(
    stem: Path, targets: list[Target], packaging: Packaging, metadata: Mapping[str, str]
) -> tuple[list[WeightFile], dict[str, str]]:
    """Returns a component's weight files, and the index if there are several."""
    shards: list[list[Target]] = [[]]
    limit, room = packaging.max_shard_size, packaging.max_shard_size
    sizes = {target.key: nbytes(math.prod(target.shape), target.dtype) for target in targets}
    for target in targets:
        if limit and shards[-1] and sizes[target.key] > room:
            shards.append([])
            room = limit
        shards[-1].append(target)
        room -= sizes[target.key]
    variant = f".{packaging.variant}" if packaging.variant else ""
    files = []
    for n, shard in enumerate(shards, 1):
        number = f"-{n:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = stem.with_name(f"{stem.name}{variant}{number}.safetensors")
        files.append(lay_out(path, shard, metadata))
    if len(files) == 1:
        return files, {}
    where = {
        target.key: f.path.name for f, shard in zip(files, shards, strict=True) for target in shard
    }
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    return files, {f"{stem.name}.safetensors.index{variant}.json": _json(index)}


def _config_files(config: Config) -> dict[str, str]:
    kind = config.component.kind
    if kind == "tokenizer":
        if config.folder:
            return copied_tokenizer(config.folder, config.values)
        return tokenizer_files(config.values)
    return {CONFIG_FILES[kind]: _json(versioned(config))}


def layout_text(header: Header) -> str:
    """Returns a header as `key_maps/*/layout.json` has it: one tensor a line, no offsets."""
    lines = (
        f"  {json.dumps(tensor.name)}: {json.dumps([tensor.dtype, tensor.shape])}"
        for tensor in header.tensors.values()
    )
    metadata = json.dumps(dict(header.metadata))
    return f'{{"metadata": {metadata},\n "tensors": {{\n' + ",\n".join(lines) + "\n}}\n"


def _json(values: Mapping[str, Any]) -> str:
    """Returns JSON as diffusers writes it: sorted, two spaces, a line feed at the end."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
