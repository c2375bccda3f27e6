"""Files whose keys have other names than the original ones, read under those.

Programs save the same network under many names. A network is found by its structure: by the keys
that are its root in its map, whatever stands before them. Wrappers of training leave a segment in
every key, and a map lists the other spellings of single layers. A lone UNet, VAE or ControlNet may
be in the diffusers layout already: the maps, read right to left, tell its original names. A file
that was stripped to the EMA copy of its UNet has the UNet's names without their dots. After this,
everything else sees one layout only; every tensor keeps the name that it has in its file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import replace

from ..maps.architecture import UNET_ROOT, Architecture, Component, KeyMaps, Source
from ..reading.tensor import Header, Tensor

CONV_OUT = "out.2.weight"
"""The last layer of a UNet, which a ControlNet, the copy of its first half, does not have."""

STRAYS = 20
"""Of so many keys one may be a stray, beside those that begin with a prefix."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Segments that DataParallel, `torch.compile`, FSDP and activation checkpointing leave in keys."""

EMA_PREFIX = "model_ema."
EMA_OF = "model.diffusion_model."
EMA_NAMES = ("model_ema.diffusion_model", "model_ema.")
"""EMA copies are named after the UNet's keys: one of these, and what follows the UNet's prefix with
all dots removed."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION_IN = ("encoder.mid_block.attentions.0.", "decoder.mid_block.attentions.0.")
"""The attention of a VAE, as diffusers named its layers before release 0.17."""


FLAT = "embeddings.token_embedding.weight"
"""In a text encoder: its names lack the segment `text_model.`."""
HEADED = "model.embed_tokens.weight"
"""In a text encoder: its names are those of a language model with its head."""


def unwrapped(header: Header, maps: KeyMaps) -> Header:
    """Returns a header without what wrappers add to its keys, and with the UNet where it belongs.

    Args:
        header: of a file.
        maps: the known architectures.
    """
    split = {key: key.split(".") for key in header.tensors if "." in key}
    bare = {
        key: ".".join(s for s in segments if s not in WRAPPERS)
        for key, segments in split.items()
        if not WRAPPERS.isdisjoint(segments)
    }
    found = " and ".join(sorted({s for key in bare for s in split[key]} & WRAPPERS))
    header = renamed(header, bare, f"the keys are read without the wrapper {found}")
    if not _holds(header, maps.architectures.values()):
        header = _without_prefix(header, maps)
    unets = [p for p in _places(header, (UNET_ROOT, CONV_OUT)) if p not in ("", EMA_OF)]
    if unets and not (UNET_ROOT in header.tensors and CONV_OUT in header.tensors):
        header = _moved(header, dict.fromkeys(unets, EMA_OF))
    return header


def respelled(header: Header, architecture: Architecture) -> Header:
    """Returns a header with every component where its architecture has it, in the usual spelling.

    Args:
        header: without what wrappers add to its keys.
        architecture: of the file.
    """
    places: dict[str, Source] = {}
    for component in architecture.models:
        if component is not architecture.rooted:
            places |= _elsewhere(header, architecture, component, places.keys())
    if source := places.pop("", None):  # whatever its map does not know is another component's
        keymap = architecture.maps.keymap(source.keymap)
        names = {key: source.prefix + key for key in header.tensors if keymap.match(key)}
        header = renamed(header, names, f"keys without a prefix are read as {source.prefix}")
    header = _moved(header, {prefix: source.prefix for prefix, source in places.items()})
    usual = {}
    for source in dict.fromkeys(s for c in architecture.models for s in c.sources):
        keymap, start = architecture.maps.keymap(source.keymap), source.prefix
        for key in header.tensors if keymap.words.spellings else ():
            if key.startswith(start) and key != (
                name := start + keymap.spelled(key.removeprefix(start))
            ):
                usual[key] = name
    some = next(iter(usual), "")
    return renamed(header, usual, f"{len(usual):,} keys have another spelling, such as {some}")


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
    """Returns the name that diffusers gives a tensor of a VAE today, and transformers one of T5.

    >>> present_name("encoder.mid_block.attentions.0.query.weight")
    'encoder.mid_block.attentions.0.to_q.weight'
    >>> present_name("encoder.embed_tokens.weight")
    'shared.weight'
    """
    if key == "encoder.embed_tokens.weight":
        return "shared.weight"
    if not key.startswith(OLD_ATTENTION_IN):
        return key
    place, _, leaf = key.rpartition(".")
    before, _, name = place.rpartition(".")
    return f"{before}.{OLD_ATTENTION.get(name, name)}.{leaf}"


def current_name(key: str, stored: Container[str]) -> str:
    """Returns the name that a tensor has today, given the names of its whole component.

    >>> current_name("model.norm.weight", {"model.norm.weight", "model.embed_tokens.weight"})
    'norm.weight'
    """
    if FLAT in stored and not key.startswith("text_projection."):
        return f"text_model.{key}"
    if HEADED in stored:
        return key.removeprefix("model.")
    return present_name(key)


def renamed(header: Header, names: Mapping[str, str], note: str) -> Header:
    """Returns a header under other names, and with a note on that, if there are any.

    A tensor whose new name another one has keeps its own, and is noted as the other's twin.

    Args:
        header: of the file.
        names: the new name of each tensor that gets one, by its key in `header`.
        note: what was done, as a sentence.
    """
    if not names:
        return header
    tensors: dict[str, Tensor] = {}
    twins = dict(header.twins)
    taken = header.tensors.keys() - names.keys()
    for key, tensor in header.tensors.items():
        new = names.get(key, key)
        if new != key and new in taken:
            twins[key], new = new, key
        taken.add(new)
        tensors[new] = tensor
    return replace(header, tensors=tensors, twins=twins, notes=(*header.notes, note))


def _moved(header: Header, places: Mapping[str, str]) -> Header:
    """Returns a header in which what begins with one prefix begins with another."""
    names = {}
    for key in header.tensors if places else ():
        if starts := [prefix for prefix in places if key.startswith(prefix)]:
            start = max(starts, key=len)
            names[key] = places[start] + key.removeprefix(start)
    said = ", ".join(f"{old} as {new}" for old, new in places.items())
    return renamed(header, names, f"the keys are read with other prefixes: {said}")


def _places(header: Header, root: Iterable[str]) -> list[str]:
    """Returns the prefixes with which all keys of a root are there."""
    first, *others = root
    found = (
        key[: -len(first)]
        for key in header.tensors
        if key.endswith(first) and (key == first or key[-len(first) - 1] == ".")
    )
    return [p for p in found if all(p + other in header.tensors for other in others)]


def _elsewhere(
    header: Header, architecture: Architecture, component: Component, taken: Collection[str]
) -> dict[str, Source]:
    """Returns the prefixes under which a component is, beside those that its sources have.

    Of several networks of its kind, the first in the file is the one that its name says, or that no
    name says is another. Those of the same width are that one once more.
    """
    found: dict[str, tuple[str, Source]] = {}  # by the key of its root
    for source in component.sources:
        if keys := architecture.maps.keymap(source.keymap).words.root:
            for prefix in _places(header, keys):
                found.setdefault(prefix + keys[0], (prefix, source))
    owners = {s.prefix for c in architecture.models for s in c.sources if s.prefix} | {*taken}
    here = [key for key, (prefix, source) in found.items() if prefix == source.prefix]
    named: list[str] = []
    unnamed: list[str] = []
    for key, (prefix, _) in found.items():
        called = [
            other.name
            for other in architecture.models
            if any(f".{word}." in f".{prefix}" for word in other.aliases)
        ]
        if prefix not in owners and (not called or component.name in called):
            (named if called else unnamed).append(key)
    places = [*here[:1], *named, *unnamed]
    return {
        found[key][0]: found[key][1]
        for key in places
        if key not in here and header.tensors[key].shape == header.tensors[places[0]].shape
    }


def _without_prefix(header: Header, maps: KeyMaps) -> Header:
    """Returns a header without what all keys but strays begin with, if a network is left then."""
    bare, start = header, ""
    while not _holds(bare, maps.architectures.values()):
        starts = Counter(key.partition(".")[0] for key in bare.tensors if "." in key)
        first, count = starts.most_common(1)[0] if starts else ("", 0)
        if not starts or (len(header.tensors) - count) * STRAYS > len(header.tensors):
            found = (
                _places(bare, (UNET_ROOT, CONV_OUT)) or in_original_names(bare, maps) is not bare
            )
            return bare if found else header
        start += f"{first}."
        names = {k: k.removeprefix(start) for k in header.tensors if k.startswith(start)}
        bare = renamed(header, names, f"the keys are read without {start}, which they begin with")
    return bare


def _free(names: Mapping[str, str], header: Header) -> dict[str, str]:
    """Leaves out new names that a tensor of the file has already: neither tensor may be lost."""
    return {old: new for old, new in names.items() if new not in header.tensors}


def is_there(architecture: Architecture, prefix: str, header: Header) -> bool:
    """Whether the network that tells an architecture is in the file; of a UNet, both its ends."""
    ends = (UNET_ROOT, CONV_OUT) if architecture.root == UNET_ROOT else (architecture.root,)
    return all(prefix + key in header.tensors for key in ends)


def _holds(header: Header, architectures: Iterable[Architecture]) -> bool:
    """Whether the network of one of the architectures begins in the file."""
    return any(prefix + a.root in header.tensors for a in architectures for prefix in a.prefixes)


def _backwards(header: Header, architecture: Architecture, source: Source) -> dict[str, str]:
    """Returns original names by those of the diffusers layout, if most tensors have one."""
    keymap = architecture.maps.keymap(source.keymap)
    names = {}
    for key in header.tensors:
        origin = keymap.origin(present_name(key))
        if origin and origin.parts == 1 and origin.op.keeps_order:
            names[key] = source.prefix + origin.source
    most = 2 * len(names) > len(header.tensors)  # a few names are alike in many networks
    return names if most and len(set(names.values())) == len(names) else {}


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
