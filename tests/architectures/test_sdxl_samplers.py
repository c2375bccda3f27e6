"""Relatives of SDXL that are sampled otherwise: Playground v2.5 and CosXL.

What is expected is written down from playgroundai/playground-v2.5-1024px-aesthetic and from how
diffusers' documentation sets CosXL up, not from the key maps.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import ckptconv
from ckptconv.detection.facts import FEW
from ckptconv.inference.generation import Settings, call_arguments, generate
from ckptconv.inference.pipeline import load_pipeline
from tests.support.checkpoints import Raw, Value, raw, save
from tests.support.markers import NOTHING, V, built_from, floats
from tests.support.properties import PipelineProperties
from tests.support.reference import unet
from tests.support.reference.files import whole
from tests.support.relatives import Relative

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Sample

MEAN = [-1.6574, 1.886, -1.383, 2.5155]
STD = [8.4927, 5.9022, 6.5498, 5.2299]
PLAYGROUND_SCHEDULER = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sample_max_value": 1.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
COSXL_SCHEDULER = {
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rho": 7.0,
    "sigma_data": 1.0,
    "sigma_max": 120.0,
    "sigma_min": 0.002,
    "sigma_schedule": "exponential",
}

MEAN_KEY = {"edm_mean": floats(*MEAN, shape=(1, 4, 1, 1))}
PLAYGROUND = {**MEAN_KEY, "edm_std": floats(*STD)}
COSXL = {"edm_vpred.sigma_max": ("F32", (), floats(120)[2]), "edm_vpred.sigma_min": floats(0.002)}


SHALLOW = whole("sdxl", unet.SHALLOW_SDXL)
EDIT = whole("sdxl", replace(unet.SHALLOW_SDXL, in_channels=8))
LATENTS = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([0.9, 1.1, 1.2, 0.8])
SIGMAS = {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.002)}


class TestProperties(PipelineProperties):
    relatives = (
        Relative(
            "Playground v2.5",
            SHALLOW,
            {"edm_mean": LATENTS[0], "edm_std": LATENTS[1]},
            {
                "vae.latents_mean": pytest.approx(LATENTS[0].tolist()),
                "vae.latents_std": pytest.approx(LATENTS[1].tolist()),
                "scheduler._class_name": "EDMDPMSolverMultistepScheduler",
            },
            slow=True,
        ),
        Relative(
            "CosXL",
            SHALLOW,
            SIGMAS,
            {
                "scheduler._class_name": "EDMEulerScheduler",
                "scheduler.prediction_type": "v_prediction",
            },
            slow=True,
        ),
        Relative("CosXL-edit", EDIT, SIGMAS, slow=True),
    )


@pytest.mark.parametrize("architecture", ["sdxl", "koala-1b"])
@pytest.mark.parametrize(
    ("markers", "scheduler", "vae"),
    [
        (PLAYGROUND, PLAYGROUND_SCHEDULER, {"scaling_factor": 0.5, "latents_mean": MEAN}),
        (COSXL, COSXL_SCHEDULER, {"scaling_factor": 0.13025}),
        (  # another range than the published one, and marks that other tools add
            COSXL | {"edm_vpred.sigma_max": floats(80), "v_pred": NOTHING, "ztsnr": NOTHING},
            COSXL_SCHEDULER | {"sigma_max": 80.0},
            {"scaling_factor": 0.13025},
        ),
    ],
    ids=["playground", "cosxl", "cosxl, other range"],
)
def test_a_marker_decides_the_sampler_and_its_values_are_read(
    architecture: str,
    markers: Raw,
    scheduler: dict[str, Any],
    vae: dict[str, Any],
    tmp_path: Path,
) -> None:
    detection, built, index = built_from(architecture, markers, tmp_path)
    assert built["scheduler"].values == scheduler
    assert vae.items() <= built["vae"].values.items()
    assert ("latents_std" in built["vae"].values) == ("latents_mean" in vae)
    assert built["vae"].values["force_upcast"] is True
    assert "assumed" not in {*built["vae"].origins.values(), *built["scheduler"].origins.values()}
    assert {fact.source for fact in detection.facts.values()} == {"marker", "structure"}
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert "is_cosxl_edit" not in index


@pytest.mark.parametrize(("markers", "value"), [(COSXL, True), (PLAYGROUND, None), (V, None)])
def test_only_cosxl_edit_scales_the_latents_of_the_image(
    markers: Raw, value: bool | None, tmp_path: Path
) -> None:
    _, _, index = built_from("sdxl", markers, tmp_path, "instruct-pix2pix")
    assert index["_class_name"] == "StableDiffusionXLInstructPix2PixPipeline"
    assert index.get("is_cosxl_edit") is value


@pytest.mark.parametrize(
    "damaged",
    [
        floats(1, math.nan, 1, 1),
        floats(1, 1, 1),
        floats(*[1.0] * FEW * 2),
        ("I64", (4,), bytes(32)),
    ],
    ids=["not a number", "too few", "too many", "integers"],
)
def test_a_damaged_marker_is_replaced_by_the_published_values_and_that_is_said(
    damaged: Value, tmp_path: Path
) -> None:
    _, built, _ = built_from("sdxl", PLAYGROUND | {"edm_std": damaged}, tmp_path)
    vae = built["vae"]
    assert (vae.values["latents_std"], vae.origins["latents_std"]) == (STD, "assumed")
    assert (vae.values["latents_mean"], vae.origins["latents_mean"]) == (MEAN, "measured")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "markers", "scheduler", "vae"),
    [
        ("text-to-image", PLAYGROUND, PLAYGROUND_SCHEDULER, STD),
        ("instruct-pix2pix", COSXL | {"ztsnr": NOTHING}, COSXL_SCHEDULER, None),
    ],
    ids=["playground", "cosxl-edit"],
)
def test_a_marked_file_goes_all_the_way(
    task: str,
    markers: Raw,
    scheduler: dict[str, Any],
    vae: list[float] | None,
    sample: Sample,
    tmp_path: Path,
) -> None:
    tensors = raw(sample("sdxl", task=task, dtype="fp16")) | markers
    source, out, back = (tmp_path / name for name in ("file.safetensors", "out", "back"))
    save(tensors, source)
    ckptconv.convert(source, out)
    edits = True if task == "instruct-pix2pix" else None
    assert json.loads((out / "model_index.json").read_text()).get("is_cosxl_edit") is edits
    assert json.loads((out / "vae" / "config.json").read_text()).get("latents_std") == vae
    found = ckptconv.verify(None if vae else source, out)
    assert found.passed, found
    assert ckptconv.export(out, back).lost == {}
    assert raw(back) == tensors

    pipe = load_pipeline(source, dtype="fp32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    own = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
    assert {entry: own[entry] for entry in scheduler} == scheduler
    assert pipe.vae.config.latents_std == vae
    assert getattr(pipe, "is_cosxl_edit", None) is edits
    arguments = call_arguments(
        pipe,
        Settings("a cat", steps=2, size=(64, 64)),
        {"image": Image.new("RGB", (64, 64), "gray")} if edits else {},
    )
    assert np.asarray(generate(pipe, arguments, 7)).std() > 10
