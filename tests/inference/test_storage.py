"""Weights that stay in fp8 while their layers compute in another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]  # it has none
import diffusers
import numpy as np
import pytest
import torch

import ckptconv
from ckptconv import UsageError, load_pipeline
from tests.conftest import Sample
from tests.support.adapters import Adapter
from tests.support.pipelines import SMALL, modules, parameters, pixels, runner

FP8 = torch.float8_e4m3fn
STORED = ["--storage", "fp8"]
SETTINGS: list[dict[str, Any]] = [{"dtype": "fp32"}, {"storage": "fp8"}]


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("sd1", "unet"),
        *(
            pytest.param(n, "transformer", marks=pytest.mark.slow)
            for n in ("flux", "sd3", "chroma")
        ),
        pytest.param("sdxl", "unet", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_it_is_the_layerwise_casting_of_diffusers(
    name: str, network: str, sample: Sample, tmp_path: Path
) -> None:
    """From the file, from the folder in fp8, and by stock diffusers from that folder."""
    folder = tmp_path / "out"
    ckptconv.convert(sample(name, dtype="bf16"), folder, dtype="fp8")
    load: Any = diffusers.DiffusionPipeline.from_pretrained
    stock = load(folder, torch_dtype=torch.bfloat16)
    getattr(stock, network).enable_layerwise_casting(FP8, torch.bfloat16)
    wanted = getattr(stock, network).state_dict()
    narrow = sum(tensor.dtype == FP8 for tensor in wanted.values())
    assert narrow > len(wanted) / 2
    for path in (sample(name, dtype="bf16"), folder):
        pipe = load_pipeline(path, device="cpu", storage="fp8")
        assert pipe.dtype == torch.bfloat16
        found = getattr(pipe, network).state_dict()
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert tensor.dtype == wanted[key].dtype, key
            assert torch.equal(tensor.float(), wanted[key].float()), key


@pytest.mark.slow
def test_images_are_near_those_of_weights_that_are_not_rounded(
    sample: Sample, tmp_path: Path
) -> None:
    run, images = runner(tmp_path), []
    for words in (["--dtype", "bf16"], [*STORED, "--dtype", "bf16"], STORED):
        run(sample("sd1"), *SMALL, *words, "--overwrite")
        images.append(pixels(tmp_path / "out.png").astype(float))
        assert parameters(tmp_path / "out.png").get("storage") == ("fp8" if images[1:] else None)
    assert 0 < np.abs(images[1] - images[0]).mean() < 16
    assert np.array_equal(images[1], images[2])


@pytest.mark.slow
def test_sequential_offload_paints_the_same(sample: Sample) -> None:
    """With the CPU in the place of the GPU: accelerate moves the weights in the same way."""
    images = []
    for offloaded in (False, True):
        pipe = load_pipeline(sample("sd1"), device="cpu", storage="fp8")
        pipe.set_progress_bar_config(disable=True)
        for module in modules(pipe).values() if offloaded else ():
            accelerate.cpu_offload(module, torch.device("cpu"))
        words: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
        random = torch.Generator().manual_seed(1)
        images.append(pipe("a fox", **words, generator=random, output_type="np").images)
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"storage": "int8"}, "storage 'int8' is unknown"),
        ({"dtype": "fp8"}, "no layer computes in fp8"),
        ({"storage": "fp8", "components": {"unet": None}}, "is for a unet or transformer"),
    ],
)
def test_what_is_refused(words: dict[str, Any], message: str, sample: Sample) -> None:
    with pytest.raises(UsageError, match=message):
        load_pipeline(sample("sd1"), device="cpu", **words)


@pytest.mark.slow
def test_a_lora_is_merged_before_the_weights_are_rounded(sample: Sample, tmp_path: Path) -> None:
    layer, adapter = "time_embedding.linear_1", Adapter()
    adapter.peft(
        "unet.", {layer: ckptconv.plan(sample("sd1")).tensors("unet")[f"{layer}.weight"].shape}
    )
    file = adapter.save(tmp_path / "a.safetensors")
    weights = [
        load_pipeline(sample("sd1"), device="cpu", lora=file, **words).unet.state_dict()
        for words in SETTINGS
    ]
    merged, stored = (state[f"{layer}.weight"] for state in weights)
    assert torch.equal(merged.to(FP8).float(), stored.float())
    runner(tmp_path)(sample("sd1"), *SMALL, *STORED, "--lora", f"{file}:0.5")
    assert parameters(tmp_path / "out.png")["loras"] == [{"file": "a.safetensors", "scale": 0.5}]
