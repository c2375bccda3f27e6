"""What the libraries want to be told, and what they say that helps nobody."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["quiet", "reading", "uncollected"]

CHATTER = {
    "transformers.utils.import_utils": ("requires torchvision",),  # image processors do without
    "transformers.modeling_utils": ("from: None",),  # of a LoRA, which holds no other weights
    # Many LoRA files have no keys for the text encoders; one that has none at all, or is of another
    # shape, is an error of ours.
    "diffusers.loaders.lora_base": ("No LoRA keys associated",),
    "diffusers.loaders.peft": ("No LoRA keys associated", "was unsuccessful with the following"),
    "diffusers.models.modeling_utils": ("kept in float32: []",),  # an empty list is no problem
}
"""By logger, what messages that do not matter contain."""

WARNINGS = (
    "`torch_dtype` is deprecated",  # the new name is unknown to older releases, see `reading`
    "`upcast_vae` is deprecated",  # called by the pipelines of diffusers themselves
    "Already found a `peft_config` attribute",  # several LoRA files were asked for
    "In CPU autocast, but the target dtype",  # asked for by the depth pipeline, for every dtype
)
"""How warnings that do not matter begin."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Puts off Python's cyclic garbage collector.

    Importing the libraries and making their modules creates a million objects, of which none is
    garbage; looking for some, again and again, takes half as long as all the rest.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries from chatting; their other warnings pass."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars: list[Any] = [diffusers_logging, transformers_logging]
    shown = [bar for bar in bars if bar.is_progress_bar_enabled()]
    for name in CHATTER:
        logging.getLogger(name).addFilter(_matters)
    for bar in shown:
        bar.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for bar in shown:
            bar.enable_progress_bar()
        for name in CHATTER:
            logging.getLogger(name).removeFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in CHATTER[record.name])


def reading(dtype: torch.dtype, weights: Iterable[Path]) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained`, which read what is there and ask no Hub.

    Args:
        dtype: of the weights.
        weights: the files; their names tell the variant.
    """
    variant = re.compile(r"\.([^.]+?)(-\d+-of-\d+)?\.safetensors$")
    variants = {found[1] for path in weights if (found := variant.search(path.name))}
    # Since 2026 it is called `dtype`, a name that releases before ignore.
    choices: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
    choices["use_safetensors"] = True
    if len(variants) == 1:
        choices["variant"] = variants.pop()
    return choices
