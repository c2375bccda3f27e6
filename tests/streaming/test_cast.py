"""Casts round as IEEE 754 says, and values that become infinite are counted."""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.dtypes import torch_dtype
from ckptconv.errors import UsageError
from ckptconv.streaming.cast import cast

SPECIAL = np.array(
    [
        *(0.0, -0.0, 1.0, -1.5, 65504.0, 65519.99, 65520.0, 1e5, -1e5, 3.3895e38, 3.4e38),
        *(6e-8, 2.9e-8, 2.0**-24, 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8),
        *(1 + 3 * 2.0**-8, np.inf, -np.inf, np.nan),
    ],
    dtype=np.float32,
)
"""Signed zeros, the largest values, subnormals, ties between two neighbours, no numbers."""


def _fp32_values() -> npt.NDArray[np.float32]:
    """Returns values of every exponent, and the special ones."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    return np.concatenate([SPECIAL, bits.view(np.float32)])


def _run(values: npt.NDArray[np.generic], source: str, target: str) -> tuple[bytes, int]:
    view, overflows = cast(bytearray(values.tobytes()), source, target)
    return bytes(view), overflows


def _same_numbers(found: npt.NDArray[np.generic], wanted: npt.NDArray[np.generic]) -> bool:
    """Whether two float arrays are equal bit for bit, whatever stands in a NaN."""
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(found), nan)
    return bool(found[~nan].tobytes() == wanted[~nan].tobytes())


def _bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds numbers to bfloat16, to nearest, ties to even, on their bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_fp32_to_fp16_equals_numpy_bit_for_bit_and_counts_overflows() -> None:
    values = _fp32_values()
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float16)
    found, overflows = _run(values, "F32", "F16")
    assert _same_numbers(np.frombuffer(found, np.float16), wanted)
    assert overflows == int((np.isinf(wanted) & np.isfinite(values)).sum()) > 1000


def test_fp32_to_bf16_rounds_to_nearest_even_and_counts_overflows() -> None:
    values = _fp32_values()
    values = values[~np.isnan(values)]
    wanted = _bf16_bits(values)
    found, overflows = _run(values, "F32", "BF16")
    assert np.array_equal(np.frombuffer(found, np.uint16), wanted)
    infinite = (wanted & 0x7FFF) == 0x7F80
    assert overflows == int((infinite & np.isfinite(values)).sum()) > 0


@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_every_16_bit_value_becomes_itself_in_fp32(source: str) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    if source == "F16":
        wanted = codes.view(np.float16).astype(np.float32)
    else:
        wanted = (codes.astype(np.uint32) << 16).view(np.float32)
    found, overflows = _run(codes, source, "F32")
    assert _same_numbers(np.frombuffer(found, np.float32), wanted)
    assert overflows == 0


def test_bf16_to_fp16_equals_numpy_by_way_of_fp32() -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    values = (codes.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float16)
    found, overflows = _run(codes, "BF16", "F16")
    assert _same_numbers(np.frombuffer(found, np.float16), wanted)
    assert overflows == int((np.isinf(wanted) & np.isfinite(values)).sum()) > 1000


def _fp8(code: int, exponent_bits: int, *, has_inf: bool) -> float:
    """Decodes an fp8 number (https://arxiv.org/abs/2209.05433, table 1)."""
    mantissa_bits = 7 - exponent_bits
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1 and has_inf:
        return math.nan if mantissa else sign * math.inf
    if code & 0x7F == 0x7F and not has_inf:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(1 + mantissa / 2**mantissa_bits, exponent - bias)


@pytest.mark.parametrize(
    ("source", "exponent_bits", "has_inf"), [("F8_E4M3", 4, False), ("F8_E5M2", 5, True)]
)
@pytest.mark.parametrize(("target", "kind"), [("F16", np.float16), ("F32", np.float32)])
def test_every_fp8_value_becomes_itself(
    source: str, exponent_bits: int, has_inf: bool, target: str, kind: type[np.floating]
) -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = np.array([_fp8(int(c), exponent_bits, has_inf=has_inf) for c in codes], dtype=kind)
    found, overflows = _run(codes, source, target)
    assert _same_numbers(np.frombuffer(found, kind), wanted)
    assert overflows == 0  # an infinity of the source is none that the cast made


def test_overflows_of_fp64_are_counted_where_fp32_overflows_as_well() -> None:
    values = np.array([1e300, -1e39, 1.0, np.inf, np.nan])
    assert _run(values, "F64", "F16")[1] == 2
    found, overflows = _run(values, "F64", "F32")
    assert overflows == 2
    assert np.isinf(np.frombuffer(found, np.float32)).tolist() == [True, True, False, True, False]


@settings(max_examples=100, deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_a_fp16_is_the_nearest_of_its_neighbours(value: float) -> None:
    found, overflows = _run(np.array([value], dtype=np.float32), "F32", "F16")
    (half,) = struct.unpack("<e", found)
    assert overflows == (math.isinf(half) and math.isfinite(value))
    if math.isfinite(half):
        below = float(np.nextafter(np.float16(half), np.float16(-np.inf)))
        above = float(np.nextafter(np.float16(half), np.float16(np.inf)))
        error = abs(half - value)
        assert all(error <= abs(other - value) for other in (below, above))


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "nonsense"])
def test_a_dtype_that_torch_lacks_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"has no dtype for {name}"):
        torch_dtype(name)


def test_scales_of_eight_exponent_bits_cast_too() -> None:
    from ckptconv.streaming.cast import cast

    codes = bytes([126, 127, 128, 254])  # 2 to the power of code - 127
    view, overflows = cast(bytearray(codes), "F8_E8M0", "F16")
    values = np.frombuffer(view, dtype="<f2")
    assert values[:3].tolist() == [0.5, 1, 2]
    assert np.isinf(values[3])
    assert overflows == 1
