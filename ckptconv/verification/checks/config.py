"""Do the configurations of a folder agree with its weights and with the architecture?

What a configuration should say comes from `ckptconv.configs.config`. Where a folder is silent, the
class's own default is what it says; where it says more than the published file, that must be the
default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ...configs.config import LIBRARIES, TORCH_NAMES, Config, class_of
from ...folder.names import CONFIG_FILES
from ...folder.read import ComponentFolder
from ..classes import Unbuildable, defaults
from ..result import Check, Problem

NAMES = ("_class_name", "architectures", "image_processor_type", "feature_extractor_type")
"""Entries that name the class."""
RENAMED = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "DPTFeatureExtractor": "DPTImageProcessor",
}
"""Classes under another name of theirs: of an older release, or of a twin that does the same."""
DTYPES = ("torch_dtype", "dtype")
"""Entries that say how transformers loads the weights."""
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
"""Entries that only training, the size of a tile or the sixth digit depends on. Published folders
disagree in them, with each other or with the network that their weights were trained in."""
BY_BLOCK = ("attention_head_dim", "transformer_layers_per_block")
"""Lists with one entry for each block of a UNet; a number stands for the same in all."""
SAYS = {"assumed": "was only assumed", "constant": "", "measured": "by the weights"}
"""Why a value is expected, by its origin."""


def check_config(config: Config, part: ComponentFolder, *, ours: bool) -> Check:
    """Compares the configuration of a component with what it should be.

    Args:
        config: as it should be.
        part: the component of the folder.
        ours: ckptconv wrote the folder, so that every difference is a later change.
    """
    component, file = config.component, CONFIG_FILES[config.component.kind]
    if part.config is None:
        what = "is missing or cannot be read"
        return Check(component.name, "config", (Problem(file, what),))
    problems: list[Problem] = []
    notes: list[str] = []
    own, name = part.config, class_of(config)
    said = class_said(own)
    other = bool(component.kind == "scheduler" and said and said != name)
    if said is not None and said != name and not other:
        problems.append(Problem(_class_entry(own), f"is {said!r}, expected {name}"))
    try:
        known = defaults(component.home, str(said) if other else name)
    except Unbuildable as error:
        return Check(component.name, "config", (Problem(_class_entry(own), str(error)),))
    if other:
        notes.append(f"steps with {said}, the published folder with {name}")
    for entry, have, want in _entries(config, own, known):
        if same(have, want, _blocks(config, entry)):
            continue
        origin = config.origins.get(entry, "default")
        why = SAYS.get(origin, f"by the {origin}")
        text = f"is {_show(have)}, expected {_show(want)}{f' ({why})' if why else ''}"
        idle = not ours and not IDLE.isdisjoint({entry, f"{entry} of {name}"})
        if origin == "assumed" or idle or (other and entry not in SCHEDULE):
            notes.append(f"{entry} {text}")
        else:
            problems.append(Problem(entry, text))
    problems += _dtype_problems(own, part, notes)
    extent = f"{len(config.values)} values of {file}"
    return Check(component.name, "config", tuple(problems), tuple(notes), extent)


def check_index(
    expected: Mapping[str, Any], have: Mapping[str, Any] | None, parts: Collection[str]
) -> Check:
    """Compares `model_index.json` with what it should be.

    Args:
        expected: as `ckptconv.config.model_index` gives it.
        have: content of the file; None if it is missing or cannot be read.
        parts: the components that the folder has.
    """
    if have is None:
        what = "is missing, so no pipeline loads the folder: say --only for a part of a model"
        return Check("model", "index", (Problem("model_index.json", what),))
    problems, notes = [], []
    for name, want in expected.items():
        found = have.get(name, [None, None] if isinstance(want, list) else None)
        if name == "_diffusers_version" or same(_plain(found, want), want):
            continue
        if want == [None, None] and isinstance(found, list) and len(found) == 2:
            if name in parts:
                notes.append(f"{name} ({found[1]}) is no part of the file: it was not checked")
                continue
            what = f"is {_show(found)}, but the folder has no {name}"
        elif name == "requires_safety_checker" and "safety_checker" in parts:
            continue
        else:
            what = f"is {_show(found)}, expected {_show(want)}"
        problems.append(Problem(name, what))
    for name, value in have.items():
        if name not in expected and not name.startswith("_") and value not in ([None, None], None):
            notes.append(f"{name} = {_show(value)} is no part of the file: it was not checked")
    return Check("model", "index", tuple(problems), tuple(notes), f"{len(expected)} entries")


def same(have: Any, want: Any, only: Iterable[int] | None = None) -> bool:
    """Tells whether two values mean the same: a number stands for a list of it.

    Args:
        have: one value.
        want: another.
        only: which entries of a list a number stands for; all by default.

    >>> same(8, [8, 8, 8]), same(4, [1, 4, 4], only=[1, 2]), same(True, 1)
    (True, True, False)

    Of two mappings, what the first says besides does not matter: it is the configuration of a
    model inside, which is written with all that it inherits.
    """
    if isinstance(have, Mapping) and isinstance(want, Mapping):
        return all(same(have.get(key), value) for key, value in want.items())
    if isinstance(have, (list, tuple)) and isinstance(want, (list, tuple)):
        if len(have) != len(want):
            return False
        return all(map(same, have, want))
    if isinstance(have, (list, tuple)) or isinstance(want, (list, tuple)):
        many, one = (have, want) if isinstance(have, (list, tuple)) else (want, have)
        chosen = range(len(many)) if only is None else [n for n in only if n < len(many)]
        return bool(many) and all(same(many[n], one) for n in chosen)
    if have is None or want is None:  # null stands for false in published files
        return not have and not want and {type(have), type(want)} <= {type(None), bool}
    return isinstance(have, bool) == isinstance(want, bool) and bool(have == want)


def _entries(
    config: Config, own: Mapping[str, Any], known: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the entries that matter: name, what the folder says, what was expected."""
    for entry in dict.fromkeys([*config.values, *own]):
        if entry in NAMES or entry in DTYPES:
            continue
        if entry not in known and (entry not in config.values or entry not in own):
            continue  # the class does not read it
        default = known.get(entry)
        yield entry, own.get(entry, default), config.values.get(entry, default)


