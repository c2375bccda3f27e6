"""Names, keys and metadata that hint at how a model is to be sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import ckptconv
from ckptconv.detection.detect import detect
from ckptconv.errors import on_the_command_line
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
        ("dmd2_sdxl_4step_unet_fp16", {}, "says 'dmd 2': a DMD2 model"),
        ("flash-sdxl", {}, "says 'flash sdxl': a Flash Diffusion model"),
        ("pcm_sdxl_smallcfg_2step", {}, "says 'pcm': a phased consistency model"),
        ("turbovisionxl", {}, ""),
        ("flash_photography", {}, ""),
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


@pytest.mark.parametrize("name", ["SDXL-Turbo-Lightning-LCM", "dmd2_lcm", "turbo"])
@pytest.mark.parametrize("key", [True, False])
def test_no_two_hints_contradict_each_other(name: str, key: bool) -> None:
    cond_proj = {"model.diffusion_model.time_embed.cond_proj.weight": (320, 256)} if key else {}
    header = made(shapes(bundled().architectures["sdxl"].layout()) | cond_proj)
    (note,) = detect(replace(header, path=Path(f"{name}.safetensors"))).notes
    assert note.startswith("the file holds the key") == key


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("noobaiXLNAIXL_vPred10Version", "says 'v pred'"),
        ("NoobAI-XL-Vpred-v1.0", "says 'vpred'"),
        ("model_v-pred", "says 'v pred'"),
        ("model-v-prediction", "says 'v prediction'"),
        ("model_zsnr", "says 'zsnr'"),
        ("model-ztsnr", "says 'ztsnr'"),
        ("sdxl_vpred_ztsnr", "says 'vpred'"),
        ("vprediction", "says 'vprediction'"),
        ("predictable", ""),
    ],
)
def test_a_name_hints_at_the_options_of_v_prediction(name: str, said: str) -> None:
    tensors = shapes(bundled().architectures["sdxl"].layout())
    header = replace(made(tensors), path=Path(f"{name}.safetensors"))
    found = detect(header)
    assert found.facts["prediction_type"].source == "assumed"
    assert len(found.notes) == bool(said)
    with on_the_command_line():
        spoken = detect(header).notes
    for notes, options in (
        (found.notes, ("prediction_type='v_prediction'", "zero_terminal_snr=True")),
        (spoken, ("--prediction-type v_prediction", "--zero-terminal-snr ")),
    ):
        for note in notes:
            assert said in note
            assert all(option in f"{note} " for option in options), note
    marked = tensors | {"v_pred": (0,), "ztsnr": (0,)}
    assert detect(replace(made(marked), path=header.path)).notes == ()


def test_a_yaml_of_the_same_name_is_hinted_at(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(small)
    beside = tmp_path / "model.yaml"
    for text, hinted in (("steps: 3", False), (V_YAML, True)):
        beside.write_text(text)
        for found in (ckptconv.inspect(file), ckptconv.plan(file).detection):
            said = [note for note in found.notes if "model.yaml" in note]
            assert (
                said
                == [
                    f"model.yaml lies beside the file and looks like its configuration: "
                    f"original_config={str(beside)!r} reads it"
                ]
                * hinted
            )
    found = ckptconv.plan(file, original_config=beside).detection
    assert found.facts["prediction_type"].value == "v_prediction"
    assert not any("lies beside" in note for note in found.notes)


V_YAML = "model: {params: {parameterization: v, unet_config: {params: {}}}}"
