"""KOALA: SDXL with one resnet a level, and in the small one no middle."""

from __future__ import annotations

from dataclasses import replace

from tests.support.properties import PipelineProperties
from tests.support.reference import unet
from tests.support.reference.files import unet_alone, whole
from tests.support.relatives import Relative

SMALL = unet.TINY_KOALA
LARGE = replace(SMALL, has_middle=True, middle_depth=SMALL.input_depth[-1][0])
NO_MIDDLE = {"unet.mid_block_type": None}


class TestProperties(PipelineProperties):
    relatives = (
        Relative("KOALA-700M", whole("sdxl", SMALL), configs=NO_MIDDLE, slow=True),
        Relative("KOALA-700M", unet_alone(SMALL), configs=NO_MIDDLE, variant="UNet alone"),
        Relative("KOALA-1B", whole("sdxl", LARGE), slow=True),
        Relative("KOALA-1B", unet_alone(LARGE), variant="UNet alone"),
    )
