"""Tensors whose axes are stored in another order: right to the bit, wherever values are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptconv
from ckptconv.reading.source import open_header
from tests.conftest import Sample
from tests.support.adapters import Adapter, layers
from tests.support.checkpoints import raw, raw_folder

pytestmark = pytest.mark.slow


def reordered(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values with other strides."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


@pytest.fixture(scope="module")
def pair(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same SDXL checkpoint as a safetensors file, and as torch saves it with other strides.

    Its maps split joint projections into rows and transpose a matrix.
    """
    plain, path = sample("sdxl", dtype="fp32"), tmp_path_factory.mktemp("strides") / "model.ckpt"
    tensors = {key: reordered(tensor) for key, tensor in load_file(plain).items()}
    torch.save({"state_dict": tensors}, path)
    orders = [info for info in open_header(path).tensors.values() if info.order]
    assert {len(info.shape) for info in orders} == {2, 4}
    return plain, path


@pytest.fixture(scope="module")
def lora(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter for convolutions and linear layers, and the same with other strides."""
    folder, adapter = tmp_path_factory.mktemp("lora"), Adapter()
    adapter.kohya("lora_unet_", layers(pair[0], "model.diffusion_model.", "input_blocks"))
    plain = adapter.save(folder / "lora.safetensors")
    torch.save({k: reordered(t) for k, t in load_file(plain).items()}, folder / "lora.pt")
    return plain, folder / "lora.pt"


@pytest.mark.parametrize("choices", [{}, {"dtype": "bf16"}, {"lora": True}])
def test_other_strides_give_the_same_folder(
    choices: dict[str, Any], pair: tuple[Path, Path], lora: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, other = (choices | ({"lora": [str(file)]} if "lora" in choices else {}) for file in lora)
    ckptconv.convert(pair[0], tmp_path / "plain", **plain)
    ckptconv.convert(pair[1], tmp_path / "other", **other)
    assert raw_folder(tmp_path / "other") == raw_folder(tmp_path / "plain")
    assert ckptconv.verify(pair[1], tmp_path / "other", **other).passed
    if not choices:
        ckptconv.export(tmp_path / "other", tmp_path / "back.safetensors")
        assert raw(tmp_path / "back.safetensors") == raw(pair[0])


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_other_strides_load_as_the_same_pipeline(
    dtype: str | None, pair: tuple[Path, Path]
) -> None:
    plain, other = (ckptconv.load_pipeline(path, device="cpu", dtype=dtype) for path in pair)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        states = [getattr(pipe, name).state_dict() for pipe in (plain, other)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_difference_is_found_where_it_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ckptconv.convert(pair[1], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    info = open_header(weights).tensors["conv_in.weight"]
    content = bytearray(weights.read_bytes())
    content[info.start + 4 * math.prod(info.shape[1:])] ^= 1  # the first value of the second row
    weights.write_bytes(content)
    (problem,) = ckptconv.verify(pair[1], folder).problems
    assert problem.startswith("unet: conv_in.weight: 1 of ")
    assert problem.endswith("the first at [1, 0, 0, 0]")


def test_two_spellings_of_one_tensor_are_compared_by_value(sample: Sample, tmp_path: Path) -> None:
    tensors = load_file(sample("sd1"))
    key = "first_stage_model.encoder.mid.attn_1.q.weight"
    square = torch.randn(tensors[key].shape[:2]).to(tensors[key].dtype)
    twin = key.replace(".q.", ".to_q.")
    for other, alike in ((square.t().contiguous().t(), True), (square.t(), False)):
        torch.save(tensors | {key: square, twin: other}, tmp_path / "model.ckpt")
        found = ckptconv.plan(tmp_path / "model.ckpt")
        assert any("that differ" in problem for problem in found.problems) != alike
