"""The blocks of a network, named as diffusers names them and measured on a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..planning.plan import Plan
from ..planning.step import Target


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a component."""

    name: str  # as diffusers names it, such as `down_blocks.0`
    channels: int  # of the output; 0 where that means nothing
    resnets: int
    attention: tuple[int, ...]  # the number of transformer blocks in each attention module
    resamples: str  # `down`, `up` or empty
    parameters: int
    original: tuple[str, ...]  # the blocks of the file that its tensors come from


_BLOCK = re.compile(
    r"((?:encoder\.|decoder\.)?(?:down_blocks|up_blocks)\.\d+|.*?layers\.\d+|"
    r"(?:(?:single_)?transformer_blocks|encoder\.block)\.\d+)\."
    r"|((?:(?:encoder|decoder|text_model)\.)?[^.]+)"
)
_ORIGINAL = re.compile(r".*?(?:blocks?|layers|down|up)(?:\.\d+)+|.*?(?=\.(?:weight|bias)$)")
_WIDTHS = (
    *("resnets.0.conv2.weight", "weight", "linear_2.weight", "mlp.fc2.weight"),
    *("ff.net.2.weight", "proj_out.weight", "feed_forward.w2.weight"),
    *("layer.1.DenseReluDense.wo.weight", "mlp.down_proj.weight"),
)
"""The first of these tensors in a block has as many rows as the block has output channels."""
_EMBEDDINGS = ("shared", "embed_tokens")
"""Blocks that have a row for each token, and the channels as columns."""
_RESAMPLERS = {"downsamplers": "down", "upsamplers": "up"}
_ORDER = (
    *("embeddings", "embed_tokens", "conv_in", "time_embedding", "add_embedding"),
    *("t_embedder", "all_x_embedder", "x_pad_token", "noise_refiner"),
    *("cap_embedder", "cap_pad_token", "context_refiner"),
    *("shared", "pos_embed", "x_embedder", "context_embedder", "time_text_embed"),
    *("distilled_guidance_layer", "transformer_blocks", "single_transformer_blocks"),
    *("down_blocks", "encoder", "block", "layers", "mid_block", "up_blocks"),
    *("conv_norm_out", "final_layer_norm", "norm", "all_final_layer", "norm_out"),
    *("text_projection", "conv_out", "proj_out", "quant_conv"),
)


def blocks(plan: Plan, component: str) -> list[Block]:
    """Returns the blocks of a component in the order in which data pass through them."""
    members: dict[str, dict[str, Target]] = {}
    originals: dict[str, list[str]] = {}
    for step in plan.steps:
        for target in step.targets:
            if target.component == component:
                found = _BLOCK.match(target.key)
                name = found[1] or found[2] if found else target.key
                members.setdefault(name, {})[target.key.removeprefix(f"{name}.")] = target
                originals.setdefault(name, []).append(step.sources[0].name)
    return [_block(name, members[name], originals[name]) for name in sorted(members, key=_position)]


def _block(name: str, tensors: Mapping[str, Target], originals: Iterable[str]) -> Block:
    return Block(
        name,
        next((tensors[k].shape[name in _EMBEDDINGS] for k in _WIDTHS if k in tensors), 0),
        _entries(tensors, "resnets"),
        tuple(
            _entries(tensors, f"attentions.{n}.transformer_blocks")
            for n in range(_entries(tensors, "attentions"))
        ),
        next((_RESAMPLERS[r] for key in tensors if (r := key.split(".")[0]) in _RESAMPLERS), ""),
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        tuple(dict.fromkeys(f[0] if (f := _ORIGINAL.match(key)) else key for key in originals)),
    )


def _entries(tensors: Iterable[str], container: str) -> int:
    """Returns how many entries a container has."""
    start = f"{container}."
    return len({k[len(start) :].partition(".")[0] for k in tensors if k.startswith(start)})


def _position(name: str) -> tuple[bool, int, int]:
    """Sorts blocks in the order of the data: encoder before decoder, then `_ORDER`, then number."""
    if name == "post_quant_conv":  # the first of the decoder
        return True, -1, 0
    root = re.sub(r"^(encoder|decoder|text_model)\.", "", name).partition(".")[0]
    number = re.search(r"(\d+)$", name)
    return (
        name.startswith("decoder."),
        _ORDER.index(root) if root in _ORDER else len(_ORDER),
        int(number[1]) if number else 0,
    )
