"""diffusers and transformers: finding their classes in any thread, and keeping a command quiet."""

from __future__ import annotations

import gc
import importlib
import logging
import threading
import warnings
from typing import Any

LOCK = threading.RLock()
"""Held while a library imports or builds something. The libraries import their modules on first
use, and threads that enter a ring of imports at different points see unfinished modules."""

LACK = (
    "out of memory",
    "allocate memory",
    "failed to map segment",
    "bad_alloc",
    "start new thread",
)
"""What the messages of errors say of too little memory."""

LIBRARIES = ("diffusers", "transformers")
"""Classes come from nowhere else."""

RENAMED = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "DPTFeatureExtractor": "DPTImageProcessor",
    "Qwen2TokenizerFast": "Qwen2Tokenizer",
    "Qwen3ForCausalLM": "Qwen3Model",
}
"""Classes of transformers under another name: of an older release, or of a twin that does the same
here. A pipeline reads the hidden states of a language model, which has no need of its head."""

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
    """Returns a class of diffusers or transformers, or None; imports the library, nothing else.

    Args:
        library: `diffusers`, `transformers`, or a package of `diffusers.pipelines`, as
            `model_index.json` names it.
        name: of the class.
    """
    name = RENAMED.get(name, name)
    home = library if library in LIBRARIES else f"diffusers.pipelines.{library}"
    if not library.isidentifier():
        return None
    with LOCK:
        try:
            found = getattr(importlib.import_module(home), name, None)
        except ImportError as error:
            if is_out_of_memory(error):
                raise
            return None
    return found if isinstance(found, type) else None


def library_version(library: str) -> str:
    """Returns the release of an installed library, such as `0.39.0`; imports none of it."""
    import importlib.metadata  # slow, and not needed to inspect a file

    return importlib.metadata.version(library)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tells whether an error, or what led to it, says that memory ran out: many only have words."""
    while error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in LACK):
            return True
        error = error.__cause__ or error.__context__
    return False


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


def tied(module: Any) -> dict[str, str]:
    """Returns the names of tied weights, and of each the first name of the same weight."""
    first: dict[int, str] = {}
    every = module.state_dict(keep_vars=True)
    names = {name: first.setdefault(id(tensor), name) for name, tensor in every.items()}
    return {name: usual for name, usual in names.items() if name != usual}
