"""The yaml that a model was trained with: it wins, and says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import ckptconv
from ckptconv.configs.config import Config, configs
from ckptconv.configs.original_config import OriginalConfig, ValuePath, read_original_config
from ckptconv.conversion.convert import plan
from ckptconv.detection.detect import detect
from ckptconv.errors import FileRefused
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from tests.conftest import Sample, published

if TYPE_CHECKING:
    from pathlib import Path

# What the yamls of the published models say of what is read: latent-diffusion's
# configs/stable-diffusion/v1-inference.yaml, stablediffusion's v2-inference-v.yaml and
# generative-models' sd_xl_base.yaml.
V1 = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    scale_factor: 0.18215
    unet_config:
      params:
        in_channels: 4
        out_channels: 4
        model_channels: 320
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        context_dim: 768
    first_stage_config:
      params:
        ddconfig: {z_channels: 4, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4], num_res_blocks: 2}
"""  # noqa: E501
V2 = """
model:
  params:
    parameterization: "v"
    scale_factor: 0.18215
    unet_config:
      params:
        model_channels: 320
        channel_mult: [1, 2, 4, 4]
        num_head_channels: 64
        num_heads: -1
        use_linear_in_transformer: True
        context_dim: 1024
"""
XL = """
model:
  params:
    scale_factor: 0.13025
    denoiser_config:
      params:
        scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling}
    network_config:
      params:
        adm_in_channels: 2816
        in_channels: 4
        model_channels: 320
        channel_mult: [1, 2, 4]
        num_head_channels: 64
        context_dim: 2048
        use_linear_in_transformer: True
"""
FILES = {"sd15-emaonly-fp32": V1, "sd21-768-fp32": V2, "sdxl-base-fp16": XL}


def read(folder: Path, text: str) -> OriginalConfig:
    path = folder / "train.yaml"
    path.write_text(text)
    return read_original_config(path, bundled())


def built(name: str, original: OriginalConfig | None = None) -> dict[str, Config]:
    decided = original.facts if original else {}
    return configs(build_plan(detect(published(name), decided=decided)))


def notes_of(folder: Path, text: str, name: str = "sd15-emaonly-fp32") -> list[str]:
    return read(folder, text).overrides(built(name))[1]


def unet(lines: str) -> str:
    return f"model: {{params: {{unet_config: {{params: {{{lines}}}}}}}}}"


@pytest.mark.parametrize("name", FILES)
def test_the_yaml_of_a_published_model_agrees_with_its_file(tmp_path: Path, name: str) -> None:
    original = read(tmp_path, FILES[name])
    assert len(original.values) >= 5
    assert original.overrides(built(name, original)) == ({}, [])


def test_the_parameterization_decides_the_prediction_type(tmp_path: Path) -> None:
    facts = read(tmp_path, V2).facts
    assert list(facts) == ["prediction_type"]
    fact = facts["prediction_type"]
    assert (fact.value, fact.source) == ("v_prediction", "original config")
    assert fact.detail == "train.yaml says v"
    assert read(tmp_path, V2.replace('"v"', "eps")).facts["prediction_type"].value == "epsilon"
    assert read(tmp_path, XL).facts["prediction_type"].value == "epsilon"
    v = read(tmp_path, XL.replace("EpsScaling", "VScaling")).facts["prediction_type"]
    assert v.value == "v_prediction"
    assert read(tmp_path, V1).facts == {}
    assert read(tmp_path, V2.replace('"v"', "x0")).facts == {}


def test_what_is_measured_or_constant_yields_and_each_disagreement_is_reported(
    tmp_path: Path,
) -> None:
    text = V1.replace("0.0120", "0.02").replace("scale_factor: 0.18215", "scale_factor: 0.5")
    text = text.replace("context_dim: 768", "context_dim: 1024")
    original = read(tmp_path, text)
    before = built("sd15-emaonly-fp32")
    wins, notes = original.overrides(before)
    assert wins == {
        "scheduler": {"beta_end": 0.02},
        "vae": {"scaling_factor": 0.5},
        "unet": {"cross_attention_dim": 1024},
    }
    assert sorted(notes) == [
        "train.yaml says scheduler.beta_end = 0.02, not 0.012 (constant)",
        "train.yaml says unet.cross_attention_dim = 1024, not 768 (measured)",
        "train.yaml says vae.scaling_factor = 0.5, not 0.18215 (constant)",
    ]


def test_heads_follow_from_their_width(tmp_path: Path) -> None:
    wins, _ = read(tmp_path, unet("num_head_channels: 40")).overrides(built("sd15-emaonly-fp32"))
    assert wins == {"unet": {"attention_head_dim": [8, 16, 32, 32]}}
    narrow = V2.replace("model_channels: 320", "model_channels: 640")
    wins, _ = read(tmp_path, narrow).overrides(built("sd21-768-fp32"))
    assert wins["unet"]["attention_head_dim"] == [10, 20, 40, 40], "of the widths of the yaml"


@pytest.mark.parametrize(
    "lines",
    ["num_heads: -1", "num_heads: null", "context_dim: '${model.x}'", "num_res_blocks: [2, 2]", ""],
)
def test_what_says_nothing_new_changes_nothing(tmp_path: Path, lines: str) -> None:
    assert notes_of(tmp_path, unet(lines)) == []


