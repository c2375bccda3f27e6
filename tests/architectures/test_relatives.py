"""Relatives of Stable Diffusion 2 with networks of their own: the x4 upscaler and unCLIP.

What their networks compute is compared with those in `tests/support/reference`, which share nothing
with the key maps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.configs.config import configs, model_index
from ckptconv.detection.detect import detect
from ckptconv.errors import FileRefused, Incomplete, UsageError
from ckptconv.files import read_json
from ckptconv.inference.generation import Settings, call_arguments, check
from ckptconv.inference.pipeline import load_pipeline
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from tests.architectures.test_components import assert_equal, loaded
from tests.architectures.test_oracle import agree
from tests.conftest import made, shapes
from tests.support.published_relatives import EXPECTED, understood
from tests.support.reference import files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a published file, with the statistics that it leaves out."""
    architecture = bundled().architectures[name.removesuffix("-h").removesuffix("-l")]
    tensors = shapes(architecture.layout(architecture.tasks[0].name))
    if name == "sd2-unclip-l":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("embedder.")}
        tensors |= files.layout({"embedder.model.": files.FILES[name]["embedder.model."]})
        tensors |= {f"noise_augmentor.data_{part}": (1, 768) for part in ("mean", "std")}
        tensors |= {"model.diffusion_model.label_emb.0.0.weight": (1280, 1536)}
    return tensors


@pytest.mark.parametrize("name", EXPECTED)
def test_the_configurations_mean_what_the_published_ones_say(name: str) -> None:
    plan = build_plan(detect(made(published(name))))
    plan.require_complete()
    built = configs(plan)
    ours: dict[str, Any] = {part: config.values for part, config in built.items()}
    ours["model_index"] = model_index(plan, built)
    assert ours.keys() == EXPECTED[name].keys()
    for part, values in EXPECTED[name].items():
        assert understood(part, ours[part]) == understood(part, values), part
    assert plan.detection.facts["prediction_type"].source == "task"
    if name != "x4-upscaler":
        assert plan.detection.facts["image_encoder"].source == "structure"


MEAN, STD = torch.linspace(-1, 1, 96), torch.linspace(0.5, 2, 96)
"""Statistics of image embeddings, as wide as those of the small networks."""


EMBEDDER, ENCODER = "embedder.model.", "image_encoder"


class Pair:
    """Some networks of a small file by their prefix, and the folder converted from it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *prefixes: str,
        rest: Mapping[str, Tensor] | None = None,
        **choices: Any,
    ) -> None:
        parts = {prefix: files.TINY_FILES[name][prefix] for prefix in prefixes}
        self.networks: dict[str, nn.Module] = files.networks(parts, 1)
        self.file, self.out = folder / f"{name}.safetensors", folder / name
        # They were made in float32, so that nothing is lost.
        made = {k: v.float() for k, v in files.tensors(self.networks).items()}
        self.tensors = {**(rest or {}), **made}
        save_file(self.tensors, self.file)
        self.choices = choices
        self.report = ckptconv.convert(self.file, self.out, **choices)

    @property
    def without_embedder(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.tensors.items() if not k.startswith(EMBEDDER)}

    def prove(self) -> dict[str, Tensor]:
        """Verifies the folder, and returns what the file holds that it turns back into."""
        found = ckptconv.verify(self.file, self.out, **self.choices)
        assert found.passed, found.as_data()
        found = ckptconv.verify(None, self.out)
        assert found.passed, found.as_data()
        back = self.file.with_name("back.safetensors")
        ckptconv.export(self.out, back)
        return load_file(back)


@torch.no_grad()
def compare_unets(pair: Pair, y: Tensor) -> None:
    torch.manual_seed(0)
    reference: Any = pair.networks["model.diffusion_model."]
    model = loaded(diffusers.UNet2DConditionModel, pair.out / "unet")
    x = torch.randn(2, reference.config.in_channels, 16, 16, dtype=torch.float64)
    context = torch.randn(2, 5, reference.config.context_dim, dtype=torch.float64)
    steps = torch.tensor([7.0, 801.0], dtype=torch.float64)
    agree(model(x, steps, context, class_labels=y).sample, reference(x, steps, context, y))


@pytest.fixture(scope="module")
def x4(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("x4")
    rest = ("first_stage_model.", "low_scale_model.", "")
    return Pair("x4-upscaler", folder, "model.diffusion_model.", *rest)


@torch.no_grad()
def test_the_x4_upscaler_computes_the_same_and_goes_back(x4: Pair) -> None:
    compare_unets(x4, torch.tensor([20, 350]))
    vae: Any = x4.networks["first_stage_model."]
    model = loaded(diffusers.AutoencoderKL, x4.out / "vae")
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    mean, _ = vae.encode(image)
    agree(model.encode(image).latent_dist.mean, mean)
    agree(model.decode(mean).sample, vae.decode(mean))
    assert_equal(x4.prove(), x4.tensors)


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The ViT-L variant, with statistics as Karlo's file has them."""
    folder = tmp_path_factory.mktemp("unclip")
    rest = (EMBEDDER, "noise_augmentor.")
    donor = statistics("pair", folder)
    return Pair("sd2-unclip-l", folder, "model.diffusion_model.", *rest, image_normalizer=donor)


