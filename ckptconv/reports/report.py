"""What a file is, as plain data: the content of `inspect --json`, `plan --json` and the tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..configs.config import class_of, configs
from ..detection.detect import Detection
from ..detection.spellings import EMA_PREFIX
from ..planning.plan import Plan
from ..planning.step import Target
from ..reading.gguf import MAGIC
from ..reading.source import is_zip
from ..reading.tensor import Header, Tensor

UNKNOWN = "no key map knows it"


def inspection(detection: Detection, plan: Plan | None) -> dict[str, Any]:
    """Returns everything that is known of a file; there is no plan of one that was refused.

    `architecture` is None if nothing matched.
    """
    header = detection.header
    data: dict[str, Any] = {
        "file": str(header.path),
        "size": header.size,
        "tensors": len(header.tensors),
        **dict.fromkeys(("architecture", "task", "pipeline", "prediction_type")),
        "components": {},
        "evidence": list(detection.evidence),
        "missing": list(plan.absent) if plan else [],
        "unclaimed": list(plan.unclaimed) if plan else [],
        "problems": list(plan.problems) if plan else [],
        "verdicts": {
            v.architecture: {"matches": v.matches, "failing": [line.text for line in v.failing]}
            for v in detection.verdicts
        },
        "ema": any(key.startswith(EMA_PREFIX) for key in header.tensors),
        "metadata": dict(header.metadata),
        "notes": list(detection.notes),
    }
    if plan is None:
        return data
    architecture, task = detection.require()
    data |= {
        "architecture": architecture.name,
        "title": architecture.title,
        "task": task.name,
        "pipeline": task.pipeline,
        "dropped": dict(Counter(step.reason for step in plan.steps if step.reason)),
    }
    data |= {
        fact.name: {"value": fact.value, "source": fact.source, "detail": fact.detail}
        for fact in detection.facts.values()
        if fact.name != "task"
    }
    if plan.problems:
        return data
    built, parts = configs(plan), tensors_by_part(plan)
    data["components"] = {
        c.name: {
            "class": class_of(built[c.name]),
            "tensors": len(plan.tensors(c.name)),
            **amounts(parts[c.name]),
        }
        for c in architecture.models
        if c.name in built
    }
    data["assumed"] = {
        f"{name}.{key}": config.values[key]
        for name, config in built.items()
        for key, origin in config.origins.items()
        if origin == "assumed"
    }
    return data


def tensors_by_part(plan: Plan) -> dict[str, list[Tensor]]:
    """Returns the tensors that are read, by component or by the reason why they are left out."""
    parts: dict[str, list[Tensor]] = {}
    for step in plan.steps:
        name = f"not converted: {step.reason}" if step.reason else step.targets[0].component
        parts.setdefault(name, []).extend(step.sources)
    return parts


def amounts(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Returns how much some tensors hold."""
    return {
        "parameters": sum(tensor.numel for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors).most_common()),
    }


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Returns a row for every key of the file: what becomes of it."""
    return [
        _row(source.name, source, step.op.name, step.targets, step.reason)
        for step in plan.steps
        for source in step.sources
    ]


def header_rows(header: Header) -> list[dict[str, Any]]:
    """Returns such rows for a file that was refused: nothing becomes of its keys."""
    return [_row(key, tensor) for key, tensor in header.tensors.items()]


def _row(
    key: str, source: Tensor, op: str = "", targets: Sequence[Target] = (), reason: str = ""
) -> dict[str, Any]:
    return {
        "source": key,
        "op": op,
        "targets": [f"{target.component}/{target.key}" for target in targets],
        "shape": list(source.shape),
        "target_shapes": [list(target.shape) for target in targets],
        "dtype": source.dtype,
        "target_dtype": targets[0].dtype if targets else None,
        "reason": reason,
    }


def hashes(header: Header) -> dict[str, str]:
    """Returns the hashes by which users know a file, from one pass over it; none for shards.

    `sha256` is of the whole file, and `short` its first ten digits. A safetensors file has a
    `sshs_model_hash` too, as training tools write it: the SHA-256 of what follows the header.
    """
    if len(header.files) > 1:
        return {}
    whole, data = hashlib.sha256(), hashlib.sha256()
    with header.path.open("rb") as file:
        beginning = file.read(9)
        plain = not (is_zip(beginning) or beginning.startswith(MAGIC))
        file.seek(0)
        whole.update(file.read(header.data_start) if plain else b"")
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            data.update(chunk)
    digest = whole.hexdigest()
    found = {"sha256": digest, "short": digest[:10]}
    return found | {"sshs_model_hash": data.hexdigest()} if plain else found