def test_a_component_that_is_not_converted_is_not_configured(tmp_path: Path) -> None:
    config = built("sd15-emaonly-fp32")
    del config["vae"]
    assert read(tmp_path, V1.replace("0.18215", "0.5")).overrides(config) == ({}, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "cannot be read as YAML: while parsing"),
        ("a: 1\na: 2\n", "cannot be read as YAML: "),
        ("- a\n- b\n", "is not a YAML mapping"),
        ("", "has no entry model.params"),
        ("model: {params: 3}", "has no entry model.params"),
        ("model: 3", "has no entry model.params"),
        (
            unet("num_head_channels: 0, context_dim: wide"),
            "entries make no sense\n"
            "  - unet_config.params.num_head_channels: 0 where positive numbers were expected\n"
            "  - unet_config.params.context_dim: 'wide' where positive numbers were expected\n",
        ),
        (
            unet("channel_mult: [1, x], model_channels: 320"),
            "entries make no sense\n"
            "  - unet_config.params.channel_mult: [1, 'x'] where positive numbers were expected\n",
        ),
        (unet("channel_mult: [1, 2], model_channels: wide"), "entries make no sense\n"),
        (unet("num_head_channels: [64, 64]"), "entries make no sense\n"),
        (unet("context_dim: {a: 1}"), "entries make no sense\n"),
    ],
)
def test_a_file_that_is_no_original_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FileRefused) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'train.yaml'}: {said}")
    assert caught.value.hint == (
        "give the yaml that the model was trained with, such as v1-inference.yaml"
    )


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "train.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileRefused, match="cannot be read"):
        read_original_config(path, bundled())


@pytest.mark.parametrize(
    ("choices", "value", "source"),
    [
        ({}, "epsilon", "metadata"),
        ({"original_config": True}, "v_prediction", "original config"),
        ({"original_config": True, "prediction_type": "epsilon"}, "epsilon", "option"),
    ],
)
def test_an_option_beats_the_yaml_which_beats_the_file(
    tmp_path: Path, sample: Sample, choices: dict[str, Any], value: str, source: str
) -> None:
    if "original_config" in choices:
        choices = {**choices, "original_config": tmp_path / "train.yaml"}
        (tmp_path / "train.yaml").write_text(XL.replace("EpsScaling", "VScaling"))
    fact = plan(sample("sdxl"), **choices).detection.facts["prediction_type"]
    assert (fact.value, fact.source) == (value, source)


def test_a_yaml_that_overrules_the_file_on_a_fact_is_reported(
    tmp_path: Path, sample: Sample
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text('model: {params: {parameterization: "v"}}')
    assert plan(sample("sd1"), original_config=path).detection.notes == (
        "prediction_type is v_prediction (train.yaml says v), where the file alone gives epsilon "
        "(nothing in the file says otherwise, and most checkpoints predict the noise)",
    )


def test_a_conversion_writes_and_reports_what_the_yaml_says(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model: {params: {scale_factor: 0.5}}")
    report = ckptconv.convert(sample("sd1"), tmp_path / "out", original_config=path, only=["vae"])
    assert report.configs["vae"].values["scaling_factor"] == 0.5
    assert '"scaling_factor": 0.5' in (tmp_path / "out" / "vae" / "config.json").read_text()
    assert "train.yaml says vae.scaling_factor = 0.5, not 0.18215 (constant)" in report.warnings


def test_a_donor_folder_keeps_its_values_only_where_the_yaml_is_silent() -> None:
    config = built("sd15-emaonly-fp32")["vae"]
    donor = replace(config, values={"scaling_factor": 2.0}, origins={"scaling_factor": "donor"})
    original = OriginalConfig(
        published("sd15-emaonly-fp32").path, values=(("vae.scaling_factor", ValuePath(()), 0.5),)
    )
    wins, notes = original.overrides({"vae": donor})
    assert wins == {"vae": {"scaling_factor": 0.5}}
    assert notes[0].endswith("says vae.scaling_factor = 0.5, not 2.0 (donor)")


@pytest.mark.parametrize(
    ("lines", "heads"),
    [
        ("width: 40, num_head_channels: '${.width}'", [8, 16, 32, 32]),
        ("num_head_channels: '${model.params.other}'", None),
        ("num_head_channels: '${num_head_channels}'", None),
        ("num_head_channels: '${model.params.unet_config.params.num_head_channels}'", None),
        ("num_head_channels: '${hostile:40}'", None),
        ("a: '${hostile:40}', num_head_channels: '${.a}'", None),
        ("num_head_channels: '${${.a}:40}', a: hostile", None),
        ("num_head_channels: '${oc.env:HOSTILE,40}'", None),
    ],
)
def test_an_interpolation_leads_to_another_entry_and_never_to_a_resolver(
    lines: str, heads: list[int] | None, tmp_path: Path
) -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("hostile", int)
    try:
        wins, _ = read(tmp_path, unet(lines)).overrides(built("sd15-emaonly-fp32"))
    finally:
        OmegaConf.clear_resolver("hostile")
    assert wins.get("unet", {}).get("attention_head_dim") == heads
