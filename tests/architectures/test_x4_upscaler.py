"""The x4 upscaler of Stable Diffusion 2."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from PIL import Image

from ckptconv.detection.detect import detect
from ckptconv.errors import UsageError
from ckptconv.inference.generation import Settings, check
from tests.support.pipelines import asked
from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.published_relatives import header
from tests.support.reference.files import TINY_FILES
from tests.support.relatives import Relative

UPSCALER: Any = diffusers.StableDiffusionUpscalePipeline


class TestProperties(PipelineProperties):
    relatives = (
        Relative(
            "SD2 x4 upscaler",
            TINY_FILES["x4-upscaler"],
            configs={
                "unet.only_cross_attention": [True, True, True, False],
                "scheduler.prediction_type": "v_prediction",
            },
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("x4-upscaler",)


def test_the_task_decides_the_prediction() -> None:
    assert detect(header("x4-upscaler")).facts["prediction_type"].source == "task"


def test_the_size_of_an_upscaled_image_is_that_of_the_result() -> None:
    photo, cls = Image.new("RGB", (33, 16)), UPSCALER
    assert asked(cls, photo)["image"].size == (32, 16)
    assert asked(cls, photo, size=(128, 64))["image"].size == (32, 16)
    settings = Settings("a cat", size=(72, 64), strength=0.5)
    with pytest.raises(UsageError) as caught:
        check(cls, "upscaling", settings)
    assert list(caught.value.problems) == [
        "strength does not fit: StableDiffusionUpscalePipeline takes none",
        "image is missing: upscaling needs it",
        "size does not divide by 32, as upscaling needs it",
    ]
