"""Changes the values of a weight: an adapter is added, or a scale multiplied.

The arithmetic is that of the libraries (PEFT for LoRA, DoRA, LoHa and LoKr), which a test holds it
against. What is added is computed in float64 and rounded to float32 before it is added: libraries
of linear algebra sum in an order of their own, and in float32 the last bit would depend on the
processor, so that a folder could not be verified bit for bit on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import FileRefused
from ..planning.step import Change
from ..reading.tensor import Tensor
from .cast import cast

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Rows = Callable[[slice], Array]
    """From some rows of a weight to what is added to them, each row flat."""


BLOCK = 64 << 10
"""Elements that are computed at a time: they stay in a processor's cache."""
SMALL = 256 << 10
"""Multiplications in a product that OpenBLAS computes without threads of its own. Ours would wait
for those: a conversion took six times as long on a busy machine."""


def merged(
    data: bytearray,
    dtype: str,
    shape: tuple[int, ...],
    changes: Iterable[Change],
    read: Callable[[Tensor], bytearray],
) -> tuple[memoryview, str]:
    """Changes the values of one weight.

    Args:
        data: its elements, row by row.
        dtype: of the elements, as safetensors names it.
        shape: of the weight, [out, in, ...].
        changes: what to do, in this order.
        read: gives the bytes of a tensor.

    Returns:
        The new elements and their dtype: F64 for F64, F32 for all others.

    Raises:
        FileRefused: an alpha is not finite.
    """
    import numpy as np

    values = _decoded(data, dtype)
    weight = values.reshape(shape[0] if shape else 1, -1)
    for each in changes:
        tensors = dict(each.parts)
        parts = {
            role: _decoded(read(tensor), tensor.dtype).reshape(tensor.shape).astype(np.float64)
            for role, tensor in tensors.items()
        }
        factor = each.factor
        if (alpha := parts.pop("alpha", None)) is not None:
            said = float(alpha.reshape(-1)[0])
            factor *= said
            if not math.isfinite(factor):
                raise FileRefused(
                    f"{tensors['alpha'].file}: an alpha of the adapter is {said}",
                    hint="the adapter is broken, as by a training that diverged: take another",
                )
        change = KINDS[each.kind](parts, factor)
        step = max(1, BLOCK // max(1, weight.shape[1]))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            change(weight[rows], rows)
    return values.data.cast("B"), "F64" if values.dtype == np.float64 else "F32"


def _decoded(data: bytearray, dtype: str) -> Array:
    """Returns elements as float64 if they are that, else as float32, which holds their values."""
    import numpy as np

    if dtype in ("F32", "F64"):
        return np.frombuffer(data, "<f8" if dtype == "F64" else "<f4")
    return np.frombuffer(cast(data, dtype, "F32")[0], "<f4")


Apply = Callable[["Array", slice], None]
"""Changes some rows of a weight, in place."""


def _adding(rows_of: Callable[[Mapping[str, Array]], Rows]) -> Callable[..., Apply]:
    """Makes a kind of change that adds something to each row."""

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

    made = np.empty((len(left), right.shape[1]), np.float64)
    width = max(1, SMALL // max(1, left.size))
    for start in range(0, right.shape[1], width):
        columns = slice(start, start + width)
        np.matmul(left, right[:, columns], out=made[:, columns])
    return made


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
"""By kind, from the tensors of a change and its factor to what changes the rows of a weight."""
