"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

import ckptconv
from ckptconv.inference.generation import Settings, with_defaults
from ckptconv.inference.model import open_model
from ckptconv.options import Options
from tests.support.properties import PipelineProperties
from tests.support.reference import mmdit
from tests.support.reference.files import sd3
from tests.support.relatives import Relative, run

ALL = ("clip_l", "clip_g", "t5xxl")
PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"
MEDIUM = {
    "transformer.dual_attention_layers": [],
    "transformer.num_attention_heads": 3,
    "transformer.pos_embed_max_size": 8,
    "transformer.qk_norm": None,
}
DUAL = {
    "transformer.dual_attention_layers": [0, 1],
    "transformer.pos_embed_max_size": 12,
    "transformer.qk_norm": "rms_norm",
}
LARGE = {"transformer.num_attention_heads": 4, "transformer.qk_norm": "rms_norm"}


WITHOUT_T5 = Relative(
    "Stable Diffusion 3 medium",
    sd3(mmdit.TINY_SD3, *ALL[:2]),
    {PROJECTION: torch.randn(128, 128).half()},
    MEDIUM,
    variant="without T5, with a projection that it does not use",
)


class TestProperties(PipelineProperties):
    relatives = (
        Relative("Stable Diffusion 3 medium", sd3(mmdit.TINY_SD3, *ALL), configs=MEDIUM),
        WITHOUT_T5,
        Relative(
            "Stable Diffusion 3.5 medium", sd3(mmdit.TINY_SD35, *ALL), configs=DUAL, slow=True
        ),
        Relative(
            "Stable Diffusion 3.5 medium",
            sd3(mmdit.TINY_SD35),
            configs=DUAL,
            variant="without text encoders",
        ),
        Relative(
            "Stable Diffusion 3.5 large", sd3(mmdit.TINY_LARGE, *ALL), configs=LARGE, slow=True
        ),
        Relative(
            "Stable Diffusion 3.5 large turbo",
            sd3(mmdit.TINY_LARGE, *ALL),
            configs=LARGE,
            slow=True,
            metadata={"modelspec.architecture": "stable-diffusion-3.5-large-turbo"},
        ),
    )


@pytest.mark.slow
def test_without_t5_the_call_that_is_printed_loads_the_folder_and_draws(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WITHOUT_T5.tensors(), file)
    lines = run("convert", file, tmp_path / "out").stderr.splitlines()
    call = lines[-1].removeprefix("load it with ")
    assert call.endswith(", text_encoder_3=None)")
    pipe = eval(call, {"DiffusionPipeline": DiffusionPipeline, "torch": torch})  # noqa: S307
    pipe.set_progress_bar_config(disable=True)
    made = pipe.to(torch.float32)("a fox", num_inference_steps=1, width=64, height=64)
    assert made.images[0].size == (64, 64)


@pytest.mark.parametrize(
    ("release", "steps", "guidance"), [(None, 28, 3.5), ("large", 28, 3.5), ("large-turbo", 4, 0)]
)
def test_the_turbo_is_told_by_an_option(
    release: str | None, steps: int, guidance: float, tmp_path: Path
) -> None:
    tensors = Relative("Stable Diffusion 3.5 large", sd3(mmdit.TINY_LARGE)).tensors()
    file = tmp_path / "sd3.5_large_turbo.safetensors"
    save_file({k: v for k, v in tensors.items() if k.startswith("model.")}, file)
    assert "release='large-turbo'" in "".join(ckptconv.inspect(file).notes)
    missing = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    model = open_model(file, Options(release=release), given=missing)
    assert model.facts["release"].value == (release or "large")
    settings = with_defaults(model, Settings("a fox"))
    assert (settings.steps, settings.guidance) == (steps, guidance)


@pytest.mark.parametrize(
    ("config", "steps", "guidance"),
    [(mmdit.TINY_SD3, 28, 7), (mmdit.TINY_SD35, 40, 4.5)],
)
def test_both_mediums_have_their_settings(
    config: mmdit.MmDitConfig, steps: int, guidance: float, tmp_path: Path
) -> None:
    tensors = Relative("Stable Diffusion 3", sd3(config)).tensors()
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if k.startswith("model.")}, file)
    missing = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    ckptconv.convert(file, tmp_path / "out")
    for place in (file, tmp_path / "out"):
        settings = with_defaults(open_model(place, Options(), given=missing), Settings("a fox"))
        assert (settings.steps, settings.guidance) == (steps, guidance)
