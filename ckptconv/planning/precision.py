"""In which dtype a conversion writes each tensor.

`fp8` is for the layers of the UNet or transformer that diffusers' layerwise casting keeps in fp8
(`ModelMixin.enable_layerwise_casting`): its layers with weights, but for those below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from ..dtypes import CASTS, FLOATS, FP8
from ..maps.architecture import Architecture
from .step import Step, Target

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


def cast_step(step: Step, dtype: str, network: str) -> Step:
    """Returns a step with its targets cast; see `dtype_of` for the arguments."""
    dtypes = [dtype_of(target, dtype, network) for target in step.targets]
    pairs = zip(step.targets, dtypes, strict=True)
    return replace(step, targets=tuple(replace(t, dtype=new) for t, new in pairs))


def kept_layers(targets: Iterable[Target], network: str) -> str:
    """Says how many tensors of the network fp8 leaves as stored, and why."""
    kept = [t.key.rpartition(".")[0] for t in targets if not _is_rounded(t, network)]
    why = Counter(found[0] if (found := KEPT.search(name)) else "no layer" for name in kept)
    counts = ", ".join(f"{count:,} of {name}" for name, count in why.items())
    return f"{len(kept):,} tensors of the {network} are not rounded to fp8 ({counts})"
