"""A pipeline of a GGUF file keeps its blocks, and paints what their values paint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ckptconv
from ckptconv import load_pipeline
from ckptconv.inference.memory import job_of
from ckptconv.inference.model import open_model
from ckptconv.options import Options
from tests.conftest import Sample
from tests.support import gguf_files
from tests.support.checkpoints import rewritten
from tests.support.gguf_files import Stored, cycled, dequantized, kind
from tests.support.reference.files import FLUX_FILES

PROMPT: dict[str, Any] = {
    **{"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 1},
    **{"max_sequence_length": 16, "output_type": "latent"},
}
KEPT = ("Q8_0", "Q4_0", "Q4_K", "IQ4_XS")
"""Dtypes that diffusers computes with; TQ2_0, below, it does not."""


@pytest.fixture(scope="module")
def original(sample: Sample) -> Path:
    return sample("flux", dtype="fp32")


@pytest.fixture(scope="module")
def donors(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("donors")
    places = {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5xxl_fp16"}
    return {
        name: rewritten(original, folder / f"{of}.safetensors", partial(inner, FLUX_FILES[of]))
        for name, of in places.items()
    }


def inner(prefix: str, key: str) -> str | None:
    return key.removeprefix(prefix) if key.startswith(prefix) else None


def quantized(original: Path, path: Path, *dtypes: str) -> tuple[Path, Stored]:
    prefix = FLUX_FILES["flux1-dev"]
    tensors = load_file(original)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    stored = cycled(own, dtypes)
    return gguf_files.write(path, stored), stored


def painted(pipe: Any) -> Any:
    return pipe(**PROMPT, generator=torch.Generator().manual_seed(1)).images.float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0"])
def test_it_paints_within_the_error_of_the_quantization(
    dtype: str, original: Path, donors: Mapping[str, Any], tmp_path: Path
) -> None:
    file, stored = quantized(original, tmp_path / "model.gguf", dtype)
    same = tmp_path / "values.safetensors"
    save_file(dequantized(stored), same)
    kept, values, unquantized = (
        painted(load_pipeline(path, device="cpu", dtype="fp32", **donors))
        for path in (file, same, original)
    )
    error = np.abs(values - unquantized).mean()
    assert 0 < np.abs(kept - values).mean() < error / 4


@pytest.mark.slow
def test_linear_layers_keep_their_blocks_and_nothing_else_does(
    original: Path, donors: Mapping[str, Any], tmp_path: Path
) -> None:
    file, stored = quantized(original, tmp_path / "model.gguf", *KEPT, "TQ2_0")
    pipe = load_pipeline(file, device="cpu", **donors)
    state = pipe.transformer.state_dict()
    made = ckptconv.plan(file)
    seen = set()
    for step in made.steps:
        source = step.sources[0]
        keeps = source.dtype in KEPT
        rows = stored[source.name][2]
        at = 0
        for target in step.targets:
            found = state[target.key]
            assert found.dtype == (torch.uint8 if keeps else torch.bfloat16), target.key
            if keeps:
                count = target.shape[0]
                if step.op.name == "swap_halves":
                    rows = np.roll(rows, count // 2, axis=0)
                assert np.array_equal(found.numpy(), rows[at : at + count])
                assert found.quant_type == kind(source.dtype)
                at += count
        seen.add((source.dtype, step.op.name))
    assert {dtype for dtype, _ in seen} >= {*KEPT, "TQ2_0", "F32"}
    assert ("Q8_0", "split_rows") in seen
    with pytest.raises(ValueError, match="not serializable"):
        pipe.transformer.save_pretrained(tmp_path / "out")
    assert pipe.text_encoder_2.dtype == torch.bfloat16


@pytest.mark.slow
def test_what_is_kept_takes_the_memory_of_the_file(
    original: Path, donors: Mapping[str, Any], tmp_path: Path
) -> None:
    file, _ = quantized(original, tmp_path / "model.gguf", "Q4_0")
    pipe = load_pipeline(file, device="cpu", **donors)
    held = sum(p.numel() * p.itemsize for p in pipe.transformer.parameters())
    assert held < file.stat().st_size


def test_a_quantized_unet_decides_the_dtype(sample: Sample, tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    whole = sample("sd1", dtype="fp16")
    own = {
        k.removeprefix(prefix): v.astype(np.float32)
        for k, v in load_file(whole).items()
        if k.startswith(prefix)
    }
    file = gguf_files.write(tmp_path / "unet.gguf", cycled(own, ["Q8_0"], reshaped=True), "sd1")
    model = open_model(file, Options.of({"vae": whole, "text_encoder": whole}))
    assert model.dtype == "bf16"
    assert any("the unet decides that all weights are loaded as bf16" in n for n in model.notes)


@pytest.mark.slow
def test_storage_in_fp8_takes_the_values(
    original: Path, donors: Mapping[str, Any], tmp_path: Path
) -> None:
    file, _ = quantized(original, tmp_path / "model.gguf", "Q4_0")
    pipe = load_pipeline(file, device="cpu", storage="fp8", **donors)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert (type(layer), layer.weight.dtype) == (torch.nn.Linear, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", ["Q4_0", "TQ2_0"])
def test_the_memory_of_what_is_kept_is_that_of_its_blocks(
    dtype: str, original: Path, donors: Mapping[str, Any], tmp_path: Path
) -> None:
    file, _ = quantized(original, tmp_path / "model.gguf", dtype)
    job = job_of(open_model(file, Options.of(donors)), (512, 512), "cuda")
    size = job.sizes["transformer"]
    assert (size.loaded < 0.8 * size.numbers) == (dtype in KEPT)
    assert (size.loaded >= 2 * size.numbers) == (dtype not in KEPT)
    assert job.sizes["text_encoder_2"].loaded >= 2 * job.sizes["text_encoder_2"].numbers
