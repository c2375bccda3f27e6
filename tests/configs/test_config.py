"""The configurations mean what the published files say, and tell where each value comes from."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ckptconv.configs.config import Config, class_of, class_said, configs, model_index, versioned
from ckptconv.detection.detect import detect, option_fact
from ckptconv.errors import FileRefused, MapError
from ckptconv.files import read_json
from ckptconv.maps.architecture import KeyMaps, bundled
from ckptconv.planning.components import Donor
from ckptconv.planning.plan import Plan, build_plan
from tests.conftest import made, shapes
from tests.support.published import HEADERS

if TYPE_CHECKING:
    from pathlib import Path

    from ckptconv.reading.tensor import Header

UNET = "model.diffusion_model."


def built(header: Header, *, maps: KeyMaps | None = None, **facts: Any) -> dict[str, Config]:
    decided = {name: option_fact(name, value) for name, value in facts.items()}
    return configs(build_plan(detect(header, maps=maps, decided=decided)))


@functools.cache
def plain(name: str) -> dict[str, Config]:
    return built(HEADERS[name])


def plan_of(header: Header) -> Plan:
    return build_plan(detect(header))


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_zero_terminal_snr_changes_the_schedule(name: str) -> None:
    config = built(HEADERS[name], prediction_type="v_prediction", zero_terminal_snr=True)
    scheduler = config["scheduler"].values
    assert scheduler["_class_name"] == (
        "EulerDiscreteScheduler" if name == "sdxl" else "DDIMScheduler"
    )
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert scheduler["timestep_spacing"] == "trailing"


@pytest.mark.parametrize(
    ("name", "channels", "scheduler"),
    [
        ("sd15", 8, "EulerAncestralDiscreteScheduler"),
        ("sd21", 9, "PNDMScheduler"),
        ("sd21", 5, "PNDMScheduler"),
        ("sd21", 8, "EulerAncestralDiscreteScheduler"),
        ("sdxl", 9, "EulerDiscreteScheduler"),
    ],
)
def test_the_task_decides_the_scheduler(name: str, channels: int, scheduler: str) -> None:
    header = made(shapes(HEADERS[name]) | {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)})
    config = built(header)
    assert class_of(config["scheduler"]) == scheduler
    assert config["unet"].values["in_channels"] == channels


@pytest.mark.parametrize(
    ("name", "component", "key", "origin"),
    [
        ("sd15", "unet", "attention_head_dim", "constant"),
        ("sd15", "unet", "block_out_channels", "measured"),
        ("sd15", "unet", "time_cond_proj_dim", "measured"),
        ("sd15", "unet", "layers_per_block", "measured"),
        ("sd15", "unet", "transformer_layers_per_block", "measured"),
        ("sd15", "vae", "scaling_factor", "constant"),
        ("sd15", "vae", "latent_channels", "measured"),
        ("sd15", "text_encoder", "num_attention_heads", "measured"),
        ("sd15", "text_encoder", "hidden_act", "constant"),
        ("sd15", "tokenizer", "pad_token", "constant"),
        ("sd15", "scheduler", "beta_start", "constant"),
        ("sd15", "scheduler", "prediction_type", "assumed"),
        ("sd21", "unet", "sample_size", "assumed"),
        ("sd21", "unet", "upcast_attention", "assumed"),
        ("sd21", "unet", "attention_head_dim", "measured"),
        ("sd21-base", "unet", "sample_size", "metadata"),
        ("sd21-base", "scheduler", "prediction_type", "metadata"),
        ("sdxl", "scheduler", "prediction_type", "metadata"),
        ("sdxl", "scheduler", "timestep_spacing", "assumed"),
        ("sdxl", "unet", "projection_class_embeddings_input_dim", "measured"),
    ],
)
def test_every_value_tells_where_it_comes_from(
    name: str, component: str, key: str, origin: str
) -> None:
    config = plain(name)[component]
    assert config.origins[key] == origin
    assert config.origins.keys() == config.values.keys()


def test_an_option_is_the_origin_of_what_it_decides() -> None:
    config = built(HEADERS["sd21"], prediction_type="epsilon")
    assert config["scheduler"].origins["prediction_type"] == "option"
    assert config["unet"].origins["sample_size"] == "option"
    assert class_of(config["scheduler"]) == "PNDMScheduler"


def test_a_narrower_and_shallower_network_is_measured() -> None:
    narrow = {
        key: tuple(n if n < 128 or not key.startswith(UNET) else n // 5 for n in shape)
        for key, shape in shapes(HEADERS["sdxl"]).items()
        if not any(f"transformer_blocks.{i}." in key for i in range(1, 10))
        and ".resblocks.31." not in key
    }
    config = built(made(narrow))
    assert config["unet"].values["block_out_channels"] == [64, 128, 256]
    assert config["unet"].values["attention_head_dim"] == [1, 2, 4]
    assert config["unet"].values["transformer_layers_per_block"] == [1, 1, 1]
    assert config["unet"].values["cross_attention_dim"] == 2048 // 5
    assert config["text_encoder_2"].values["num_hidden_layers"] == 31


def test_a_guidance_embedding_is_measured() -> None:
    cond_proj = {f"{UNET}time_embed.cond_proj.weight": (320, 256)}
    assert plain("sd15")["unet"].values["time_cond_proj_dim"] is None
    config = built(made(shapes(HEADERS["sd15"]) | cond_proj))
    assert config["unet"].values["time_cond_proj_dim"] == 256


def test_a_width_without_whole_heads_is_refused() -> None:
    odd = {
        key: tuple(n if n < 128 else n * 3 // 10 for n in shape)
        for key, shape in shapes(HEADERS["sd21"]).items()
    }
    with pytest.raises(FileRefused, match="of no width that its heads fit") as caught:
        built(made(odd))
    assert "down_blocks.0.resnets.0.conv1.weight has 96 rows, which are no heads of 64" in str(
        caught.value
    )


@pytest.mark.parametrize("entry", [{}, {"torch_dtype": "float16"}, {"dtype": "bfloat16"}])
def test_transformers_is_told_to_load_in_fp32(entry: dict[str, str]) -> None:
    config = plain("sd15")["text_encoder"]
    written = versioned(replace(config, values={**config.values, **entry}))
    assert (written["torch_dtype"], "dtype" in written) == ("float32", False)
    assert "torch_dtype" not in versioned(plain("sd15")["unet"])


def test_what_is_absent_has_no_configuration_and_is_null_in_the_index() -> None:
    tensors = {k: s for k, s in shapes(HEADERS["sdxl"]).items() if k.startswith(UNET)}
    plan = plan_of(made(tensors))
    built_ = configs(plan)
    assert set(built_) == {"unet", "tokenizer", "tokenizer_2", "scheduler"}
    index = model_index(plan, built_)
    for name in ("vae", "text_encoder", "text_encoder_2", "feature_extractor", "image_encoder"):
        assert index[name] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_written_values_have_the_version_of_the_library_that_reads_them() -> None:
    config = plain("sd15")
    diffusers = importlib.metadata.version("diffusers")
    assert versioned(config["unet"])["_diffusers_version"] == diffusers
    text = versioned(config["text_encoder"])
    assert text["transformers_version"] == importlib.metadata.version("transformers")
    assert versioned(config["tokenizer"]) == config["tokenizer"].values


def test_overrides_win_and_are_marked() -> None:
    plan = plan_of(HEADERS["sd15"])
    config = configs(plan, {"vae": {"scaling_factor": 1.5}})["vae"]
    assert config.values["scaling_factor"] == 1.5
    assert config.origins["scaling_factor"] == "original config"
    assert config.origins["latent_channels"] == "measured"


def test_a_folder_that_is_given_brings_its_own_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderTiny", "latent_channels": 4}))
    donor = Donor((replace(made({"a.weight": (1,)}), path=tmp_path / "w.safetensors"),), file)
    plan = build_plan(detect(HEADERS["sd15"]), donors={"vae": donor})
    config = configs(plan)["vae"]
    assert config.values == {"_class_name": "AutoencoderTiny", "latent_channels": 4}
    assert config.origins == {"_class_name": "donor", "latent_channels": "donor"}
    assert model_index(plan, configs(plan))["vae"] == ["diffusers", "AutoencoderTiny"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read as JSON: "),
        (b"\xff", "cannot be read as JSON: "),
        (b"[" * 100_000, "cannot be read as JSON: "),
        (b"[]", "holds no JSON object"),
        (None, "the file cannot be read: "),
    ],
)
def test_a_json_file_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FileRefused) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert caught.value.hint == "check the file"


@pytest.mark.parametrize(
    ("hole", "said"),
    [
        ("!dim [conv_in.wight, 0]", "measures 'conv_in.wight', which is no converted key"),
        ("!dim [conv_in.weight, 4]", "tuple index out of range"),
        ("!fact age", "'age'"),
        ("!fact [prediction_type, {v_prediction: 1}]", "'epsilon'"),
        ("!heads [conv_in.weight, 0]", "by zero"),
        ("!side [conv_in.weight, 0]", "319 patches, which fill no square"),
        ("!nothing x", "unknown hole '!nothing'"),
        ("!dim []", "'key' is missing"),
    ],
)
def test_a_hole_that_cannot_be_filled_is_refused(tmp_path: Path, hole: str, said: str) -> None:
    (folder,) = bundled().folders
    text = (folder / "sd1" / "arch.yaml").read_text()
    (tmp_path / "sd1").mkdir()
    (tmp_path / "sd1" / "arch.yaml").write_text(
        text.replace("attention_head_dim: 8 ", f"attention_head_dim: {hole} ")
    )
    with pytest.raises(MapError) as caught:
        built(HEADERS["sd15"], maps=KeyMaps([tmp_path, folder]))
    message = str(caught.value)
    assert "attention_head_dim" in message
    assert said in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, None),
        ({"_class_name": None}, None),
        ({"architectures": ["CLIPTextModel"]}, "CLIPTextModel"),
        ({"architectures": ["A", "B"]}, ["A", "B"]),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "CLIPImageProcessor"),
    ],
)
def test_the_class_that_a_configuration_names(values: dict[str, Any], said: object) -> None:
    assert class_said(values) == said
