"""Adapters (LoRA and its kin) that a conversion adds to the weights.

Training tools name the layers of an adapter in several ways, some with underscores for dots, which
cannot be undone. So every name that a tensor of the plan can have is written into a table, and the
keys of the adapter are looked up there.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FileRefused
from ..maps.architecture import Architecture
from ..maps.keymap import KeyMap
from ..reading.tensor import Header
from .adapter_kinds import LYCORIS_ROLES, change_of
from .components import best_match
from .step import Change, Step, Target

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lycoris_": "unet",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
"""How the name of a layer begins, and its component. After a prefix that ends with an underscore,
dots are written as underscores, too."""

LORA_ENDS = {
    "down": (".lora_down", ".lora_A", ".lora.down", "_lora.down", ".lora_linear_layer.down"),
    "up": (".lora_up", ".lora_B", ".lora.up", "_lora.up", ".lora_linear_layer.up"),
    "mid": (".lora_mid",),
    "magnitude": (".lora_magnitude_vector",),
}
ROLES = {
    **{f"{end}.weight": role for role, ends in LORA_ENDS.items() for end in ends},
    ".lora_magnitude_vector": "magnitude",
    ".alpha": "alpha",
    **{f".{role}": role for role in LYCORIS_ROLES},
}
"""How a key ends, and the role of the tensor in its layer."""

REFUSED = {
    ".dora_scale": "a DoRA of LyCORIS, whose magnitudes diffusers does not read",
    ".lora_B.bias": "a trained bias",
    ".diff": "a full difference",
    ".diff_b": "a full difference of a bias",
    ".w_norm": "a trained norm",
    ".b_norm": "the bias of a trained norm",
    ".oft_diag": "an OFT adapter",
    ".oft_blocks": "an OFT adapter",
}
"""How keys end that are known and cannot be merged."""

OLD_ENDS = {
    ".to_out.0": ".to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}
"""How the names of layers end, and how they ended in old releases of diffusers."""

METADATA = "lora_adapter_metadata"
"""The metadata entry in which diffusers notes the settings of PEFT, as JSON."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, and how strongly it applies."""

    header: Header
    scale: float = 1.0


def with_adapters(
    architecture: Architecture,
    steps: Sequence[Step],
    adapters: Sequence[Adapter],
    left_out: Collection[str] = (),
) -> tuple[tuple[Step, ...], list[str]]:
    """Adds adapters, in their order, to the steps of a plan.

    The layers of components that are left out are skipped; the sentences that come back say so.

    Raises:
        FileRefused: a key of an adapter has no place or its tensor a wrong shape; all are named.
    """
    layers = _layers(architecture, steps) if adapters else {}
    changes: dict[Target, list[Change]] = {}
    notes: list[str] = []
    for adapter in adapters:
        merge = _merge(adapter, layers, left_out)
        if merge.problems:
            raise _refusal(architecture, adapter, merge)
        notes += merge.notes
        for target, change in merge.changes.items():
            changes.setdefault(target, []).append(change)
    changed = []
    for step in steps:
        own = [change for target in step.targets for change in changes.get(target, ())]
        changed.append(replace(step, changes=(*step.changes, *own)) if own else step)
    return tuple(changed), notes


Layers = Mapping[str, Collection[Target]]
"""By every name that a layer can have, its weight; several where a name is ambiguous."""


def _layers(architecture: Architecture, steps: Iterable[Step]) -> Layers:
    keymaps = {
        component.name: {architecture.maps.keymap(s.keymap): None for s in component.sources}
        for component in architecture.models
        if component.name in PREFIXES.values()
    }
    layers: dict[str, dict[Target, None]] = {}  # the targets in order, each once
    for target in (target for step in steps for target in step.targets):
        if target.component not in keymaps or not target.key.endswith(".weight"):
            continue
        names = dict.fromkeys(_names(target.key, keymaps[target.component]))
        for prefix, component in PREFIXES.items():
            if component == target.component:
                for name in names:
                    flat = name.replace(".", "_") if prefix.endswith("_") else name
                    layers.setdefault(prefix + flat, {})[target] = None
    return layers


def _names(key: str, keymaps: Iterable[KeyMap]) -> Iterator[str]:
    """Yields every name, without prefix, of the layer that has a weight."""
    layer = key.removesuffix(".weight")
    # transformers 5 has no wrapper text_model in memory
    for name in (layer, layer.removeprefix("text_model.")):
        yield name
        for end, old in OLD_ENDS.items():
            if name.endswith(end):
                yield name.removesuffix(end) + old
    for keymap in keymaps:
        origin = keymap.origin(key)
        if origin and origin.parts == 1 and origin.op.keeps_order:
            original, _, leaf = origin.source.rpartition(".")
            if leaf == "weight":
                yield original


