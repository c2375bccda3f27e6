"""Do the configurations of a folder agree with its weights and with the architecture?

What a configuration should say comes from `ckptconv.configs.config`. Where a folder is silent, the
class's own default is what it says; where it says more than the published file, that must be the
default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ...configs.allowed import Unbuildable, as_published, defaults
from ...configs.config import DTYPES, Config, class_of, class_said
from ...dtypes import FLOATS, LIBRARY_NAMES
from ...errors import option
from ...folder.names import CONFIG_FILES, INDEX
from ...folder.read import ComponentFolder
from ...libraries import LIBRARIES, RENAMED, find_class
from ...maps.architecture import CLASS_ENTRIES
from ..result import Check, Problem

SCHEDULE = {
    "beta_end",
    "beta_schedule",
    "beta_start",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "trained_betas",
}
"""What a model was trained with, whichever scheduler steps through it."""
IDLE = {
    "attention_dropout",
    "dropout",
    "initializer_factor",
    "initializer_range",
    "layer_norm_eps of DPTForDepthEstimation",
    "sample_size of AutoencoderKL",
}
"""Entries that matter only to training, the size of a tile or the sixth digit. Published folders
disagree in them, with each other or with the network that their weights were trained in."""
BY_BLOCK = ("attention_head_dim", "transformer_layers_per_block")
"""Lists with one entry for each block of a UNet; a number stands for the same in all."""
ABSENT = [None, None]
"""What `model_index.json` says of a component that is not there."""
SAYS = {"assumed": "was only assumed", "constant": "", "measured": "by the weights"}
"""Why a value is expected, by its origin."""


def check_config(config: Config, part: ComponentFolder, *, ours: bool) -> Check:
    """Compares the configuration of a component with what it should be.

    In a folder of `ours`, which ckptconv wrote, every difference is a later change.
    """
    component, file = config.component, CONFIG_FILES[config.component.kind]
    extent = f"{len(config.values)} values of {file}" if part.config is not None else ""
    return Check.of(component.name, "config", _differences(config, part, file, ours), extent)


def _differences(
    config: Config, part: ComponentFolder, file: str, ours: bool
) -> Iterator[Problem | str]:
    if part.config is None:
        yield Problem(file, "is missing or cannot be read")
        return
    own = as_published(part.config)
    component, name, said = config.component, class_of(config), class_said(own)
    other = bool(component.kind == "scheduler" and said and said != name)
    if other:
        yield f"steps with {said}, the published folder with {name}"
    elif said not in (None, name):
        yield Problem(_class_entry(own), f"is {said!r}, expected {name}")
    try:
        known = defaults(component.home, str(said) if other else name)
    except Unbuildable as error:
        yield Problem(_class_entry(own), str(error))
        return
    for entry, have, want in _entries(config, own, known):
        if same(have, want, _blocks(config, entry)):
            continue
        origin = config.origins.get(entry, "default")
        why = SAYS.get(origin, f"by the {origin}")
        text = f"is {_show(have)}, expected {_show(want)}{f' ({why})' if why else ''}"
        idle = not ours and not IDLE.isdisjoint({entry, f"{entry} of {name}"})
        noted = origin == "assumed" or idle or (other and entry not in SCHEDULE)
        yield f"{entry} {text}" if noted else Problem(entry, text)
    yield from _wrong_dtypes(own, part, ours)


def check_index(
    expected: Mapping[str, Any], have: Mapping[str, Any] | None, parts: Collection[str]
) -> Check:
    """Compares `model_index.json` with what it should be; `parts` are those that are there."""
    findings = _index_findings(expected, have, parts)
    return Check.of("model", "index", findings, "" if have is None else f"{len(expected)} entries")


def _index_findings(
    expected: Mapping[str, Any], have: Mapping[str, Any] | None, parts: Collection[str]
) -> Iterator[Problem | str]:
    if have is None:
        what = "is missing, so no pipeline loads the folder"
        yield Problem(INDEX, f"{what}: say {option('only')} for a part of a model")
        return
    for name, want in expected.items():
        found = have.get(name, ABSENT if isinstance(want, list) else None)
        unasked = name == "_diffusers_version" or (
            name == "requires_safety_checker" and "safety_checker" in parts
        )
        if unasked or same(_plain(found, want), want):
            continue
        if want != ABSENT or not isinstance(found, list) or len(found) != 2:
            yield Problem(name, f"is {_show(found)}, expected {_show(want)}")
        elif name in parts:
            yield f"{name} ({found[1]}) is no part of the file: it was not checked"
        else:
            yield Problem(name, f"is {_show(found)}, but the folder has no {name}")
    for name, value in have.items():
        if name not in expected and not name.startswith("_") and value not in (ABSENT, None):
            yield f"{name} = {_show(value)} is no part of the file: it was not checked"


def same(have: Any, want: Any, only: Iterable[int] | None = None) -> bool:
    """Whether two values mean the same: a number stands for a list of it.

    `only` says which entries of a list a number stands for; all by default. A mapping, which
    configures a model inside, may say more than is wanted: it is written with all it inherits.

    >>> same(8, [8, 8, 8]), same(4, [1, 4, 4], only=[1, 2]), same(True, 1)
    (True, True, False)
    """
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        return all(same(have.get(key), value) for key, value in want.items())
    lists = [value for value in (have, want) if isinstance(value, list | tuple)]
    if len(lists) == 2:
        return len(have) == len(want) and all(map(same, have, want))
    if lists:
        one = want if lists[0] is have else have
        chosen = range(len(lists[0])) if only is None else only
        return bool(lists[0]) and all(same(lists[0][n], one) for n in chosen if n < len(lists[0]))
    if have is None or want is None:  # null stands for false in published files
        return not have and not want and {type(have), type(want)} <= {type(None), bool}
    return isinstance(have, bool) == isinstance(want, bool) and bool(have == want)


def _entries(
    config: Config, own: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the entries that matter: name, what the folder says, what was expected."""
    for entry in dict.fromkeys([*config.values, *own]):
        if entry in CLASS_ENTRIES or entry in DTYPES:
            continue
        if entry in known or (entry in config.values and entry in own):  # else, nobody reads it
            default = known.get(entry)
            yield entry, own.get(entry, default), config.values.get(entry, default)


