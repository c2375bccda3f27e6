"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import torch

from tests.support.properties import PipelineProperties
from tests.support.reference import mmdit
from tests.support.reference.files import sd3
from tests.support.relatives import Relative

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


class TestProperties(PipelineProperties):
    relatives = (
        Relative("Stable Diffusion 3 medium", sd3(mmdit.TINY_SD3, *ALL), configs=MEDIUM),
        Relative(
            "Stable Diffusion 3 medium",
            sd3(mmdit.TINY_SD3, *ALL[:2]),
            {PROJECTION: torch.randn(128, 128).half()},
            MEDIUM,
            variant="without T5, with a projection that it does not use",
        ),
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
