"""Casts raw elements from one dtype to another, with NumPy: importing torch would take longer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..dtypes import BITS, BLOCKS, FLOATS, numpy_dtype
from ..errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt


def cast(data: bytearray | memoryview, source: str, target: str) -> tuple[memoryview, int]:
    """Casts elements, rounding to the nearest value, ties to even.

    Quantized ones, whole blocks of them, are computed in float32 first. Returns the bytes, and how
    many finite values are too large for the target: those become infinite, or the largest value of
    a dtype of 8 bits, some of which have no infinity.
    """
    import ml_dtypes
    import numpy as np

    if source in BLOCKS:
        before, source = _dequantized(data, source), "F32"
    else:
        before = np.frombuffer(data, dtype=numpy_dtype(source))
    after = _rounded(before, source, target)
    lost = 0
    if source in FLOATS and target in FLOATS and before.size and _has_lost(before, after):
        over = ~np.isfinite(after) & np.isfinite(before)
        lost = int(np.count_nonzero(over))
        if BITS[target] == 8:
            after[over] = np.copysign(ml_dtypes.finfo(after.dtype).max, before[over])  # type: ignore[no-untyped-call]
    return memoryview(after.view(np.uint8).data), lost


def _rounded(before: npt.NDArray[Any], source: str, target: str) -> npt.NDArray[Any]:
    import numpy as np

    if (BITS[source], BITS[target]) == (16, 8):
        taken = np.take(_table(source, target).view(np.uint8), before.view(np.uint16))
        return taken.view(numpy_dtype(target))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return before.astype(numpy_dtype(target))


def _has_lost(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> bool:
    """Whether a value may have become too large, by the quicker of two looks."""
    import ml_dtypes
    import numpy as np

    if after.itemsize == 1:
        return not np.isfinite(after).all()
    limit, most = (ml_dtypes.finfo(x.dtype).max for x in (after, before))  # type: ignore[no-untyped-call]
    # A look at the ends is all that most tensors need; NaN fails it.
    return float(most) > float(limit) and not (-limit <= before.min() and before.max() <= limit)


@functools.cache
def _table(source: str, target: str) -> npt.NDArray[Any]:
    """Returns every value of 16 bits, rounded: a look-up is nine times as fast as a cast."""
    import numpy as np

    every = np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(source))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return every.astype(numpy_dtype(target))


def _dequantized(data: bytearray | memoryview, dtype: str) -> npt.NDArray[Any]:
    import gguf
    import numpy as np

    kind = getattr(gguf.GGMLQuantizationType, dtype, None)
    if kind is None:
        raise UsageError(f"this gguf package does not know {dtype}", hint="pip install -U gguf")
    # One row: the package computes few rows at a time, and short ones would take it long.
    row = np.frombuffer(data, np.uint8).reshape(1, -1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return gguf.quants.dequantize(row, kind).reshape(-1)