def _blocks(config: Config, entry: str) -> list[int] | None:
    """Returns the blocks of a UNet that have attention; the middle one goes by the last entry."""
    kinds = config.values.get("down_block_types")
    if entry not in BY_BLOCK or not isinstance(kinds, list):
        return None
    return [n for n, kind in enumerate(kinds) if "CrossAttn" in kind or n == len(kinds) - 1]


def _class_entry(own: Mapping[str, Any]) -> str:
    return next((name for name in CLASS_ENTRIES if name in own), CLASS_ENTRIES[1])


def _renamed(name: Any) -> Any:
    return RENAMED.get(name, name) if isinstance(name, str) else name


def _wrong_dtypes(
    own: Mapping[str, Any], part: ComponentFolder, ours: bool
) -> Iterator[Problem | str]:
    """Yields dtypes to load the weights in that are neither float32 nor what is stored.

    Published folders have such: a variant shares its configuration with another.
    """
    stored = {LIBRARY_NAMES.get(tensor.dtype) for tensor in part.tensors.values()}
    known = [LIBRARY_NAMES.get(dtype) for dtype in FLOATS]
    for entry in DTYPES:
        said = own.get(entry)
        if said in (None, "float32", *stored):
            continue
        what = f"is {_show(said)}, expected float32, which diffusers loads by default"
        yield Problem(entry, what) if ours or said not in known else f"{entry} {what}"


def _plain(value: Any, want: Any) -> Any:
    """Returns an entry of the index with the class under its usual name, in its usual place."""
    if not isinstance(value, list):
        return value
    plain = [_renamed(item) for item in value]
    if not isinstance(want, list) or plain[1:] != want[1:] or want[0] in (None, *LIBRARIES):
        return plain
    # diffusers offers the class in several places
    return want if isinstance(plain[0], str) and find_class(plain[0], want[1]) else plain


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
