"""Where `generate` merges a LoRA into the weights, and where diffusers loads it beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import UsageError
from ckptconv.inference.memory import Job, Size, job_of
from tests.conftest import Folder, Sample
from tests.support.adapters import Adapter, layers
from tests.support.checkpoints import rewritten
from tests.support.pipelines import SMALL, runner
from tests.support.reference.files import FLUX_FILES


def inner(prefix: str, key: str) -> str | None:
    return key.removeprefix(prefix) if key.startswith(prefix) else None


@pytest.fixture
def files(sample: Sample, tmp_path: Path) -> Path:
    """Gives a folder with the files of a small FLUX.1, to be put together."""
    (folder := tmp_path / "files").mkdir()
    for name, prefix in FLUX_FILES.items():
        rewritten(sample("flux"), folder / f"{name}.safetensors", partial(inner, prefix))
    return folder


@pytest.fixture
def lora(sample: Sample, tmp_path: Path) -> Path:
    prefix, adapter = FLUX_FILES["flux1-dev"], Adapter()
    adapter.peft("diffusion_model.", layers(sample("flux"), prefix, "double_blocks.0.img_attn"))
    return adapter.save(tmp_path / "lora.safetensors")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gives the model that `generate` builds a pipeline of, and stops it there."""
    found: dict[str, Any] = {}

    def build(model: Any, **_: object) -> None:
        found["built"] = model
        raise UsageError("built")

    monkeypatch.setattr("ckptconv.commands.generate.build_pipeline", build)
    return found


def merges(model: Any) -> bool:
    return any(step.changes for step in model.steps)


def test_a_lora_is_merged_into_a_transformer_of_several_files(
    files: Path, lora: Path, seen: dict[str, Any], tmp_path: Path
) -> None:
    runner(tmp_path)(files, *SMALL, "--assemble", "--lora", lora, code=2)
    assert merges(seen["built"])


def test_memory_is_counted_with_the_lora_merged(
    files: Path, lora: Path, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Quantized layers that it changes are no longer quantized."""

    def measure(model: Any, *words: Any) -> Any:
        seen["counted"] = model
        return job_of(model, *words)

    monkeypatch.setattr("ckptconv.commands.generate.job_of", measure)
    words = ("--assemble", "--lora", lora, "--memory", "8GB")
    runner(tmp_path)(files, *SMALL, *words, code=2)
    assert merges(seen["counted"])
    assert merges(seen["built"])


def test_beside_a_lora_no_weights_are_in_fp8(
    folder: Folder, lora: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a diffusers folder, into which no LoRA is merged."""

    def measure(*_: Any) -> Job:
        unet = Size(2 * 10**9, 10**9, 10**9, 10**6)  # 2 GB, or 1 GB in fp8
        return Job({"unet": unet}, "bf16", 64 * 64, device="cpu")

    monkeypatch.setattr("ckptconv.commands.generate.job_of", measure)
    run = runner(tmp_path)
    words = (folder("small"), *SMALL, "--lora", lora)
    result = run(*words, "--memory", "3GB", code=3)
    assert "too little: the smallest setting, bf16, takes" in result.stderr
    result = run(*words, "--storage", "fp8", code=2)
    assert "exclude each other for a diffusers folder" in result.stderr
