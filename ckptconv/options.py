"""What a caller may decide: one record, from Python or from the command line.

The fields of `Options` are the keyword arguments of `plan`, `convert`, `verify` and
`load_pipeline`; together with their help texts, they make the options of the commands.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

from .dtypes import cast_name
from .errors import UsageError
from .maps.architecture import KeyMaps, bundled

FACTS: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "zero_terminal_snr": (False, True),
    "family": ("sd1", "sd2", "sdxl", "flux", "sd3"),
    "release": (
        *("dev", "krea", "kontext", "depth", "canny", "large", "large-turbo"),
        *("turbo", "base"),
    ),
}
"""The facts that an option can decide, and their values."""

DONORS = (
    *("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("depth_estimator", "image_normalizer"),
)
"""The components that can come from another file; each has an option of its name."""

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""The components that can come from a folder of a tokenizer; likewise."""

SYNONYMS = {"torch_dtype": "dtype"}
"""Keywords as diffusers spells them."""

AnyPath = str | Path
P = ParamSpec("P")
R = TypeVar("R")


class Choices(TypedDict, total=False):
    """The keyword arguments that `Options` understands, for type checkers."""

    dtype: Any
    torch_dtype: Any
    ema: bool
    only: str | Iterable[str] | None
    vae: AnyPath | None
    text_encoder: AnyPath | None
    text_encoder_2: AnyPath | None
    text_encoder_3: AnyPath | None
    depth_estimator: AnyPath | None
    image_normalizer: AnyPath | None
    tokenizer: AnyPath | None
    tokenizer_2: AnyPath | None
    tokenizer_3: AnyPath | None
    prediction_type: str | None
    zero_terminal_snr: bool | None
    family: str | None
    release: str | None
    original_config: AnyPath | None
    lora: AnyPath | Iterable[AnyPath]
    assemble: bool
    ignore_zeros: bool
    maps: KeyMaps | None


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The file of an adapter, and how strongly it applies."""

    path: Path
    scale: float = 1.0


def adapter_file(text: str | Path | AdapterFile) -> AdapterFile:
    """Reads `FILE` or `FILE:SCALE`; a file that has the whole text as its name is taken as such.

    Raises:
        UsageError: the scale is not finite.

    >>> adapter_file("style.safetensors:0.8").scale
    0.8
    """
    if isinstance(text, AdapterFile):
        return text
    name, _, number = str(text).rpartition(":")
    try:
        if not name or Path(text).exists():
            return AdapterFile(Path(text))
        scale = float(number)
    except (OSError, ValueError):  # a name that is too long, say; or a colon in the name
        return AdapterFile(Path(text))
    if not math.isfinite(scale):
        raise UsageError(f"{text}: the scale is {number}", hint="give a number, such as 0.8")
    return AdapterFile(Path(name), scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a caller decides; whatever is left out is found out, or stays as it is in the file.

    Attributes:
        dtype: cast to fp16, bf16, fp32, or the main network to fp8; else as stored, GGUF as bf16.
        ema: take the EMA copy of the UNet.
        only: the components to write, such as unet and vae; all by default.
        vae: take the VAE from another checkpoint, a lone component file or a diffusers folder.
        text_encoder: likewise the text encoder.
        text_encoder_2: likewise the second text encoder.
        text_encoder_3: likewise the third.
        depth_estimator: likewise the depth estimator of SD2 depth-to-image.
        image_normalizer: likewise unCLIP's image statistics; a file of mean and deviation will do.
        tokenizer: the folder of a tokenizer, or a diffusers folder, to take the tokenizer from.
        tokenizer_2: likewise the second tokenizer.
        tokenizer_3: likewise the third.
        prediction_type: what the UNet predicts, `epsilon` or `v_prediction`; detected by default.
        zero_terminal_snr: whether the noise schedule ends in pure noise; detected by default.
        family: what a lone VAE is for, such as `sd1`, `sdxl` or `flux`; detected by default.
        release: which of several models that look alike, such as `kontext`; assumed by default.
        original_config: the LDM or SGM yaml of the model, which wins over what is measured.
        lora: a LoRA, DoRA, LoHa or LoKr to add to the weights, as FILE or FILE:SCALE; or several.
        assemble: put the model together from the files of a folder, which stands for the file.
        ignore_zeros: accept large weights that are all zero, as an unfinished download has them.
        maps: the key maps to use; by default those that come with ckptconv.
    """

    dtype: str | None = None
    ema: bool = False
    only: frozenset[str] | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    text_encoder_2: Path | None = None
    text_encoder_3: Path | None = None
    depth_estimator: Path | None = None
    image_normalizer: Path | None = None
    tokenizer: Path | None = None
    tokenizer_2: Path | None = None
    tokenizer_3: Path | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    family: str | None = None
    release: str | None = None
    original_config: Path | None = None
    lora: tuple[AdapterFile, ...] = ()
    assemble: bool = False
    ignore_zeros: bool = False
    maps: KeyMaps = dataclasses.field(default_factory=bundled)

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> Options:
        """Returns the options that keyword arguments mean. None stands for the default.

        Raises:
            TypeError: a keyword is unknown; the nearest one is named.
            UsageError: a value is none that the option can have.
        """
        given: dict[str, Any] = {}
        for word, value in words.items():
            name = SYNONYMS.get(word, word)
            if name not in _READERS:
                raise TypeError(_unknown(word, _READERS))
            if value is not None:
                read = _READERS[name](value)
                if given.setdefault(name, read) != read:
                    raise TypeError(f"{word} and {name} are one option, and differ")
        return cls(**given)

    def as_words(self) -> dict[str, Any]:
        """Returns the keyword arguments that mean this record."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def donors(self) -> dict[str, Path]:
        """The files or folders to take components from, by component."""
        given = {name: getattr(self, name) for name in (*DONORS, *TOKENIZERS)}
        return {name: place for name, place in given.items() if place is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that the caller decides, by name."""
        return {name: v for name in FACTS if (v := getattr(self, name)) is not None}


