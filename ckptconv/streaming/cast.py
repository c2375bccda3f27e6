"""Casts raw elements from one dtype to another, with NumPy: importing torch would take longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..dtypes import BLOCKS, FLOATS, numpy_dtype
from ..errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt


def cast(data: bytearray | memoryview, source: str, target: str) -> tuple[memoryview, int]:
    """Casts elements, rounding to the nearest value, ties to even.

    Quantized ones, whole blocks of them, are computed in float32 first. Returns the bytes, and how
    many finite values became infinite.
    """
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if source in BLOCKS:
            before = _dequantized(data, source)
        else:
            before = np.frombuffer(data, dtype=numpy_dtype(source))
        after = before.astype(numpy_dtype(target))
    lost = 0
    if source in FLOATS and target in FLOATS and before.size:
        limit, most = (ml_dtypes.finfo(x.dtype).max for x in (after, before))  # type: ignore[no-untyped-call]
        # A look at the ends is quick, and all that most tensors need; NaN fails it.
        if float(most) > float(limit) and not (-limit <= before.min() and before.max() <= limit):
            lost = int(np.count_nonzero(np.isinf(after) & np.isfinite(before)))
    return memoryview(after.view(np.uint8).data), lost


def _dequantized(data: bytearray | memoryview, dtype: str) -> npt.NDArray[Any]:
    import gguf
    import numpy as np

    kind = getattr(gguf.GGMLQuantizationType, dtype, None)
    if kind is None:
        raise UsageError(f"this gguf package does not know {dtype}", hint="pip install -U gguf")
    # One row: the package computes few rows at a time, and short ones would take it long.
    return gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(1, -1), kind).reshape(-1)
