"""Weights of GGUF that stay quantized in memory, as diffusers itself keeps them.

diffusers computes a linear layer with the blocks as they are stored: it dequantizes them when the
layer has its turn, on its device. So the blocks move as bytes, and rows of them as rows.
Convolutions, embeddings, norms, and whatever transformers builds, are dequantized on loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..dtypes import BLOCKS, nbytes
from ..libraries import find_class
from ..planning.step import Step, Target
from ..reading.tensor import Tensor
from .modules import meta_parameters

if TYPE_CHECKING:
    import torch
    from torch import nn

    Layers = Sequence[tuple[nn.Module, str]]
    """Layers whose weights stay quantized, and the dtypes of those."""

Described = TypeVar("Described", Tensor, Target)


def keep_quantized(
    modules: Mapping[str, nn.Module], steps: Iterable[Step], dtype: torch.dtype
) -> tuple[list[Step], Layers]:
    """Replaces the linear layers whose weights are quantized in the file by those of diffusers.

    Args:
        modules: from `empty_module`, by component.
        steps: that bring the tensors to them.
        dtype: to compute in.

    Returns:
        The steps, which take those weights as bytes, and the new layers, for `know_blocks`.
    """
    kept: list[Step] = []
    layers: list[tuple[nn.Module, str]] = []
    components = set()
    for step in steps:
        source, targets = step.sources[0], step.targets
        owners = []
        if keeps_blocks(step):
            found = (_owner(modules.get(target.component), target.key) for target in targets)
            owners = [owner for owner in found if owner]
        if not owners or len(owners) < len(targets):
            kept.append(step)
            continue
        for (owner, name), target in zip(owners, targets, strict=True):
            layers.append((_replaced(owner, name, target, source.dtype, dtype), source.dtype))
            components.add(target.component)
        as_bytes = tuple(_as_bytes(target, source.dtype) for target in targets)
        kept.append(replace(step, sources=(_as_bytes(source, source.dtype),), targets=as_bytes))
    for name in components:
        _mark(modules[name], dtype)
    return kept, layers


def know_blocks(layers: Layers) -> None:
    """Tells the layers what their bytes are, once they have them."""
    for layer, dtype in layers:
        weight: Any = layer.weight
        layer.weight = _parameter(weight.data, dtype)


def _owner(module: nn.Module | None, key: str) -> tuple[nn.Module, str] | None:
    """Returns the parent and the name of the linear layer of diffusers that a weight is of."""
    from torch import nn

    path, _, leaf = key.rpartition(".")
    parent, _, name = path.rpartition(".")
    model = find_class("diffusers", "ModelMixin")
    if leaf != "weight" or not isinstance(module, model):
        return None
    try:
        owner = module.get_submodule(parent)
    except AttributeError:  # `fill` says what does not fit
        return None
    return (owner, name) if type(getattr(owner, name, None)) is nn.Linear else None


def keeps_blocks(step: Step) -> bool:
    """Whether whole rows of whole blocks move into matrices, and diffusers knows their dtype."""
    source = step.sources[0]
    if source.dtype not in BLOCKS:
        return False
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    known = {str(kind.name) for kind in SUPPORTED_GGUF_QUANT_TYPES}
    moves = step.op.order != "transposed" and not step.changes and source.order is None
    return (
        moves
        and source.dtype in known
        and len(source.shape) == 2
        and source.shape[1] % BLOCKS[source.dtype][0] == 0
    )


def _as_bytes(tensor: Described, dtype: str) -> Described:
    rows, columns = tensor.shape
    return replace(tensor, dtype="U8", shape=(rows, nbytes(columns, dtype)))


def _replaced(
    owner: nn.Module, name: str, target: Target, dtype: str, computed: torch.dtype
) -> nn.Module:
    """Puts a layer that computes with blocks, still without them, in the place of another."""
    import torch
    from diffusers.quantizers.gguf.utils import GGUFLinear

    old: Any = getattr(owner, name)
    with meta_parameters()():
        layer: nn.Module = GGUFLinear(
            old.in_features, old.out_features, old.bias is not None, compute_dtype=computed
        )
    shape = _as_bytes(target, dtype).shape
    layer.weight = _parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), dtype)
    setattr(owner, name, layer.requires_grad_(False))
    return layer


def _parameter(data: torch.Tensor, dtype: str) -> nn.Parameter:
    import gguf
    from diffusers.quantizers.gguf import utils

    make: Any = utils.GGUFParameter
    parameter: nn.Parameter = make(data, quant_type=getattr(gguf.GGMLQuantizationType, dtype))
    return parameter


def _mark(module: Any, dtype: torch.dtype) -> None:
    """Lets diffusers know that the module is quantized: such a one cannot be saved or cast."""
    import diffusers

    make: Any = diffusers.GGUFQuantizationConfig
    quantizers: Any = diffusers.quantizers
    config = make(compute_dtype=dtype)
    module.hf_quantizer = quantizers.DiffusersAutoQuantizer.from_config(config)
    module.is_quantized, module.quantization_method = True, config.quant_method
