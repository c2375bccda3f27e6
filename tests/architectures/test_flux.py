"""FLUX.1 and what was made from it."""

from __future__ import annotations

from functools import partial

import torch

from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference import flux, t5
from tests.support.reference.files import all_in_one, transformer_alone
from tests.support.relatives import Relative

DEV = all_in_one(flux.TINY_DEV)
T5 = "text_encoders.t5xxl.transformer."
PROJECTION = "text_encoders.clip_l.transformer.text_projection.weight"
GUIDED = {"transformer.guidance_embeds": True, "scheduler.use_dynamic_shifting": True}
UNGUIDED = {"transformer.guidance_embeds": False, "scheduler.shift": 1.0}
HEADS = {"transformer.num_attention_heads": 3, "text_encoder_2.num_heads": 2}


class TestProperties(PipelineProperties):
    relatives = (
        Relative("FLUX.1 dev", DEV, {PROJECTION: torch.randn(128, 128).half()}, GUIDED),
        Relative(
            "FLUX.1 dev",
            transformer_alone(flux.TINY_DEV, ""),
            configs=GUIDED,
            variant="transformer alone",
        ),
        Relative(
            "FLUX.1 dev",
            all_in_one(flux.TINY_WIDE) | {T5: partial(t5.T5, t5.TINY_T5_TWICE)},
            configs=HEADS,
            variant="of other sizes, T5's embedding twice",
            slow=True,
        ),
        Relative("FLUX.1 schnell", all_in_one(flux.TINY_SCHNELL), configs=UNGUIDED, slow=True),
        Relative(
            "FLUX.1 schnell",
            transformer_alone(flux.TINY_SCHNELL),
            configs=UNGUIDED,
            variant="transformer alone",
        ),
        Relative("FLUX.1 Fill", all_in_one(flux.TINY_FILL), slow=True),
        Relative("FLUX.1 Fill", transformer_alone(flux.TINY_FILL), variant="transformer alone"),
        Relative("FLUX.1 Depth and Canny", all_in_one(flux.TINY_CONTROL), slow=True),
        Relative(
            "FLUX.1 Depth and Canny",
            transformer_alone(flux.TINY_CONTROL),
            variant="transformer alone",
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("flux-dev", "flux-schnell")
