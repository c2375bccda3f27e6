"""ControlNets that stand alone; one in a checkpoint is in `test_sd1.py`."""

from __future__ import annotations

from functools import partial

from tests.support.properties import Properties
from tests.support.reference import unet
from tests.support.reference.controlnet import ControlNet
from tests.support.reference.files import TINY_FILES
from tests.support.relatives import Relative

CONFIGS = {
    "controlnet-sd1": unet.TINY_SD1,
    "controlnet-sd2": unet.TINY_SD2,
    "controlnet-sdxl": unet.TINY_SDXL,
}


class TestProperties(Properties):
    relatives = tuple(
        relative
        for name, config in CONFIGS.items()
        for row in [f"ControlNet for {name.removeprefix('controlnet-').upper()}"]
        for relative in (
            Relative(row, TINY_FILES[name]),
            Relative(row, {"": partial(ControlNet, config)}, variant="without a prefix"),
        )
    )
