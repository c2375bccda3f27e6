"""unCLIP of Stable Diffusion 2.1, with either image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.detection.detect import detect
from ckptconv.errors import FileRefused, Incomplete, UsageError
from ckptconv.files import read_json
from ckptconv.inference.pipeline import load_pipeline
from tests.support import stock
from tests.support.oracle import loaded
from tests.support.pipelines import asked
from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.published_relatives import header
from tests.support.reference.files import TINY_FILES
from tests.support.relatives import (
    Converted,
    Relative,
    assert_equal,
    convert,
    exported,
    verified,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tests.conftest import Sample

MEAN, STD = torch.linspace(-1, 1, 96), torch.linspace(0.5, 2, 96)
"""Statistics of image embeddings, as wide as those of the small networks."""


EMBEDDER, ENCODER = "embedder.model.", "image_encoder"
SMALL_L, SMALL_H = TINY_FILES["sd2-unclip-l"], TINY_FILES["sd2-unclip-h"]
# No VAE and no text encoder, so that the tests are quick.
PARTS = {p: SMALL_L[p] for p in ("model.diffusion_model.", EMBEDDER, "noise_augmentor.")}
ONLY_L = Relative("SD2.1 unCLIP L", PARTS, variant="what only unCLIP has")


class TestProperties(PipelineProperties):
    relatives = (
        Relative("SD2.1 unCLIP L", SMALL_L, slow=True),
        Relative(
            "SD2.1 unCLIP H",
            SMALL_H,
            configs={"unet.class_embed_type": "projection"},
            slow=True,
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("sd2-unclip-h", "sd2-unclip-l")


@pytest.mark.parametrize("name", TestConfigurations.published)
def test_the_task_decides_the_prediction_and_keys_the_image_encoder(name: str) -> None:
    facts = detect(header(name)).facts
    assert facts["prediction_type"].source == "task"
    assert facts["image_encoder"].source == "structure"


@pytest.mark.slow
def test_the_libraries_load_statistics_that_the_file_holds(sample: Sample, tmp_path: Path) -> None:
    report = ckptconv.convert(
        sample("sd2-unclip", task="image-variation", dtype="fp16"), tmp_path / "out"
    )
    architecture, task = report.plan.detection.require()
    with stock.listening() as complaints:
        models = {}
        for component in architecture.models:
            part = tmp_path / "out" / component.name
            models[component.name] = stock.model(part, stock.MODELS[component.name])
            stock.check_weights(models[component.name], part)
        # diffusers wonders at any ready one of this class, which its top does not offer.
        del models["image_normalizer"]
        pipeline = stock.load(tmp_path / "out", **models)
    assert complaints == []
    assert type(pipeline).__name__ == task.pipeline
    assert pipeline.unet.config.in_channels == task.channels


def without_embedder() -> dict[str, Tensor]:
    return {k: v for k, v in ONLY_L.tensors().items() if not k.startswith(EMBEDDER)}


@pytest.fixture(scope="module")
def unclip(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The ViT-L variant, with statistics as Karlo's file has them."""
    folder = tmp_path_factory.mktemp("unclip")
    return convert(ONLY_L, folder, "--image-normalizer", statistics("pair", folder))


@pytest.mark.slow
def test_unclip_computes_the_same_and_goes_back_with_its_statistics(unclip: Converted) -> None:
    unclip.compare()
    assert ckptconv.inspect(unclip.file).facts["image_encoder"].value == "openai"
    verified(unclip.file, unclip.folder, image_normalizer=unclip.file.with_name("pair"))
    verified(None, unclip.folder)
    back = exported(unclip.folder)
    assert torch.equal(back.pop("noise_augmentor.data_mean"), MEAN[None])
    assert torch.equal(back.pop("noise_augmentor.data_std"), STD[None])
    assert_equal(back, unclip.tensors)


