"""Relatives of Stable Diffusion 2 with networks of their own: the x4 upscaler and unCLIP.

What is expected of their configurations is written down from stabilityai/stable-diffusion-x4-upscaler,
stable-diffusion-2-1-unclip (H) and -unclip-small (L), as remembered and as diffusers and the original
repository's configurations set them up; `upcast_attention` of unCLIP is that of 2.1, which it was
trained from. What is computed is compared with the networks in `tests/reference`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.configs.config import Config, configs, model_index
from ckptconv.detect import detect
from ckptconv.errors import FileRefused, Incomplete, UsageError
from ckptconv.inference.generation import Settings, call_arguments, check
from ckptconv.inference.pipeline import load_pipeline
from ckptconv.planning.plan import build_plan
from tests.conftest import made
from tests.pipelines import parameters, runner
from tests.published import FOLDERS, FOUR_LEVELS, UNET, meaning
from tests.reference import files
from tests.test_components import loaded, round_trip
from tests.test_oracle import IDS, agree

if TYPE_CHECKING:
    from torch import nn

    from tests.conftest import Sample

VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2}
SD2_VAE = FOLDERS["sd21"]["vae"]
DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
SCHEDULER = {
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}
UNCLIP_UNET = {
    **UNET,
    **FOUR_LEVELS,
    "attention_head_dim": [5, 10, 20, 20],
    "class_embed_type": "projection",
    "cross_attention_dim": 1024,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNCLIP: dict[str, dict[str, Any]] = {
    "vae": SD2_VAE,
    "text_encoder": FOLDERS["sd21"]["text_encoder"],
    "tokenizer": FOLDERS["sd21"]["tokenizer"],
    "feature_extractor": {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 224},
    },
    "image_noising_scheduler": {**DDPM, "beta_schedule": "squaredcos_cap_v2"},
    "scheduler": {
        **{k: v for k, v in SCHEDULER.items() if k != "clip_sample"},
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "skip_prk_steps": True,
    },
    "model_index": {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
}
EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    "sd2-unclip-h": {
        **UNCLIP,
        "unet": {**UNCLIP_UNET, "projection_class_embeddings_input_dim": 2048},
        "image_encoder": {
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
        "image_normalizer": {"embedding_dim": 1024},
    },
    "sd2-unclip-l": {
        **UNCLIP,
        "unet": {**UNCLIP_UNET, "projection_class_embeddings_input_dim": 1536},
        "image_encoder": {
            "hidden_act": "quick_gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "image_normalizer": {"embedding_dim": 768},
    },
    "x4-upscaler": {
        "unet": {
            **UNET,
            "attention_head_dim": 8,
            "block_out_channels": [256, 512, 512, 1024],
            "cross_attention_dim": 1024,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
            "in_channels": 7,
            "num_class_embeds": 1000,
            "only_cross_attention": [True, True, True, False],
            "sample_size": 128,
            "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
            "use_linear_projection": True,
        },
        "vae": {
            **VAE,
            "block_out_channels": [128, 256, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "sample_size": 256,
            "scaling_factor": 0.08333,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "text_encoder": FOLDERS["sd21"]["text_encoder"],
        "tokenizer": FOLDERS["sd21"]["tokenizer"],
        "low_res_scheduler": {**DDPM, "beta_schedule": "scaled_linear"},
        "scheduler": {
            **SCHEDULER,
            "_class_name": "DDIMScheduler",
            "beta_end": 0.02,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.0001,
        },
        "model_index": {
            "_class_name": "StableDiffusionUpscalePipeline",
            "low_res_scheduler": ["diffusers", "DDPMScheduler"],
            "max_noise_level": 350,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    },
}


def understood(component: str, values: Any) -> Any:
    """Returns a configuration as the class that reads it understands it."""
    if component == "image_encoder":
        filled = transformers.CLIPVisionConfig(**values).to_dict()
        own = ("architectures", "dtype", "transformers_version")
        return {k: v for k, v in filled.items() if k not in own}
    if component in ("feature_extractor", "image_normalizer"):
        return {k: v for k, v in values.items() if k != "_class_name"}
    return meaning(component, values)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_configurations_mean_what_the_published_ones_say(name: str) -> None:
    shapes = files.layout(files.FILES[name])
    if name != "x4-upscaler":  # as if the statistics were in the file
        width = shapes["embedder.model.visual.proj"][1]
        shapes |= {f"noise_augmentor.data_{part}": (1, width) for part in ("mean", "std")}
    plan = build_plan(detect(made(shapes)))
    plan.require_complete()
    built: dict[str, Config] = configs(plan)
    ours = {part: config.values for part, config in built.items()}
    ours["model_index"] = model_index(plan, built)
    assert ours.keys() == EXPECTED[name].keys()
    for part, values in EXPECTED[name].items():
        assert understood(part, ours[part]) == understood(part, values), part
    for config in built.values():
        assert "assumed" not in config.origins.values()


class Pair:
    """The networks of a small file by their prefix, and the folder converted from it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.networks: dict[str, nn.Module] = files.networks(files.TINY_FILES[name], 1)
        self.file = folder / f"{name}.safetensors"
        tensors = files.tensors(self.networks)  # made in float32, so that nothing is lost
        save_file({key: tensor.float() for key, tensor in tensors.items()}, self.file)
        self.out = folder / name
        self.report = ckptconv.convert(self.file, self.out)

    def __getitem__(self, prefix: str) -> Any:
        return self.networks[prefix]

    def load(self, cls: Any, component: str) -> Any:
        return loaded(cls, self.out / component)


