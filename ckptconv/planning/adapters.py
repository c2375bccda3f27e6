"""Adapters (LoRA and its kin) that a conversion adds to the weights.

Training tools name the layers of an adapter in several ways, some with underscores for dots, which
cannot be undone. So every name that a tensor of the plan can have is written into a table, and a
key of the adapter is looked up there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FileRefused
from ..maps.architecture import Architecture
from ..options import AdapterFile
from ..reading.source import open_header
from ..reading.tensor import Header
from .adapter_forms import change_of
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
"""How the name of a layer begins, and the component that has it. After a prefix that ends with an
underscore, dots are underscores, too."""

ROLES = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora.down.weight": "down",
    "_lora.down.weight": "down",
    ".lora_linear_layer.down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".lora.up.weight": "up",
    "_lora.up.weight": "up",
    ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".alpha": "alpha",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f".lokr_{name}": f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
}
"""How a key ends, and what the tensor is for its layer."""

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
"""How keys end that are known, and cannot be merged."""

ALIASES = {
    ".to_out.0": (".to_out",),
    ".q_proj": (".to_q",),
    ".k_proj": (".to_k",),
    ".v_proj": (".to_v",),
    ".out_proj": (".to_out",),
}
"""How names end that old releases of diffusers ended otherwise."""

METADATA = "lora_adapter_metadata"
"""Entry of the metadata in which diffusers notes the settings of PEFT, as JSON."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, and how strongly it applies."""

    header: Header
    scale: float = 1.0


def read_adapter(file: AdapterFile) -> Adapter:
    """Reads the header of an adapter.

    Raises:
        FileRefused: the file cannot be read.
    """
    return Adapter(open_header(file.path), file.scale)


def with_adapters(
    architecture: Architecture,
    steps: Sequence[Step],
    adapters: Iterable[Adapter],
    left_out: Iterable[str] = (),
) -> tuple[tuple[Step, ...], list[str]]:
    """Adds adapters to the steps of a plan.

    Args:
        architecture: of the checkpoint.
        steps: of the plan.
        adapters: in the order in which they are added.
        left_out: components that the file may have and that are not to be written: their part of
            an adapter is passed over.

    Returns:
        The steps, and sentences on what was passed over.

    Raises:
        FileRefused: a key of an adapter has no place, or a tensor of it a wrong shape; all of them
            are named.
    """
    adapters = tuple(adapters)
    homes = _homes(architecture, steps) if adapters else {}
    skipped = frozenset(left_out)
    changes: dict[Target, list[Change]] = {}
    notes: list[str] = []
    for adapter in adapters:
        found = _read(adapter, homes, skipped)
        if found.problems:
            raise _refusal(architecture, adapter, found)
        notes += found.notes
        for target, change in found.changes:
            changes.setdefault(target, []).append(change)
    changed = []
    for step in steps:
        own = [c for target in step.targets for c in changes.get(target, ())]
        changed.append(replace(step, changes=(*step.changes, *own)) if own else step)
    return tuple(changed), notes


Homes = Mapping[str, Sequence[Target]]
"""By every name that a layer can have, its weight; several where a name is ambiguous."""


def _homes(architecture: Architecture, steps: Iterable[Step]) -> Homes:
    homes: dict[str, list[Target]] = {}
    prefixes: dict[str, list[str]] = {}
    for prefix, component in PREFIXES.items():
        prefixes.setdefault(component, []).append(prefix)
    maps = {
        component.name: [
            architecture.maps.keymap(name)
            for name in dict.fromkeys(source.keymap for source in component.sources)
        ]
        for component in architecture.models
    }
    for step in steps:
        for target in step.targets:
            if target.component not in prefixes or not target.key.endswith(".weight"):
                continue
            origins = [keymap.origin(target.key) for keymap in maps.get(target.component, ())]
            originals = [
                origin.source
                for origin in origins
                if origin and origin.parts == 1 and origin.op.keeps_order
            ]
            names = dict.fromkeys(_names(target.key, originals))
            for prefix in prefixes[target.component]:
                for name in names:
                    full = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
                    if target not in homes.setdefault(full, []):
                        homes[full].append(target)
    return homes


def _names(key: str, originals: Iterable[str]) -> Iterator[str]:
    """Yields the names of the layer that has a weight, in every layout."""
    name = key.removesuffix(".weight")
    short = name.removeprefix("text_model.")  # transformers 5 has no such wrapper in memory
    for each in (name, short):
        yield each
        for end, others in ALIASES.items():
            if each.endswith(end):
                yield from (each.removesuffix(end) + other for other in others)
    yield from (o.removesuffix(".weight") for o in originals if o.endswith(".weight"))


