"""Stock diffusers and transformers take a converted folder without a word of complaint."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)

import ckptconv
from ckptconv.maps.architecture import bundled
from tests.conftest import Folder, Sample
from tests.support.checkpoints import raw_folder

RELATIVES = ("koala-1b", "koala-700m", "ssd-1b")
"""They take their tasks from sdxl, so that one of them is tried."""
TASKS = [
    (name, task.name)
    for name, architecture in bundled().architectures.items()
    if not architecture.single
    for task in list(architecture.tasks)[: 1 if name in RELATIVES else None]
]
MODELS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.ControlNetModel,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "depth_estimator": transformers.DPTForDepthEstimation,
    "image_encoder": transformers.CLIPVisionModelWithProjection,
    "image_normalizer": StableUnCLIPImageNormalizer,
}


class _Complaints(logging.Handler):
    """Collects what the libraries warn of, but for what this installation lacks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "requires torchvision" not in record.getMessage():
            self.lines.append(record.getMessage())


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    handler = _Complaints()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # another test of this process may have made the library quiet
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler.lines
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def _load(folder: Path, **options: Any) -> Any:
    return DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]  # theirs is untyped
        folder, local_files_only=True, **options
    )


def _model(folder: Path, component: str, **options: Any) -> Any:
    """Loads a model, and checks that no key is missing or unexpected."""
    model, info = MODELS[component].from_pretrained(
        folder / component, local_files_only=True, output_loading_info=True, **options
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return model


def _check_weights(model: Any, component: Path) -> None:
    """Checks that a model holds what its folder does, bit for bit."""
    stored = raw_folder(component)
    # transformers 5 leaves `text_model.` out of a CLIPTextModel's names
    held = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    short = {key: key.removeprefix(f"{component.name}/") for key in stored}
    short = {key: name.removeprefix("text_model.") for key, name in short.items()}
    assert held.keys() == set(short.values())
    for key, (dtype, shape, data) in stored.items():
        value = held[short[key]]
        assert tuple(value.shape) == shape
        wanted = torch.frombuffer(bytearray(data), dtype=_TORCH[dtype])
        assert torch.equal(value.flatten(), wanted.to(value.dtype))


_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(scope="module")
def loaded() -> dict[str, dict[str, Any]]:
    """The models that the tasks of an architecture share, all but the UNet."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_the_models_and_the_pipeline_of_every_task_load_without_a_complaint(
    name: str,
    task: str,
    sample: Sample,
    complaints: list[str],
    loaded: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    report = ckptconv.convert(sample(name, task=task, dtype="fp16"), tmp_path, overwrite=True)
    models = loaded.setdefault(name, {})
    architecture, own = report.plan.detection.require()
    for component in architecture.models:
        if component.name == "unet" or component.name not in models:
            models[component.name] = _model(tmp_path, component.name)
            _check_weights(models[component.name], tmp_path / component.name)
    # diffusers wonders at any ready one of this class, which its top does not offer.
    ready = [c.name for c in architecture.models if c.name != "image_normalizer"]
    pipeline = _load(tmp_path, **{name: models[name] for name in ready})
    assert complaints == []
    assert type(pipeline).__name__ == own.pipeline
    channels = pipeline.unet.config.in_channels
    known = {t.name: t.channels for t in bundled().architectures[name].tasks}
    assert known[task] == channels


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
def test_a_pipeline_loads_all_of_its_models_by_itself(
    name: str, folder: Folder, complaints: list[str]
) -> None:
    pipeline = _load(folder(name))
    assert complaints == []
    architecture = bundled().architectures[name]
    for component in architecture.for_task(architecture.tasks[0]).models:
        assert type(getattr(pipeline, component.name)) is MODELS[component.name]


def test_a_complaint_would_have_been_heard(
    folder: Folder, complaints: list[str], tmp_path: Path
) -> None:
    shutil.copytree(folder("sd1"), tmp_path / "out")
    index = tmp_path / "out" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "bogus": True}))
    _load(tmp_path / "out")
    assert any("bogus" in line for line in complaints)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_configs_serve_from_single_file_offline_and_it_reads_the_same_weights(
    name: str, sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    configs = tmp_path / "configs"
    ckptconv.convert(sample(name), configs, configs_only=True)
    classes = {
        "sd1": diffusers.StableDiffusionPipeline,
        "sdxl": diffusers.StableDiffusionXLPipeline,
    }
    theirs = classes[name].from_single_file(
        str(sample(name)), config=str(configs), local_files_only=True
    )
    architecture = bundled().architectures[name]
    for component in architecture.for_task(architecture.tasks[0]).models:
        _check_weights(getattr(theirs, component.name), folder(name) / component.name)


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated")  # the name that old ones know
@pytest.mark.parametrize(("variant", "shard"), [("", 3_000_000), ("fp16", 0), ("fp16", 3_000_000)])
def test_variants_and_shards_load(
    variant: str, shard: int, sample: Sample, complaints: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = ckptconv.convert(
        sample("sd1", dtype="fp16"), out, variant=variant, max_shard_size=shard
    )
    shards = [name for name in report.files if "-of-" in name]
    assert bool(shards) == bool(shard)
    assert all((".fp16-" in name) == bool(variant) for name in shards)
    options: dict[str, Any] = {"variant": variant or None, "torch_dtype": torch.float16}
    pipeline = _load(out, **options)
    assert complaints == []
    for component in ("unet", "text_encoder"):
        _check_weights(getattr(pipeline, component), out / component)
        model = _model(out, component, **options)
        assert model.dtype == getattr(pipeline, component).dtype == torch.float16


def test_an_image_is_drawn_from_a_sharded_cast_inpainting_model(
    sample: Sample, complaints: list[str], tmp_path: Path
) -> None:
    from PIL import Image

    out = tmp_path / "out"
    ckptconv.convert(
        sample("sd1", task="inpainting", dtype="fp16"),
        out,
        dtype="fp32",
        max_shard_size=10_000_000,
    )
    pipeline = _load(out)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt="a test",
            image=Image.new("RGB", (64, 64), "gray"),
            mask_image=Image.new("L", (64, 64), 255),
            num_inference_steps=2,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        for seed in (0, 1)
    ]
    assert images[0].shape == (64, 64, 3)
    assert images[0].std() > 0.01
    assert abs(images[0] - images[1]).max() > 0.01
    assert complaints == []
