"""Loading and generating on a GPU (`pytest -m gpu`), and what of it can be shown on a CPU.

The bodies take the device; without a GPU the CPU's runs remain. What needs a GPU skips and says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from ckptconv import load_pipeline
from ckptconv.errors import DeviceError
from ckptconv.inference.generation import generate
from ckptconv.maps.architecture import bundled
from ckptconv.sample import layout_of, write_sample
from tests.conftest import Sample
from tests.support.pipelines import assert_same, bits, modules, tensors
from tests.support.qwen import tokenizers

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"
)
needs_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, found {torch.cuda.device_count()}"
)
ON_GPU = (pytest.mark.gpu, needs_gpu)
ARCHITECTURES = [a.name for a in bundled().architectures.values() if not a.single]


def image(pipe: Any, seed: int = 5, size: int = 64, steps: int = 2) -> Any:
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": steps}
    if "Img2Img" in type(pipe).__name__:
        arguments |= {"image": Image.new("RGB", (size, size), (200, 40, 90)), "strength": 1.0}
    else:
        arguments |= {"width": size, "height": size}
    return np.asarray(generate(pipe, arguments, seed)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype", "device"),
    [
        ("sdxl", "bf16", "cpu"),  # the others are in test_pipeline.py
        *(
            pytest.param(architecture, dtype, "cuda", marks=ON_GPU)
            for architecture in ARCHITECTURES
            for dtype in (None, "fp16", "bf16", "fp32")
        ),
    ],
)
def test_modules_are_those_of_diffusers(
    architecture: str, dtype: str | None, device: str, sample: Sample, tmp_path: Path
) -> None:
    given: dict[str, Any] = {**tokenizers(architecture, tmp_path)}
    ckptconv.convert(sample(architecture), tmp_path / "out", dtype=dtype, **given)
    ours = load_pipeline(sample(architecture), device=device, dtype=dtype, **given)
    assert_same(ours, load_pipeline(tmp_path / "out", device=device))
    found = {
        tensor.device.type for module in modules(ours).values() for _, tensor in tensors(module)
    }
    assert found == {device}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "device"),
    [
        ("sdxl", "cpu"),
        ("sdxl-refiner", "cpu"),
        *(pytest.param(architecture, "cuda", marks=ON_GPU) for architecture in ARCHITECTURES),
    ],
)
def test_the_same_seed_gives_the_same_image(
    architecture: str, device: str, sample: Sample, tmp_path: Path
) -> None:
    dtype = "fp16" if device == "cuda" else "fp32"
    given: dict[str, Any] = {**tokenizers(architecture, tmp_path)}
    pipe = load_pipeline(sample(architecture), device=device, dtype=dtype, **given)
    one, two, other = image(pipe), image(pipe), image(pipe, seed=6)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.std() > 10


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_makes_the_image_of_a_cpu(architecture: str, sample: Sample) -> None:
    made = [
        image(load_pipeline(sample(architecture), device=device, dtype="fp32"))
        for device in ("cpu", "cuda")
    ]
    assert np.abs(made[0] - made[1]).mean() < 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("offload", ["model", "sequential"])
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_offloading_changes_no_image(architecture: str, offload: str, sample: Sample) -> None:
    whole = image(load_pipeline(sample(architecture), device="cuda", dtype="fp16"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    pipe = load_pipeline(sample(architecture), device="cuda", dtype="fp16", offload=offload)
    weights = sum(p.nbytes for m in modules(pipe).values() for p in m.parameters())
    assert torch.cuda.memory_allocated() - before < weights / 10, "weights do not wait on the CPU"
    assert np.abs(image(pipe) - whole).mean() < 2


@pytest.mark.gpu
@needs_gpus
def test_a_model_spread_over_gpus_makes_the_same_image(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = image(load_pipeline(sample("sdxl"), device="cuda", dtype="fp16"))
    size = sample("sdxl").stat().st_size
    count = torch.cuda.device_count()
    # As if each of them were nearly too small, so that the UNet must be split.
    monkeypatch.setattr(
        "ckptconv.inference.pipeline.free_memory", lambda: dict.fromkeys(range(count), size)
    )
    pipe = load_pipeline(sample("sdxl"), device="cuda", dtype="fp16", device_map="balanced")
    assert len({p.device for p in pipe.unet.parameters()}) > 1
    assert np.abs(image(pipe) - whole).mean() < 2


@pytest.mark.gpu
@needs_gpu
def test_one_gpu_takes_a_balanced_model_whole(sample: Sample) -> None:
    pipe = load_pipeline(sample("sd1"), device="cuda", device_map="balanced")
    assert image(pipe).std() > 10


@pytest.mark.gpu
@needs_gpu
def test_a_full_gpu_is_an_error_with_a_hint(sample: Sample) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(DeviceError, match="out of memory while loading") as caught:
            load_pipeline(sample("sdxl"), device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "offload='model'" in caught.value.hint


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives an SDXL of 6.9 GB with random weights."""
    architecture = bundled().architectures["sdxl"]
    path = tmp_path_factory.mktemp("full") / "sdxl.safetensors"
    write_sample(architecture, path, layout_of(architecture, full=True, dtype="fp16"))
    return path


@pytest.mark.gpu
@needs_gpu
def test_a_full_size_sdxl_loads_in_its_own_size_and_runs(full_size: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipe = load_pipeline(full_size, device="cuda")
    size = sum(p.nbytes for m in modules(pipe).values() for p in m.parameters())
    assert size == pytest.approx(full_size.stat().st_size, rel=0.001)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.02 * size, f"{peak:,} bytes at the peak for {size:,} bytes of weights"
    one = image(pipe, size=1024)
    assert one.shape == (1024, 1024, 3)
    assert np.array_equal(one, image(pipe, size=1024))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_moved_bytes_are_the_bytes_of_the_file(
    device: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the buffers, which the CPU takes only for a cast, cut into small pieces."""
    if device == "cpu":
        monkeypatch.setattr("ckptconv.inference.weights._view", nothing)
    whole = load_pipeline(sample("sdxl"), device="cpu")
    monkeypatch.setattr("ckptconv.inference.weights.CHUNK", 4096)
    moved = load_pipeline(sample("sdxl"), device=device)
    for name, module in modules(moved).items():
        pairs = zip(tensors(module), tensors(modules(whole)[name]), strict=True)
        for (key, mine), (_, other) in pairs:
            assert torch.equal(bits(mine).cpu(), bits(other)), key


nothing: Callable[..., None] = lambda *_: None  # noqa: E731  (stands for a function that gives none)
