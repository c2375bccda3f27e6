"""Changes the values of a weight: adds an adapter, or multiplies by a scale.

The arithmetic is that of the libraries (PEFT for LoRA, DoRA, LoHa and LoKr), as a test checks. What
is added is computed in float64 and rounded to float32 first: libraries of linear algebra sum in an
order of their own, and in float32 the last bit would depend on the processor, so that a folder
could not be verified bit for bit on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import FileRefused
from ..reading.tensor import Tensor
from .cast import cast

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..files import Files
    from .transfers import Transfer

    Array = npt.NDArray[Any]
    Rows = Callable[[slice], Array]
    """Gives what is added to some rows of a weight, each row flat."""


BLOCK = 64 << 10
"""Elements that are computed at a time: they stay in a processor's cache."""
SMALL = 256 << 10
"""Multiplications in a product that OpenBLAS computes without threads of its own. Ours would wait
for them: a conversion took six times as long on a busy machine."""


def merged(
    data: memoryview, dtype: str, transfer: Transfer, files: Files
) -> tuple[memoryview, str]:
    """Makes the changes of a transfer to the values of its weight, given row by row.

    Returns the new elements and their dtype, F64 for F64 and F32 for all others. FileRefused if an
    alpha is not finite, or a file can no longer be read.
    """
    import numpy as np

    values = _decoded(data, dtype)
    weight = values.reshape(transfer.shape[0] if transfer.shape else 1, -1)
    for each in transfer.changes:
        parts = {role: _read(tensor, files).astype(np.float64) for role, tensor in each.parts}
        factor = each.factor
        if (alpha := parts.pop("alpha", None)) is not None:
            value = float(alpha.reshape(-1)[0])
            factor *= value
            if not math.isfinite(factor):
                raise FileRefused(
                    f"{dict(each.parts)['alpha'].file}: an alpha of the adapter is {value}",
                    hint="the adapter is broken, as by a training that diverged: take another",
                )
        change = KINDS[each.kind](parts, factor)
        step = max(1, BLOCK // max(1, weight.shape[1]))
        for start in range(0, len(weight), step):
            stop = min(start + step, len(weight))
            change(weight[start:stop], slice(each.first + start, each.first + stop))
    return values.data.cast("B"), "F64" if values.dtype == np.float64 else "F32"


def _read(tensor: Tensor, files: Files) -> Array:
    return _decoded(tensor.read(files), tensor.dtype).reshape(tensor.shape)


def _decoded(data: bytearray | memoryview, dtype: str) -> Array:
    """Returns elements as float64 if that is their dtype, else as float32, which is exact."""
    import numpy as np

    if dtype in ("F32", "F64"):
        return np.frombuffer(data, "<f8" if dtype == "F64" else "<f4")
    return np.frombuffer(cast(data, dtype, "F32")[0], "<f4")


Apply = Callable[["Array", slice], None]
"""Changes some rows of a weight, in place."""


def _adding(rows_of: Callable[[Mapping[str, Array]], Rows]) -> Callable[..., Apply]:
    """Returns a kind of change that adds something to each row."""

    def kind(parts: Mapping[str, Array], factor: float) -> Apply:
        rows_at = rows_of(parts)

        def apply(weight: Array, rows: slice) -> None:
            added = rows_at(rows)
            added *= factor
            weight += added.astype(weight.dtype, copy=False)

        return apply

    return kind


def _dora(parts: Mapping[str, Array], factor: float) -> Apply:
    """LoRA, then every row gets the length that was trained (https://arxiv.org/abs/2402.09353)."""
    import numpy as np

    rows_at, magnitude = _lora(parts), parts["magnitude"].reshape(-1, 1)

    def apply(weight: Array, rows: slice) -> None:
        new = weight + factor * rows_at(rows)
        weight[...] = new * (magnitude[rows] / np.linalg.norm(new, axis=1, keepdims=True))

    return apply


def _scale(parts: Mapping[str, Array], _factor: float) -> Apply:
    """One scale for the whole weight, or one for each row."""
    scale = parts["scale"].reshape(-1, 1)

    def apply(weight: Array, rows: slice) -> None:
        weight *= (scale if len(scale) == 1 else scale[rows]).astype(weight.dtype)

    return apply


def _lora(parts: Mapping[str, Array]) -> Rows:
    """Up times down (https://arxiv.org/abs/2106.09685); in a convolution with a core between."""
    import numpy as np

    up, down = _flat(parts["up"]), _flat(parts["down"])
    if (mid := parts.get("mid")) is not None:
        down = _flat(np.einsum("abhw,bi->aihw", mid, down))
    return lambda rows: _product(up[rows], down)


def _loha(parts: Mapping[str, Array]) -> Rows:
    """The product, element by element, of two LoRA (https://arxiv.org/abs/2108.06098)."""
    import numpy as np

    def factors(n: int) -> tuple[Array, Array]:
        up, down = _flat(parts[f"hada_w{n}_a"]), _flat(parts[f"hada_w{n}_b"])
        if (core := parts.get(f"hada_t{n}")) is None:
            return up, down
        return up.T, _flat(np.einsum("ijhw,jr->irhw", core, down))

    (up, down), (other_up, other_down) = factors(1), factors(2)
    return lambda rows: _product(up[rows], down) * _product(other_up[rows], other_down)


def _lokr(parts: Mapping[str, Array]) -> Rows:
    """The Kronecker product of two matrices, each whole or a product."""
    import numpy as np

    def factor(name: str) -> Array:
        if (whole := parts.get(name)) is not None:
            return _flat(whole)
        up, down = _flat(parts[f"{name}_a"]), _flat(parts[f"{name}_b"])
        if (core := parts.get(name.replace("w", "t"))) is not None:
            return _flat(np.einsum("ijhw,ip,jr->prhw", core, up, down))
        return up @ down

    left, right = factor("lokr_w1"), factor("lokr_w2")

    def rows_at(rows: slice) -> Array:
        row = np.arange(*rows.indices(len(left) * len(right)))
        outer = left[row // len(right)][:, :, None] * right[row % len(right)][:, None, :]
        return outer.reshape(len(row), -1)

    return rows_at


def _product(left: Array, right: Array) -> Array:
    """Multiplies two matrices, some columns at a time."""
    import numpy as np

    product = np.empty((len(left), right.shape[1]), np.float64)
    width = max(1, SMALL // max(1, left.size))
    for start in range(0, right.shape[1], width):
        columns = slice(start, start + width)
        np.matmul(left, right[:, columns], out=product[:, columns])
    return product


def _flat(tensor: Array) -> Array:
    """Returns a tensor as a matrix: its first axis, and all others."""
    return tensor.reshape(len(tensor), -1)


KINDS: Mapping[str, Callable[..., Apply]] = {
    "lora": _adding(_lora),
    "dora": _dora,
    "loha": _adding(_loha),
    "lokr": _adding(_lokr),
    "scale": _scale,
}
"""By kind, a function from the tensors of a change and its factor to what changes the rows."""
