"""Casts raw elements from one dtype to another: all but F32 to F16 and back with torch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["cast", "torch_dtype"]

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """Returns torch's dtype for a name that safetensors uses.

    Raises:
        UsageError: this torch has none.
    """
    import torch

    dtype = getattr(torch, _NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"torch {torch.__version__} has no dtype for {name}")
    return dtype


def cast(data: bytearray | memoryview, source: str, target: str) -> tuple[memoryview, int]:
    """Casts elements, rounding to the nearest value, ties to even.

    torch casts F64 to 16 bits by way of F32, so that a value can be rounded twice.

    Args:
        data: the elements, back to back.
        source: their dtype, as safetensors names it.
        target: the dtype to give.

    Returns:
        The bytes of the elements, and how many finite ones became infinite.
    """
    if (source, target) == ("F32", "F16"):
        return _halved(data)
    if (source, target) == ("F16", "F32"):
        return _doubled(data), 0
    import torch

    before = torch.frombuffer(data, dtype=torch_dtype(source))
    after = before.to(torch_dtype(target))
    return memoryview(after.view(torch.uint8).numpy().data), _overflows(before, after)


def _halved(data: bytearray | memoryview) -> tuple[memoryview, int]:
    """Casts F32 to F16 with numpy: the commonest cast, and importing torch would take longer."""
    import numpy as np

    before = np.frombuffer(data, dtype="<f4")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        after = before.astype("<f2")
    limit = np.finfo(np.float16).max
    overflows = 0
    if not (before.size and -limit <= before.min() and before.max() <= limit):  # NaN fails it
        overflows = int(np.count_nonzero(np.isinf(after) & np.isfinite(before)))
    return memoryview(after.view(np.uint8).data), overflows


def _doubled(data: bytearray | memoryview) -> memoryview:
    """Casts F16 to F32, which holds every value of F16, with numpy as well."""
    import numpy as np

    return memoryview(np.frombuffer(data, dtype="<f2").astype("<f4").view(np.uint8).data)


def _overflows(before: torch.Tensor, after: torch.Tensor) -> int:
    """Counts the values that were finite and are infinite now."""
    import torch

    if not before.is_floating_point():
        return 0
    limit = torch.finfo(after.dtype).max
    if torch.finfo(before.dtype).max <= limit or not before.numel():
        return 0
    if before.dtype.itemsize == 1:  # torch compares no fp8
        before = before.float()
    low, high = torch.aminmax(before)
    if -limit <= low.item() and high.item() <= limit:  # a look at the ends is quick; NaN fails it
        return 0
    return int((after.isinf() & before.double().isfinite()).sum())