@torch.no_grad()
def test_unclip_computes_the_same_and_goes_back_with_its_statistics(unclip: Pair) -> None:
    compare_unets(unclip, torch.randn(2, 2 * 96, dtype=torch.float64))
    compare_encoders(unclip.networks[EMBEDDER], unclip.out)
    assert unclip.report.plan.detection.facts["image_encoder"].value == "openai"
    back = unclip.prove()
    assert torch.equal(back.pop("noise_augmentor.data_mean"), MEAN[None])
    assert torch.equal(back.pop("noise_augmentor.data_std"), STD[None])
    assert_equal(back, unclip.tensors)


@pytest.fixture(scope="module")
def openclip(unclip: Pair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The other fixture with the image encoder of the ViT-H variant, which alone is converted."""
    folder = tmp_path_factory.mktemp("openclip")
    return Pair("sd2-unclip-h", folder, EMBEDDER, rest=unclip.without_embedder, only=[ENCODER])


def test_the_image_encoder_of_openclip_computes_the_same(openclip: Pair) -> None:
    compare_encoders(openclip.networks[EMBEDDER], openclip.out)
    # A narrow one is told by the text transformer that it lacks.
    assert openclip.report.plan.detection.facts["image_encoder"].value == "openclip"


def test_an_image_encoder_under_the_names_of_transformers_is_the_same(
    openclip: Pair, tmp_path: Path
) -> None:
    weights, ids = f"{ENCODER}/model.safetensors", torch.arange(17)[None]
    tensors = load_file(openclip.out / weights)
    renamed = tensors | {"vision_model.embeddings.position_ids": ids}
    named = {f"{EMBEDDER}visual.{key}": tensor for key, tensor in renamed.items()}
    file, out = tmp_path / "file", tmp_path / "out"
    save_file(openclip.without_embedder | named, file)
    ckptconv.convert(file, out, only=[ENCODER])
    assert_equal(load_file(out / weights), tensors)
    # Old releases of transformers save the positions as well, and read them.
    for positions, wrong in ((ids, 0), (ids.flip(1), 1)):
        extra = {"vision_model.embeddings.position_ids": positions.contiguous()}
        save_file(tensors | extra, out / weights)
        checks = ckptconv.verify(file, out, only=[ENCODER]).checks
        assert [len(c.problems) for c in checks if c.kind == "weights"] == [wrong]


@torch.no_grad()
def compare_encoders(embedder: Any, out: Path) -> None:
    model = loaded(transformers.CLIPVisionModelWithProjection, out / "image_encoder")
    image = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    agree(model(image).image_embeds, embedder.visual(image))
    # Softmax cancels the bias of the keys, so no output shows a wrong one.
    joined = embedder.state_dict()["visual.transformer.resblocks.0.attn.in_proj_bias"]
    ours = model.state_dict()["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    assert torch.equal(ours, joined.chunk(3)[1])


# The statistics of the image embeddings, which no published file holds.


def statistics(kind: str, folder: Path) -> Path:
    """Writes a donor of some kind."""
    rows = {"mean": MEAN[None].clone(), "std": STD[None].clone()}
    path = folder / kind
    if kind == "folder":
        normalizer = StableUnCLIPImageNormalizer(96)
        normalizer.load_state_dict(rows)
        normalizer.save_pretrained(path)
    elif kind == "vectors":
        save_file({"mean": MEAN.clone(), "std": STD.clone()}, path)
    else:
        torch.save({"dict": rows, "pair": (MEAN, STD)}[kind], path)
    return path


def test_without_statistics_the_folder_says_so_and_a_pipeline_how_to_supply_them(
    unclip: Pair, tmp_path: Path
) -> None:
    report = ckptconv.convert(unclip.file, tmp_path / "out", configs_only=True)
    (warning,) = [text for text in report.warnings if text.startswith("image_normalizer")]
    assert warning.startswith("image_normalizer is not in the file, so model_index.json says null")
    assert "--image-normalizer FILE (with OpenAI's encoder (L) it is ViT-L-14_stats.th" in warning
    index = read_json(tmp_path / "out" / "model_index.json")
    assert index["image_normalizer"] == [None, None]
    with pytest.raises(Incomplete, match="no image_normalizer, which its pipeline") as caught:
        load_pipeline(unclip.file, device="cpu")
    assert "ViT-L-14_stats.th of Karlo" in caught.value.hint


def test_with_statistics_a_pipeline_is_built(unclip: Pair) -> None:
    absent = {"vae": None, "text_encoder": None}
    pipe = load_pipeline(unclip.file, device="cpu", components=absent, **unclip.choices)
    assert type(pipe).__name__ == "StableUnCLIPImg2ImgPipeline"
    assert torch.equal(pipe.image_normalizer.mean, MEAN[None])
    assert pipe.feature_extractor.crop_size["height"] == 56, "4 patches of 14 pixels"


@pytest.mark.parametrize("kind", ["folder", "vectors", "dict", "pair"])
def test_statistics_come_from_a_donor(kind: str, unclip: Pair, tmp_path: Path) -> None:
    donor, out, part = statistics(kind, tmp_path), tmp_path / "out", ["image_normalizer"]
    ckptconv.convert(unclip.file, out, only=part, image_normalizer=donor)
    held = loaded(StableUnCLIPImageNormalizer, out / "image_normalizer")
    assert torch.equal(held.mean, MEAN[None].double())
    assert torch.equal(held.std, STD[None].double())
    found = ckptconv.verify(unclip.file, out, only=part, image_normalizer=donor)
    assert found.passed, found.as_data()


def test_other_donors_are_refused(unclip: Pair, small: Path, tmp_path: Path) -> None:
    torch.save((MEAN[:, None], STD), tmp_path / "columns")
    torch.save((MEAN,), tmp_path / "half")
    StableUnCLIPImageNormalizer(128).save_pretrained(tmp_path / "wide")
    for donor, said in {
        tmp_path / "columns": r"row needs shape \[n\] or \[1, n\], found \[96, 1\]",
        tmp_path / "half": "image_normalizer: std is missing",
        unclip.out / "unet": "is that of UNet2DConditionModel",
        tmp_path
        / "wide": r"\[1, 128\], which does not fit \[96, 128\], the shape of image_encoder",
    }.items():
        with pytest.raises(FileRefused, match=said):
            ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=donor)
    with pytest.raises(UsageError, match="image_normalizer is given, but it is not"):
        ckptconv.convert(small, tmp_path / "out", image_normalizer=tmp_path / "half")


# What `generate` makes of an image.


UPSCALER: Any = diffusers.StableDiffusionUpscalePipeline


def asked(cls: Any, image: Image.Image, **settings: Any) -> dict[str, Any]:
    """Returns what a pipeline would be called with; it needs no weights for that."""
    pipe = cls.__new__(cls)
    return call_arguments(pipe, Settings("a cat", image=Path("x"), **settings), {"image": image})


def test_an_image_to_vary_is_looked_at_and_the_result_has_its_own_size() -> None:
    photo, cls = Image.new("RGB", (96, 48)), diffusers.StableUnCLIPImg2ImgPipeline
    arguments = asked(cls, photo, noise_level=3)
    assert arguments["image"] is photo
    assert arguments["noise_level"] == 3
    assert not {"width", "height"} & arguments.keys()
    arguments = asked(cls, photo, size=(64, 128))
    assert (arguments["width"], arguments["height"]) == (64, 128)


def test_the_size_of_an_upscaled_image_is_that_of_the_result() -> None:
    photo, cls = Image.new("RGB", (33, 16)), UPSCALER
    assert asked(cls, photo)["image"].size == (32, 16)
    assert asked(cls, photo, size=(128, 64))["image"].size == (32, 16)
    settings = Settings("a cat", size=(72, 64), strength=0.5)
    with pytest.raises(UsageError) as caught:
        check(cls, "upscaling", settings)
    assert list(caught.value.problems) == [
        "--strength does not fit: StableDiffusionUpscalePipeline takes none",
        "--image is missing: upscaling needs it",
        "--size does not divide by 32, as upscaling needs it",
    ]
