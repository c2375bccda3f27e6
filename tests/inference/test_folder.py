"""A folder loads as diffusers would load it, bit for bit, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import load_pipeline
from ckptconv.errors import FileRefused
from ckptconv.folder.names import RECORD
from ckptconv.inference.model import open_model
from ckptconv.options import Options
from ckptconv.planning.step import ASIDE
from tests.conftest import Copy, Sample
from tests.support.pipelines import TASKS, assert_same, modules

pytestmark = pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")

VAE, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes sure that no weights are loaded by their library."""
    monkeypatch.setattr("ckptconv.inference.pipeline.from_library", None)


def stock(ours: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Loads a folder with diffusers alone, into the class that we chose."""
    return type(ours).from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]]) -> None:
    """Replaces a weight file; it may be a link, which is not written through."""
    state = change(load_file(file))
    file.unlink()
    save_file(state, file, {"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    """Sets entries of a JSON file."""
    content = json.loads(file.read_text()) | values
    file.unlink()
    file.write_text(json.dumps(content))


@pytest.mark.usefixtures("alone")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "task"),  # these two compute a float buffer, so that a library builds them
    [(name, task.name) for name, task in TASKS if name not in ("chroma", "z-image")],
)
def test_every_task_is_what_stock_diffusers_loads(
    architecture: str, task: str, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample(architecture, task=task), tmp_path / "out", dtype="fp16")
    ours = load_pipeline(tmp_path / "out", device="cpu")
    theirs = stock(ours, tmp_path / "out", torch.float16)
    assert_same(ours, theirs)
    assert ours.config._name_or_path == str(theirs.config._name_or_path)
    for name, module in modules(ours).items():
        their = modules(theirs)[name]
        for entry in ("_name_or_path", "dtype", "torch_dtype"):
            mine = str(getattr(module.config, entry, None))
            assert mine == str(getattr(their.config, entry, None)), (name, entry)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_shards_variants_and_a_cast(dtype: str | None, sample: Sample, tmp_path: Path) -> None:
    out, file = tmp_path / "out", sample("sd1", dtype="fp16")
    ckptconv.convert(file, out, variant="fp16", max_shard_size=200_000)
    assert len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 2
    ours = load_pipeline(tmp_path / "out", device="cpu", dtype=dtype)
    kind = torch.bfloat16 if dtype else torch.float16
    theirs = type(ours).from_pretrained(
        tmp_path / "out", torch_dtype=kind, variant="fp16", local_files_only=True
    )
    assert_same(ours, theirs)


@pytest.mark.usefixtures("alone")
def test_names_of_older_releases(copy: Copy) -> None:
    """Attention of a VAE before diffusers 0.17; `position_ids`, saved before transformers 4.31."""
    folder = copy("sd1")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def aged(state: dict[str, torch.Tensor]) -> dict[str, Any]:
        for new, name in old.items():
            state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
        return state

    rewrite(folder / VAE, aged)
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(folder / ENCODER, lambda state: state | ids)
    ours = load_pipeline(folder, device="cpu")
    assert_same(ours, stock(ours, folder, torch.float32))


@pytest.mark.usefixtures("alone")
def test_names_of_a_newer_release(copy: Copy) -> None:
    """Release 5 of transformers saves a text encoder without the segment `text_model.`."""
    folder = copy("sd1")
    rewrite(
        folder / ENCODER,
        lambda state: {key.removeprefix("text_model."): value for key, value in state.items()},
    )
    ours = load_pipeline(folder, device="cpu")
    assert_same(ours, stock(ours, folder, torch.float32))


@pytest.mark.slow
def test_a_class_of_others_is_loaded_by_its_library(copy: Copy) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    folder = copy("sd1")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=16)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    extractor = folder / "feature_extractor"
    extractor.mkdir()
    (extractor / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 32}')
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # gone since release 5
    )
    ours = load_pipeline(folder, device="cpu", dtype="fp16")
    theirs = stock(ours, folder, torch.float16)
    assert_same(ours, theirs)
    assert type(ours.safety_checker) is StableDiffusionSafetyChecker
    assert type(ours.feature_extractor) is type(theirs.feature_extractor)
    assert load_pipeline(folder, device="cpu", components={"safety_checker": None}).unet


def test_a_class_of_no_known_library_is_refused(copy: Copy) -> None:
    folder = copy("sd1")
    edit(folder / "model_index.json", unet=["os", "PathLike"])
    with pytest.raises(
        FileRefused, match=r"unet is \['os', 'PathLike'\], expected UNet2DCond"
    ) as e:
        load_pipeline(folder, device="cpu")
    assert "components={'unet': ...}" in e.value.hint


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "unet/config.json",
            {"cross_attention_dim": 32},
            r"attn2\.to_k\.weight: has shape \[32, 64\], needed",
        ),
        ("unet/config.json", {"block_out_channels": "wide"}, "cannot load the folder"),
        ("text_encoder/config.json", {"hidden_size": 33}, "needed .49408, 33."),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "all"}, "cannot load"),
    ],
)
def test_a_configuration_that_does_not_fit_is_no_traceback(
    file: str, values: dict[str, Any], message: str, copy: Copy
) -> None:
    folder = copy("sd1")
    edit(folder / file, **values)
    with pytest.raises(FileRefused, match=message):
        load_pipeline(folder, device="cpu")


def test_a_component_whose_folder_is_missing(copy: Copy) -> None:
    folder = copy("sd1")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler").rmdir()
    with pytest.raises(FileRefused, match="it has no scheduler"):
        load_pipeline(folder, device="cpu")


def test_a_damaged_record_of_the_conversion_stops_nobody(copy: Copy) -> None:
    folder = copy("sd1")
    record = folder / ASIDE / RECORD
    assert open_model(folder, Options()).facts
    record.unlink()
    assert not open_model(folder, Options()).facts
    for damaged in ("{", "[]", ""):
        record.write_text(damaged)
        assert not open_model(folder, Options()).facts
