"""Stable Diffusion 2; its depth-to-image, unCLIP and upscaler have files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.markers import DDIM, PLAIN, RESCALED, ZERO, V, check_v_prediction
from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference import unet
from tests.support.reference.files import whole
from tests.support.relatives import Relative

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Raw

SD2 = whole("sd2", unet.TINY_SD2)
FAT_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The tensor whose values spread more widely in the 768-v model."""
BASE = {FAT_BIAS: torch.linspace(-0.1, 0.1, 64)}
EPSILON = {"scheduler.prediction_type": "epsilon"}


class TestProperties(PipelineProperties):
    relatives = (
        Relative(
            "Stable Diffusion 2.x (768-v)",
            SD2,
            {FAT_BIAS: torch.linspace(-1, 1, 64)},
            {"scheduler.prediction_type": "v_prediction"},
        ),
        Relative("Stable Diffusion 2.x base", SD2, BASE, EPSILON, slow=True),
        Relative(
            "Stable Diffusion 2.x base",
            whole("sd2", replace(unet.TINY_SD2, in_channels=8)),
            BASE,
            variant="trained to edit",
            task="instruct-pix2pix",
            slow=True,
        ),
        Relative("SD2 inpainting", whole("sd2", replace(unet.TINY_SD2, in_channels=9)), slow=True),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("sd21", "sd21-base")


@pytest.mark.parametrize(("markers", "expected"), [(V, DDIM | PLAIN), (ZERO, DDIM | RESCALED)])
def test_v_prediction_and_zero_terminal_snr_set_the_whole_schedule(
    markers: Raw, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    check_v_prediction("sd2", markers, expected, tmp_path)
