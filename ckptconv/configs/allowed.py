"""Reads the configurations of a folder as data: the classes and the entries that are allowed.

Anybody may have written a folder, and the libraries follow its configurations to code:
`attn_implementation` to a kernel on the Hub, `auto_map` and `model_index.json` to Python files,
`quantization_config` to another library. Here a component has one of the classes that the key maps
name, and of its configuration counts only what the constructor of that class takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FileRefused, UsageError
from ..libraries import RENAMED, find_class
from ..maps.architecture import KeyMaps

CODE = frozenset(
    {
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        *("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate"),
        *("trust_remote_code", "use_kernels", "kernel_config"),
        *("quantization_config", "compression_config"),
        *("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"),
    }
)
"""Entries that make a library fetch or run something else, wherever they stand."""
HARMLESS = (None, False, "eager", "sdpa")
"""Their values that ask for nothing beside the library itself."""

BACKBONES = {"bit": "BitConfig"}
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
TOKENIZER = {
    *("add_prefix_space", "added_tokens_decoder", "additional_special_tokens"),
    *("chat_template", "clean_up_tokenization_spaces", "do_lower_case", "errors"),
    "extra_special_tokens",
    *("model_max_length", "padding_side", "truncation_side"),
    *("bos_token", "eos_token", "pad_token", "unk_token"),
}
"""Entries of a tokenizer: its constructor takes anything."""
SCHEDULES = {"beta_schedule", "sigma_data"}
"""One of them is in the constructor of every scheduler that can step for these models."""

FLOWS = "transformer"
"""A model that has this component was trained with flow matching."""

MOST_LAYERS = 200
"""More of anything that a configuration counts would only take time and memory: the largest
published count is 32."""
COUNTS = ("depths", "layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
LARGEST = 1 << 20
"""No width, vocabulary or size is larger."""


class Unbuildable(ValueError):
    """A class cannot be built from a configuration."""


@dataclass(frozen=True, slots=True)
class Role:
    """What may stand under the name of a component: its kind, and by class, where that is."""

    kind: str
    homes: dict[str, str] = field(default_factory=dict)


def roles(maps: KeyMaps) -> dict[str, Role]:
    """Returns the components that a folder may have, by name, as the key maps know them."""
    # The one class of the published folders that holds nothing of a checkpoint.
    checker = {"StableDiffusionSafetyChecker": "stable_diffusion"}
    found = {"safety_checker": Role("model", checker)}
    for architecture in maps.architectures.values():
        for name, component in architecture.components.items():
            names = (*maps.classes(component), *component.donors)
            role = found.setdefault(name, Role(component.kind))
            role.homes.update(dict.fromkeys(names, component.home))
    return found


def require_class(path: Path, name: str, role: Role, index: Mapping[str, Any]) -> tuple[str, str]:
    """Returns library and class of a component, as `model_index.json` says them.

    FileRefused if a component of that name cannot be of that class.
    """
    said = index[name]
    library, cls = said if isinstance(said, list) and len(said) == 2 else ("", "")
    wanted = "a scheduler of diffusers for these models"
    if role.kind == "scheduler":
        fits = library == "diffusers" and scheduler_class(str(cls), flow=FLOWS in index)
    else:
        wanted = " or ".join(role.homes)
        home = role.homes.get(RENAMED.get(str(cls), str(cls)))
        # diffusers offers some classes in several places
        fits = home and (library == home or find_class(str(library), cls) is find_class(home, cls))
    if not fits:
        raise FileRefused(
            f"{path}: {name} is {str(said)[:80]}, expected {wanted}",
            hint=f"correct it, or, in Python, load_pipeline(..., components={{{name!r}: ...}}) "
            "supplies a component",
        )
    return library, cls


def scheduler_class(name: str, *, flow: bool = False) -> Any:
    """Returns a scheduler that has the noise schedules of these models, or None.

    Args:
        name: of the class.
        flow: whether the model was trained with flow matching.

    UsageError if it needs a library that is not installed.
    """
    found = find_class("diffusers", name)
    if missing := " ".join(b for b in getattr(found, "_backends", ()) if b != "torch"):
        raise UsageError(f"{name} needs {missing}", hint=f"pip install {missing}")
    takes = _parameters(found) if hasattr(found, "_get_compatibles") else {}
    if flow:
        return found if "shift" in takes and "prediction_type" not in takes else None
    return None if "prediction_type" not in takes or SCHEDULES.isdisjoint(takes) else found


def code_asked_for(values: object, at: str = "") -> Iterator[str]:
    """Yields the entries of a configuration that ask for code, at any depth, by dotted name."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key in CODE and not any(value is each or value == each for each in HARMLESS):
                yield f"{at}{key}"
            yield from code_asked_for(value, f"{at}{key}.")
    elif isinstance(values, list):
        for n, value in enumerate(values):
            yield from code_asked_for(value, f"{at}{n}.")