@pytest.fixture(scope="module", params=["x4-upscaler", "sd2-unclip-l", "sd2-unclip-h"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("relatives"))


@torch.no_grad()
def test_the_networks_compute_the_same(pair: Pair) -> None:
    torch.manual_seed(0)
    reference = pair["model.diffusion_model."]
    config = reference.config
    unet = pair.load(diffusers.UNet2DConditionModel, "unet")
    x = torch.randn(2, config.in_channels, 16, 16, dtype=torch.float64)
    context = torch.randn(2, 5, config.context_dim, dtype=torch.float64)
    steps = torch.tensor([7.0, 801.0], dtype=torch.float64)
    y = torch.tensor([20, 350])
    if config.adm_channels:
        y = torch.randn(2, config.adm_channels, dtype=torch.float64)
    agree(unet(x, steps, context, class_labels=y).sample, reference(x, steps, context, y))
    other = y.flip(0)
    with pytest.raises(AssertionError):
        agree(unet(x, steps, context, class_labels=y).sample, reference(x, steps, context, other))
    text, theirs = pair.load(transformers.CLIPTextModel, "text_encoder")(IDS), IDS
    theirs = pair["cond_stage_model.model."](IDS)
    agree(text.last_hidden_state, theirs.penultimate_normed)
    image = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    if "embedder.model." in pair.networks:
        encoder = pair.load(transformers.CLIPVisionModelWithProjection, "image_encoder")
        agree(encoder(image).image_embeds, pair["embedder.model."].visual(image))
    vae = pair.load(diffusers.AutoencoderKL, "vae")
    mean, _ = pair["first_stage_model."].encode(image)
    agree(vae.encode(image).latent_dist.mean, mean)
    agree(vae.decode(mean).sample, pair["first_stage_model."].decode(mean))


def test_a_folder_is_proved_and_goes_back(pair: Pair) -> None:
    round_trip(pair.file, pair.out)


def test_what_the_image_encoder_is_has_evidence(pair: Pair) -> None:
    facts = pair.report.plan.detection.facts
    if "sd2-unclip-l" == pair.out.name:
        assert facts["image_encoder"].value == "openai"
        assert "transformer.resblocks.0.ln_1.weight" in facts["image_encoder"].detail
    elif "sd2-unclip-h" == pair.out.name:
        assert facts["image_encoder"].value == "openclip"
        assert "no text transformer" in facts["image_encoder"].detail
    assert (facts["prediction_type"].value, facts["prediction_type"].source) == (
        "v_prediction",
        "task",
    )


# The statistics of the image embeddings, which no published file holds.

MEAN, STD = torch.linspace(-1, 1, 96), torch.linspace(0.5, 2, 96)


def statistics(kind: str, folder: Path) -> Path:
    """Writes a donor of some kind."""
    rows = {"mean": MEAN[None], "std": STD[None]}
    if kind == "folder":
        normalizer = StableUnCLIPImageNormalizer(96)
        normalizer.load_state_dict(rows)
        normalizer.save_pretrained(folder / kind)
    elif kind == "safetensors":
        save_file(rows, folder / kind)
    elif kind == "dict":
        torch.save(rows, folder / kind)
    else:  # as Karlo's
        torch.save((MEAN, STD), folder / kind)
    return folder / kind


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("sd2-unclip-l", tmp_path_factory.mktemp("unclip"))


def test_without_statistics_the_folder_says_so_and_a_pipeline_how_to_supply_them(
    unclip: Pair,
) -> None:
    (warning,) = unclip.report.warnings
    assert warning.startswith("image_normalizer is not in the file, so model_index.json says null")
    assert "--image-normalizer FILE (with OpenAI's encoder (L) it is ViT-L-14_stats.th" in warning
    assert ckptconv.files.read_json(unclip.out / "model_index.json")["image_normalizer"] == [
        None,
        None,
    ]
    with pytest.raises(Incomplete, match="has no image_normalizer, which its pipeline") as caught:
        load_pipeline(unclip.file, device="cpu")
    assert "ViT-L-14_stats.th of Karlo" in caught.value.hint


@pytest.mark.parametrize("kind", ["folder", "safetensors", "dict", "pair"])
def test_statistics_come_from_a_donor(kind: str, unclip: Pair, tmp_path: Path) -> None:
    donor, out, part = statistics(kind, tmp_path), tmp_path / "out", ["image_normalizer"]
    ckptconv.convert(unclip.file, out, only=part, image_normalizer=donor)
    held = loaded(StableUnCLIPImageNormalizer, out / "image_normalizer")
    assert torch.equal(held.mean, MEAN[None].double())
    assert torch.equal(held.std, STD[None].double())
    found = ckptconv.verify(unclip.file, out, only=part, image_normalizer=donor)
    assert found.passed, found.as_data()


def test_donors_of_another_kind_are_refused(unclip: Pair, sample: Sample, tmp_path: Path) -> None:
    torch.save((MEAN[:, None], STD), tmp_path / "columns")
    with pytest.raises(FileRefused, match="row needs shape"):
        ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=tmp_path / "columns")
    torch.save((MEAN,), tmp_path / "half")
    with pytest.raises(FileRefused, match="std is missing"):
        ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=tmp_path / "half")
    with pytest.raises(FileRefused, match="AutoencoderKL, but a image_normalizer is"):
        ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=unclip.out / "vae")
    with pytest.raises(UsageError, match="image_normalizer is given, but it is not"):
        ckptconv.convert(sample("sd1"), tmp_path / "out", image_normalizer=unclip.out)


