"""Chroma."""

from __future__ import annotations

from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference.files import all_in_one, transformer_alone
from tests.support.reference.flux import TINY_CHROMA
from tests.support.relatives import Relative

MEASURED = {
    "transformer.approximator_hidden_dim": 160,
    "transformer.approximator_layers": 2,
    "transformer.num_attention_heads": 2,
}


class TestProperties(PipelineProperties):
    relatives = (
        Relative("Chroma", all_in_one(TINY_CHROMA), configs=MEASURED),
        Relative(
            "Chroma",
            transformer_alone(TINY_CHROMA, ""),
            configs=MEASURED,
            variant="transformer alone",
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("chroma",)