@dataclass(frozen=True, slots=True)
class _Found:
    """What an adapter does to the tensors of a plan."""

    changes: tuple[tuple[Target, Change], ...]
    misplaced: tuple[str, ...]
    unfit: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Sentences: keys without a place, and tensors of wrong shapes."""
        return self.misplaced + self.unfit


def _read(adapter: Adapter, homes: Homes, skipped: frozenset[str]) -> _Found:
    header = adapter.header
    layers: dict[str, dict[str, str]] = {}
    misplaced: list[str] = []
    unfit: list[str] = []
    notes: list[str] = []
    changes: list[tuple[Target, Change]] = []
    for key in header.tensors:
        end = max((e for e in (*ROLES, *REFUSED) if key.endswith(e)), key=len, default="")
        if end in ROLES:
            first = layers.setdefault(key.removesuffix(end), {}).setdefault(ROLES[end], key)
            misplaced += [f"{key}: says the same as {first}"] if first != key else []
        else:
            what = REFUSED.get(end, "not a key of a LoRA, LoHa or LoKr")
            misplaced.append(f"{key}: {what}; needed one of LoRA, LoHa or LoKr")
    settings = _settings(header, unfit)
    passed: dict[str, int] = {}
    taken: dict[Target, str] = {}
    for name, keys in layers.items():
        component = next((c for p, c in PREFIXES.items() if name.startswith(p)), "")
        if component in skipped:
            passed[component] = passed.get(component, 0) + 1
            continue
        targets = homes.get(name) or homes.get(name.replace(".processor.", "."), ())
        if len(targets) != 1:
            misplaced.append(_misplaced(name, component, keys, targets, homes))
            continue
        (target,) = targets
        if other := taken.get(target):
            misplaced.append(f"{name}: changes {target.component}/{target.key}, as {other} does")
            continue
        taken[target] = name
        parts = {role: header.tensors[key] for role, key in keys.items()}
        try:
            short = name.removeprefix(f"{component}.")
            change = change_of(short, target, parts, settings.get(component, {}))
        except ValueError as error:
            unfit.append(f"{name}: {error}")
            continue
        changes.append((target, replace(change, factor=change.factor * adapter.scale)))
    for component, count in passed.items():
        notes.append(
            f"{header.path}: {count:,} layers of {component}, which is left out, are passed over"
        )
    if not header.tensors:
        misplaced.append("the file holds no tensors")
    return _Found(tuple(changes), tuple(misplaced), tuple(unfit), tuple(notes))


def _misplaced(
    name: str, component: str, keys: Mapping[str, str], targets: Sequence[Target], homes: Homes
) -> str:
    """Says why a layer of an adapter has no place."""
    if targets:
        return f"{name}: may be {' and '.join(f'{t.component}/{t.key}' for t in targets)}"
    if not component:
        return f"{next(iter(keys.values()))}: begins with none of {', '.join(PREFIXES)}"
    if not any(target.component == component for found in homes.values() for target in found):
        return f"{name}: there is no {component} to change"
    return f"{name}: {component} has no such layer"


def _settings(header: Header, problems: list[str]) -> dict[str, dict[str, Any]]:
    """Returns what the metadata note of PEFT's settings, by component; adds what is wrong."""
    text = header.metadata.get(METADATA, "{}")
    try:
        noted = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{METADATA} in the metadata is not JSON: {error}")
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in noted.items() if isinstance(noted, dict) else ():
        component, _, setting = key.partition(".")
        settings.setdefault(component, {})[setting] = value
    return settings


@functools.cache
def _published(architecture: Architecture) -> Homes:
    """Returns the names of the layers of a published file."""
    layout = architecture.layout()
    matches = [best_match(architecture, c, layout, c.sources) for c in architecture.models]
    return _homes(architecture, [step for match in matches for step in match.steps.values()])


def _refusal(architecture: Architecture, adapter: Adapter, found: _Found) -> FileRefused:
    """Says what does not fit, and what the adapter is for, if that can be told."""
    fits, named = [], []
    for other in architecture.maps.architectures.values():
        if other.single or other.name == architecture.name:
            continue
        theirs = _read(adapter, _published(other), frozenset())
        fits += [other.title] if not theirs.problems else []
        named += [other.title] if found.misplaced and not theirs.misplaced else []
    hint = f"give an adapter that was trained on {architecture.title}"
    if titles := fits or named:
        hint = f"it is an adapter for {' or '.join(titles)}: give it to such a checkpoint"
    header = adapter.header
    said = header.metadata.get(
        "ss_base_model_version", header.metadata.get("modelspec.architecture")
    )
    return FileRefused(
        f"{header.path}: the adapter does not fit {architecture.title}"
        + (f"; its metadata say that it is for {said}" if said else ""),
        problems=found.problems,
        hint=hint,
    )