def test_with_statistics_it_runs_and_they_go_back_into_the_file(
    unclip: Pair, tmp_path: Path
) -> None:
    donor = statistics("pair", tmp_path)
    pipe = load_pipeline(unclip.file, device="cpu", image_normalizer=donor)
    assert type(pipe).__name__ == "StableUnCLIPImg2ImgPipeline"
    assert torch.equal(pipe.image_normalizer.mean, MEAN[None])
    photo = Image.new("RGB", (96, 48), "gray")
    arguments = call_arguments(pipe, Settings("a cat", image=Path("x"), noise_level=3), {"image": photo})
    assert arguments["image"] is photo, "the image is looked at, not painted on"
    assert arguments["noise_level"] == 3
    assert "height" not in arguments
    report = ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=donor)
    assert report.warnings == ()
    assert ckptconv.verify(None, tmp_path / "out").passed
    ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert torch.equal(back.pop("noise_augmentor.data_mean"), MEAN[None])
    assert torch.equal(back.pop("noise_augmentor.data_std"), STD[None])
    assert back.keys() == load_file(unclip.file).keys()


def test_an_image_is_upscaled_four_times(sample: Sample, tmp_path: Path) -> None:
    run, small, out = runner(tmp_path), tmp_path / "small.png", tmp_path / "out.png"
    Image.new("RGB", (33, 16), "gray").save(small)
    options = ("--steps", "1", "--seed", "7", "--device", "cpu", "--image", small)
    run(sample("x4-upscaler"), *options, "--noise-level", "350")
    assert Image.open(out).size == (128, 64)
    assert parameters(out)["noise_level"] == 350
    result = run(sample("x4-upscaler"), *options, "--noise-level", "351", "--overwrite", code=2)
    assert "noise_level" in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings("a cat", image=Path("x"), size=(72, 64)), "--size does not divide by 32, as up"),
        (Settings("a cat", size=(64, 64)), "--image is missing: upscaling needs it"),
        (Settings("a cat", image=Path("x"), strength=0.5), "--strength does not fit"),
    ],
)
def test_settings_that_an_upscaler_cannot_take(settings: Settings, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(diffusers.StableDiffusionUpscalePipeline, "upscaling", settings)
    assert said in str(caught.value)
