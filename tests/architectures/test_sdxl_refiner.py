"""The refiner of Stable Diffusion XL."""

from __future__ import annotations

from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference import unet
from tests.support.reference.files import whole
from tests.support.relatives import Relative


class TestProperties(PipelineProperties):
    relatives = (Relative("SDXL refiner", whole("refiner", unet.TINY_REFINER)),)


class TestConfigurations(PublishedConfigurations):
    published = ("sdxl-refiner",)
