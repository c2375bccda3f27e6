"""What the real classes of diffusers and transformers expect, asked on the meta device.

A class is built from a configuration without memory for its weights; its names and shapes are
compared with those of a folder. Nothing of a folder is run (`ckptconv.configs.allowed`).
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..configs.allowed import Unbuildable, kept
from ..libraries import LIBRARIES, find_class, tied

if TYPE_CHECKING:
    import torch

MOST_TENSORS = 5_000
"""A class that makes more of them is not built to the end; the largest known model has 1,680."""
MOST_BUFFER = 1 << 27
"""Elements of a tensor that a class computes, such as positions; Stable Diffusion 3 has 2**25.8."""


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
        config: its configuration; entries that its constructor does not take are left out.

    Raises:
        Unbuildable: there is no such class, or the configuration makes no sense to it.
    """
    return _expected(library, name, json.dumps(kept(library, name, config), sort_keys=True))


def has_class(library: str, name: str) -> bool:
    """Tells whether a library offers a class of this name, without importing it."""
    return library in LIBRARIES and name in dir(importlib.import_module(library))


def limited(most: int = MOST_TENSORS) -> torch.overrides.TorchFunctionMode:
    """Returns the mode in which a class is built: it stops one that would fill time or memory."""
    import torch

    makes = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
    makes |= {torch.arange, torch.linspace, torch.eye}
    joins = {torch.stack, torch.cat, torch.outer, torch.einsum}

    def check_size(result: torch.Tensor) -> None:
        if result.numel() > MOST_BUFFER:
            raise Unbuildable(f"it computes a tensor of {result.numel():,} numbers")

    def is_meta(value: Any) -> bool:
        several = isinstance(value, list | tuple)
        return any(map(is_meta, value)) if several else bool(getattr(value, "is_meta", False))

    def on_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return type(value)(map(on_meta, value)) if isinstance(value, list | tuple) else value

    class Limited(torch.overrides.TorchFunctionMode):
        """Counts the tensors that are made in this thread, and measures those with real memory."""

        left = most

        def __torch_function__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func in makes:
                self.left -= 1
                if self.left < 0:
                    raise Unbuildable("it has far more tensors than the weights")
                if str(kwargs.get("device")) != "meta":
                    check_size(func(*args, **{**kwargs, "device": "meta"}))
            elif func in joins and not is_meta(args):
                check_size(func(*on_meta(args), **kwargs))
            return func(*args, **kwargs)

    return Limited()


@functools.lru_cache(maxsize=256)
def _expected(library: str, name: str, config: str) -> Expected:
    import torch

    owner, values = find_class(library, name), json.loads(config)
    try:
        with limited(), torch.device("meta"):
            if hasattr(owner, "config_class"):
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