@pytest.fixture(scope="module")
def openclip(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The same with the image encoder of the ViT-H variant, which alone is converted."""
    relative = Relative("SD2.1 unCLIP H", {EMBEDDER: SMALL_H[EMBEDDER]}, without_embedder())
    return convert(relative, tmp_path_factory.mktemp("openclip"), "--only", ENCODER)


def test_the_image_encoder_of_openclip_computes_the_same(openclip: Converted) -> None:
    openclip.compare()
    # A narrow one is told by the text transformer that it lacks.
    assert ckptconv.inspect(openclip.file).facts["image_encoder"].value == "openclip"


def test_an_image_encoder_under_the_names_of_transformers_is_the_same(
    openclip: Converted, tmp_path: Path
) -> None:
    weights, ids = f"{ENCODER}/model.safetensors", torch.arange(17)[None]
    tensors = load_file(openclip.folder / weights)
    renamed = tensors | {"vision_model.embeddings.position_ids": ids}
    named = {f"{EMBEDDER}visual.{key}": tensor for key, tensor in renamed.items()}
    file, out = tmp_path / "file", tmp_path / "out"
    save_file(without_embedder() | named, file)
    ckptconv.convert(file, out, only=[ENCODER])
    assert_equal(load_file(out / weights), tensors)
    # Old releases of transformers save the positions as well, and read them.
    for positions, wrong in ((ids, 0), (ids.flip(1), 1)):
        extra = {"vision_model.embeddings.position_ids": positions.contiguous()}
        save_file(tensors | extra, out / weights)
        checks = ckptconv.verify(file, out, only=[ENCODER]).checks
        assert [len(c.problems) for c in checks if c.kind == "weights"] == [wrong]


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
    unclip: Converted, tmp_path: Path
) -> None:
    report = ckptconv.convert(unclip.file, tmp_path / "out", configs_only=True)
    (warning,) = [text for text in report.warnings if text.startswith("image_normalizer")]
    assert warning.startswith("image_normalizer is not in the file, so model_index.json says null")
    assert "image_normalizer=FILE (with OpenAI's encoder (L) it is ViT-L-14_stats.th" in warning
    index = read_json(tmp_path / "out" / "model_index.json")
    assert index["image_normalizer"] == [None, None]
    with pytest.raises(Incomplete, match="no image_normalizer, which its pipeline") as caught:
        load_pipeline(unclip.file, device="cpu")
    assert "ViT-L-14_stats.th of Karlo" in caught.value.hint


def test_with_statistics_a_pipeline_is_built(unclip: Converted) -> None:
    absent = {"vae": None, "text_encoder": None}
    donor = unclip.file.with_name("pair")
    pipe = load_pipeline(unclip.file, device="cpu", components=absent, image_normalizer=donor)
    assert type(pipe).__name__ == "StableUnCLIPImg2ImgPipeline"
    assert torch.equal(pipe.image_normalizer.mean, MEAN[None])
    assert pipe.feature_extractor.crop_size["height"] == 56, "4 patches of 14 pixels"


@pytest.mark.parametrize("kind", ["folder", "vectors", "dict", "pair"])
def test_statistics_come_from_a_donor(kind: str, unclip: Converted, tmp_path: Path) -> None:
    donor, out, part = statistics(kind, tmp_path), tmp_path / "out", ["image_normalizer"]
    ckptconv.convert(unclip.file, out, only=part, image_normalizer=donor)
    held = loaded(StableUnCLIPImageNormalizer, out / "image_normalizer")
    assert torch.equal(held.mean, MEAN[None].double())
    assert torch.equal(held.std, STD[None].double())
    found = ckptconv.verify(unclip.file, out, only=part, image_normalizer=donor)
    assert found.passed, found.as_data()


def test_other_donors_are_refused(unclip: Converted, small: Path, tmp_path: Path) -> None:
    torch.save((MEAN[:, None], STD), tmp_path / "columns")
    torch.save((MEAN,), tmp_path / "half")
    StableUnCLIPImageNormalizer(128).save_pretrained(tmp_path / "wide")
    for donor, said in {
        tmp_path / "columns": r"row needs shape \[n\] or \[1, n\], found \[96, 1\]",
        tmp_path / "half": "image_normalizer: std is missing",
        unclip.folder / "unet": "is that of UNet2DConditionModel",
        tmp_path / "wide": r"\[1, 128\], but axis 1 should be 96: image_encoder/.* \[96, 128\]",
    }.items():
        with pytest.raises(FileRefused, match=said):
            ckptconv.convert(unclip.file, tmp_path / "out", image_normalizer=donor)
    with pytest.raises(UsageError, match="image_normalizer is given, but it is not"):
        ckptconv.convert(small, tmp_path / "out", image_normalizer=tmp_path / "half")


# What `generate` makes of an image.


def test_an_image_to_vary_is_looked_at_and_the_result_has_its_own_size() -> None:
    photo, cls = Image.new("RGB", (96, 48)), diffusers.StableUnCLIPImg2ImgPipeline
    arguments = asked(cls, photo, noise_level=3)
    assert arguments["image"] is photo
    assert arguments["noise_level"] == 3
    assert not {"width", "height"} & arguments.keys()
    arguments = asked(cls, photo, size=(64, 128))
    assert (arguments["width"], arguments["height"]) == (64, 128)
