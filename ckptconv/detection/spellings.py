"""Files whose keys have other names than the original ones, read under those.

A lone UNet, VAE or ControlNet may be in the diffusers layout already: the maps, read right to left,
tell its original names. A file that was stripped to the EMA copy of its UNet has the UNet's names
without their dots. After this, everything else sees one layout only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..maps.architecture import Architecture, KeyMaps, Source
from ..reading.tensor import Header

EMA_PREFIX = "model_ema."
EMA_OF = "model.diffusion_model."
EMA_NAMES = ("model_ema.diffusion_model", "model_ema.")
"""EMA copies are named after the UNet's keys: one of these, and what follows the UNet's prefix with
all dots removed."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION_IN = ("encoder.mid_block.attentions.0.", "decoder.mid_block.attentions.0.")
"""The attention of a VAE, as diffusers named its layers before release 0.17."""


def in_original_names(header: Header, maps: KeyMaps) -> Header:
    """Returns a header under original names, or as it is if it has them or none can be told.

    Args:
        header: of a file.
        maps: the known architectures.
    """
    architectures = maps.architectures.values()
    if _holds(header, (a for a in architectures if not a.single)):
        return header
    if any(key.startswith(EMA_PREFIX) for key in header.tensors) and (
        copies := _free(dict(_with_dots(header, maps)), header)
    ):
        return renamed(header, copies, "the EMA copy is all that the file has of its UNet")
    if _holds(header, architectures):
        return header
    best: dict[str, str] = {}
    for architecture in architectures:
        for source in {s.keymap: s for s in reversed(architecture.rooted.sources)}.values():
            names = _free(_backwards(header, architecture, source), header)
            if len(names) > len(best) and source.prefix + architecture.root in names.values():
                best = names
    if not best:
        return header
    return renamed(header, best, "the keys are those of the diffusers layout")


def present_name(key: str) -> str:
    """Returns the name that diffusers gives a tensor of a VAE today.

    >>> present_name("encoder.mid_block.attentions.0.query.weight")
    'encoder.mid_block.attentions.0.to_q.weight'
    """
    if not key.startswith(OLD_ATTENTION_IN):
        return key
    place, _, leaf = key.rpartition(".")
    before, _, name = place.rpartition(".")
    return f"{before}.{OLD_ATTENTION.get(name, name)}.{leaf}"


def renamed(header: Header, names: Mapping[str, str], note: str) -> Header:
    """Returns a header under other names.

    Args:
        header: of the file.
        names: the new name of each tensor that gets one, by its key in `header`; all differ.
        note: what was done, as a sentence.
    """
    tensors = {names.get(key, key): tensor for key, tensor in header.tensors.items()}
    return replace(header, tensors=tensors, notes=(*header.notes, note))


def _free(names: Mapping[str, str], header: Header) -> dict[str, str]:
    """Leaves out new names that a tensor of the file has already: neither tensor may be lost."""
    return {old: new for old, new in names.items() if new not in header.tensors}


def _holds(header: Header, architectures: Iterable[Architecture]) -> bool:
    """Whether the network of one of the architectures begins in the file."""
    return any(prefix + a.root in header.tensors for a in architectures for prefix in a.prefixes)


def _backwards(header: Header, architecture: Architecture, source: Source) -> dict[str, str]:
    """Returns original names by names in the diffusers layout, of the tensors that stay whole."""
    keymap = architecture.maps.keymap(source.keymap)
    names = {}
    for key in header.tensors:
        origin = keymap.origin(present_name(key))
        if origin and origin.parts == 1 and origin.op.keeps_order:
            names[key] = source.prefix + origin.source
    return names if len(set(names.values())) == len(names) else {}


def _with_dots(header: Header, maps: KeyMaps) -> Iterator[tuple[str, str]]:
    """Yields the name of an EMA copy, and that of the UNet's tensor that it is a copy of."""
    known: Mapping[str, str] = {
        key.removeprefix(EMA_OF).replace(".", ""): key
        for architecture in maps.architectures.values()
        for key in architecture.layout().tensors
        if key.startswith(EMA_OF)
    }
    for key in header.tensors:
        prefix = next((name for name in EMA_NAMES if key.startswith(name)), None)
        if prefix and (name := known.get(key.removeprefix(prefix))):
            yield key, name
