"""Adapters of FLUX and SD3, whose original layers are several in diffusers, or in another order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import FileRefused, load_pipeline
from ckptconv.reading.header import read_header
from tests.conftest import Sample
from tests.support.adapters import RANK, Adapter
from tests.support.pipelines import SMALL, parameters, pixels, runner

ROOT = "model.diffusion_model."
BLOCK, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.1."
Layers = Mapping[str, tuple[list[str], list[int]]]
"""By original layer, the layers in diffusers and how many shares of its rows each takes; from the
last row on if the halves change places."""

FLUX: Layers = {
    "double_blocks.0.img_attn.qkv": ([f"{BLOCK}attn.to_{n}" for n in "qkv"], [1, 1, 1]),
    "double_blocks.0.txt_attn.qkv": ([f"{BLOCK}attn.add_{n}_proj" for n in "qkv"], [1, 1, 1]),
    "double_blocks.0.img_attn.proj": ([f"{BLOCK}attn.to_out.0"], [1]),
    "double_blocks.0.txt_attn.proj": ([f"{BLOCK}attn.to_add_out"], [1]),
    "double_blocks.0.img_mod.lin": ([f"{BLOCK}norm1.linear"], [1]),
    "double_blocks.0.txt_mlp.2": ([f"{BLOCK}ff_context.net.2"], [1]),
    "single_blocks.1.linear1": (
        [*(f"{SINGLE}attn.to_{n}" for n in "qkv"), f"{SINGLE}proj_mlp"],
        [1, 1, 1, 4],
    ),
    "single_blocks.1.linear2": ([f"{SINGLE}proj_out"], [1]),
    "img_in": (["x_embedder"], [1]),
    "vector_in.in_layer": (["time_text_embed.text_embedder.linear_1"], [1]),
    "final_layer.adaLN_modulation.1": (["norm_out.linear"], [-1]),
    "final_layer.linear": (["proj_out"], [1]),
}
LAST = "transformer_blocks.1."
SD3: Layers = {
    "joint_blocks.0.x_block.attn.qkv": ([f"{BLOCK}attn.to_{n}" for n in "qkv"], [1, 1, 1]),
    "joint_blocks.1.context_block.attn.qkv": (
        [f"{LAST}attn.add_{n}_proj" for n in "qkv"],
        [1, 1, 1],
    ),
    "joint_blocks.0.context_block.attn.proj": ([f"{BLOCK}attn.to_add_out"], [1]),
    "joint_blocks.0.x_block.mlp.fc1": ([f"{BLOCK}ff.net.0.proj"], [1]),
    "joint_blocks.0.x_block.adaLN_modulation.1": ([f"{BLOCK}norm1.linear"], [1]),
    "joint_blocks.1.context_block.adaLN_modulation.1": ([f"{LAST}norm1_context.linear"], [-1]),
    "final_layer.adaLN_modulation.1": (["norm_out.linear"], [-1]),
}
XLABS = {
    "double_blocks.0.img_attn.qkv": "double_blocks.0.processor.qkv_lora1",
    "double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
    "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1",
    "double_blocks.0.txt_attn.proj": "double_blocks.0.processor.proj_lora2",
    "single_blocks.1.linear1": "single_blocks.1.processor.qkv_lora",
    "single_blocks.1.linear2": "single_blocks.1.processor.proj_lora",
}


def written(naming: str, layers: Layers, source: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """Returns an adapter in a naming, and what diffusers should read in it, in names of PEFT."""
    ours, theirs = Adapter(), Adapter()
    header = read_header(source)
    for layer, (names, shares) in layers.items():
        rows, columns = header.tensors[f"{ROOT}{layer}.weight"].shape
        if naming == "xlabs":
            if layer not in XLABS:
                continue
            if len(names) == 4:  # its adapters leave the MLP of a single block alone
                rows, names, shares = rows // 7 * 3, names[:3], shares[:3]
        down, up, alpha = ours.random(RANK, columns), ours.random(rows, RANK), 1.0
        place = layer.replace(".", "_")
        if naming == "kohya":
            alpha = 0.5
            ours.tensors[f"lora_unet_{place}.alpha"] = torch.tensor(alpha * RANK)
        if naming != "peft":
            begin, ends = {
                "kohya": (f"lora_unet_{place}", (".lora_down.weight", ".lora_up.weight")),
                "original": (f"diffusion_model.{layer}", (".lora_A.weight", ".lora_B.weight")),
                "xlabs": (XLABS.get(layer, ""), (".down.weight", ".up.weight")),
            }[naming]
            ours.tensors[begin + ends[0]], ours.tensors[begin + ends[1]] = down, up
        if shares == [-1]:
            up = torch.cat(up.chunk(2)[::-1])
        sizes = [rows // abs(sum(shares)) * abs(share) for share in shares]
        for name, part in zip(names, torch.split(up, sizes), strict=True):
            theirs.tensors[f"transformer.{name}.lora_A.weight"] = down * alpha
            theirs.tensors[f"transformer.{name}.lora_B.weight"] = part.contiguous()
    if naming == "peft":
        ours.tensors = dict(theirs.tensors)
    return ours, theirs.tensors


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Pipelines of diffusers, by architecture: whoever changes one puts its weights back."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "naming", "changed"),
    [
        *(("flux", naming, 19) for naming in ("kohya", "original", "peft")),
        ("flux", "xlabs", 12),
        *(("sd3", naming, 11) for naming in ("kohya", "original", "peft")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_weights_are_those_of_load_and_fuse_in_diffusers(
    architecture: str,
    naming: str,
    changed: int,
    sample: Sample,
    pipelines: dict[str, Any],
    tmp_path: Path,
) -> None:
    source = sample(architecture)
    adapter, peft = written(naming, {"flux": FLUX, "sd3": SD3}[architecture], source)
    file = adapter.save(tmp_path / "adapter.safetensors")
    out = tmp_path / "out"
    ckptconv.convert(source, out, dtype="fp32", only="transformer", lora=f"{file}:0.8")
    if architecture not in pipelines:
        pipelines[architecture] = load_pipeline(source, device="cpu", dtype="fp32")
    pipe = pipelines[architecture]
    before = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(peft)
    pipe.fuse_lora(components=["transformer"], lora_scale=0.8)
    pipe.unload_lora_weights()
    (weights,) = (out / "transformer").glob("*.safetensors")
    ours, theirs = load_file(weights), pipe.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert sum(not torch.equal(t, before[key]) for key, t in theirs.items()) == changed
    pipe.transformer.load_state_dict(before)


@pytest.mark.parametrize(
    ("architecture", "prefix", "component"),
    [
        ("flux", "lora_te1_", "text_encoder"),
        ("flux", "lora_te3_", "text_encoder_2"),
        ("flux", "text_encoders.t5xxl.transformer.", "text_encoder_2"),
        ("sd3", "lora_te2_", "text_encoder_2"),
        ("sd3", "lora_te3_", "text_encoder_3"),
        ("sd3", "text_encoder_3.", "text_encoder_3"),
    ],
)
def test_every_text_encoder_has_its_prefix(
    architecture: str, prefix: str, component: str, sample: Sample, tmp_path: Path
) -> None:
    key, target = next(
        (k, t)
        for k, t in ckptconv.plan(sample(architecture)).tensors(component).items()
        if k.endswith(("q_proj.weight", "SelfAttention.q.weight"))
    )
    adapter, layer = Adapter(), key.removesuffix(".weight")
    name = layer.replace(".", "_") if prefix.endswith("_") else layer
    adapter.lora(prefix + name, target.shape, ".lora_down.weight", ".lora_up.weight")
    file = adapter.save(tmp_path / "adapter.safetensors")
    plan = ckptconv.plan(sample(architecture), lora=str(file))
    (step,) = [step for step in plan.steps if step.changes]
    assert [(t.component, t.key) for t in step.targets] == [(component, key)]


def test_a_key_that_finds_no_home_is_an_error(sample: Sample, tmp_path: Path) -> None:
    adapter, _ = written("kohya", FLUX, sample("flux"))
    for name in (
        "lora_unet_double_blocks_7_img_attn_qkv",
        "lora_unet_nowhere",
        "double_blocks.0.x",
    ):
        adapter.lora(name, (4, 4), ".lora_down.weight", ".lora_up.weight")
    wrong = "lora_unet_single_blocks_0_linear1"
    adapter.lora(wrong, (256 * 3, 256), ".lora_down.weight", ".lora_up.weight")
    file = adapter.save(tmp_path / "adapter.safetensors")
    with pytest.raises(FileRefused, match="does not fit FLUX") as error:
        ckptconv.plan(sample("flux"), lora=str(file))
    assert len(error.value.problems) == 4
    assert sum("transformer has no such layer" in line for line in error.value.problems) == 3
    assert any(line.startswith(f"{wrong}: down [3, 256]") for line in error.value.problems)


@pytest.mark.parametrize("layer", ["transformer.x_embedder", "img_in"])
def test_a_control_adapter_is_refused_by_its_name(
    layer: str, sample: Sample, tmp_path: Path
) -> None:
    width, columns = ckptconv.plan(sample("flux")).tensors("transformer")["x_embedder.weight"].shape
    adapter = Adapter()
    adapter.peft("", {layer: (width, 2 * columns)})
    adapter.tensors[f"{layer}.lora_B.bias"] = torch.zeros(width)
    file = adapter.save(tmp_path / "adapter.safetensors")
    with pytest.raises(FileRefused, match="is a control adapter of FLUX"):
        ckptconv.plan(sample("flux"), lora=str(file))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_generate_adds_it_too(sample: Sample, tmp_path: Path) -> None:
    """From the file, where it is merged, and from the folder, where diffusers loads it."""
    source, run = sample("flux"), runner(tmp_path)
    adapter, _ = written("peft", FLUX, source)
    file = adapter.save(tmp_path / "adapter.safetensors")
    ckptconv.convert(source, tmp_path / "out")
    found = []
    for path, words in (
        (source, []),
        (source, ["--lora", file]),
        (tmp_path / "out", ["--lora", file]),
    ):
        run(path, *SMALL, *words, "--overwrite")
        found.append(pixels(tmp_path / "out.png").astype(int))
    assert parameters(tmp_path / "out.png")["loras"] == [{"file": file.name, "scale": 1.0}]
    assert np.abs(found[0] - found[1]).max() > 3
    assert np.abs(found[1] - found[2]).max() <= 3
    control = Adapter()
    columns = ckptconv.plan(source).tensors("transformer")["x_embedder.weight"].shape[1]
    control.peft("transformer.", {"x_embedder": (8, 2 * columns)})
    bad = control.save(tmp_path / "control.safetensors")
    result = run(tmp_path / "out", *SMALL, "--lora", bad, "--overwrite", code=3)
    assert "is a control adapter" in result.stderr


def test_a_lora_of_a_scaled_fp8_file_follows_the_scale(sample: Sample, tmp_path: Path) -> None:
    """In a tensor whose halves change places, each half has the scale and its own rows."""
    tensors = load_file(sample("flux", dtype="fp32"))
    layer = f"{ROOT}final_layer.adaLN_modulation.1"
    plain = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight"] = plain
    tensors[f"{layer}.scale_weight"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "scaled.safetensors")
    adapter = Adapter()
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    adapter.lora(name, tuple(plain.shape), ".lora_A.weight", ".lora_B.weight")
    file = adapter.save(tmp_path / "adapter.safetensors")
    out = tmp_path / "out"
    ckptconv.convert(
        tmp_path / "scaled.safetensors", out, dtype="fp32", only="transformer", lora=str(file)
    )
    (weights,) = (out / "transformer").glob("*.safetensors")
    added = adapter.tensors[f"{name}.lora_B.weight"] @ adapter.tensors[f"{name}.lora_A.weight"]
    shift, scale = (plain.float() * 0.5 + added).chunk(2)
    found = load_file(weights)["norm_out.linear.weight"]
    np.testing.assert_allclose(found, torch.cat([scale, shift]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_k"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
)
def test_a_kronecker_product_is_divided_by_rows(
    layer: str, wanted: str, sample: Sample, tmp_path: Path
) -> None:
    source, adapter = sample("flux", dtype="fp32"), Adapter()
    rows, columns = read_header(source).tensors[f"{ROOT}{layer}.weight"].shape
    left, right = adapter.random(rows // 32, columns // 16), adapter.random(32, 16)
    name = f"lycoris_{layer.replace('.', '_')}"
    adapter.tensors |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
    file = adapter.save(tmp_path / "adapter.safetensors")
    ckptconv.convert(source, tmp_path / "out", only="transformer", lora=str(file))
    (weights,) = (tmp_path / "out/transformer").glob("*.safetensors")
    whole = load_file(source)[f"{ROOT}{layer}.weight"] + torch.kron(left, right)
    expected = whole.chunk(3)[1] if "qkv" in layer else torch.cat(whole.chunk(2)[::-1])
    np.testing.assert_allclose(
        load_file(weights)[f"{wanted}.weight"], expected, rtol=1e-5, atol=1e-6
    )
