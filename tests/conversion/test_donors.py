"""Components that the file lacks, or that the user wants from elsewhere, come from a donor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import ckptconv
from ckptconv.errors import FileRefused
from ckptconv.files import read_json
from tests.conftest import Folder, Sample
from tests.support.checkpoints import raw, rewritten, save
from tests.support.reference import text

VAE = "first_stage_model."


@pytest.fixture(scope="module")
def without_vae(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD1 checkpoint that has lost its VAE."""
    path = tmp_path_factory.mktemp("donors") / "headless.safetensors"
    return rewritten(small, path, lambda key: None if key.startswith(VAE) else key)


def test_a_missing_component_is_null_and_the_message_tells_how_to_supply_it(
    without_vae: Path, tmp_path: Path
) -> None:
    report = ckptconv.convert(without_vae, tmp_path / "out")
    index = read_json(tmp_path / "out" / "model_index.json")
    assert index["vae"] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert not (tmp_path / "out" / "vae").exists()
    assert report.warnings == (
        "vae is not in the file, so model_index.json says null: supply it with vae=FILE",
    )


@pytest.mark.parametrize(
    "kind",
    ["checkpoint", "lone file", "lone file with its prefix", "diffusers file", "folder", "model"],
)
def test_a_donor_gives_the_component(
    kind: str, without_vae: Path, small: Path, folder: Folder, tmp_path: Path
) -> None:
    whole = folder("small")
    path = tmp_path / "vae.safetensors"
    if kind == "lone file":
        rewritten(small, path, lambda k: k.removeprefix(VAE) if k.startswith(VAE) else None)
    elif kind == "lone file with its prefix":
        rewritten(small, path, lambda k: k if k.startswith(VAE) else None)
    donor = {
        "checkpoint": small,
        "diffusers file": whole / "vae" / "diffusion_pytorch_model.safetensors",
        "folder": whole / "vae",
        "model": whole,
    }.get(kind, path)
    report = ckptconv.convert(without_vae, tmp_path / "out", vae=donor)
    assert report.warnings == ()
    written = raw(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert written == raw(whole / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("vae/config.json", "model_index.json"):
        assert read_json(tmp_path / "out" / name) == read_json(whole / name)
    name = donor.name if donor.suffix else "diffusion_pytorch_model.safetensors"
    record = read_json(tmp_path / "out" / "ckptconv" / "source.json")
    assert record["donors"] == {"vae": name}


def test_a_donor_wins_over_the_component_in_the_file(
    small: Path, sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    report = ckptconv.convert(small, tmp_path / "out", vae=sample("sdxl"))
    assert report.warnings == (OTHER_LATENTS,)
    out = tmp_path / "out"
    written = raw(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert written == raw(folder("sdxl") / "vae" / "diffusion_pytorch_model.safetensors")
    dropped = read_json(out / "ckptconv" / "source.json")["dropped"]
    assert {r for k, r in dropped.items() if k.startswith(VAE)} == {"replaced"}
    assert not any(k.startswith(VAE) for k in raw(out / "ckptconv" / "dropped.safetensors"))


OTHER_LATENTS = (
    "vae comes from another model: its scaling_factor is 0.13025, where Stable Diffusion 1.x has "
    "0.18215, so this UNet may not understand its latents"
)


@pytest.mark.parametrize(
    ("kind", "choices", "metadata", "factor"),
    [
        ("checkpoint", {}, {}, 0.13025),
        ("folder", {}, {}, 0.13025),
        ("lone file", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, 0.13025),
        ("lone file", {"family": "sdxl"}, {}, 0.13025),
        ("lone file", {}, {}, 0.18215),
        ("lone file", {}, {"modelspec.architecture": "stable-diffusion-v1/vae"}, 0.18215),
    ],
)
def test_a_vae_brings_its_scaling_factor(
    kind: str,
    choices: dict[str, Any],
    metadata: dict[str, str],
    factor: float,
    small: Path,
    sample: Sample,
    folder: Folder,
    tmp_path: Path,
) -> None:
    donor = {"checkpoint": sample("sdxl"), "folder": folder("sdxl")}.get(kind)
    if donor is None:
        vae = {k: v for k, v in raw(sample("sdxl")).items() if k.startswith(VAE)}
        donor = save(vae, tmp_path / "vae.safetensors", metadata)
    out = tmp_path / "out"
    report = ckptconv.convert(small, out, vae=donor, configs_only=True, **choices)
    assert report.warnings == ((OTHER_LATENTS,) if factor == 0.13025 else ())
    assert read_json(out / "vae" / "config.json")["scaling_factor"] == factor


@pytest.mark.slow
def test_a_scaling_factor_that_a_vae_brought_is_not_held_against_the_folder(
    small: Path, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(small, tmp_path / "out", vae=sample("sdxl"))
    with_donor = ckptconv.verify(small, tmp_path / "out", vae=sample("sdxl"))
    for found in (with_donor, ckptconv.verify(None, tmp_path / "out")):
        (check,) = (c for c in found.checks if (c.component, c.kind) == ("vae", "config"))
        assert not check.problems, check


def test_donors_give_both_text_encoders(sample: Sample, folder: Folder, tmp_path: Path) -> None:
    text = "conditioner."
    bare = rewritten(
        sample("sdxl"), tmp_path / "bare.safetensors", lambda k: None if k.startswith(text) else k
    )
    whole = folder("sdxl")
    report = ckptconv.convert(bare, tmp_path / "absent")
    assert [w.partition(" ")[0] for w in report.warnings] == ["text_encoder", "text_encoder_2"]
    ckptconv.convert(
        bare, tmp_path / "out", text_encoder=whole / "text_encoder", text_encoder_2=sample("sdxl")
    )
    for name in ("text_encoder", "text_encoder_2"):
        written = raw(tmp_path / "out" / name / "model.safetensors")
        assert written == raw(whole / name / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is that of UNet2DConditionModel, but a vae"),
        ({"architectures": ["CLIPTextModel"]}, r"is that of \['CLIPTextModel'\], but a vae"),
        ({}, "is that of None, but a vae is of AutoencoderKL"),
        ([1], "holds no JSON object"),
        (None, "holds no config.json"),
    ],
)
def test_a_folder_of_another_component_is_no_donor(
    config: Any, message: str, without_vae: Path, folder: Folder, tmp_path: Path
) -> None:
    donor = tmp_path / "donor"
    donor.mkdir()
    weights = "diffusion_pytorch_model.safetensors"
    (donor / weights).write_bytes((folder("small") / "vae" / weights).read_bytes())
    if config is not None:
        (donor / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileRefused, match=message):
        ckptconv.convert(without_vae, tmp_path / "out", vae=donor)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "missing.safetensors"])
def test_a_donor_that_is_not_there_is_named(name: str, without_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="cannot be read"):
        ckptconv.convert(without_vae, tmp_path / "out", vae=tmp_path / name)


def test_a_donor_without_the_component_is_refused(
    without_vae: Path, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileRefused, match="cannot give what it is to give") as caught:
        ckptconv.convert(small, tmp_path / "out", vae=without_vae)
    assert caught.value.message.startswith(str(without_vae))
    assert caught.value.problems == ("vae: the file holds none that Stable Diffusion 1.x can have",)


def test_a_quantized_donor_is_refused(small: Path, without_vae: Path, tmp_path: Path) -> None:
    tensors = {k: v for k, v in raw(small).items() if k.startswith(VAE)}
    tensors[f"{VAE}encoder.conv_in.weight.absmax"] = ("F32", (1,), bytes(4))
    donor = save(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(FileRefused, match="cannot give what it is to give") as caught:
        ckptconv.plan(without_vae, vae=donor)
    (problem,) = caught.value.problems
    assert problem.startswith("vae: this is quantized with bitsandbytes")


@pytest.mark.parametrize("by", ["the weights", "config.json"])
def test_a_quantized_folder_is_no_donor(
    by: str, without_vae: Path, folder: Folder, tmp_path: Path
) -> None:
    whole, donor = folder("small") / "vae", tmp_path / "donor"
    donor.mkdir()
    values, weights = read_json(whole / "config.json"), "diffusion_pytorch_model.safetensors"
    tensors = raw(whole / weights)
    if by == "config.json":
        values["quantization_config"] = {"quant_method": "bitsandbytes"}
    else:
        tensors["encoder.conv_in.weight.absmax"] = ("F32", (1,), bytes(4))
    (donor / "config.json").write_text(json.dumps(values))
    save(tensors, donor / weights)
    with pytest.raises(FileRefused, match="quantized") as caught:
        ckptconv.plan(without_vae, vae=donor)
    assert caught.value.code == "quantized"


def test_a_text_encoder_of_another_width_is_no_donor(sample: Sample, tmp_path: Path) -> None:
    wide = text.ClipText(text.TINY_CLIP).state_dict()
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(FileRefused, match="do not fit together") as caught:
        ckptconv.convert(sample("sd2"), tmp_path / "o", text_encoder=tmp_path / "wide.safetensors")
    (problem,) = caught.value.problems
    assert problem.startswith("unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    assert "text_encoder/text_model.final_layer_norm.weight" in problem
