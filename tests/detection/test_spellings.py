"""Files whose keys have other names than the original ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from tests.support.oracle import loaded
from tests.support.relatives import assert_equal, round_trip

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.conftest import Sample


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner", "koala-700m"])
def test_a_unet_in_the_diffusers_layout_is_told_by_its_original_names(
    name: str, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample(name), tmp_path / "whole", only=["unet"])
    lone = tmp_path / "whole/unet/diffusion_pytorch_model.safetensors"
    report = ckptconv.convert(lone, tmp_path / "out")
    assert report.plan.detection.require()[0].name == name
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        whole, out = tmp_path / "whole/unet" / file, tmp_path / "out/unet" / file
        if file == "config.json":
            assert json.loads(whole.read_bytes()) == json.loads(out.read_bytes())
        else:
            assert_equal(load_file(whole), load_file(out))
    assert ckptconv.verify(lone, tmp_path / "out").passed
    ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    original = {k: v for k, v in load_file(sample(name)).items() if k.startswith("model.diff")}
    assert_equal(load_file(tmp_path / "back.safetensors"), original)


@pytest.mark.parametrize("old", [False, True])
def test_a_vae_in_the_diffusers_layout_may_have_the_oldest_names(
    old: bool, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample("sd1"), tmp_path / "whole", only=["vae"])
    want = load_file(tmp_path / "whole/vae/diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    given = dict(want)
    for now, before in names.items() if old else ():
        given = {
            k.replace(f"attentions.0.{now}.", f"attentions.0.{before}."): v
            for k, v in given.items()
        }
    assert (given.keys() != want.keys()) == old
    save_file(given, tmp_path / "vae.safetensors")
    ckptconv.convert(tmp_path / "vae.safetensors", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), want)
    assert ckptconv.verify(tmp_path / "vae.safetensors", tmp_path / "out").passed
    assert not any(loaded(diffusers.AutoencoderKL, tmp_path / "out").training for _ in [0])


@pytest.mark.parametrize("name", ["sd1"])
def test_the_ema_copy_of_a_unet_is_enough(name: str, sample: Sample, tmp_path: Path) -> None:
    tensors = load_file(sample(name, ema=True))
    stripped = {k: v for k, v in tensors.items() if not k.startswith("model.diffusion_model.")}
    save_file(stripped, tmp_path / "ema.safetensors")
    report = ckptconv.convert(tmp_path / "ema.safetensors", tmp_path / "out")
    assert "the EMA copy is all that the file has of its UNet" in report.warnings
    ckptconv.convert(sample(name, ema=True), tmp_path / "want", ema=True)
    file = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(tmp_path / "out" / file), load_file(tmp_path / "want" / file))
    assert ckptconv.verify(tmp_path / "ema.safetensors", tmp_path / "out").passed


PLACES = {
    "sdxl": ("conditioner.embedders.1.", "text_encoder_2"),
    "sdxl-refiner": ("conditioner.embedders.0.", "text_encoder_2"),
    "sd2": ("cond_stage_model.", "text_encoder"),
}
"""Where an OpenCLIP text tower lies, and the component that it becomes."""


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits query, key and value in the names of OpenCLIP, as some merging tools do."""
    parts: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if ".attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                parts[key.replace("in_proj_", f"{name}_proj.")] = part.clone()
        else:
            parts[key] = value
    return parts


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd2", "apart"), ("sdxl", "as transformers"), ("sdxl-refiner", "apart")],
)
def test_an_openclip_tower_may_be_split_already(
    name: str, kind: str, sample: Sample, tmp_path: Path
) -> None:
    prefix, component = PLACES[name]
    tensors = load_file(sample(name))
    ckptconv.convert(sample(name), tmp_path / "want", only=[component])
    want = load_file(tmp_path / "want" / component / "model.safetensors")
    if kind == "apart":
        given = apart(tensors)
    else:
        given = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        given |= {f"{prefix}transformer.{k}": v for k, v in want.items()}
    assert given.keys() != tensors.keys()
    save_file(given, tmp_path / "given.safetensors")
    ckptconv.convert(tmp_path / "given.safetensors", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / component / "model.safetensors"), want)
    round_trip(tmp_path / "given.safetensors", tmp_path / "out")


def test_no_tensor_is_lost_to_a_name_that_another_has(sample: Sample, tmp_path: Path) -> None:
    ckptconv.convert(sample("sd2"), tmp_path / "whole", only=["unet"])
    tensors = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    twin = "model.diffusion_model.out.0.bias"
    save_file({**tensors, twin: torch.ones(3)}, tmp_path / "twin.safetensors")
    plan = ckptconv.plan(tmp_path / "twin.safetensors")
    sources = {source.name for step in plan.steps for source in step.sources}
    assert sources == {*tensors, twin}
    assert plan.unclaimed == ("conv_norm_out.bias",)