_DESCRIBED = (inspect.getdoc(Options) or "").partition("Attributes:\n")[2].rstrip()

HELP: Mapping[str, str] = dict(re.findall(r"^    (\w+): (.+)$", _DESCRIBED, re.M))
"""What each option does, from the docstring of `Options`."""


def _items(value: Any) -> Iterable[Any]:
    return [value] if isinstance(value, str | Path | AdapterFile) else value


def _fact(name: str, value: Any) -> Any:
    if value not in FACTS[name]:
        allowed = ", ".join(map(str, FACTS[name]))
        raise UsageError(f"{name} cannot be {value!r}: it is one of {allowed}")
    return value


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "dtype": cast_name,
    "ema": bool,
    "only": lambda value: frozenset(_items(value)),
    **dict.fromkeys((*DONORS, *TOKENIZERS, "original_config"), Path),
    **{name: functools.partial(_fact, name) for name in FACTS},
    "lora": lambda value: tuple(map(adapter_file, _items(value))),
    "assemble": bool,
    "ignore_zeros": bool,
    "maps": lambda value: value,
}
"""By field of `Options`, the function that turns a caller's value into the record's."""


def _unknown(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return f"unexpected keyword argument {word!r}; {hint}"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose `**choices` are those of `Options`.

    An unknown keyword is a TypeError that names the nearest one, and `help()` lists every keyword
    with its default and its meaning.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is dataclasses.MISSING else field.default,
            annotation=Choices.__annotations__[field.name],
        )
        for field in dataclasses.fields(Options)
    ]
    known = [p.name for p in (*own, *options)]

    @functools.wraps(function)
    def call(*args: P.args, **words: P.kwargs) -> R:
        for word in words:
            if word not in known and word not in SYNONYMS:
                raise TypeError(f"{function.__name__}() got an {_unknown(word, known)}")
        return function(*args, **words)

    call.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    call.__doc__ = (function.__doc__ or "").replace(
        "        **choices: see `Options`.", textwrap.indent(_DESCRIBED, "    ")
    )
    return call
