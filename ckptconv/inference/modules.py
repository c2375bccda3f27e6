"""Modules without memory for their weights, and the components that have no weights.

Nothing here changes the process: other threads may build modules of their own at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.tokenizer import read_tokenizer, tokenizer_files
from ..errors import FileRefused
from ..files import lend
from ..folder.names import CONFIG_FILES
from ..libraries import LIBRARIES, LOCK, find_class, library_version, tied
from ..planning.step import Target
from ..verification.classes import limited
from .model import VERIFY, Blueprint
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
        classes and names of tensors, several dtypes.

    Raises:
        FileRefused: the weights are not those that the configuration of a folder describes.
    """
    most = 2 * len(targets) + 100
    limit = limited(most) if blueprint.folder else contextlib.nullcontext()
    with LOCK, limit, meta_parameters()():
        module: nn.Module = _from_config(cls, blueprint, dtype)
    if blueprint.folder:
        own = module.state_dict()
        names, problems = matched(module, targets)
        needs = sum(parameter.numel() for parameter in module.parameters())
        held = sum(math.prod(target.shape) for target in targets.values())
        of_others = hasattr(cls, "config_class") and blueprint.library != "transformers"
        lost = (
            own.keys() - set(names.values()) - tied(module).keys()
        )  # a library would fill them with noise
        if needs > 2 * held or (lost and not of_others):
            raise FileRefused(
                f"{blueprint.folder}: the weights are not those that {CONFIG_FILES['model']} "
                f"describes: they hold {held:,} numbers, and it needs {needs:,}",
                problems=problems,
                hint=VERIFY,
            )
        # Such a buffer has the dtype that was the process's default when a library built it.
        computed = (b for name, b in module.named_buffers() if name not in own)
        if problems or of_others or any(b.is_floating_point() for b in computed):
            return None
    return module


def _from_config(cls: Any, blueprint: Blueprint, dtype: torch.dtype) -> Any:
    values, origin = dict(blueprint.config), str(blueprint.folder or "")
    if not hasattr(cls, "config_class"):
        made = cls.from_config(values)
        if origin:
            _set_origin(made, origin)
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
    """Lets its library load a component; that may change the process meanwhile.

    The library sees the weights, and a configuration of what was kept: nothing else of the folder.
    """
    folder = blueprint.folder or Path()
    weights = {file for file in files if file.parent == folder}
    variants = {found[1] for file in weights if (found := VARIANT.search(file.name))}
    options: dict[str, Any] = {"use_safetensors": True}
    if len(variants) == 1:
        options["variant"] = variants.pop()
    with LOCK, tempfile.TemporaryDirectory(prefix="ckptconv-") as place:
        name = _dtype_entry(cls.config_class()) if hasattr(cls, "config_class") else "torch_dtype"
        options[name] = dtype
        Path(place, CONFIG_FILES["model"]).write_text(json.dumps(dict(blueprint.config)))
        for file in [*weights, *folder.glob("*.safetensors.index*.json")]:
            lend(file, Path(place, file.name))
        made = cls.from_pretrained(place, local_files_only=True, **options)
    _set_origin(made, str(folder))
    return made


def without_weights(cls: Any, blueprint: Blueprint) -> Any:
    """Makes a scheduler, an image processor or a tokenizer."""
    values = dict(blueprint.config)
    with LOCK:
        if blueprint.kind == "scheduler":
            return cls.from_config(values)
        if blueprint.kind == "processor":
            return cls.from_dict(values)
        # The constructor of a tokenizer takes paths before release 5 of transformers, and tables
        # since: only files do for both. They are what `convert` writes, or what a folder holds.
        folder = blueprint.folder
        files = read_tokenizer(folder, values) if folder else tokenizer_files(values)
        with tempfile.TemporaryDirectory(prefix="ckptconv-") as place:
            for file, held in files.items():
                Path(place, file).write_bytes(held.encode())
            tokenizer = cls.from_pretrained(place, local_files_only=True)
        tokenizer.name_or_path = str(folder or "")
        return tokenizer


def _dtype_entry(config: Any) -> str:
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before release 4.56


def _set_origin(module: Any, origin: str) -> None:
    """Notes where a module comes from, as its library does."""
    if hasattr(module, "register_to_config"):
        module.register_to_config(_name_or_path=origin)
    else:
        module.config.name_or_path = module.name_or_path = origin


def _set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    """Sets the dtype in a configuration of transformers, and in those inside it."""
    setattr(config, _dtype_entry(config), dtype)
    for value in vars(config).values():
        if hasattr(value, "to_json_string"):
            _set_dtype(value, dtype)


@functools.cache
def meta_parameters() -> type[torch.overrides.TorchFunctionMode]:
    """Returns a context in which this thread makes parameters on the meta device."""
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
