"""The streamed comparison counts and places every difference, whatever the borders of its parts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptconv.dtypes import torch_dtype
from ckptconv.maps.ops import OPS, RENAME
from ckptconv.planning.step import Step, Target
from ckptconv.reading.header import read_header
from ckptconv.reading.tensor import Header, Tensor
from ckptconv.streaming.transfers import transfers
from ckptconv.verification import compare as module
from ckptconv.verification.compare import Found, compare, look_for_nonfinite

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8"]


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets small tensors cross the borders of buffers and jobs."""
    monkeypatch.setattr(module, "BUFFER", 64)
    monkeypatch.setattr(module, "PART", 256)
    monkeypatch.setattr(module, "LOOK", 64)
    monkeypatch.setattr(module, "CAST_PART", 24)


def places(header: Header) -> dict[tuple[str, str], Tensor]:
    return {("x", key): tensor for key, tensor in header.tensors.items()}


def steps(source: Header, target: Header, transposed: frozenset[str] = frozenset()) -> list[Step]:
    """Pairs the tensors of two files by name."""
    return [
        Step(
            OPS["transpose"] if key in transposed else RENAME,
            (tensor,),
            (Target("x", key, target.tensors[key].dtype, target.tensors[key].shape),),
        )
        for key, tensor in source.tensors.items()
    ]


def found(source: Path, target: Path, transposed: frozenset[str] = frozenset()) -> dict[str, Found]:
    headers = read_header(source), read_header(target)
    todo = transfers(steps(*headers, transposed), places(headers[1]))
    return {key: value for (_, key), value in compare(todo, places(headers[1])).items()}


def random_tensors(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for n in range(int(rng.integers(1, 9))):
        shape = tuple(int(size) for size in rng.integers(0, 9, rng.integers(0, 4)))
        dtype = torch_dtype(str(rng.choice(DTYPES)))
        raw = torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        raw[:] = torch.from_numpy(rng.integers(0, 256, raw.numel(), np.uint8))
        tensors[f"t{n}"] = raw.view(dtype).reshape(shape)
    return tensors


@pytest.mark.parametrize("seed", range(40))
def test_every_difference_is_counted_and_placed(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng)
    save_file(tensors, tmp_path / "a")
    expected = {}
    for key, value in tensors.items():
        count = int(rng.integers(0, min(value.numel(), 5) + 1))
        chosen = sorted(rng.choice(value.numel(), count, replace=False).tolist()) if count else []
        bits = value.reshape(-1).clone().view(torch.uint8)
        for at in chosen:
            bits[at * value.element_size() + int(rng.integers(value.element_size()))] ^= 1
        tensors[key] = bits.view(value.dtype).reshape(value.shape)
        if chosen:
            expected[key] = Found(len(chosen), chosen[0], value.numel(), tuple(value.shape))
            where = list(np.unravel_index(chosen[0], value.shape)) if value.shape else []
            assert expected[key].where == str([int(n) for n in where])
    save_file(tensors, tmp_path / "b")
    assert found(tmp_path / "a", tmp_path / "b") == expected
    assert found(tmp_path / "b", tmp_path / "b") == {}


@pytest.mark.parametrize(
    "kinds", [("F32", "F16"), ("F32", "BF16"), ("F16", "F32"), ("BF16", "F16")]
)
@pytest.mark.parametrize("transpose", [False, True])
def test_values_are_compared_with_the_rounded_ones(
    kinds: tuple[str, str], transpose: bool, tmp_path: Path
) -> None:
    before, after = map(torch_dtype, kinds)
    value = (torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 1e4).to(before)
    value[3, 4] = torch.nan
    save_file({"x": value}, tmp_path / "a")
    cast = (value.T if transpose else value).to(after).contiguous()
    save_file({"x": cast}, tmp_path / "b")
    turned = frozenset({"x"}) if transpose else frozenset[str]()
    assert found(tmp_path / "a", tmp_path / "b", turned) == {}
    bits = cast.view(torch.int32 if cast.element_size() == 4 else torch.int16)
    bits[2, 5] ^= 1  # the last place
    bits[3 + transpose, 4 - transpose] ^= 1  # another NaN is as good
    bits[6, 1] ^= 1
    save_file({"x": cast}, tmp_path / "b")
    (one,) = found(tmp_path / "a", tmp_path / "b", turned).values()
    assert (one.count, one.where) == (2, "[2, 5]")


def test_nan_where_there_is_a_number_is_a_difference(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(50)}, tmp_path / "a")
    half = torch.zeros(50, dtype=torch.float16)
    half[33] = torch.nan
    save_file({"x": half}, tmp_path / "b")
    assert found(tmp_path / "a", tmp_path / "b") == {"x": Found(1, 33, 50, (50,))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype: str, tmp_path: Path) -> None:
    width = torch_dtype(dtype).itemsize
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096 * width, np.uint8))
    if dtype == "F64":  # random bits of a double are finite
        raw.view(torch.int64)[[7, 300]] = torch.tensor([0x7FF << 52, (0x7FF << 52) + 1])
    value = raw.view(torch_dtype(dtype)).reshape(64, 64)
    save_file({"x": value, "y": torch.zeros(3)}, tmp_path / "a")
    # A float8 has no isfinite of its own.
    exact = value if value.dtype in (torch.float64, torch.int64) else value.float()
    bad = torch.nonzero(~torch.isfinite(exact).reshape(-1)).reshape(-1).tolist()
    assert bool(bad) == (dtype not in ("I64", "U8"))
    want = {("x", "x"): Found(len(bad), bad[0], 4096, (64, 64))} if bad else {}
    assert look_for_nonfinite(places(read_header(tmp_path / "a"))) == want
