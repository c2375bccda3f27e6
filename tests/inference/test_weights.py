"""Tensors go from the file into the modules: unchanged, or cast as asked, and without a copy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import load_pipeline
from ckptconv.errors import FileRefused, MapError
from ckptconv.inference.weights import fill
from ckptconv.reading.header import read_header
from tests.conftest import Sample
from tests.support.pipelines import assert_same, empty, modules

CPU = torch.device("cpu")


def test_weights_that_keep_their_dtype_take_no_memory_of_their_own(
    sample: Sample, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(sample("sd1").read_bytes())
    before = file.read_bytes()
    pipe = load_pipeline(file, device="cpu")
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(1)
    assert file.read_bytes() == before, "a write to a weight reached the file"
    info = read_header(file).tensors["model.diffusion_model.input_blocks.0.0.weight"]
    with file.open("r+b") as raw:
        raw.seek(info.start)
        raw.write(b"\0" * info.nbytes)
    assert not pipe.unet.conv_in.weight.any(), "the weight is not a view of the file"


@pytest.mark.slow
def test_unaligned_tensors_load_the_same(sample: Sample, tmp_path: Path) -> None:
    source = sample("sd1")
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    assert read_header(odd).data_start % 2 == 1
    pipe = load_pipeline(odd, device="cpu")
    assert_same(pipe, load_pipeline(source, device="cpu"))
    parameters = [p for module in modules(pipe).values() for p in module.parameters()]
    assert all(p.data_ptr() % p.itemsize == 0 for p in parameters)


def test_several_dtypes_become_one_that_holds_all_values(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "mixed.safetensors"
    state = load_file(sample("sdxl"))
    save_file(
        {k: v.float() if k.startswith("first_stage_model.") else v for k, v in state.items()}, file
    )
    pipe = load_pipeline(file, device="cpu")
    assert {p.dtype for m in modules(pipe).values() for p in m.parameters()} == {torch.float32}
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(pipe.unet.conv_in.weight, state[key].float())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_becomes_fp16_exactly(kind: torch.dtype, sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "fp8.safetensors"
    state = {
        k: v.to(kind) if k.startswith("model.diffusion_model.") else v
        for k, v in load_file(sample("sdxl")).items()
    }
    save_file(state, file)
    pipe = load_pipeline(file, device="cpu")
    assert {p.dtype for m in modules(pipe).values() for p in m.parameters()} == {torch.float16}
    stored = state["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.conv_in.weight.float(), stored.float())
    assert pipe.unet.conv_in.weight.unique().numel() > 50


@pytest.mark.slow
def test_values_too_large_for_the_dtype_are_reported(
    sample: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "large.safetensors"
    state = load_file(sample("sd1"))
    state["model.diffusion_model.input_blocks.0.0.weight"].view(-1)[:3] = 1e6
    save_file(state, file)
    pipe = load_pipeline(file, device="cpu", dtype="fp16")
    assert int(pipe.unet.conv_in.weight.isinf().sum()) == 3
    assert "unet/conv_in.weight: 3 values are too large for F16" in caplog.text
    caplog.clear()
    load_pipeline(file, device="cpu", dtype="bf16")
    assert "too large" not in caplog.text


def test_progress_ends_at_the_whole(sample: Sample) -> None:
    for dtype in (None, "bf16"):
        calls: list[tuple[int, int]] = []
        pipe = load_pipeline(
            sample("sd1"),
            device="cpu",
            dtype=dtype,
            progress=lambda done, total, calls=calls: calls.append((done, total)),  # type: ignore[misc]
        )
        size = sum(p.nbytes for m in modules(pipe).values() for p in m.parameters())
        assert calls == sorted(calls)
        assert calls[-1] == (size, size)


def test_a_file_that_becomes_shorter_is_refused(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "short.safetensors"
    file.write_bytes(sample("sd1").read_bytes())
    made = ckptconv.plan(file, dtype="fp16")
    unet = {"unet": empty(made, "unet")}
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(FileRefused, match="became shorter while it was read"):
        fill(unet, made.steps, {"unet": {"": CPU}})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"cross_attention_dim": 32}, "attn2.to_k.weight: has shape [64, 64], needed [64, 32]"),
        ({"layers_per_block": 1}, "resnets.1.conv1.weight: the module has no such parameter"),
        ({"layers_per_block": 3}, "unet: down_blocks.0.resnets.2.conv1.weight is missing"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_our_fault(
    values: Mapping[str, Any], problem: str, sample: Sample
) -> None:
    made = ckptconv.plan(sample("sd1"))
    unet = {"unet": empty(made, "unet", values)}
    with pytest.raises(MapError, match="do not agree") as caught:
        fill(unet, made.steps, {"unet": {"": CPU}})
    assert any(problem in line for line in caught.value.problems)
