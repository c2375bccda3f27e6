"""Weights in fp8 with a scale: the value is the number that is stored, times the scale.

ComfyUI writes two layouts. The older marks the network with a tensor `scaled_fp8`; beside each
`X.weight` stands `X.scale_weight`, and perhaps `X.scale_input`. The newer one has `X.weight_scale`,
perhaps `X.input_scale`, and `X.comfy_quant`: JSON, as bytes, that names the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..dtypes import FLOATS
from ..files import read_range
from ..maps.ops import DROP, OPS
from ..reading.tensor import Header, Tensor
from .step import Change, Step, dropped

MARKER = "scaled_fp8"
WEIGHTS = {".scale_weight": ".weight", ".weight_scale": ".weight"}
"""How the key of a scale ends, and that of its weight."""
INPUTS = (".scale_input", ".input_scale")
"""How the key of a scale ends that activations are divided by, to compute in fp8 as well."""
FORMAT = ".comfy_quant"
FORMATS = ("float8_e4m3fn", "float8_e5m2")
SETTINGS = {"format", "full_precision_matrix_mult"}
"""What a format may say; a rotation or a block size, say, would change the values."""
FEW = 4096
"""Bytes of a format at most."""

FOLDED = "folded into its weight"


@dataclass(frozen=True, slots=True)
class Scales:
    """What a header says of scales.

    Attributes:
        header: without the keys that are no weights.
        scales: by key of the weight, its scale.
        dropped: why each of the other keys is left out.
        problems: scales that cannot be used.
    """

    header: Header
    scales: Mapping[str, Tensor]
    dropped: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def by_weight(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each weight that has a scale, and the scale."""
        return ((self.header.tensors[key], scale) for key, scale in self.scales.items())

    def steps(self, header: Header) -> dict[str, Step]:
        """Returns the steps for the keys that are no weights, by key.

        Args:
            header: of the file, with all of its keys.
        """
        return {key: dropped(header.tensors[key], why) for key, why in self.dropped.items()}


def read_scales(header: Header) -> Scales:
    """Returns the scales of a file; there are none in most.

    Args:
        header: of the file; of a format, its few bytes are read as well.
    """
    scales: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    problems: list[str] = []
    named: set[str] = set()
    for key in header.tensors:
        end = next((end for end in WEIGHTS if key.endswith(end)), None)
        if end:
            weight = key.removesuffix(end) + WEIGHTS[end]
            left_out[key] = FOLDED
            named.add(weight)
            if problem := _unfit(header, key, weight):
                problems.append(problem)
            elif weight in scales:
                problems.append(f"{key}: {weight} has another scale, {scales[weight].name}")
            else:
                scales[weight] = header.tensors[key]
        elif key.endswith(INPUTS):
            left_out[key] = "unused"
        elif key.endswith(FORMAT):
            left_out[key] = "unused"
            problems += _format_problems(header, key)
    for key in header.tensors:
        before, _, last = key.rpartition(".")
        if last == MARKER:
            left_out[key] = "unused"
        if (last == MARKER or key.endswith(FORMAT)) and not any(
            weight.startswith(before) for weight in named
        ):
            problems.append(f"{key}: says that weights have scales, and there is none")
    if not left_out:
        return Scales(header, {}, {}, ())
    kept = {key: info for key, info in header.tensors.items() if key not in left_out}
    return Scales(replace(header, tensors=kept), scales, left_out, tuple(problems))


def scaled(step: Step, scales: Mapping[Tensor, Tensor], problems: list[str]) -> Step:
    """Adds the scale of its source to a step, if it has one.

    Args:
        step: of a plan.
        scales: by weight.
        problems: gets a sentence where a scale cannot be applied.
    """
    (source,) = step.sources
    scale = scales.get(source)
    if scale is None or step.op is DROP:
        return step
    rows = math.prod(scale.shape) > 1
    if rows and step.op not in (OPS["rename"], OPS["squeeze"]):
        problems.append(f"{scale.name}: has a scale for each row, which {step.op.name} would move")
        return step
    changes = tuple(Change(t.key, "scale", (("scale", scale),)) for t in step.targets)
    return replace(step, changes=changes)


def _unfit(header: Header, key: str, weight: str) -> str | None:
    """Says why a scale cannot be used."""
    scale, info = header.tensors[key], header.tensors.get(weight)
    if info is None:
        return f"{key}: is the scale of {weight}, which is missing"
    if info.dtype not in FLOATS or scale.dtype not in FLOATS:
        return f"{key}: is {scale.dtype} for a weight of {info.dtype}, needed floats"
    if scale.numel != 1 and _rows(scale.shape) != info.shape[:1]:
        return (
            f"{key}: has shape {list(scale.shape)}, needed one number, or one for each row of "
            f"{list(info.shape)}"
        )
    return None


def _rows(shape: Iterable[int]) -> tuple[int, ...]:
    """Leaves axes of one element behind the first out."""
    first, *rest = (*shape, 1)
    return (first, *(n for n in rest if n != 1))


def _format_problems(header: Header, key: str) -> list[str]:
    info = header.tensors[key]
    if info.nbytes > FEW:
        return [f"{key}: has {info.nbytes:,} bytes, needed a short text in JSON"]
    try:
        said = json.loads(read_range(info.file, info.start, info.nbytes))
    except (ValueError, RecursionError):
        return [f"{key}: is not JSON"]
    if not isinstance(said, dict) or said.get("format") not in FORMATS or said.keys() - SETTINGS:
        return [f"{key}: the format is {json.dumps(said)[:100]}, needed {' or '.join(FORMATS)}"]
    return []
