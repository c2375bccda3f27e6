"""Modules without memory for their weights, and the components that have no weights.

Nothing here changes the process: other threads may build modules of their own at the same time.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.tokenizer import tokenizer_files
from ..errors import FileRefused
from ..libraries import LIBRARIES, LOCK, find_class, library_version
from ..planning.step import Target
from .model import Blueprint
from .weights import matched

if TYPE_CHECKING:
    import torch
    from torch import nn

VARIANT = re.compile(r"\.([^.]+?)(-\d+-of-\d+)?\.safetensors$")
"""In the name of a weight file."""


def component_class(name: str, blueprint: Blueprint) -> Any:
    """Returns the class of a component.

    Raises:
        FileRefused: the library has no such class.
    """
    found, library = find_class(blueprint.library, blueprint.name), blueprint.library
    if found is None:
        known = library in LIBRARIES
        version = f" {library_version(library)}" if known else ""
        raise FileRefused(
            f"{name}: the configuration names the class {blueprint.name}, which {library}{version} "
            "does not have",
            hint=f"upgrade {library}, or check the configuration; in Python, "
            f"load_pipeline(..., components={{{name!r}: ...}}) supplies a component",
        )
    return found


def empty_module(
    cls: Any, blueprint: Blueprint, targets: Mapping[str, Target], dtype: torch.dtype
) -> nn.Module | None:
    """Returns a module whose parameters are on the meta device and whose buffers are real.

    Args:
        cls: the class that the blueprint names.
        blueprint: of the module.
        targets: the tensors that it will get.
        dtype: theirs; the configurations of transformers note it.

    Returns:
        The module, or None if it comes from a folder and needs what only its library does: other
        classes and names of tensors, quantization, several dtypes.
    """
    if blueprint.folder and not _is_plain(cls, blueprint):
        return None
    with LOCK, _meta_parameters()():
        module: nn.Module = _from_config(cls, blueprint, dtype)
    if blueprint.folder:
        own = module.state_dict()
        # Such a buffer has the dtype that was the process's default when a library built it.
        computed = (b for name, b in module.named_buffers() if name not in own)
        if matched(module, targets)[1] or any(b.is_floating_point() for b in computed):
            return None
    return module


def _is_plain(cls: Any, blueprint: Blueprint) -> bool:
    """Whether building from the configuration and copying the tensors is all that it takes."""
    known = issubclass(cls, find_class("diffusers", "ModelMixin")) or (
        blueprint.library == "transformers" and hasattr(cls, "config_class")
    )
    mixed = getattr(cls, "_keep_in_fp32_modules", None)
    return known and not mixed and not blueprint.config.get("quantization_config")


def _from_config(cls: Any, blueprint: Blueprint, dtype: torch.dtype) -> Any:
    values, origin = dict(blueprint.config), str(blueprint.folder or "")
    if not hasattr(cls, "config_class"):
        made = cls.from_config(values)
        if origin:
            made.register_to_config(_name_or_path=origin)
        return made
    config = cls.config_class.from_dict(values)
    config.name_or_path = origin
    # With a dtype in its configuration, a backbone would be built with that as the default of the
    # whole process. In the end all get the dtype of the weights, as in `from_pretrained`.
    _set_dtype(config, None)
    made = cls(config)
    _set_dtype(made.config, dtype)
    return made


def from_library(cls: Any, blueprint: Blueprint, dtype: torch.dtype, files: Iterable[Path]) -> Any:
    """Lets its library load a component from its folder; that may change the process meanwhile."""
    weights = {file.name for file in files if file.parent == blueprint.folder}
    variants = {found[1] for name in weights if (found := VARIANT.search(name))}
    options: dict[str, Any] = {"use_safetensors": True}
    if len(variants) == 1:
        options["variant"] = variants.pop()
    with LOCK:
        name = _dtype_entry(cls.config_class()) if hasattr(cls, "config_class") else "torch_dtype"
        options[name] = dtype
        return cls.from_pretrained(blueprint.folder, local_files_only=True, **options)


def without_weights(cls: Any, blueprint: Blueprint) -> Any:
    """Makes a scheduler, an image processor or a tokenizer."""
    values = dict(blueprint.config)
    with LOCK:
        if blueprint.folder:
            return cls.from_pretrained(blueprint.folder, local_files_only=True)
        if blueprint.kind == "scheduler":
            return cls.from_config(values)
        if blueprint.kind == "processor":
            return cls.from_dict(values)
        # The constructor of a tokenizer takes paths before release 5 of transformers, and tables
        # since: only files do for both. They are what `convert` writes.
        with tempfile.TemporaryDirectory(prefix="ckptconv-") as folder:
            for file, text in tokenizer_files(values).items():
                Path(folder, file).write_text(text, encoding="utf-8")
            tokenizer = cls.from_pretrained(folder, local_files_only=True)
        tokenizer.name_or_path = ""
        return tokenizer


def _dtype_entry(config: Any) -> str:
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before release 4.56


def _set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    """Sets the dtype in a configuration of transformers, and in those inside it."""
    setattr(config, _dtype_entry(config), dtype)
    for value in vars(config).values():
        if hasattr(value, "to_json_string"):
            _set_dtype(value, dtype)


@functools.cache
def _meta_parameters() -> type[torch.overrides.TorchFunctionMode]:
    import torch

    # What libraries make parameters of. Everything else, such as `arange` and `tensor`, stays real:
    # it goes into buffers, which no file holds.
    made = {torch.empty, torch.rand, torch.randn}
    made |= {torch.empty_like, torch.rand_like, torch.randn_like}

    class MetaParameters(torch.overrides.TorchFunctionMode):
        """Puts new parameters on the meta device, in this thread only."""

        def __torch_function__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = dict(kwargs or {})
            # So transformers asks on which device it builds. Elsewhere than on the meta device it
            # would initialize the weights, and patch `torch.nn.init` for that.
            asks = func is torch.tensor and args == ([],)
            if (func in made or asks) and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    return MetaParameters