def notes_on_code(path: Path, values: object) -> list[str]:
    """Returns a sentence on what the configuration in a file asks for in vain, if it does."""
    asked = ", ".join(code_asked_for(values))
    return [f"{path} asks for code from elsewhere, which was left out: {asked}"] if asked else []


def kept(library: str, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a configuration that the constructor of a class takes.

    Raises:
        Unbuildable: there is no such class, it cannot have the model that the configuration puts
            inside it, or a number is larger than that of any model.
    """
    owner = _class(library, name)
    taken = _kept(getattr(owner, "config_class", None) or owner, as_published(values))
    check_sizes(name, taken)
    return taken


def own_name(library: str, name: str) -> dict[str, Any]:
    """Returns the entries by which a configuration names the class of a model."""
    if config := getattr(_class(library, name), "config_class", None):
        return {"architectures": [name], "model_type": config.model_type}
    return {"_class_name": name}


def defaults(library: str, name: str) -> Mapping[str, Any]:
    """Returns what a class takes from a configuration, and the values where it is silent.

    Raises:
        Unbuildable: there is no such class.
    """
    owner = _class(library, name)
    return MappingProxyType(_parameters(getattr(owner, "config_class", None) or owner))


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Refuses numbers that would make a class build for hours; raises Unbuildable."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(f"{key} of {name}", value)
            continue
        flat = list(_flat(value))
        limit = MOST_LAYERS if key in COUNTS else LARGEST
        most = LARGEST if all(isinstance(n, float) for n in flat) else MOST_LAYERS
        if len(flat) > most or any(isinstance(n, int | float) and n > limit for n in flat):
            raise Unbuildable(f"{key} of {name} is out of all reason: {str(value)[:80]}")


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


@functools.cache
def _class(library: str, name: str) -> Any:
    found = find_class(library, name)
    if found is None:
        raise Unbuildable(f"{library} has no class {name}")
    return found


def _kept(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    taken = {}
    inside = getattr(owner, "sub_configs", None) or {}
    known = _known(owner)
    for key, value in values.items():
        if key in CODE or key not in known:
            continue
        if key == "backbone_config" and isinstance(value, Mapping):
            kind = str(value.get("model_type"))
            if kind not in BACKBONES:
                what = f"is one of {kind[:80]!r}, expected {', '.join(map(repr, BACKBONES))}"
                raise Unbuildable(f"{key} of {owner.__name__} {what}")
            own = _kept(_class("transformers", BACKBONES[kind]), value)
            taken[key] = {"model_type": kind, **own}
        elif key in inside and isinstance(value, Mapping):
            taken[key] = _kept(inside[key], value)
        else:
            taken[key] = without_code(value)
    return taken


def as_published(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without what release 5 of transformers writes for plain RoPE.

    >>> as_published({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}})
    {'rope_theta': 10000}
    """
    plain = dict(values)
    rope = plain.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") == "default":
        plain["rope_theta"] = plain.pop("rope_parameters").get("rope_theta")
    if isinstance(kinds := plain.get("layer_types"), list) and set(kinds) == {"full_attention"}:
        del plain["layer_types"]
    return plain


def without_code(value: Any) -> Any:
    """Returns a value without the entries that may ask for code, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_code(item) for key, item in value.items() if key not in CODE}
    return [without_code(item) for item in value] if isinstance(value, list) else value


@functools.cache
def _known(owner: Any) -> frozenset[str]:
    """Returns the entries that are kept of a configuration."""
    owners = [owner]
    if hasattr(owner, "_get_compatibles"):  # another may take this scheduler's configuration over
        owners += [each for each in owner._get_compatibles() if hasattr(each, "_get_compatibles")]
    known = {name.lstrip("_") for each in owners for name in _parameters(each)}
    return frozenset(known)


@functools.cache
def _parameters(owner: Any) -> dict[str, Any]:
    """Returns the parameters of a constructor and their defaults."""
    if hasattr(owner, "vocab_files_names"):
        return dict.fromkeys(TOKENIZER)
    if kinds := getattr(owner, "valid_kwargs", None):  # of an image processor: in its attributes
        return {key: getattr(owner, key, None) for key in kinds.__annotations__}
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    # Release 5 of transformers takes it as another word.
    rope = {"rope_theta": owner.default_theta} if hasattr(owner, "default_theta") else {}
    return rope | {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in named
        if p.name not in NOT_ASKED
    }
