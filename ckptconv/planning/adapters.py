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
from ..maps.keymap import KeyMap, Origin
from ..reading.tensor import Header
from .adapter_kinds import LYCORIS_ROLES, change_of
from .components import best_match
from .step import Change, Step, Target, targets_of

NETWORK, T5 = ("unet", "transformer"), ("text_encoder_3", "text_encoder_2", "text_encoder")
PREFIXES: Mapping[str, Sequence[str]] = {
    "lora_unet_": NETWORK,
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": T5,
    "lycoris_": NETWORK,
    "unet.": ("unet",),
    "transformer.": ("transformer",),
    "diffusion_model.": NETWORK,
    "base_model.model.": NETWORK,
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": T5,
    "": ("transformer",),
}
"""How the name of a layer begins, and its component: the first of these that the architecture has.
After a prefix that ends with an underscore, dots are written as underscores, too."""

LORA_ENDS = {
    "down": (
        ".lora_down",
        ".lora_A",
        ".lora.down",
        "_lora.down",
        ".lora_linear_layer.down",
        ".down",
    ),
    "up": (".lora_up", ".lora_B", ".lora.up", "_lora.up", ".lora_linear_layer.up", ".up"),
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

XLABS: Mapping[str, tuple[str, int]] = {
    ".img_attn.qkv": (".processor.qkv_lora1", 3),
    ".txt_attn.qkv": (".processor.qkv_lora2", 3),
    ".img_attn.proj": (".processor.proj_lora1", 1),
    ".txt_attn.proj": (".processor.proj_lora2", 1),
    ".linear1": (".processor.qkv", 3),
    ".linear2": (".processor.proj", 1),
}
"""How the names of FLUX's layers end, how they end in the adapters of XLabs, and how many of the
parts that the layer has in diffusers are meant; as diffusers' `lora_conversion_utils` has it."""

CONTROL, CONTROL_ROLES = ("x_embedder", "img_in"), ("lora_A", "lora_down")
"""The layer that a control adapter of FLUX makes twice as wide, and what reads its columns."""

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
    layers = _layers(architecture, steps) if adapters else Layers({}, {})
    changes: dict[Target, list[Change]] = {}
    notes: list[str] = []
    embedder = layers.places.get("transformer.x_embedder", ())
    for adapter in adapters:
        for place in embedder:
            refuse_control(adapter.header, place.whole.shape[1])
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


@dataclass(frozen=True, slots=True)
class Place:
    """The weights that a layer of an adapter changes: the parts, in order, of one product.

    Where the original has the two halves of the only part in the other order, it is `swapped`.
    """

    targets: tuple[Target, ...]
    swapped: bool = False

    @property
    def whole(self) -> Target:
        """All parts as one."""
        rows = sum(target.shape[0] for target in self.targets if target.shape)
        first = self.targets[0]
        return replace(first, shape=(rows, *first.shape[1:])) if first.shape else first

    def shares(self, change: Change) -> Iterator[tuple[Target, Change]]:
        """Divides a change of the whole among the parts."""
        first = self.whole.shape[0] // 2 if self.swapped else 0
        for target in self.targets:
            yield target, replace(change, key=target.key, first=first)
            first += target.shape[0] if target.shape else 0


@dataclass(frozen=True, slots=True)
class Layers:
    """Where layers are, by every name that they can have; several places if a name is ambiguous.

    `prefixes` has the component of each prefix.
    """

    places: Mapping[str, Collection[Place]]
    prefixes: Mapping[str, str]


def _layers(architecture: Architecture, steps: Iterable[Step]) -> Layers:
    models = {component.name: component for component in architecture.models}
    prefixes = {
        prefix: next((name for name in choices if name in models), choices[0])
        for prefix, choices in PREFIXES.items()
        if prefix or not models.keys().isdisjoint(choices)
    }
    targets = targets_of(steps)
    places: dict[str, dict[Place, None]] = {}  # in order, each once
    for name in dict.fromkeys(prefixes.values()):
        if not (own := targets.get(name, {})):
            continue
        found = [(n, Place((t,))) for key, t in own.items() for n in _names(key)]
        for keymap in dict.fromkeys(s.keymap for s in models[name].sources):
            bound = architecture.maps.keymap(keymap).bound_by_targets(own)
            found += _original_places(bound, own)
        for prefix in (prefix for prefix, component in prefixes.items() if component == name):
            for layer, place in found:
                flat = layer.replace(".", "_") if prefix.endswith("_") else layer
                places.setdefault(prefix + flat, {})[place] = None
    return Layers(places, prefixes)


def _names(key: str) -> Iterator[str]:
    """Yields every name in diffusers, without prefix, of the layer that has a weight."""
    layer, _, leaf = key.rpartition(".")
    if leaf != "weight":
        return
    # transformers 5 has no wrapper text_model in memory
    for name in (layer, layer.removeprefix("text_model.")):
        yield name
        for end, old in OLD_ENDS.items():
            if name.endswith(end):
                yield name.removesuffix(end) + old


def _original_places(keymap: KeyMap, targets: Mapping[str, Target]) -> Iterator[tuple[str, Place]]:
    """Yields the original names of layers, without prefix, and what they have become."""
    groups: dict[str, tuple[Origin, dict[int, Target]]] = {}
    for key, target in targets.items():
        if origin := keymap.origin(key):
            groups.setdefault(origin.source, (origin, {}))[1][origin.part] = target
    for source, (origin, parts) in groups.items():
        layer, _, leaf = source.rpartition(".")
        if leaf != "weight" or len(parts) != origin.parts or origin.op.order == "transposed":
            continue
        place = Place(
            tuple(parts[n] for n in range(origin.parts)), origin.op.order == "halves swapped"
        )
        yield layer, place
        for end, (other, count) in XLABS.items():
            if layer.endswith(end):
                yield layer.removesuffix(end) + other, Place(place.targets[:count])


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
        component = next((c for p, c in layers.prefixes.items() if name.startswith(p)), "")
        if component in left_out:
            skipped[component] += 1
            continue
        found = layers.places
        places = found.get(name) or found.get(name.replace(".processor.", "."), ())
        if len(places) != 1:
            first_key = next(iter(keys.values()))
            merge.misplaced.append(_misplaced(name, component, first_key, places, layers))
            continue
        (place,) = places
        if other := next((names[target] for target in place.targets if target in names), None):
            what = " and ".join(f"{t.component}/{t.key}" for t in place.targets)
            merge.misplaced.append(f"{name}: changes {what}, as {other} does")
            continue
        names |= dict.fromkeys(place.targets, name)
        parts = {role: header.tensors[key] for role, key in keys.items()}
        layer = name.removeprefix(f"{component}.")
        try:
            change = change_of(layer, place.whole, parts, settings.get(component, {}))
        except ValueError as error:
            merge.unfit.append(f"{name}: {error}")
        else:
            change = replace(change, factor=change.factor * adapter.scale)
            merge.changes.update(place.shares(change))
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
    name: str, component: str, key: str, places: Collection[Place], layers: Layers
) -> str:
    """Says why a layer of an adapter, which has a key, has no place."""
    if places:
        found = (f"{place.whole.component}/{place.whole.key}" for place in places)
        return f"{name}: may be {' and '.join(found)}"
    if not component:
        return f"{key}: begins with none of {', '.join(layers.prefixes)}"
    if not any(p.whole.component == component for found in layers.places.values() for p in found):
        return f"{name}: there is no {component} to change"
    return f"{name}: {component} has no such layer"


def refuse_control(header: Header, columns: int) -> None:
    """Refuses an adapter that makes the first layer of FLUX's transformer read a control image.

    Args:
        header: of the adapter.
        columns: that the layer has.

    Raises:
        FileRefused: it is such an adapter.
    """
    for key, tensor in header.tensors.items():
        layer, _, role = key.replace(".weight", "").rpartition(".")
        if role in CONTROL_ROLES and layer.endswith(CONTROL) and tensor.shape[1:] == (2 * columns,):
            raise FileRefused(
                f"{header.path}: is a control adapter of FLUX.1 (Depth or Canny): it makes "
                f"{layer} read {2 * columns} channels, latents and a control image, where the "
                f"transformer has {columns}",
                hint="load it with FluxControlPipeline.load_lora_weights of diffusers, or take the "
                "checkpoint FLUX.1 Depth or Canny",
            )


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
