"""Relatives of SDXL that are sampled otherwise: Playground v2.5, CosXL, v-prediction, and hints.

What is expected is written down from playgroundai/playground-v2.5-1024px-aesthetic and from how
diffusers' documentation sets CosXL up, not from the key maps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import ckptconv
from ckptconv.configs.config import Config, configs, model_index
from ckptconv.detection.detect import Detection, detect
from ckptconv.detection.facts import FEW, Fact, find_fact, values_of
from ckptconv.inference.generation import Settings, call_arguments, generate
from ckptconv.inference.pipeline import load_pipeline
from ckptconv.maps.architecture import bundled
from ckptconv.maps.evidence import Witness
from ckptconv.maps.schema import Fault, read
from ckptconv.planning.plan import build_plan
from ckptconv.reading.header import read_header
from tests.conftest import made, shapes
from tests.support.checkpoints import Raw, Value, raw, save

if TYPE_CHECKING:
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


NOTHING = ("F32", (0,), b"")


def floats(*values: float, shape: tuple[int, ...] = (), letter: str = "f") -> Value:
    dtype = {"f": "F32", "e": "F16"}[letter]
    return dtype, shape or (len(values),), struct.pack(f"<{len(values)}{letter}", *values)


MEAN_KEY = {"edm_mean": floats(*MEAN, shape=(1, 4, 1, 1))}
PLAYGROUND = {**MEAN_KEY, "edm_std": floats(*STD)}
COSXL = {"edm_vpred.sigma_max": ("F32", (), floats(120)[2]), "edm_vpred.sigma_min": floats(0.002)}


def built_from(
    architecture: str, markers: Raw, folder: Path, task: str = ""
) -> tuple[Detection, dict[str, Config], dict[str, Any]]:
    """Returns what a file of published shapes says whose only values are those of the markers."""
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


def one_fact(name: str, witnesses: tuple[Witness, ...]) -> Fact:
    return find_fact(name, witnesses, made({}), "text-to-image")


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


@pytest.mark.parametrize(
    ("markers", "value"), [(COSXL, True), (PLAYGROUND, None), ({"v_pred": NOTHING}, None)]
)
def test_only_cosxl_edit_scales_the_latents_of_the_image(
    markers: Raw, value: bool | None, tmp_path: Path
) -> None:
    _, _, index = built_from("sdxl", markers, tmp_path, "instruct-pix2pix")
    assert index["_class_name"] == "StableDiffusionXLInstructPix2PixPipeline"
    assert index.get("is_cosxl_edit") is value


def test_a_file_without_markers_is_sampled_as_published_and_nothing_is_assumed_of_it(
    tmp_path: Path,
) -> None:
    detection, built, _ = built_from("sdxl", {"v_pred": NOTHING}, tmp_path)
    assert (detection.facts["sampler"].value, detection.facts["sampler"].source) == (
        "published",
        "structure",
    )
    assert built["scheduler"].values["_class_name"] == "EulerDiscreteScheduler"
    assert built["vae"].origins["scaling_factor"] == "constant"


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


def test_values_keep_every_bit(tmp_path: Path) -> None:
    header = read_header(
        save(
            {
                "half": floats(*MEAN, letter="e"),
                "single": floats(0.1, 1 / 3, 3.4028234663852886e38, 1e-45, -0.0, 122.878044),
            },
            tmp_path / "f.safetensors",
        )
    )
    assert values_of(header, "half") == [-1.6572265625, 1.8857421875, -1.3828125, 2.515625]
    assert values_of(header, "single")[:2] == [0.1, 0.33333334]
    again = struct.pack("<6f", *values_of(header, "single"))
    assert again == floats(0.1, 1 / 3, 3.4028234663852886e38, 1e-45, -0.0, 122.878044)[2]
    assert values_of(header, "missing") == []


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


# The schedules of models that are trained with v-prediction, by what the file holds. Expected: the
# class, prediction_type, rescale_betas_zero_snr and timestep_spacing. PNDM knows no zero SNR.

V: Raw = {"v_pred": NOTHING}
ZERO: Raw = {"v_pred": NOTHING, "ztsnr": NOTHING}
BUFFER: Raw = {"alphas_cumprod": floats(0.999, 0.5, 0.0)}


@pytest.mark.parametrize(
    ("architecture", "markers", "expected"),
    [
        ("sd1", V, ("PNDMScheduler", "v_prediction", None, None)),
        ("sd1", ZERO, ("DDIMScheduler", "v_prediction", True, "trailing")),
        ("sd1", BUFFER, ("DDIMScheduler", "v_prediction", True, "trailing")),
        ("sd2", V, ("DDIMScheduler", "v_prediction", False, "leading")),
        ("sd2", ZERO, ("DDIMScheduler", "v_prediction", True, "trailing")),
        ("sdxl", V, ("EulerDiscreteScheduler", "v_prediction", False, "leading")),
        ("sdxl", ZERO, ("EulerDiscreteScheduler", "v_prediction", True, "trailing")),
        ("sdxl", BUFFER, ("EulerDiscreteScheduler", "v_prediction", True, "trailing")),
        ("ssd-1b", V, ("EulerDiscreteScheduler", "v_prediction", False, "leading")),
        ("ssd-1b", ZERO, ("EulerDiscreteScheduler", "v_prediction", True, "trailing")),
    ],
)
def test_v_prediction_and_zero_terminal_snr_set_the_whole_schedule(
    architecture: str, markers: Raw, expected: tuple[Any, ...], tmp_path: Path
) -> None:
    import diffusers

    _, built, _ = built_from(architecture, markers, tmp_path)
    values = built["scheduler"].values
    entries = ("_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    assert tuple(values.get(entry) for entry in entries) == expected
    scheduler = getattr(diffusers, expected[0]).from_config(values)
    scheduler.set_timesteps(10)
    last = float(scheduler.alphas_cumprod[-1])
    if values.get("rescale_betas_zero_snr"):
        assert last < 1e-6  # Euler keeps it just above zero: its sigma is a quotient
        assert int(scheduler.timesteps[0]) == 999
    else:
        assert last == pytest.approx(0.0047, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "metadata", "said"),
    [
        ("sd_xl_turbo_1.0_fp16", {}, "says 'turbo': a Turbo model"),
        ("dreamshaperXL_v21TurboDPMSDE", {}, "says 'turbo': a Turbo model"),
        ("juggernautXL_v9Rdphoto2Lightning", {}, "says 'lightning': a Lightning model"),
        ("sdxl_lightning_4step", {}, "says 'lightning': a Lightning model"),
        ("dreamshaper_8LCM", {}, "says 'lcm': a latent consistency model"),
        ("Hyper-SDXL-1step-Unet", {}, "says 'hyper sdxl': a Hyper-SD model"),
        ("photonHyperSD15", {}, "says 'hyper sd': a Hyper-SD model"),
        ("model", {"modelspec.title": "Some XL (Turbo)"}, "the metadata modelspec.title says 'tur"),
        ("turbovisionxl", {}, ""),
        ("hyperrealism_hyper_realistic_v2", {}, ""),
        ("enlightningLCMed", {}, ""),
        ("model", {"modelspec.description": "works with the LCM sampler"}, ""),
    ],
)
def test_names_hint_at_a_distilled_model_word_by_word(
    name: str, metadata: dict[str, str], said: str
) -> None:
    layout = bundled().architectures["sdxl"].layout()
    header = replace(layout, path=Path(f"{name}.safetensors"), metadata=metadata)
    notes = detect(header).notes
    assert len(notes) == bool(said)
    assert all(said in note and "Scheduler" in note for note in notes)


def test_a_guidance_input_hints_at_a_latent_consistency_model() -> None:
    cond_proj = {"model.diffusion_model.time_embed.cond_proj.weight": (320, 256)}
    (note,) = detect(made(shapes(bundled().architectures["sdxl"].layout()) | cond_proj)).notes
    assert note.startswith(f"the file holds the key {next(iter(cond_proj))}: the UNet takes the gu")


def test_facts_that_contradict_each_other_are_reported() -> None:
    layout = bundled().architectures["sdxl"].layout()
    assert layout.metadata["modelspec.prediction_type"] == "epsilon"
    (note,) = detect(
        replace(made(shapes(layout) | {"ztsnr": (0,)}), metadata=layout.metadata)
    ).notes
    assert note.startswith("prediction_type is epsilon and zero_terminal_snr is True: these contra")


def test_a_default_answers_always_and_needs_a_reason() -> None:
    faults: list[Fault] = []
    data = [{"has": "a", "value": 1}, {"value": 2, "because": "so"}]
    assert one_fact("f", read(tuple[Witness, ...], data, (), faults)) == Fact(
        "f", 2, "structure", "so"
    )
    assert not faults
    read(tuple[Witness, ...], [{"value": 2}], (), faults)
    assert list(map(str, faults)) == ["[0]: 'because' is missing"]
