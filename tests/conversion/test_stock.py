"""Stock diffusers and transformers take a converted folder without a word of complaint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import ckptconv
from ckptconv.maps.architecture import bundled
from tests.conftest import Folder, Sample
from tests.support import stock
from tests.support.pipelines import TASKS, modules, tensors
from tests.support.qwen import tokenizers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    with stock.listening() as lines:
        yield lines


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner"])
def test_a_pipeline_loads_all_of_its_models_by_itself(
    name: str, folder: Folder, complaints: list[str]
) -> None:
    pipeline = stock.load(folder(name))
    assert complaints == []
    architecture = bundled().architectures[name]
    for component in architecture.for_task(architecture.tasks[0]).models:
        assert type(getattr(pipeline, component.name)) is stock.MODELS[component.name]


def test_a_complaint_would_have_been_heard(
    folder: Folder, complaints: list[str], tmp_path: Path
) -> None:
    shutil.copytree(folder("sd1"), tmp_path / "out")
    index = tmp_path / "out" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "bogus": True}))
    stock.load(tmp_path / "out")
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
        stock.check_weights(getattr(theirs, component.name), folder(name) / component.name)


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
    pipeline = stock.load(out, **options)
    assert complaints == []
    for component in ("unet", "text_encoder"):
        stock.check_weights(getattr(pipeline, component), out / component)
        model = stock.model(out / component, stock.MODELS[component], **options)
        assert model.dtype == getattr(pipeline, component).dtype == torch.float16


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated")
@pytest.mark.parametrize(
    ("name", "task", "dtype"),
    [
        pytest.param(name, task.name, dtype, marks=[pytest.mark.slow] if n else [])
        for n, (name, task) in enumerate(TASKS)
        for dtype in (DTYPES if name != TASKS[n - 1][0] else ["fp16"])  # else the same modules
    ],
)
def test_a_pipeline_has_one_dtype_fp32_unless_another_is_asked_for(
    name: str, task: str, dtype: str, sample: Sample, tmp_path: Path
) -> None:
    given: dict[str, Any] = {**tokenizers(name, tmp_path)}
    file = sample(name, task=task)
    ckptconv.convert(file, tmp_path / "out", dtype=dtype, variant=dtype, **given)
    asked: dict[torch.dtype, dict[str, Any]] = {torch.float32: {}}
    asked[DTYPES[dtype]] = {"torch_dtype": DTYPES[dtype]}
    for expected, options in asked.items():
        pipeline = stock.load(tmp_path / "out", variant=dtype, **options)
        for part, module in modules(pipeline).items():
            # What is computed is of another kind, and in fp16 a class may keep some layers wide.
            kept = set(getattr(type(module), "_keep_in_fp32_modules", None) or ())
            own = module.state_dict().keys()
            held = {
                tensor.dtype
                for key, tensor in tensors(module)
                if key in own and tensor.is_floating_point() and kept.isdisjoint(key.split("."))
            }
            assert held == {expected}, part


@pytest.mark.slow
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
    pipeline = stock.load(out)
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
