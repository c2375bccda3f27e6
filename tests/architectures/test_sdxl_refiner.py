"""The refiner of Stable Diffusion XL."""

from __future__ import annotations

from tests.support.properties import Properties
from tests.support.reference import unet
from tests.support.reference.files import whole
from tests.support.relatives import Relative


class TestProperties(Properties):
    relatives = (Relative("SDXL refiner", whole("refiner", unet.TINY_REFINER)),)
    published = ("sdxl-refiner",)
