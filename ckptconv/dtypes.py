"""The dtypes of tensors: one table of what safetensors, torch, NumPy and people call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch


BITS: dict[str, int] = {
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of every dtype: `Dtype::bitsize` in `src/tensor.rs` of safetensors 0.8."""

BLOCKS: dict[str, tuple[int, int]] = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176)},
    **{"Q6_K": (256, 210), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66)},
    **{"IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110)},
    **{"IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66)},
    "MXFP4": (32, 17),
}
"""Quantized dtypes, which only GGUF has: the values in a block, and its bytes. A block is stored as
a whole and lies within a row. Source: `GGML_QUANT_SIZES` in https://github.com/ggml-org/llama.cpp,
gguf-py (MIT)."""

FLOATS = frozenset(dtype for dtype in BITS if dtype.startswith(("F", "BF"))) | BLOCKS.keys()
"""The dtypes of real numbers: not the integers, BOOL or C64."""

LIBRARY_NAMES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    **{f"{kind[0].upper()}{n}": f"{kind}{n}" for kind in ("int", "uint") for n in (64, 32, 16, 8)},
    "BOOL": "bool",
    "C64": "complex64",
}
"""The names that torch, and NumPy with ml_dtypes, give to dtypes of the format."""

ONES: dict[str, bytes] = {
    "F64": b"\0\0\0\0\0\0\xf0\x3f",
    "F32": b"\0\0\x80\x3f",
    "F16": b"\0\x3c",
    "BF16": b"\x80\x3f",
    "F8_E4M3": b"\x38",
    "F8_E5M2": b"\x3c",
}
"""The bytes of 1.0, by dtype."""

COMPUTED = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""The dtypes that layers compute in: as users write them, and as safetensors does."""

FP8 = "fp8"
"""The dtype that only stores weights: e4m3, which has no infinity and ends at 448."""

CASTS = {**COMPUTED, FP8: "F8_E4M3"}
"""The dtypes that weights can be cast to, likewise."""

_SYNONYMS = {
    **{name: name for name in CASTS},
    **{dtype.lower(): name for name, dtype in CASTS.items()},
    **{LIBRARY_NAMES[dtype]: name for name, dtype in CASTS.items()},
    **{"half": "fp16", "float": "fp32"},
}


def cast_name(dtype: object) -> str:
    """Returns the key of `CASTS` for a `torch.dtype` or its name; UsageError for any other.

    >>> cast_name("torch.float16"), cast_name("BF16"), cast_name("float8_e4m3fn")
    ('fp16', 'bf16', 'fp8')
    """
    name = _SYNONYMS.get(str(dtype).lower().removeprefix("torch."))
    if name is None:
        hint = f"it is one of {', '.join(CASTS)}"
        raise UsageError(f"dtype {str(dtype)!r} is unknown", hint=hint)
    return name


def nbytes(count: int, dtype: str) -> int:
    """Returns how many bytes a number of elements take, back to back; of blocks, whole ones."""
    if dtype in BLOCKS:
        values, size = BLOCKS[dtype]
        return count // values * size
    return count * BITS[dtype] // 8


def torch_dtype(name: str) -> torch.dtype:
    """Returns torch's dtype for a dtype of the format; UsageError if this torch has none."""
    import torch

    dtype = getattr(torch, LIBRARY_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"torch {torch.__version__} has no dtype for {name}")
    return dtype


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Returns NumPy's little-endian dtype for a dtype of the format; UsageError if none exists."""
    import ml_dtypes  # adds bfloat16 and the dtypes of 8 bits to NumPy
    import numpy as np

    library_name = LIBRARY_NAMES.get(name, "")
    if hasattr(ml_dtypes, library_name):
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, library_name))
        return found
    if not library_name:
        raise UsageError(f"values of {name} cannot be read", hint="store them as F16 or BF16")
    return np.dtype(library_name).newbyteorder("<")
