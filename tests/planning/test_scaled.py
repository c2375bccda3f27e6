"""Weights in fp8 that have a scale, as ComfyUI writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import CkptconvError
from tests.conftest import Sample

UNET = "model.diffusion_model."


def in_scaled_fp8(source: Path, path: Path, ends: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Writes a file with its linear weights in fp8 and scales; returns what these weights are."""
    scale_end, input_end, marker = ends
    tensors, values = {}, {}
    for key, tensor in load_file(source).items():
        tensors[key] = tensor
        if not key.endswith(".weight") or tensor.ndim != 2 or "embedding" in key:
            continue
        name, scale = key.removesuffix(".weight"), tensor.float().abs().max() / 448
        tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        tensors[name + scale_end] = scale
        tensors[name + input_end] = torch.ones(())
        if marker == ".comfy_quant":
            said = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
            tensors[name + marker] = torch.frombuffer(bytearray(said), dtype=torch.uint8).clone()
        values[key] = tensors[key].float() * scale
    if marker != ".comfy_quant":
        tensors[UNET + marker] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, path)
    return values


LAYOUTS = {
    "older": (".scale_weight", ".scale_input", "scaled_fp8"),
    "newer": (".weight_scale", ".input_scale", ".comfy_quant"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaled_fp8_becomes_the_product_of_values_and_scales(
    layout: str, small: Path, tmp_path: Path
) -> None:
    source = tmp_path / "scaled.safetensors"
    values = in_scaled_fp8(small, source, LAYOUTS[layout])
    made = ckptconv.plan(source)
    assert not made.lossless
    made.require_complete()
    sources = {s.targets[0].key: s.sources[0].name for s in made.steps if s.targets}
    for dtype, wanted in ((None, torch.float16), ("fp32", torch.float32)):
        out = tmp_path / str(dtype)
        report = ckptconv.convert(source, out, dtype=dtype)
        warned = f"the file holds {len(values)} weights in fp8 with a scale: the folder is fp16"
        assert any(warned in warning for warning in report.warnings) == (dtype is None)
        weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        products = {key: values[sources[key]] for key in weights if sources[key] in values}
        assert len(products) == 184
        for key, value in products.items():
            assert torch.equal(weights[key], value.to(wanted)), key
        assert {tensor.dtype for tensor in weights.values()} == {wanted}
    found = ckptconv.verify(source, tmp_path / "None", only=["unet"])
    data = [check for check in found.checks if check.kind == "data"]
    assert [check.problems for check in data] == [()]


def test_a_scale_is_applied_to_halves_that_change_places(sample: Sample, tmp_path: Path) -> None:
    key, source = f"{UNET}final_layer.adaLN_modulation.1.weight", tmp_path / "scaled.safetensors"
    value = in_scaled_fp8(sample("flux", dtype="fp16"), source, LAYOUTS["older"])[key].half()
    ckptconv.convert(source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    swapped = torch.cat(value.chunk(2)[::-1])
    assert torch.equal(weights["norm_out.linear.weight"], swapped)
    loaded = ckptconv.load_pipeline(source, device="cpu", dtype="fp16")
    assert torch.equal(loaded.transformer.norm_out.linear.weight, swapped)


def test_scales_that_cannot_be_used_are_named(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "scaled.safetensors"
    in_scaled_fp8(small, source, LAYOUTS["newer"])
    tensors, block = load_file(source), f"{UNET}middle_block.1.transformer_blocks.0."
    said = torch.frombuffer(bytearray(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    tensors[f"{block}attn1.to_q.comfy_quant"] = said
    tensors[f"{block}attn1.to_k.weight_scale"] = torch.ones(16, 2)
    tensors[f"{block}nothing.weight_scale"] = torch.ones(())
    tensors["cond_stage_model.scaled_fp8"] = torch.ones(2)
    del tensors[f"{UNET}time_embed.0.weight_scale"]
    for key in [key for key in tensors if key.startswith("cond_stage_model.transformer.")]:
        if key.endswith(LAYOUTS["newer"]):
            del tensors[key]
    save_file(tensors, source)
    with pytest.raises(CkptconvError) as caught:
        ckptconv.convert(source, tmp_path / "out")
    assert set(caught.value.problems) == {
        f'{block}attn1.to_q.comfy_quant: the format is {{"format": "mxfp8"}}, needed '
        "float8_e4m3fn or float8_e5m2",
        f"{block}attn1.to_k.weight_scale: has shape [16, 2], needed one number, or one for each "
        "row of [16, 16]",
        f"{block}nothing.weight_scale: is the scale of {block}nothing.weight, which is missing",
        "cond_stage_model.scaled_fp8: says that weights have scales, and there is none",
        f"{UNET}time_embed.0.comfy_quant: says that weights have scales, and there is none",
    }
