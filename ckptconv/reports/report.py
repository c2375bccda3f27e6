"""What a file is, as plain data: the content of `inspect --json`, `plan --json` and the tables."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..configs.config import class_of, configs
from ..detection.detect import Detection
from ..detection.spellings import EMA_PREFIX
from ..planning.plan import Plan, build_plan
from ..reading.source import is_zip
from ..reading.tensor import Header

__all__ = ["hashes", "inspection", "plan_rows"]


def inspection(detection: Detection) -> dict[str, Any]:
    """Returns everything that is known of a file; `architecture` is None if nothing matched."""
    header = detection.header
    data: dict[str, Any] = {
        "file": str(header.path),
        "size": header.size,
        "tensors": len(header.tensors),
        "architecture": None,
        "task": None,
        "pipeline": None,
        "prediction_type": None,
        "components": {},
        "evidence": list(detection.evidence),
        "missing": [],
        "unclaimed": [],
        "problems": [],
        "verdicts": {
            v.architecture: {"matches": v.matches, "failing": [line.text for line in v.failing]}
            for v in detection.verdicts
        },
        "ema": any(key.startswith(EMA_PREFIX) for key in header.tensors),
        "metadata": dict(header.metadata),
        "notes": list(detection.notes),
    }
    if detection.refusal:
        refusal = detection.refusal
        data["refusal"] = {
            "message": refusal.message,
            "problems": list(refusal.problems),
            "hint": refusal.hint,
        }
        return data
    architecture, task = detection.require()
    plan = build_plan(detection)
    data |= {
        "architecture": architecture.name,
        "title": architecture.title,
        "task": task.name,
        "pipeline": task.pipeline,
        "missing": list(plan.absent),
        "unclaimed": list(plan.unclaimed),
        "problems": list(plan.problems),
        "dropped": dict(Counter(step.reason for step in plan.steps if step.reason)),
    }
    for fact in detection.facts.values():
        if fact.name != "task":
            data[fact.name] = {"value": fact.value, "source": fact.source, "detail": fact.detail}
    if plan.problems:
        return data
    built = configs(plan)
    for component in architecture.models:
        if component.name in built:
            data["components"][component.name] = {
                "class": class_of(built[component.name]),
                **_weights(plan, component.name),
            }
    data["assumed"] = {
        f"{name}.{key}": config.values[key]
        for name, config in built.items()
        for key, origin in config.origins.items()
        if origin == "assumed"
    }
    return data


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Returns a row for every key of the file: what becomes of it."""
    rows: list[dict[str, Any]] = [
        {
            "source": source.name,
            "op": step.op.name,
            "targets": [f"{t.component}/{t.key}" for t in step.targets],
            "shape": list(source.shape),
            "target_shapes": [list(t.shape) for t in step.targets],
            "dtype": source.dtype,
            "target_dtype": step.targets[0].dtype if step.targets else None,
            "reason": step.reason,
        }
        for step in plan.steps
        for source in step.sources
    ]
    tensors = plan.detection.header.tensors
    rows += [
        {
            "source": key,
            "op": "unclaimed",
            "targets": [],
            "shape": list(tensors[key].shape),
            "target_shapes": [],
            "dtype": tensors[key].dtype,
            "target_dtype": None,
            "reason": "no key map knows it",
        }
        for key in plan.unclaimed
    ]
    return rows


def hashes(header: Header) -> dict[str, str]:
    """Returns the hashes that users know, from one pass over the file.

    `sha256` of the whole file, its first ten digits (`short`), and, of a safetensors file,
    `sshs_model_hash`, the SHA-256 of what follows the header, as training tools write it. None of
    a checkpoint that lies in several files.
    """
    if len(header.files) > 1:
        return {}
    whole, data = hashlib.sha256(), hashlib.sha256()
    with Path(header.path).open("rb") as file:
        pickled = is_zip(file.read(9))
        file.seek(0)
        whole.update(b"" if pickled else file.read(header.data_start))
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            data.update(chunk)
    digest = whole.hexdigest()
    found = {"sha256": digest, "short": digest[:10]}
    return found if pickled else found | {"sshs_model_hash": data.hexdigest()}


def _weights(plan: Plan, component: str) -> dict[str, Any]:
    steps = [s for s in plan.steps if any(t.component == component for t in s.targets)]
    sources = [source for step in steps for source in step.sources]
    return {
        "tensors": len(plan.tensors(component)),
        "parameters": sum(math.prod(source.shape) for source in sources),
        "bytes": sum(source.nbytes for source in sources),
        "dtypes": dict(Counter(source.dtype for source in sources).most_common()),
    }
