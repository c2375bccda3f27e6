"""VAEs and text encoders that stand alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import transformers
from safetensors.torch import save_file

import ckptconv
from ckptconv.errors import FileRefused
from tests.support.properties import Convert, Properties
from tests.support.reference import text, vae
from tests.support.reference.files import CLIP, OPENCLIP, VAE, VAE_16
from tests.support.relatives import Relative

if TYPE_CHECKING:
    from pathlib import Path

FIRST = "first_stage_model."
SCALE = {"vae.scaling_factor": 0.18215}
SHIFTED = {"vae.scaling_factor": 0.3611, "vae.shift_factor": 0.1159, "vae.latent_channels": 16}
LINEAR = partial(vae.Vae, vae.TINY_VAE_LINEAR)
FLAT_TOP = partial(vae.Vae, replace(vae.TINY_VAE, channel_mult=(1, 2, 2, 2)))
STEEP = partial(vae.Vae, replace(vae.TINY_VAE, channels=32, channel_mult=(1, 2, 4, 8)))
LONE_VAE = Relative("VAE", {"": VAE}, configs=SCALE)
LONE_CLIP = Relative("CLIP text encoder", {"": CLIP})
LONE_OPENCLIP = Relative("OpenCLIP text encoder", {"": OPENCLIP})
PROJECTED = Relative(
    "CLIP text encoder",
    {"": partial(text.ClipTextWithProjection, text.TINY_CLIP)},
    variant="with projection",
    task="text encoder with projection",
)


class TestProperties(Properties):
    relatives = (
        LONE_VAE,
        Relative("VAE", {FIRST: VAE}, configs=SCALE, variant="under the prefix of checkpoints"),
        Relative("VAE", {FIRST: LINEAR}, configs=SCALE, variant="with linear attention"),
        Relative("VAE", {"": FLAT_TOP}, configs=SCALE, variant="1, 2, 2, 2 wide"),
        Relative("VAE", {"": STEEP}, configs=SCALE, variant="1, 2, 4, 8 wide", slow=True),
        Relative("VAE of FLUX.1 or SD3", {"": VAE_16}, configs=SHIFTED),
        Relative(
            "VAE of FLUX.1 or SD3",
            {FIRST: VAE_16},
            configs=SHIFTED,
            variant="under the prefix of checkpoints",
            slow=True,
        ),
        LONE_CLIP,
        PROJECTED,
        LONE_OPENCLIP,
    )


def test_the_folder_of_a_vae_is_that_of_diffusers(converted: Convert) -> None:
    assert sorted(path.name for path in converted(LONE_VAE).folder.iterdir()) == [
        "ckptconv",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("relative", "pad"),
    [(LONE_CLIP, "<|endoftext|>"), (PROJECTED, "<|endoftext|>"), (LONE_OPENCLIP, "!")],
    ids=str,
)
def test_the_tokenizer_of_a_text_encoder_pads_as_in_training(
    relative: Relative, pad: str, converted: Convert
) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(converted(relative).folder)
    assert tokenizer.pad_token == pad


def test_a_component_alone_is_no_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    save_file(LONE_VAE.tensors(), file)
    with pytest.raises(FileRefused, match="is no pipeline"):
        ckptconv.load_pipeline(file)
