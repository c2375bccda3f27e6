"""Another scheduler and LoRA files, in a pipeline that is loaded."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ckptconv.errors import UsageError
from ckptconv.inference.adapt import find_scheduler, read_loras, set_scheduler
from ckptconv.inference.pipeline import load_pipeline
from tests.conftest import Sample
from tests.support.pipelines import SMALL, Run, parameters, pixels, runner


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path)


def test_the_scheduler_keeps_its_configuration(sample: Sample) -> None:
    pipe = load_pipeline(sample("sdxl"), device="cpu", prediction_type="v_prediction")
    before = pipe.scheduler.config
    assert set_scheduler(pipe, *find_scheduler("DPMSolverMultistepScheduler")) == []
    kept = ("prediction_type", "beta_start", "beta_end", "beta_schedule", "timestep_spacing")
    assert {key: pipe.scheduler.config[key] for key in kept} == {key: before[key] for key in kept}
    assert before["prediction_type"] == "v_prediction"
    assert find_scheduler("LCMScheduler")[0].__name__ == "LCMScheduler"


@pytest.mark.parametrize(
    ("name", "cls", "settings"),
    [  # as in the table of diffusers' documentation
        ("DPM++ 2M", "DPMSolverMultistep", {"algorithm_type": "dpmsolver++"}),
        ("DPM++ 2M Karras", "DPMSolverMultistep", {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        (
            "dpm++ 2m sde  karras",
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        ),
        ("DPM++ SDE", "DPMSolverSinglestep", {"use_karras_sigmas": False}),
        ("DPM++ SDE Karras", "DPMSolverSinglestep", {"use_karras_sigmas": True}),
        ("DPM2", "KDPM2Discrete", {"use_karras_sigmas": False}),
        ("DPM2 Karras", "KDPM2Discrete", {"use_karras_sigmas": True}),
        ("DPM2 a", "KDPM2AncestralDiscrete", {"use_karras_sigmas": False}),
        ("DPM2 a Karras", "KDPM2AncestralDiscrete", {"use_karras_sigmas": True}),
        ("Euler", "EulerDiscrete", {"use_karras_sigmas": False}),
        ("Euler Exponential", "EulerDiscrete", {"use_exponential_sigmas": True}),
        ("Euler SGM Uniform", "EulerDiscrete", {"timestep_spacing": "trailing"}),
        ("EULER A", "EulerAncestralDiscrete", {}),
        ("Heun", "HeunDiscrete", {}),
        ("DDIM", "DDIM", {}),
        ("PLMS", "PNDM", {"skip_prk_steps": True}),
        ("UniPC", "UniPCMultistep", {}),
        ("LCM", "LCM", {}),
    ],
)
def test_the_samplers_of_web_uis(name: str, cls: str, settings: dict[str, Any]) -> None:
    karras = find_scheduler("EulerDiscreteScheduler")[0](use_karras_sigmas=True, beta_end=0.012)
    pipe = SimpleNamespace(scheduler=karras)
    assert set_scheduler(pipe, *find_scheduler(name)) == []
    made: Any = pipe.scheduler
    assert type(made).__name__ == f"{cls}Scheduler"
    assert {key: made.config[key] for key in settings} == settings
    assert made.config.beta_end == 0.012


@pytest.mark.parametrize("name", ["LMS", "LMS Karras", "DPM++ 2M Beta"])
def test_a_sampler_that_needs_scipy(name: str) -> None:
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config={}))
    if importlib.util.find_spec("scipy"):
        assert set_scheduler(pipe, *find_scheduler(name)) == []
        return
    with pytest.raises(UsageError, match="scipy"):
        set_scheduler(pipe, *find_scheduler(name))


def test_a_sampler_that_has_no_such_schedule() -> None:
    with pytest.raises(UsageError, match="Euler a Karras: EulerAncestralDiscreteScheduler does"):
        find_scheduler("Euler a Karras")


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("DPM++ 2M Karas", "diffusers has no scheduler DPM", "did you mean DPM++ 2M Karras,"),
        ("UNet2DConditionModel", "no scheduler UNet2DConditionModel", "it has DDIM, DDPM, DEIS"),
        ("FlowMatchEulerDiscreteScheduler", "for these models", "it has DDIM, DDPM, DEIS"),
    ],
)
def test_an_unknown_scheduler(name: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_scheduler(name)
    assert hint in caught.value.hint


def test_a_scheduler_that_lacks_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class Lacking:
        _backends = ("torch", "torchsde")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Lacking, raising=False)
    with pytest.raises(UsageError, match="needs torchsde") as caught:
        find_scheduler("DPMSolverSDEScheduler")
    assert caught.value.hint == "pip install torchsde"


def kohya(unet: torch.nn.Module, encoder: bool) -> dict[str, torch.Tensor]:
    """Returns a LoRA as the kohya trainer names it, for the attention of a UNet."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        f"lora_unet_{name.replace('.', '_')}": (module.in_features, module.out_features)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "out.0"))
    }
    if encoder:
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        prefix = "lora_te_text_model_encoder_layers_0_self_attn_"
        shapes |= {f"{prefix}{name}": (64, 64) for name in names}
    state = {}
    for name, (before, after) in shapes.items():
        state[f"{name}.lora_down.weight"] = torch.randn(2, before, generator=generator)
        state[f"{name}.lora_up.weight"] = torch.randn(after, 2, generator=generator) / 4
        state[f"{name}.alpha"] = torch.tensor(2.0)
    return state


