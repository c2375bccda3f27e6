"""Segmind SSD-1B and Segmind Vega: SDXL with fewer transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.markers import EULER, PLAIN, RESCALED, ZERO, V, check_v_prediction
from tests.support.properties import PipelineProperties
from tests.support.reference import unet
from tests.support.reference.files import unet_alone, whole
from tests.support.relatives import Relative

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Raw

SSD1B = unet.TINY_SSD1B
VEGA = replace(
    SSD1B,
    input_depth=((0, 0), (1, 1), (2, 2)),
    output_depth=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
)
ONE_RESNET = {"unet.mid_block_type": "UNetMidBlock2D"}


class TestProperties(PipelineProperties):
    relatives = (
        Relative("Segmind SSD-1B", whole("sdxl", SSD1B), slow=True),
        Relative("Segmind SSD-1B", unet_alone(SSD1B), variant="UNet alone"),
        Relative("Segmind Vega", whole("sdxl", VEGA), configs=ONE_RESNET, slow=True),
        Relative("Segmind Vega", unet_alone(VEGA), configs=ONE_RESNET, variant="UNet alone"),
    )


@pytest.mark.parametrize(("markers", "expected"), [(V, EULER | PLAIN), (ZERO, EULER | RESCALED)])
def test_v_prediction_and_zero_terminal_snr_set_the_whole_schedule(
    markers: Raw, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    check_v_prediction("ssd-1b", markers, expected, tmp_path)
