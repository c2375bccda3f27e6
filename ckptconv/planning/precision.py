"""In which dtype a conversion writes each tensor.

`fp8` is for the layers of the UNet or transformer that diffusers' layerwise casting keeps in fp8
(`ModelMixin.enable_layerwise_casting`): its layers with weights, but for those below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ..dtypes import BLOCKS, CASTS, FLOATS, FP8
from ..errors import option
from ..maps.architecture import Architecture
from ..maps.ops import DROP
from .step import ASIDE, Step, Target

QUANTIZED_DTYPE = "bf16"
"""What a component with quantized weights becomes by default, as their users compute with them."""

KEPT = re.compile(
    r"pos_embed|patch_embed|norm|^proj_in$|^proj_out$"  # of every class
    r"|(?:^|\.)(?:t_embedder|cap_embedder)\b"  # of Z-Image
)
"""Names of layers that stay as stored: diffusers rounds no norm and no embedding. A test compares
them with what each class of diffusers asks for."""


def network_of(architecture: Architecture) -> str:
    """Returns the component that fp8 is for; empty if the architecture has none."""
    rooted = architecture.rooted
    return rooted.name if rooted.name in ("unet", "transformer", "controlnet") else ""


def dtype_of(target: Target, dtype: str, network: str) -> str:
    """Returns the dtype of a target that is cast.

    Args:
        target: as it is stored.
        dtype: a key of `CASTS`.
        network: from `network_of`.
    """
    if target.dtype not in FLOATS or (dtype == FP8 and not _is_rounded(target, network)):
        return target.dtype
    return CASTS[dtype]


def _is_rounded(target: Target, network: str) -> bool:
    layer, _, leaf = target.key.rpartition(".")
    return target.component == network and leaf in ("weight", "bias") and not KEPT.search(layer)


def cast_step(step: Step, dtype: str | None, network: str) -> Step:
    """Returns a step with its targets cast, but for what is only kept aside as it is.

    Args:
        step: of a plan.
        dtype: a key of `CASTS`; None casts nothing.
        network: from `network_of`.
    """
    kept = step.op is DROP and step.sources[0].dtype not in BLOCKS
    if dtype is None or kept:
        return step
    dtypes = [dtype_of(target, dtype, network) for target in step.targets]
    pairs = zip(step.targets, dtypes, strict=True)
    return replace(step, targets=tuple(replace(t, dtype=new) for t, new in pairs))


def kept_layers(targets: Iterable[Target], network: str) -> str:
    """Says how many tensors of the network fp8 leaves as stored, and why."""
    kept = [t.key.rpartition(".")[0] for t in targets if not _is_rounded(t, network)]
    why = Counter(found[0] if (found := KEPT.search(name)) else "no layer" for name in kept)
    counts = ", ".join(f"{count:,} of {name}" for name, count in why.items())
    return f"{len(kept):,} tensors of the {network} are not rounded to fp8 ({counts})"


def unquantized(steps: list[Step], dtype: str | None, network: str) -> tuple[list[Step], list[str]]:
    """Casts components with quantized weights to `QUANTIZED_DTYPE`, where no dtype does.

    Args:
        steps: of a plan.
        dtype: that the caller decided; fp8 leaves out many a weight.
        network: from `network_of`.

    Returns:
        The steps, and a note on each of these components.
    """
    found: dict[str, set[str]] = {}
    for step in steps:
        for target in step.targets if step.sources[0].dtype in BLOCKS else ():
            found.setdefault(target.component, set()).add(step.sources[0].dtype)
    if not found or dtype not in (None, FP8):
        return steps, []
    notes = [
        f"the {name} is quantized ({', '.join(sorted(dtypes))}): it is written, or computed with, "
        f"in {QUANTIZED_DTYPE}{' beside fp8' if dtype else ''}; {option('dtype')} decides otherwise"
        for name, dtypes in found.items()
        if name != ASIDE
    ]
    owned = [any(target.component in found for target in step.targets) for step in steps]
    pairs = zip(steps, owned, strict=True)
    return [cast_step(s, QUANTIZED_DTYPE, network) if own else s for s, own in pairs], notes
