"""Stable Diffusion 1 and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import diffusers
import pytest

import ckptconv
from tests.support.markers import BUFFER, DDIM, PNDM, RESCALED, UNKNOWN, ZERO, V, check_v_prediction
from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference import controlnet, unet
from tests.support.reference.files import unet_alone, whole
from tests.support.relatives import NOTHING, Relative, assert_equal, round_trip

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Sample
    from tests.support.checkpoints import Raw

SD1 = whole("sd1", unet.TINY_SD1)
CONTROLNET = {"control_model.": partial(controlnet.ControlNet, controlnet.TINY_CONTROL_SD1)}
INPAINTING = "SD1 inpainting"
DISTILLED = "SD1 distilled with guidance (LCM)"
GUIDED = {"unet.time_cond_proj_dim": 256}


class TestProperties(PipelineProperties):
    relatives = (
        Relative("Stable Diffusion 1.x", SD1),
        Relative(INPAINTING, whole("sd1", unet.TINY_SD1_INPAINT), slow=True),
        Relative(INPAINTING, unet_alone(unet.TINY_SD1_INPAINT), variant="UNet alone"),
        Relative(
            "SD1 InstructPix2Pix", whole("sd1", replace(unet.TINY_SD1, in_channels=8)), slow=True
        ),
        Relative(DISTILLED, whole("sd1", unet.TINY_LCM), configs=GUIDED, slow=True),
        Relative(DISTILLED, unet_alone(unet.TINY_LCM), configs=GUIDED, variant="UNet alone"),
        Relative(
            "SD1 v-prediction",
            SD1,
            {"v_pred": NOTHING},
            {"scheduler.prediction_type": "v_prediction"},
            slow=True,
        ),
        Relative("SD1 with a ControlNet in it", SD1 | CONTROLNET, slow=True),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("sd15", "sd15-inpainting")


@pytest.mark.parametrize(
    ("markers", "expected"),
    [(V, PNDM | UNKNOWN), (ZERO, DDIM | RESCALED), (BUFFER, DDIM | RESCALED)],
)
def test_v_prediction_and_zero_terminal_snr_set_the_whole_schedule(
    markers: Raw, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    check_v_prediction("sd1", markers, expected, tmp_path)


@pytest.mark.slow
def test_a_controlnet_in_a_checkpoint_is_a_component_of_its_pipeline(
    sample: Sample, tmp_path: Path
) -> None:
    file = sample("sd1", task="controlnet")
    report = ckptconv.convert(file, tmp_path / "out")
    assert report.plan.detection.require()[1].pipeline == "StableDiffusionControlNetPipeline"
    assert not report.plan.unclaimed
    round_trip(file, tmp_path / "out")
    pipe = ckptconv.load_pipeline(file)
    cls: Any = diffusers.StableDiffusionControlNetPipeline
    stock = cls.from_pretrained(tmp_path / "out")
    assert_equal(dict(pipe.controlnet.state_dict()), dict(stock.controlnet.state_dict()))
