"""Names, keys and metadata that hint at how a model is to be sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckptconv.detection.detect import detect
from ckptconv.maps.architecture import bundled
from tests.conftest import made, shapes


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
