"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptconv
from ckptconv.files import read_json
from ckptconv.inference.generation import Settings, with_defaults
from ckptconv.inference.model import open_model
from ckptconv.options import Options
from tests.support.properties import Convert, PipelineProperties, PublishedConfigurations
from tests.support.reference import z_image
from tests.support.reference.files import z_image_alone, z_image_whole
from tests.support.relatives import Relative, run, verified

ROW = "Z-Image and Z-Image-Turbo"
MEASURED = {
    "transformer.dim": 256,
    "transformer.in_channels": 16,
    "transformer.n_heads": 2,
    "transformer.n_layers": 2,
    "transformer.n_refiner_layers": 1,
    "scheduler.shift": 3.0,
}
ENCODER = {
    "text_encoder.head_dim": 128,
    "text_encoder.hidden_size": 32,
    "text_encoder.num_attention_heads": 4,
    "text_encoder.num_key_value_heads": 2,
    "text_encoder.rope_theta": 1000000,
}
TEXT = "text_encoders.qwen3_4b.transformer."
WHOLE = Relative(ROW, z_image_whole(z_image.TINY_Z_IMAGE), configs=MEASURED | ENCODER)
NAN = torch.full((256,), torch.nan).half()
HEAD = torch.zeros(151936, 32).half()
LEFTOVERS = Relative(
    ROW,
    z_image_whole(z_image.TINY_Z_IMAGE),
    {"model.diffusion_model.norm_final.weight": NAN, f"{TEXT}lm_head.weight": HEAD},
    MEASURED,
    variant="with leftovers",
    slow=True,
)


class TestProperties(PipelineProperties):
    relatives = (
        WHOLE,
        Relative(
            ROW,
            z_image_alone(z_image.TINY_Z_IMAGE, ""),
            configs=MEASURED,
            variant="transformer alone",
        ),
        Relative(
            ROW,
            z_image_alone(z_image.TINY_WIDE),
            configs={"transformer.n_heads": 3, "transformer.n_refiner_layers": 2},
            variant="of other sizes",
            slow=True,
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("z-image-turbo",)
