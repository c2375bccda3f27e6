"""Stable Diffusion XL and the relatives that are sampled as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import save_file

import ckptconv
from tests.support.markers import (
    BUFFER,
    EULER,
    PLAIN,
    RESCALED,
    ZERO,
    V,
    built_from,
    check_v_prediction,
)
from tests.support.properties import PipelineProperties, PublishedConfigurations
from tests.support.reference import unet
from tests.support.reference.files import numbered, whole
from tests.support.relatives import NOTHING, Relative

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.checkpoints import Raw

SHALLOW = unet.SHALLOW_SDXL


class TestProperties(PipelineProperties):
    relatives = (
        Relative(
            "Stable Diffusion XL",
            whole("sdxl", unet.TINY_SDXL),
            # Depths are measured, not looked up: the published ones are 2 and 10.
            configs={"unet.transformer_layers_per_block": [1, 1, 3]},
        ),
        Relative("SDXL inpainting", whole("sdxl", replace(SHALLOW, in_channels=9)), slow=True),
        Relative("SDXL InstructPix2Pix", whole("sdxl", replace(SHALLOW, in_channels=8)), slow=True),
        Relative(
            "SDXL v-prediction, zero terminal SNR",
            whole("sdxl", SHALLOW),
            {"v_pred": NOTHING, "ztsnr": NOTHING},
            {
                "scheduler.prediction_type": "v_prediction",
                "scheduler.rescale_betas_zero_snr": True,
            },
            slow=True,
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("sdxl",)


@pytest.mark.parametrize(
    ("markers", "expected"),
    [(V, EULER | PLAIN), (ZERO, EULER | RESCALED), (BUFFER, EULER | RESCALED)],
)
def test_v_prediction_and_zero_terminal_snr_set_the_whole_schedule(
    markers: Raw, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    check_v_prediction("sdxl", markers, expected, tmp_path)


def test_a_file_without_markers_is_sampled_as_published_and_nothing_is_assumed_of_it(
    tmp_path: Path,
) -> None:
    detection, built, _ = built_from("sdxl", V, tmp_path)
    assert (detection.facts["sampler"].value, detection.facts["sampler"].source) == (
        "published",
        "structure",
    )
    assert built["scheduler"].values["_class_name"] == "EulerDiscreteScheduler"
    assert built["vae"].origins["scaling_factor"] == "constant"


@pytest.mark.parametrize("task", ["inpainting", "instruct-pix2pix"])
def test_the_other_tasks_of_sdxl_turn_back(task: str, tmp_path: Path) -> None:
    channels = {"inpainting": 9, "instruct-pix2pix": 8}[task]
    config = replace(unet.TINY_SDXL, in_channels=channels)
    path = tmp_path / f"{task}.safetensors"
    save_file(numbered(config), path)
    report = ckptconv.convert(path, tmp_path / "out")
    assert report.plan.detection.require()[1].name == task
    assert report.configs["unet"].values["in_channels"] == channels
    ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()
