"""Weights in fp8 with a scale: the value is the stored number times the scale.

ComfyUI writes two layouts. The older marks the network with a tensor `scaled_fp8`; beside each
`X.weight` stands `X.scale_weight`, and perhaps `X.scale_input`. The newer one has `X.weight_scale`,
perhaps `X.input_scale`, and `X.comfy_quant`: JSON, as bytes, that names the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..dtypes import FLOATS
from ..files import read_range
from ..maps.ops import DROP, OPS
from ..reading.tensor import Header, Tensor
from .step import Change, Step, dropped

MARKER, FORMAT = "scaled_fp8", "comfy_quant"
FOLDED, UNUSED = "folded into its weight", "unused"
REASONS = {
    **dict.fromkeys(("scale_weight", "weight_scale"), FOLDED),
    # activations are divided by these, to compute in fp8 as well
    **dict.fromkeys(("scale_input", "input_scale"), UNUSED),
    **dict.fromkeys((MARKER, FORMAT), UNUSED),
}
"""By the last segment of a key that is no weight, why it is dropped."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
SETTINGS = {"format", "full_precision_matrix_mult"}
"""What a format may set; a rotation or a block size, say, would change the values."""
FORMAT_BYTES = 4096
"""The size of a format, at most."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales in a header.

    Attributes:
        header: without the keys that are no weights.
        by_weight: the scale of each weight that has one.
        steps: that drop the keys that are no weights.
        problems: scales that cannot be used.
    """

    header: Header
    by_weight: Mapping[Tensor, Tensor]
    steps: Mapping[str, Step]
    problems: tuple[str, ...]


def read_scales(header: Header) -> Scales:
    """Returns the scales of a file, which most have none of; reads the few bytes of each format."""
    by_weight: dict[Tensor, Tensor] = {}
    steps: dict[str, Step] = {}
    problems: list[str] = []
    scaled_weights: list[str] = []
    for key, tensor in header.tensors.items():
        module, dot, last = key.rpartition(".")
        if last not in REASONS or not (dot or last == MARKER):
            continue
        steps[key] = dropped(tensor, REASONS[last])
        if last == FORMAT:
            problems += _format_problems(key, tensor)
        if REASONS[last] != FOLDED:
            continue
        name = f"{module}.weight"
        scaled_weights.append(name)
        weight = header.tensors.get(name)
        if weight is None:
            problems.append(f"{key}: is the scale of {name}, which is missing")
        elif problem := _unfit(weight, tensor):
            problems.append(f"{key}: {problem}")
        elif weight in by_weight:
            problems.append(f"{key}: {name} has another scale, {by_weight[weight].name}")
        else:
            by_weight[weight] = tensor
    for key in steps:
        module, _, last = key.rpartition(".")
        announces = last in (MARKER, FORMAT)
        if announces and not any(name.startswith(module) for name in scaled_weights):
            problems.append(f"{key}: says that weights have scales, and there is none")
    weights = {key: tensor for key, tensor in header.tensors.items() if key not in steps}
    return Scales(replace(header, tensors=weights), by_weight, steps, tuple(problems))


def scaled(step: Step, scales: Mapping[Tensor, Tensor], problems: list[str]) -> Step:
    """Adds the scale of its source to a step; a scale that cannot be applied is a problem."""
    (source,) = step.sources
    scale = scales.get(source)
    if scale is None or step.op is DROP:
        return step
    if scale.numel > 1 and step.op not in (OPS["rename"], OPS["squeeze"]):
        problems.append(f"{scale.name}: has a scale for each row, which {step.op.name} would move")
        return step
    changes = tuple(Change(t.key, "scale", (("scale", scale),)) for t in step.targets)
    return replace(step, changes=changes)


def _unfit(weight: Tensor, scale: Tensor) -> str:
    """Says why a scale cannot be applied; empty if it can."""
    if weight.dtype not in FLOATS or scale.dtype not in FLOATS:
        return f"is {scale.dtype} for a weight of {weight.dtype}, needed floats"
    if scale.numel != 1 and _without_ones(scale.shape) != weight.shape[:1]:
        needed = f"one number, or one for each row of {list(weight.shape)}"
        return f"has shape {list(scale.shape)}, needed {needed}"
    return ""


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """Leaves out the axes of one element, but for the first."""
    first, *rest = (*shape, 1)
    return (first, *(n for n in rest if n != 1))


def _format_problems(key: str, tensor: Tensor) -> list[str]:
    if tensor.nbytes > FORMAT_BYTES:
        return [f"{key}: has {tensor.nbytes:,} bytes, needed a short text in JSON"]
    try:
        found = json.loads(read_range(tensor.file, tensor.start, tensor.nbytes))
    except (ValueError, RecursionError):
        return [f"{key}: is not JSON"]
    if not isinstance(found, dict) or found.get("format") not in FORMATS or found.keys() - SETTINGS:
        return [f"{key}: the format is {json.dumps(found)[:100]}, needed {' or '.join(FORMATS)}"]
    return []
