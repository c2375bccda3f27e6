"""Makes GGUF files, with the gguf package; and the values that it finds in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ckptconv.dtypes import BLOCKS

Array = npt.NDArray[Any]
Stored = Mapping[str, tuple[str, tuple[int, ...], Array]]
"""By name, the dtype of a tensor, its shape and its rows as they are stored."""

WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
"""What `gguf.quants.quantize` can write."""
ROW = 256
"""Values in the rows that a writer makes of tensors whose rows are no whole blocks."""


def kind(dtype: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[dtype]


def block(dtype: str) -> int:
    return BLOCKS.get(dtype, (1, 0))[0]


def written(values: Array, dtype: str) -> tuple[str, tuple[int, ...], Array]:
    """Quantizes a tensor; in F32 if it is no matrix of whole blocks, as programs do."""
    if values.ndim < 2 or values.shape[-1] % block(dtype):
        dtype = "F32"
    if dtype not in WRITTEN:
        return random(dtype, values.shape)
    return dtype, values.shape, gguf.quants.quantize(values.astype(np.float32), kind(dtype))


def random(dtype: str, shape: tuple[int, ...], seed: int = 0) -> tuple[str, tuple[int, ...], Array]:
    """Makes blocks of any dtype; whatever is read in them as a float of 16 bits is small."""
    values, size = BLOCKS[dtype]
    rows = (*shape[:-1], shape[-1] // values * size)
    return dtype, shape, np.random.default_rng(seed).integers(0, 0x30, rows, dtype=np.uint8)


def cycled(
    tensors: Mapping[str, Array], dtypes: Iterable[str], *, reshaped: bool = False
) -> dict[str, tuple[str, tuple[int, ...], Array]]:
    """Writes the tensors of a model in several dtypes in turn.

    Args:
        tensors: of the model.
        dtypes: to take.
        reshaped: makes rows of `ROW` values of tensors whose rows are no multiple of it.
    """
    turn, stored = itertools.cycle(dtypes), {}
    for name, values in tensors.items():
        odd = values.ndim > 1 and values.size % ROW == 0 and values.shape[-1] % ROW
        rows = values.reshape(-1, ROW) if reshaped and odd else values
        dtype, _, data = written(rows, next(turn) if rows.ndim > 1 else "F32")
        stored[name] = (dtype, values.shape, data)
    return stored


def write(
    path: Path,
    stored: Stored,
    arch: str = "flux",
    more: Callable[[gguf.GGUFWriter], object] = lambda _: None,
) -> Path:
    """Writes a file.

    Args:
        path: of the file.
        stored: its tensors.
        arch: entry of the metadata.
        more: adds metadata.
    """
    writer: Any = gguf.GGUFWriter(path, arch)
    more(writer)
    for name, (dtype, shape, rows) in stored.items():
        if rows.shape[:-1] != shape[:-1]:  # as it was reshaped
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
        writer.add_tensor(name, rows, raw_dtype=kind(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(stored: Stored) -> dict[str, Array]:
    """Returns the values as the gguf package computes them, in float32."""
    return {
        name: gguf.quants.dequantize(rows, kind(dtype)).reshape(shape)
        for name, (dtype, shape, rows) in stored.items()
    }
