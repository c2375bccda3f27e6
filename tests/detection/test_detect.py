"""What a file is: the architecture, the task, and every refusal."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import inspect
from ckptconv.detection.detect import detect, option_fact
from ckptconv.detection.facts import Fact
from ckptconv.detection.foreign import ForeignFormat
from ckptconv.errors import Ambiguous, NotACheckpoint
from ckptconv.maps.architecture import KeyMaps, bundled
from tests.conftest import PUBLISHED, Sample, made, published, shapes

if TYPE_CHECKING:
    from pathlib import Path

    from ckptconv.reading.tensor import Header

UNET = "model.diffusion_model."
CONV_IN = f"{UNET}input_blocks.0.0.weight"

EXPECTED = {
    "sd15-emaonly-fp32": ("sd1", "text-to-image"),
    "sd15-full-ema-fp32": ("sd1", "text-to-image"),
    "sd15-inpainting-fp16": ("sd1", "inpainting"),
    "sd21-768-fp32": ("sd2", "text-to-image"),
    "sdxl-base-fp16": ("sdxl", "text-to-image"),
    "sdxl-refiner-fp16": ("sdxl-refiner", "image-to-image"),
}
BASES = {
    "sd1": "sd15-emaonly-fp32",
    "sd2": "sd21-768-fp32",
    "sdxl": "sdxl-base-fp16",
    "sdxl-refiner": "sdxl-refiner-fp16",
}
FOREIGN: tuple[ForeignFormat, ...] = bundled().typed(tuple[ForeignFormat, ...], "foreign")


def refusal(header: Header) -> str:
    detection = detect(header)
    assert detection.architecture is None
    assert detection.task is None
    assert detection.evidence == ()
    with pytest.raises(NotACheckpoint) as caught:
        detection.require()
    assert caught.value.hint
    return str(caught.value)


def unet_of(name: str) -> dict[str, tuple[int, ...]]:
    """The UNet of a published file, without prefix."""
    return {k.removeprefix(UNET): s for k, s in shapes(published(name)).items() if UNET in k}


def test_every_published_header_has_its_expectation() -> None:
    assert sorted(EXPECTED) == PUBLISHED
    assert set(BASES) <= set(bundled().architectures)  # of relatives, none is at hand


@pytest.mark.parametrize("name", bundled().architectures)
def test_a_layout_is_of_its_own_architecture_and_of_no_other(name: str) -> None:
    detection = detect(bundled().architectures[name].layout())
    assert [v.architecture for v in detection.verdicts if v.matches] == [name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_of_exactly_one_architecture(name: str) -> None:
    detection = detect(published(name))
    architecture, task = detection.require()
    assert (architecture.name, task.name) == EXPECTED[name]
    assert [v.architecture for v in detection.verdicts] == sorted(bundled().architectures)
    for verdict in detection.verdicts:
        assert verdict.matches == (verdict.architecture == architecture.name)
        assert bool(verdict.failing) != verdict.matches
        failing = [line.text for line in verdict.failing]
        assert all(", needed " in text or " is missing: " in text for text in failing)
    assert len(detection.evidence) == 1 + len(architecture.conditions)
    assert f"input channels: {task.name}" in detection.evidence[0]
    assert detection.facts["task"] == Fact(
        "task", task.name, "structure", "the UNet's input channels tell the task"
    )
    assert detection.notes == ()


@pytest.mark.parametrize(
    ("name", "channels", "task", "pipeline"),
    [
        ("sd1", 4, "text-to-image", "StableDiffusionPipeline"),
        ("sd1", 9, "inpainting", "StableDiffusionInpaintPipeline"),
        ("sd1", 8, "instruct-pix2pix", "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 4, "text-to-image", "StableDiffusionPipeline"),
        ("sd2", 9, "inpainting", "StableDiffusionInpaintPipeline"),
        ("sd2", 8, "instruct-pix2pix", "StableDiffusionInstructPix2PixPipeline"),
        ("sd2", 5, "depth-to-image", "StableDiffusionDepth2ImgPipeline"),
        ("sdxl", 4, "text-to-image", "StableDiffusionXLPipeline"),
        ("sdxl", 9, "inpainting", "StableDiffusionXLInpaintPipeline"),
        ("sdxl", 8, "instruct-pix2pix", "StableDiffusionXLInstructPix2PixPipeline"),
        ("sdxl-refiner", 4, "image-to-image", "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_the_input_channels_tell_the_task(
    name: str, channels: int, task: str, pipeline: str
) -> None:
    header = made(shapes(published(BASES[name])) | {CONV_IN: (320, channels, 3, 3)})
    architecture, found = detect(header).require()
    assert (architecture.name, found.name, found.pipeline) == (name, task, pipeline)


@pytest.mark.parametrize(
    ("name", "channels", "needed"),
    [
        ("sd1", 5, "4 (text-to-image), 9 (inpainting), 8 (instruct-pix2pix)"),
        ("sd2", 7, "4 (text-to-image), 9 (inpainting), 8 (instruct-pix2pix), 5 (depth-to-image)"),
        ("sdxl-refiner", 7, "4 (image-to-image)"),
    ],
)
def test_other_input_channels_are_refused(name: str, channels: int, needed: str) -> None:
    message = refusal(made(shapes(published(BASES[name])) | {CONV_IN: (320, channels, 3, 3)}))
    assert f"no known architecture matches; the nearest is {name}\n" in message
    assert f"  - the UNet has {channels} input channels, needed {needed}\n" in message


def test_a_first_convolution_of_another_rank_is_refused() -> None:
    message = refusal(made(shapes(published(BASES["sd1"])) | {CONV_IN: (320, 4)}))
    assert "input_blocks.0.0.weight has shape [320, 4], needed a 4-D convolution" in message


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=10, deadline=None, database=None)
@given(st.integers(1, 256))
def test_narrower_and_wider_networks_are_the_same_architecture(name: str, width: int) -> None:
    scaled = {
        key: tuple(n if n < 128 else max(1, n * width // 64) for n in shape)
        for key, shape in shapes(published(name)).items()
    }
    architecture, task = detect(made(scaled)).require()
    assert (architecture.name, task.name) == EXPECTED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_unet_alone_and_without_prefix_is_recognised(name: str) -> None:
    detection = detect(made(unet_of(name)))
    architecture, task = detection.require()
    assert (architecture.name, task.name) == EXPECTED[name]
    (verdict,) = (v for v in detection.verdicts if v.matches)
    assert verdict.prefix == ""


def without(name: str, *prefixes: str) -> dict[str, tuple[int, ...]]:
    starts = tuple(UNET + prefix for prefix in prefixes)
    header = published(name) if name in PUBLISHED else bundled().architectures[name].layout()
    return {k: s for k, s in shapes(header).items() if not k.startswith(starts)}


@pytest.mark.parametrize(
    ("tensors", "nearest", "failing"),
    [
        pytest.param(
            without("sdxl-base-fp16", "middle_block."),
            "ssd-1b",
            [
                "middle_block.*.in_layers.2.weight: * is nothing, needed 0 "
                "(the attention of the middle was pruned)"
            ],
            id="SDXL without a middle",
        ),
        pytest.param(
            without("sd15-emaonly-fp32", "input_blocks.11.", "input_blocks.10."),
            "sd1",
            [
                "input_blocks.*.0.in_layers.2.weight: * is 1, 2, 4, 5, 7, 8, needed 1, 2, 4, 5, 7",
            ],
            id="a level less",
        ),
        pytest.param(
            {
                k: s[:2] if k.endswith("input_blocks.1.1.proj_in.weight") else s
                for k, s in without("sd15-emaonly-fp32", "input_blocks.2.1").items()
            },
            "sd2",
            ["input_blocks.*.1.proj_in.weight: * is 1, 4, 5, 7, 8, needed 1, 2, 4, 5, 7, 8"],
            id="an attention less",
        ),
        pytest.param(
            without("sd21-768-fp32", "input_blocks.1.1."),
            "sd1",
            ["input_blocks.1.1.proj_in.weight is missing, needed 4 (SD1 projects with 1x1"],
            id="the telling one missing",
        ),
        pytest.param(
            without("flux", "single_blocks."),
            "flux",
            ["the transformer lacks single_blocks.0.linear1.weight, needed the key"],
            id="FLUX.1 without single blocks",
        ),
    ],
)
def test_a_relative_is_refused_with_the_nearest_and_where_it_fails(
    tensors: dict[str, tuple[int, ...]], nearest: str, failing: list[str]
) -> None:
    message = refusal(made(tensors))
    assert message.startswith(
        f"made.safetensors: no known architecture matches; the nearest is {nearest}\n"
    )
    assert all(f"  - {line}" in message for line in failing)
    assert "hint: `ckptconv inspect --verdicts FILE`" in message


def test_two_architectures_that_both_match_are_an_error_never_an_order(tmp_path: Path) -> None:
    (folder,) = bundled().folders
    shutil.copytree(folder / "sd1", tmp_path / "twin")
    maps = KeyMaps([tmp_path, folder])
    with pytest.raises(Ambiguous) as caught:
        detect(published("sd15-emaonly-fp32"), maps=maps)
    message = str(caught.value)
    assert ": several architectures match\n  - sd1: the UNet has 4 input" in message
    assert "\n  - twin: the UNet has 4 input" in message
    assert "hint: their conditions in arch.yaml overlap" in message
    assert detect(published("sd21-768-fp32"), maps=maps).require()[0].name == "sd2"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "a LoRA or another adapter"),
        (["lora_te1_text_model.alpha"], "a LoRA or another adapter"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA or another adapter"),
        (["diffusion_model.x.hada_w1_a"], "a LoRA or another adapter"),
        (["diffusion_model.x.lokr_w1"], "a LoRA or another adapter"),
        (["emb_params"], "a textual inversion"),
        (["clip_g", "clip_l"], "a textual inversion"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet in the original layout"),
        (
            ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"],
            "a ControlNet in the diffusers layout",
        ),
        (
            ["encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
            "a checkpoint without a",
        ),
        (["first_stage_model.decoder.conv_in.weight"], "a checkpoint without a UNet, or a VAE"),
        (
            ["encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"],
            "a VAE in the diffusers layout already",
        ),
        (["conv_in.weight", "down_blocks.0.resnets.0.norm1.weight"], "a UNet in the diffusers la"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX transformer"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a FLUX transformer"),
        (["model.diffusion_model.joint_blocks.0.x"], "a Stable Diffusion 3 transformer"),
        (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], "a language model"),
        (["text_model.final_layer_norm.weight"], "a text encoder (CLIP) of no kind"),
        (["model_ema.decay"], "the EMA weights of a checkpoint alone"),
    ],
)
def test_a_file_that_is_no_checkpoint_gets_a_sentence_that_says_what_it_is(
    keys: list[str], what: str
) -> None:
    message = refusal(made(dict.fromkeys(keys, (4, 4))))
    assert message.startswith(f"made.safetensors: this is {what}")
    assert f"\n  - it holds the key '{keys[0]}'" in message or len(keys) > 1
    assert "\nhint: " in message


DIT = "model.diffusion_model."
FAMILIES = {  # keys of published files, by a word of the sentence that names their family
    "AnimateDiff": ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"],
    "T2I-Adapter": ["conv_in.weight", "body.0.block1.weight"],
    "IP-Adapter": ["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"],
    "Stable Video Diffusion": ["first_stage_model.decoder.conv_out.time_mix_conv.weight"],
    "ModelScope": ["transformer_in.norm.weight", "down_blocks.0.temp_convs.0.conv1.0.weight"],
    "DeepFloyd": ["add_embedding.pool.positional_embedding", "encoder_hid_proj.weight"],
    "Kandinsky": ["clip_to_seq.weight", "input_blocks.0.0.weight", "to_model_dim_n.weight"],
    "Kolors": ["down_blocks.0.resnets.0.norm1.weight", "encoder_hid_proj.weight"],
    "Stable Cascade": ["clf.1.weight", "down_blocks.1.0.channelwise.0.weight"],
    "Wuerstchen": ["blocks.0.0.depthwise.weight", "cond_mapper.0.weight"],
    "HunyuanVideo": [
        "double_blocks.0.img_attn_qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    ],
    "HunyuanDiT": ["mlp_t5.0.weight", "x_embedder.proj.weight"],
    "Chroma": ["distilled_guidance_layer.in_proj.bias", "double_blocks.0.img_attn.qkv.weight"],
    "FLUX": ["single_blocks.0.linear1.weight", "single_blocks.0.linear2.weight"],
    "FLUX.1 or Chroma": ["single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"],
    "FLUX.2": [
        DIT + "double_blocks.0.img_attn.qkv.weight",
        DIT + "double_stream_modulation_img.lin.weight",
        DIT + "img_in.weight",
    ],
    "AuraFlow": ["double_layers.0.attn.w1q.weight", "t_embedder.mlp.0.weight"],
    "Qwen-Image": ["img_in.weight", "transformer_blocks.0.attn.to_q.weight", "txt_norm.weight"],
    "Stable Diffusion 3": ["pos_embed.pos_embed", "transformer_blocks.0.attn.to_q.weight"],
    "Wan 2.1 or 2.2": [DIT + "blocks.0.cross_attn.k.weight", DIT + "head.modulation"],
    "VAE of Wan": ["decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"],
    "Z-Image": ["all_x_embedder.2-1.weight", "cap_pad_token", "layers.0.attention.to_q.weight"],
    "Z-Image Omni": ["cap_pad_token", "siglip_embedder.0.weight", "x_embedder.weight"],
    "Qwen3": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"],
    "Lumina 2": ["cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight"],
    "Mochi": ["blocks.0.attn.qkv_x.weight", "t_embedder.mlp.0.weight", "t5_yproj.weight"],
    "CogVideoX": ["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"],
    "LTX-Video": [
        DIT + "adaln_single.emb.timestep_embedder.linear_1.bias",
        DIT + "patchify_proj.weight",
    ],
    "Sana": ["attention_y_norm.weight", "t_block.1.weight"],
    "PixArt": ["blocks.0.cross_attn.q_linear.weight", "t_block.1.weight", "y_embedder.y_embedding"],
    "HiDream": ["caption_projection.0.linear.weight", "t_embedder.timestep_embedder.linear_1.bias"],
    "ESRGAN": ["body.0.rdb1.conv1.weight", "conv_first.weight"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_called_by_their_names(family: str) -> None:
    message = refusal(made(dict.fromkeys(FAMILIES[family], (4, 4))))
    assert family in message.splitlines()[0]


@pytest.mark.parametrize(
    ("key", "family"),
    [
        (UNET + "encoder_hid_proj.weight", "Kolors"),
        (UNET + "input_blocks.1.1.time_mixer.mix_factor", "Stable Video Diffusion"),
        ("down_blocks.0.motion_modules.0.norm.weight", "AnimateDiff"),
    ],
)
def test_some_keys_tell_another_family_even_beside_a_whole_unet(key: str, family: str) -> None:
    message = refusal(made({**shapes(published("sdxl-base-fp16")), key: (4, 4)}))
    assert family in message.splitlines()[0]


@pytest.mark.parametrize("entry", FOREIGN, ids=lambda entry: entry.title[:30])
def test_every_pattern_of_the_foreign_files_is_reached(entry: ForeignFormat) -> None:
    assert entry.keys
    for key in (pattern.replace("*", "x") for pattern in entry.keys):
        assert refusal(made({key: (4, 4)})).startswith(f"made.safetensors: this is {entry.title}\n")


@pytest.mark.parametrize(
    ("base", "channels", "key", "what"),
    [
        ("sd1", 8, "cc_projection.weight", "zero123, which turns an object in an image"),
        ("sd1", 9, "learnable_vector", "Paint by Example"),
        ("sd1", 4, f"{UNET}input_blocks.1.1.transformer_blocks.0.fuser.linear.weight", "GLIGEN"),
        ("sd2", 4, f"{UNET}camera_embed.0.weight", "MVDream or ImageDream"),
    ],
)
def test_a_model_of_another_kind_is_not_called_by_the_name_of_its_unet(
    base: str, channels: int, key: str, what: str
) -> None:
    tensors = shapes(published(BASES[base])) | {CONV_IN: (320, channels, 3, 3), key: (4, 4)}
    message = refusal(made(tensors))
    assert message.startswith(f"made.safetensors: this is {what}")
    assert f"it holds the key {key!r}" in message


@pytest.mark.parametrize(
    ("suffix", "by"),
    [
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("wscales", "SVDQuant"),
        ("qweight", "GPTQ or AWQ"),
        ("_weight_qdata", "torchao or Quanto"),
        ("weight_scale_2", "nvfp4"),
    ],
)
@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_quantized_weights_are_named_in_every_family(name: str, suffix: str, by: str) -> None:
    tensors = shapes(bundled().architectures[name].layout())
    linear = next(key for key, shape in tensors.items() if len(shape) == 2)
    tensors[linear] = (math.prod(tensors[linear]) // 2, 1)
    tensors[linear.removesuffix("weight") + suffix] = (4,)
    found = detect(made(tensors)).refusal
    assert found
    assert found.code == "quantized"
    assert f"this is quantized {'to' if by == 'nvfp4' else 'with'} {by}" in found.message
    assert "give the fp16, bf16 or fp8 file" in found.hint or "ckptconv converts" in found.hint


def test_every_foreign_kind_has_a_sentence_of_its_own() -> None:
    assert len({entry.title for entry in FOREIGN}) == len(FOREIGN)


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("name", BASES.values())
def test_the_copied_half_of_a_unet_is_a_controlnet(name: str, prefix: str) -> None:
    half = {k: s for k, s in unet_of(name).items() if not k.startswith(("out.", "output_blocks."))}
    half |= {"input_hint_block.0.weight": (16, 3, 3, 3), "zero_convs.0.0.weight": (320, 320, 1, 1)}
    file = made({prefix + key: shape for key, shape in half.items()})
    if name == BASES["sdxl-refiner"]:  # nobody made one for it
        assert "this is a ControlNet in the original layout, but of no kind" in refusal(file)
    else:
        architecture, _ = detect(file).require()
        assert architecture.name == f"controlnet-{EXPECTED[name][0]}"


def test_an_empty_file_is_refused() -> None:
    assert "made.safetensors: the file holds no tensors" in refusal(made({}))


def test_an_unrelated_model_is_refused_with_some_of_its_keys() -> None:
    message = refusal(made({f"fc{i}.weight": (10, 10) for i in range(1200)}))
    assert "this is no checkpoint that is known" in message
    assert "the keys of the file (1,200) are such as fc0.weight, fc1.weight, fc2.weight" in message
    assert "`ckptconv architectures` lists what is known" in message


@pytest.mark.parametrize(
    ("metadata", "note"),
    [
        ({"modelspec.architecture": "stable-diffusion-v1"}, None),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, None),
        ({"modelspec.architecture": "something-else"}, None),
        (
            {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
            "modelspec.architecture = stable-diffusion-xl-v1-base",
        ),
        ({"ss_base_model_version": "sd_v2_v"}, "ss_base_model_version = sd_v2_v"),
    ],
)
def test_where_metadata_and_structure_disagree_structure_wins_and_a_note_says_so(
    metadata: dict[str, str], note: str | None
) -> None:
    detection = detect(replace(published("sd15-emaonly-fp32"), metadata=metadata))
    assert detection.require()[0].name == "sd1"
    assert len(detection.notes) == (note is not None)
    for line in detection.notes:
        assert f"the metadata says {note}," in line
        assert line.endswith("the keys are those of sd1")


def test_a_decided_fact_wins_and_a_note_says_what_it_overrules() -> None:
    header = published("sdxl-base-fp16")  # its metadata says epsilon
    decided = {"prediction_type": option_fact("prediction_type", "v_prediction")}
    detection = detect(header, decided=decided)
    assert detection.facts["prediction_type"] == decided["prediction_type"]
    assert detection.notes == (
        "prediction_type is v_prediction (set by an option), where the file alone gives epsilon "
        "(the metadata says modelspec.prediction_type = epsilon)",
    )


def test_an_option_in_the_place_of_an_assumption_is_worth_no_note() -> None:
    decided = {"prediction_type": option_fact("prediction_type", "v_prediction")}
    assert detect(published("sd15-emaonly-fp32"), decided=decided).notes == ()


@pytest.mark.parametrize("name", BASES)
def test_inspect_reads_a_file(sample: Sample, name: str) -> None:
    path = sample(name)
    detection = inspect(path)
    assert detection.require()[0].name == name
    assert detection.header.path == path