@pytest.mark.slow
def test_loras_of_kohya_apply_with_their_scale(sample: Sample, run: Run, tmp_path: Path) -> None:
    whole, unet = tmp_path / "whole.safetensors", tmp_path / "unet.safetensors"
    for path in (whole, unet):
        lora = kohya(load_pipeline(sample("sd1"), device="cpu").unet, encoder=path == whole)
        save_file(lora, path)
    asked = {
        "none": [],
        "whole": [f"{whole}"],
        "unet": [f"{unet}"],
        "half": [f"{whole}:0.5"],
        "quarters": [f"{whole}:0.25", f"{whole}:0.25"],
    }
    made = {}
    for name, loras in asked.items():
        out = tmp_path / f"{name}.png"
        result = run(sample("sd1"), *SMALL, *(f"--lora={lora}" for lora in loras), out=out.name)
        assert result.stderr.splitlines()[1:] == [f"{out}: seed 7"]
        made[name] = pixels(out)
    assert (
        parameters(tmp_path / "quarters.png")["loras"] == [{"file": whole.name, "scale": 0.25}] * 2
    )
    assert np.abs(made["quarters"] - made["half"]).max() <= 1
    for one, other in itertools.combinations(["none", "whole", "unet", "half"], 2):
        assert np.abs(made[one] - made[other]).mean() > 0.5, (one, other)


@pytest.mark.slow
def test_a_lora_that_does_not_fit_is_refused(sample: Sample, run: Run, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    save_file(kohya(load_pipeline(sample("sd1"), device="cpu").unet, encoder=False), lora)
    result = run(sample("sdxl"), *SMALL, "--lora", lora, code=3)
    assert "diffusers cannot load it as a LoRA of StableDiffusionXLPipeline" in result.stderr
    assert "size mismatch" in result.stderr
    save_file({"lora_unet_nowhere.alpha": torch.tensor(1.0)}, lora)
    assert "cannot load it as a LoRA" in run(sample("sd1"), *SMALL, "--lora", lora, code=3).stderr
    result = run(sample("sd1"), *SMALL, "--lora", sample("sd1"), code=3)
    assert "cannot load it as a LoRA" in result.stderr
    assert "no such file" in run(sample("sd1"), "--lora", "nowhere", code=3).stderr.lower()


def test_how_the_scale_of_a_lora_is_written(tmp_path: Path) -> None:
    odd = tmp_path / "a:b.safetensors"
    save_file({"x": torch.ones(1)}, odd)
    found = read_loras([f"{odd}:-0.5", str(odd)])
    assert [(lora.path, lora.scale) for lora in found] == [(odd, -0.5), (odd, 1.0)]


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(scale: str, sample: Sample, run: Run) -> None:
    result = run(sample("sd1"), "--lora", f"{sample('sd1')}:{scale}", code=2)
    assert f"the scale is {scale}" in result.stderr
