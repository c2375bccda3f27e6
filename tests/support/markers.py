"""Files of published shapes whose only values are those of tensors that mark them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.configs.config import Config, configs, model_index
from ckptconv.detection.detect import Detection, detect
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from ckptconv.reading.header import read_header
from tests.support.checkpoints import Raw, Value, save

NOTHING = ("F32", (0,), b"")


def floats(*values: float, shape: tuple[int, ...] = (), letter: str = "f") -> Value:
    dtype = {"f": "F32", "e": "F16"}[letter]
    return dtype, shape or (len(values),), struct.pack(f"<{len(values)}{letter}", *values)


def built_from(
    architecture: str, markers: Raw, folder: Path, task: str = ""
) -> tuple[Detection, dict[str, Config], dict[str, Any]]:
    """Returns what such a file is detected as, its configurations and its model index."""
    layout = bundled().architectures[architecture].layout()
    marked = read_header(save(markers, folder / "markers.safetensors"))
    header = replace(
        layout,
        tensors={**layout.tensors, **marked.tensors},
        metadata={},
    )
    if task == "instruct-pix2pix":
        conv_in = "model.diffusion_model.input_blocks.0.0.weight"
        wider = replace(header.tensors[conv_in], shape=(320, 8, 3, 3))
        header = replace(header, tensors={**header.tensors, conv_in: wider})
    plan = build_plan(detect(header))
    plan.require_complete()
    built = configs(plan)
    return plan.detection, built, model_index(plan, built)


V: Raw = {"v_pred": NOTHING}
ZERO: Raw = {"v_pred": NOTHING, "ztsnr": NOTHING}
BUFFER: Raw = {"alphas_cumprod": floats(0.999, 0.5, 0.0)}
"""What marks a model that was trained with v-prediction, and with a zero terminal SNR."""

PNDM = {"_class_name": "PNDMScheduler"}  # which knows no zero SNR
DDIM = {"_class_name": "DDIMScheduler"}
EULER = {"_class_name": "EulerDiscreteScheduler"}
UNKNOWN = {"rescale_betas_zero_snr": None, "timestep_spacing": None}
PLAIN = {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
RESCALED = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def check_v_prediction(
    architecture: str, markers: Raw, expected: Mapping[str, Any], folder: Path
) -> None:
    """Checks the whole schedule of a model that was trained with v-prediction."""
    import diffusers

    _, built, _ = built_from(architecture, markers, folder)
    values = built["scheduler"].values
    expected = {**expected, "prediction_type": "v_prediction"}
    assert {entry: values.get(entry) for entry in expected} == expected
    scheduler = getattr(diffusers, expected["_class_name"]).from_config(values)
    scheduler.set_timesteps(10)
    last = float(scheduler.alphas_cumprod[-1])
    if values.get("rescale_betas_zero_snr"):
        assert last < 1e-6  # Euler keeps it just above zero: its sigma is a quotient
        assert int(scheduler.timesteps[0]) == 999
    else:
        assert last == pytest.approx(0.0047, abs=1e-4)