@dataclass(frozen=True, slots=True)
class _Merge:
    """What an adapter does to the tensors of a plan, and what is in the way, as sentences."""

    changes: dict[Target, Change] = field(default_factory=dict)
    misplaced: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Keys without a place, then tensors of wrong shapes."""
        return self.misplaced + self.unfit


def _merge(adapter: Adapter, layers: Layers, left_out: Collection[str] = ()) -> _Merge:
    """Looks up every layer of an adapter."""
    header, merge = adapter.header, _Merge()
    settings = _settings(header, merge.unfit)
    skipped: Counter[str] = Counter()
    names: dict[Target, str] = {}
    for name, keys in _keys_by_layer(header, merge.misplaced).items():
        component = next((c for prefix, c in PREFIXES.items() if name.startswith(prefix)), "")
        if component in left_out:
            skipped[component] += 1
            continue
        targets = layers.get(name) or layers.get(name.replace(".processor.", "."), ())
        if len(targets) != 1:
            first_key = next(iter(keys.values()))
            merge.misplaced.append(_misplaced(name, component, first_key, targets, layers))
            continue
        (target,) = targets
        if other := names.get(target):
            place = f"{target.component}/{target.key}"
            merge.misplaced.append(f"{name}: changes {place}, as {other} does")
            continue
        names[target] = name
        parts = {role: header.tensors[key] for role, key in keys.items()}
        layer = name.removeprefix(f"{component}.")
        try:
            change = change_of(layer, target, parts, settings.get(component, {}))
        except ValueError as error:
            merge.unfit.append(f"{name}: {error}")
        else:
            merge.changes[target] = replace(change, factor=change.factor * adapter.scale)
    merge.notes.extend(
        f"{header.path}: {count:,} layers of {component}, which is left out, are passed over"
        for component, count in skipped.items()
    )
    return merge


def _keys_by_layer(header: Header, problems: list[str]) -> dict[str, dict[str, str]]:
    """Returns the keys of an adapter by the name of the layer and the role of the tensor."""
    layers: dict[str, dict[str, str]] = {}
    for key in header.tensors:
        end = max((end for end in (*ROLES, *REFUSED) if key.endswith(end)), key=len, default="")
        if end in ROLES:
            first = layers.setdefault(key.removesuffix(end), {}).setdefault(ROLES[end], key)
            if first != key:
                problems.append(f"{key}: says the same as {first}")
        else:
            what = REFUSED.get(end, "not a key of a LoRA, LoHa or LoKr")
            problems.append(f"{key}: {what}; needed one of LoRA, LoHa or LoKr")
    if not header.tensors:
        problems.append("the file holds no tensors")
    return layers


def _misplaced(
    name: str, component: str, key: str, targets: Collection[Target], layers: Layers
) -> str:
    """Says why a layer of an adapter, which has a key, has no place."""
    if targets:
        return f"{name}: may be {' and '.join(f'{t.component}/{t.key}' for t in targets)}"
    if not component:
        return f"{key}: begins with none of {', '.join(PREFIXES)}"
    if not any(target.component == component for found in layers.values() for target in found):
        return f"{name}: there is no {component} to change"
    return f"{name}: {component} has no such layer"


def _settings(header: Header, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of PEFT that the metadata note, by component."""
    try:
        noted = json.loads(header.metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        problems.append(f"{METADATA} in the metadata is not JSON: {error}")
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in noted.items() if isinstance(noted, dict) else ():
        component, _, setting = key.partition(".")
        settings.setdefault(component, {})[setting] = value
    return settings


@functools.cache
def _published_layers(architecture: Architecture) -> Layers:
    header = architecture.layout()
    matches = [best_match(architecture, c, header, c.sources) for c in architecture.models]
    return _layers(architecture, [step for match in matches for step in match.steps.values()])


def _refusal(architecture: Architecture, adapter: Adapter, merge: _Merge) -> FileRefused:
    """Says what does not fit, and what the adapter is for, if that can be told."""
    fits, named = [], []
    for other in architecture.maps.architectures.values():
        if other.single or other.name == architecture.name:
            continue
        theirs = _merge(adapter, _published_layers(other))
        fits += [other.title] if not theirs.problems else []
        named += [other.title] if merge.misplaced and not theirs.misplaced else []
    hint = f"give an adapter that was trained on {architecture.title}"
    if titles := fits or named:
        hint = f"it is an adapter for {' or '.join(titles)}: give it to such a checkpoint"
    header = adapter.header
    base = header.metadata.get(
        "ss_base_model_version", header.metadata.get("modelspec.architecture")
    )
    return FileRefused(
        f"{header.path}: the adapter does not fit {architecture.title}"
        + (f"; its metadata say that it is for {base}" if base else ""),
        problems=merge.problems,
        hint=hint,
    )
