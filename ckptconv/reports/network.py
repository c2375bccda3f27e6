"""The network as a picture: its blocks, named as diffusers names them, measured on a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..planning.plan import Plan, Target

__all__ = ["Block", "blocks"]


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a component.

    Attributes:
        name: as diffusers names it, such as `down_blocks.0`.
        channels: it gives; 0 where that means nothing.
        resnets: number of residual layers.
        attention: for each attention module, the number of transformer blocks in it.
        resamples: `down`, `up` or empty.
        parameters: number of elements of its tensors.
        original: where its tensors stand in the file: the first segments of their keys.
    """

    name: str
    channels: int
    resnets: int
    attention: tuple[int, ...]
    resamples: str
    parameters: int
    original: tuple[str, ...]


_NUMBERED = re.compile(r"((?:encoder\.|decoder\.)?(?:down_blocks|up_blocks)\.\d+|.*?layers\.\d+)\.")
_PLAIN = re.compile(r"((?:(?:encoder|decoder|text_model)\.)?[^.]+)")
_ORDER = (
    *("embeddings", "conv_in", "time_embedding", "add_embedding"),
    *("down_blocks", "encoder", "mid_block", "up_blocks"),
    *("conv_norm_out", "final_layer_norm", "text_projection", "conv_out", "quant_conv"),
)


def blocks(plan: Plan, component: str) -> list[Block]:
    """Returns the blocks of a component in the order in which data pass through them.

    Args:
        plan: of the file.
        component: such as `unet`, `vae` or `text_encoder`.
    """
    members: dict[str, list[tuple[Target, str]]] = {}
    for step in plan.steps:
        for target in step.targets:
            if target.component == component:
                found = _NUMBERED.match(target.key) or _PLAIN.match(target.key)
                name = found[1] if found else target.key
                members.setdefault(name, []).append((target, step.sources[0].name))
    made = [_block(name, pairs) for name, pairs in members.items()]
    return sorted(made, key=lambda block: _rank(block.name))


def _block(name: str, pairs: list[tuple[Target, str]]) -> Block:
    tensors = {slot.key.removeprefix(name + "."): slot for slot, _ in pairs}
    resample = {"downsamplers": "down", "upsamplers": "up"}
    roots = {key.partition(".")[0] for key in tensors}
    return Block(
        name,
        _channels(tensors),
        _entries(tensors, "resnets"),
        tuple(
            _entries(tensors, f"attentions.{n}.transformer_blocks")
            for n in range(_entries(tensors, "attentions"))
        ),
        next((word for root, word in resample.items() if root in roots), ""),
        sum(math.prod(slot.shape) for slot, _ in pairs),
        _common(original for _, original in pairs),
    )


def _channels(tensors: Mapping[str, Target]) -> int:
    """Returns the output channels of a block's last convolution, or of its own one."""
    for key in ("resnets.0.conv2.weight", "weight", "linear_2.weight", "mlp.fc2.weight"):
        if key in tensors:
            return tensors[key].shape[0]
    return 0


def _entries(tensors: Mapping[str, Target], container: str) -> int:
    start = container + "."
    return len({k[len(start) :].partition(".")[0] for k in tensors if k.startswith(start)})


def _common(originals: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the original blocks: keys up to the first number and its neighbour."""
    names = []
    for key in originals:
        found = re.match(r"(.*?(?:blocks?|layers|down|up)(?:\.\d+)+)", key)
        names.append(found[1] if found else re.sub(r"\.(weight|bias)$", "", key))
    return tuple(dict.fromkeys(names))


def _rank(name: str) -> tuple[int, int, int]:
    """Sorts blocks as data pass through: encoder before decoder, then by `_ORDER` and number."""
    part = re.sub(r"^(encoder|decoder|text_model)\.", "", name)
    late = name.startswith("decoder.")
    if name == "post_quant_conv":  # the first of the decoder
        return 1, -1, 0
    root = part.partition(".")[0]
    place = _ORDER.index(root) if root in _ORDER else len(_ORDER)
    number = re.search(r"(\d+)$", name)
    return int(late), place, int(number[1]) if number else 0
