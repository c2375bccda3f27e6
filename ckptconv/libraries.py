"""diffusers and transformers: finding their classes in any thread, and keeping a command quiet."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import threading
import warnings
from typing import Any

LOCK = threading.RLock()
"""Held while a library imports or builds something. The libraries import their modules on first
use, and threads that enter a ring of imports at different points see unfinished modules."""

LIBRARIES = ("diffusers", "transformers")
"""Classes come from nowhere else."""

RENAMED = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "DPTFeatureExtractor": "DPTImageProcessor",
}
"""The present names of classes that release 5 of transformers dropped."""

CHATTER = {
    "transformers.utils.import_utils": ("requires torchvision",),  # image processors do without
    "transformers.modeling_utils": ("from: None",),  # of a LoRA, which holds no other weights
    # Many LoRA files have no keys for the text encoders; one that has none at all, or is of another
    # shape, is an error of ours.
    "diffusers.loaders.lora_base": ("No LoRA keys associated",),
    "diffusers.loaders.peft": ("No LoRA keys associated", "was unsuccessful with the following"),
    "diffusers.models.modeling_utils": ("kept in float32: []",),  # an empty list is no problem
}
"""Texts of messages that help nobody, by logger."""

WARNINGS = (
    "`torch_dtype` is deprecated",  # only some releases know the new name
    "`upcast_vae` is deprecated",  # called by the pipelines of diffusers themselves
    "Already found a `peft_config` attribute",  # several LoRA files were asked for
    "In CPU autocast, but the target dtype",  # asked for by the depth pipeline, for every dtype
)
"""How warnings that help nobody begin."""


def find_class(library: str, name: str) -> Any:
    """Returns a class of diffusers or transformers, or None; imports the library.

    Args:
        library: `diffusers`, `transformers`, or a package of `diffusers.pipelines`, as
            `model_index.json` names it. Nothing else is imported.
        name: of the class.
    """
    name = RENAMED.get(name, name)
    home = library if library in LIBRARIES else f"diffusers.pipelines.{library}"
    with LOCK, contextlib.suppress(ImportError):
        found = getattr(importlib.import_module(home), name, None)
        return found if isinstance(found, type) else None
    return None


def library_version(library: str) -> str:
    """Returns the release of an installed library, such as `0.39.0`; imports none of it."""
    import importlib.metadata  # slow, and not needed to inspect a file

    return importlib.metadata.version(library)


def quieten() -> None:
    """Silences what the libraries say that helps nobody; imports none of them.

    This changes the whole process, for good: only the command line calls it, and no function of the
    Python API.
    """
    for name in CHATTER:
        logging.getLogger(name).addFilter(_matters)
    if logging.lastResort:  # which shows warnings on stderr, ours among them
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    # Imports create a million objects and no garbage; looking for some takes 10 % of their time.
    gc.set_threshold(100_000, 20, 100)


def hide_progress_bars() -> None:
    """Imports the libraries and turns their progress bars off; for the command line, too."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars: list[Any] = [diffusers_logging, transformers_logging]
    for bar in bars:
        bar.disable_progress_bar()


def _matters(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in CHATTER[record.name])