def _blocks(config: Config, entry: str) -> list[int] | None:
    """Returns the blocks of a UNet that have attention; the middle one goes by the last entry."""
    kinds = config.values.get("down_block_types")
    if entry not in BY_BLOCK or not isinstance(kinds, list):
        return None
    return [n for n, kind in enumerate(kinds) if "CrossAttn" in kind or n == len(kinds) - 1]


def _class_entry(own: Mapping[str, Any]) -> str:
    return next((name for name in NAMES if name in own), NAMES[1])


def class_said(own: Mapping[str, Any]) -> Any:
    """Returns the class that a configuration names, whatever it is; None if it names none."""
    said = own.get(_class_entry(own))
    said = said[0] if isinstance(said, list) and len(said) == 1 else said
    return RENAMED.get(said, said) if isinstance(said, str) else said


def _dtype_problems(
    own: Mapping[str, Any], part: ComponentFolder, notes: list[str]
) -> Iterator[Problem]:
    stored = {TORCH_NAMES[t.dtype] for t in part.tensors.values() if t.dtype in TORCH_NAMES}
    for entry in DTYPES:
        said = own.get(entry)
        if said is None or not stored or said in stored:
            continue
        what = f"is {_show(said)}, but the weights are {' and '.join(sorted(stored))}"
        files = {tensor.file.name for tensor in part.tensors.values()}
        if said in TORCH_NAMES.values() and all(name.count(".") > 1 for name in files):
            notes.append(f"{entry} {what}: a variant shares its configuration with another")
        else:
            yield Problem(entry, what)


def _plain(value: Any, want: Any) -> Any:
    """Returns an entry of the index with the class under its usual name, in its usual place."""
    if not isinstance(value, list):
        return value
    plain = [RENAMED.get(item, item) if isinstance(item, str) else item for item in value]
    if isinstance(want, list) and plain[1:] == want[1:] and want[0] not in LIBRARIES:
        return want  # diffusers offers the class in several places
    return plain


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
