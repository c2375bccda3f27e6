"""Casts raw elements from one dtype to another, with NumPy: importing torch would take longer."""

from __future__ import annotations

from ..dtypes import FLOATS, numpy_dtype


def cast(data: bytearray | memoryview, source: str, target: str) -> tuple[memoryview, int]:
    """Casts elements, rounding to the nearest value, ties to even.

    Returns their bytes, and how many finite values became infinite.
    """
    import ml_dtypes
    import numpy as np

    before = np.frombuffer(data, dtype=numpy_dtype(source))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        after = before.astype(numpy_dtype(target))
    lost = 0
    if source in FLOATS and target in FLOATS and before.size:
        limit, most = (ml_dtypes.finfo(x.dtype).max for x in (after, before))  # type: ignore[no-untyped-call]
        # A look at the ends is quick, and all that most tensors need; NaN fails it.
        if float(most) > float(limit) and not (-limit <= before.min() and before.max() <= limit):
            lost = int(np.count_nonzero(np.isinf(after) & np.isfinite(before)))
    return memoryview(after.view(np.uint8).data), lost
