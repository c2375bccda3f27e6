"""Counts what a module allocates while it computes, on the meta device: no memory, no time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Adds up the bytes of the storages that live, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {self._at(each) for each in _tensors((args, kwargs))}
        for each in _tensors(made):
            at, storage = self._at(each), each.untyped_storage()
            if at not in given | self._known:
                self._known.add(at)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._freed, at, storage.nbytes())
        return made

    def _at(self, tensor: Any) -> int:
        at: int = tensor.untyped_storage()._cdata
        return at

    def _add(self, count: int) -> None:
        self.bytes += count
        self.most = max(self.most, self.bytes)

    def _freed(self, at: int, count: int) -> None:
        self._known.discard(at)
        self.bytes -= count


class Fused(TorchFunctionMode):
    """Attention allocates its result only, as the kernels of GPUs do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **kwargs)


def allocated(run: Callable[[], object]) -> int:
    """Returns the most bytes that live at once beside the weights."""
    counter = Counter()
    with torch.no_grad(), torch.device("meta"), Fused(), counter:
        run()
    return counter.most


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
