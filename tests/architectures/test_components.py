"""Components that stand alone, and files whose keys have other names than the original ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.errors import FileRefused
from tests.architectures.test_oracle import CLIP, IDS, OPENCLIP, agree
from tests.support.reference import controlnet, text, unet, vae

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from tests.conftest import Sample

CONTROLNETS = {
    "controlnet-sd1": unet.TINY_SD1,
    "controlnet-sd2": unet.TINY_SD2,
    "controlnet-sdxl": unet.TINY_SDXL,
}


def saved(module: nn.Module, path: Path, prefix: str = "") -> Path:
    tensors = {prefix + k: v.contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path)
    return path


def loaded(cls: Any, folder: Path) -> Any:
    """Loads a folder as a user would, and checks that nothing is missing or left over."""
    module, info = cls.from_pretrained(folder, torch_dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return module.eval()


def round_trip(file: Path, folder: Path) -> None:
    """Proves the folder, and turns it back into the file."""
    assert ckptconv.verify(file, folder).passed, ckptconv.verify(file, folder).as_data()
    assert ckptconv.verify(None, folder).passed, ckptconv.verify(None, folder).as_data()
    ckptconv.export(folder, folder.parent / "back.safetensors")
    assert_equal(load_file(folder.parent / "back.safetensors"), load_file(file))


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_computes_the_same(name: str, prefix: str, tmp_path: Path) -> None:
    config = CONTROLNETS[name]
    net = unet.randomise(controlnet.ControlNet(config), 1).double()
    report = ckptconv.convert(saved(net, tmp_path / "net.safetensors", prefix), tmp_path / "out")
    assert report.plan.detection.require()[0].name == name
    round_trip(tmp_path / "net.safetensors", tmp_path / "out")
    model = loaded(diffusers.ControlNetModel, tmp_path / "out")
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    hint = torch.rand(2, 3, 128, 128, dtype=torch.float64)
    context = torch.randn(2, 5, config.context_dim, dtype=torch.float64)
    steps = torch.tensor([7.0, 801.0], dtype=torch.float64)
    y, added = None, None
    if config.adm_channels:
        ids = torch.randint(0, 1024, (2, 6))
        pooled = torch.randn(2, config.adm_channels - 6 * 256, dtype=torch.float64)
        sizes = unet.timestep_embedding(ids.flatten().double(), 256).reshape(2, -1).double()
        y, added = torch.cat([pooled, sizes], 1), {"text_embeds": pooled, "time_ids": ids}
    ours = model(x, steps, context, controlnet_cond=hint, added_cond_kwargs=added)
    theirs = net(x, hint, steps, context, y)
    for one, other in zip(ours.down_block_res_samples, theirs.down, strict=True):
        agree(one, other)
    agree(ours.mid_block_res_sample, theirs.middle)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_computes_the_same(prefix: str, tmp_path: Path) -> None:
    net = unet.randomise(vae.Vae(vae.TINY_VAE), 1).double()
    file = saved(net, tmp_path / "vae.safetensors", prefix)
    report = ckptconv.convert(file, tmp_path / "out")
    assert report.configs["vae"].values["scaling_factor"] == 0.18215
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ckptconv",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    round_trip(file, tmp_path / "out")
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    model = loaded(diffusers.AutoencoderKL, tmp_path / "out")
    agree(model.encode(image).latent_dist.mean, net.encode(image)[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "openclip", "clip with projection"])
def test_a_text_encoder_computes_the_same(kind: str, tmp_path: Path) -> None:
    open_clip = kind == "openclip"
    net: Any = text.OpenClipText(OPENCLIP) if open_clip else text.ClipText(CLIP)
    net = unet.randomise(net, 1).double()
    tensors = dict(net.state_dict())
    projection = torch.randn(CLIP.width, CLIP.width, dtype=torch.float64)
    if kind == "clip with projection":
        tensors |= {"text_projection.weight": projection, "logit_scale": torch.ones(())}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "text.safetensors")
    ckptconv.convert(tmp_path / "text.safetensors", tmp_path / "out")
    round_trip(tmp_path / "text.safetensors", tmp_path / "out")
    plain = kind == "clip"
    cls = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
    ours, theirs = loaded(cls, tmp_path / "out")(IDS), net(IDS)
    if plain:
        agree(ours.last_hidden_state, theirs.last)
    elif open_clip:
        agree(ours.text_embeds, theirs.pooled)
    else:
        agree(ours.last_hidden_state, theirs.last)
        pooled = theirs.last[torch.arange(2), IDS.argmax(-1)]
        agree(ours.text_embeds, pooled @ projection.T)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == ("!" if open_clip else "<|endoftext|>")


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


def in_shards(file: Path, folder: Path) -> Path:
    """Splits a checkpoint over three files and returns their index."""
    folder.mkdir()
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for n, (key, value) in enumerate(load_file(file).items()):
        parts[n % 3][key] = value
    index: dict[str, str] = {}
    for n, part in enumerate(parts, 1):
        name = f"model-{n:05}-of-00003.safetensors"
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def test_a_checkpoint_in_several_files_converts_as_one(sample: Sample, tmp_path: Path) -> None:
    index = in_shards(sample("sd2"), tmp_path / "parts")
    ckptconv.convert(index, tmp_path / "out")
    ckptconv.convert(sample("sd2"), tmp_path / "want")
    for file in (tmp_path / "want").rglob("*.safetensors"):
        assert_equal(
            load_file(tmp_path / "out" / file.relative_to(tmp_path / "want")), load_file(file)
        )
    assert ckptconv.verify(index, tmp_path / "out").passed
    facts = ckptconv.inspect(index).facts
    assert facts["prediction_type"].source == "values", "a few values are read from their own file"


def test_a_part_of_a_checkpoint_is_refused_with_its_index_named(
    sample: Sample, tmp_path: Path
) -> None:
    in_shards(sample("sd1"), tmp_path / "parts")
    with pytest.raises(FileRefused, match="part 2 of 3") as caught:
        ckptconv.inspect(tmp_path / "parts/model-00002-of-00003.safetensors")
    assert "model.safetensors.index.json" in (caught.value.hint or "")


def test_no_tensor_is_lost_to_a_name_that_another_has(sample: Sample, tmp_path: Path) -> None:
    ckptconv.convert(sample("sd2"), tmp_path / "whole", only=["unet"])
    tensors = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    twin = "model.diffusion_model.out.0.bias"
    save_file({**tensors, twin: torch.ones(3)}, tmp_path / "twin.safetensors")
    plan = ckptconv.plan(tmp_path / "twin.safetensors")
    sources = {source.name for step in plan.steps for source in step.sources}
    assert sources | set(plan.unclaimed) == {*tensors, twin}
    assert plan.unclaimed == ("conv_norm_out.bias",)


def test_a_component_alone_is_no_pipeline(tmp_path: Path) -> None:
    net = unet.randomise(vae.Vae(vae.TINY_VAE), 1)
    file = saved(net, tmp_path / "vae.safetensors")
    with pytest.raises(FileRefused, match="is no pipeline"):
        ckptconv.load_pipeline(file)


def test_a_controlnet_in_a_checkpoint_is_a_component_of_its_pipeline(
    sample: Sample, tmp_path: Path
) -> None:
    file = sample("sd1", task="controlnet")
    report = ckptconv.convert(file, tmp_path / "out")
    assert report.plan.detection.require()[1].pipeline == "StableDiffusionControlNetPipeline"
    assert not report.plan.unclaimed
    round_trip(file, tmp_path / "out")
    pipe = ckptconv.load_pipeline(file)
    cls: Any = diffusers.StableDiffusionControlNetPipeline
    stock = cls.from_pretrained(tmp_path / "out")
    assert_equal(dict(pipe.controlnet.state_dict()), dict(stock.controlnet.state_dict()))
