"""What the real classes of diffusers and transformers expect, asked on the meta device.

A class is built from a configuration without memory for its weights; its names and shapes are
compared with those of a folder. Nothing of a folder is run: the class is one that an architecture
names, and what stands in a configuration only reaches its constructor.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..libraries import LIBRARIES, find_class, tied

MOST_LAYERS = 200
"""More of anything that a configuration counts would only take time and memory: the largest
published count is 32."""
COUNTS = ("depths", "layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
LARGEST = 1 << 20
"""No width, vocabulary or size is larger."""

BACKBONES = ("bit",)
"""What a configuration may name as the model inside: others would be loaded from a hub."""
NOT_ASKED = {
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "torch_dtype",
    "transformers_version",
}
"""What transformers' configurations take and models are not made of."""


class Unbuildable(ValueError):
    """A class cannot be built from a configuration."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The tensors of a model, by name.

    Attributes:
        shapes: of each tensor.
        integers: names of those that are no floats.
    """

    shapes: Mapping[str, tuple[int, ...]]
    integers: frozenset[str]


def expected(library: str, name: str, config: Mapping[str, Any]) -> Expected:
    """Returns the tensors of a model of a class.

    Args:
        library: `diffusers`, `transformers` or a package of `diffusers.pipelines`.
        name: of the class.
        config: its configuration; entries that the class does not know are left out.

    Raises:
        Unbuildable: there is no such class, or the configuration makes no sense to it.
    """
    known = defaults(library, name)
    wanted = {key: value for key, value in config.items() if key in known}
    _check_sizes(name, wanted)
    return _expected(library, name, json.dumps(wanted, sort_keys=True))


def defaults(library: str, name: str) -> Mapping[str, Any]:
    """Returns what a class takes from a configuration, and the values where it is silent.

    Raises:
        Unbuildable: there is no such class.
    """
    return MappingProxyType(_defaults(library, name))


def has_class(library: str, name: str) -> bool:
    """Tells whether a library offers a class of this name, without importing it."""
    return library in LIBRARIES and name in dir(importlib.import_module(library))


@functools.cache
def _class(library: str, name: str) -> Any:
    found = find_class(library, name)
    if found is None:
        raise Unbuildable(f"{library} has no class {name}")
    return found


@functools.cache
def _defaults(library: str, name: str) -> dict[str, Any]:
    owner = _class(library, name)
    if library == "transformers" and hasattr(owner, "config_class"):
        owner = owner.config_class
    elif kinds := getattr(owner, "valid_kwargs", None):  # of an image processor: in its attributes
        return {key: getattr(owner, key, None) for key in kinds.__annotations__}
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in named
        if p.name not in NOT_ASKED
    }


def _check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Refuses numbers that would make a class build for hours."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            kind = value.get("model_type")
            if key == "backbone_config" and kind not in BACKBONES:
                what = f"is one of {str(kind)[:80]!r}, expected {BACKBONES[0]!r}"
                raise Unbuildable(f"{key} of {name} {what}")
            _check_sizes(f"{key} of {name}", value)
            continue
        limit = MOST_LAYERS if key in COUNTS else LARGEST
        flat = value if isinstance(value, list) else [value]
        flat = [n for item in flat for n in (item if isinstance(item, list) else [item])]
        if len(flat) > MOST_LAYERS or any(isinstance(n, int) and n > limit for n in flat):
            raise Unbuildable(f"{key} of {name} is out of all reason: {str(value)[:80]}")


@functools.lru_cache(maxsize=256)
def _expected(library: str, name: str, config: str) -> Expected:
    import torch

    owner, values = _class(library, name), json.loads(config)
    try:
        with torch.device("meta"):
            if library == "transformers":
                model = owner(owner.config_class(**values))
            else:
                model = owner(**values)
            state = model.state_dict()
            twins = tied(model)
    except Exception as error:  # whatever the class says of a bad configuration
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Unbuildable(f"{name} cannot be built from the configuration: {why}") from error
    state = {key: value for key, value in state.items() if key not in twins}
    prefix = "" if "embeddings.token_embedding.weight" not in state else "text_model."
    shapes = {prefix + key: tuple(value.shape) for key, value in state.items()}
    integers = {prefix + key for key, value in state.items() if not value.is_floating_point()}
    return Expected(MappingProxyType(shapes), frozenset(integers))
