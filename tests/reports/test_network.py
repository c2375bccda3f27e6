"""The picture of a network has the blocks, channels and depths of the published one."""

from __future__ import annotations

import pytest

from ckptconv.detection.detect import detect
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from ckptconv.reports.html.drawing import draw
from ckptconv.reports.network import Block, blocks

PARAMETERS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sdxl-refiner": {"vae": 83_653_863, "text_encoder_2": 694_659_840},
}
"""As the model cards and diffusers' own configurations give them."""

LEVELS: dict[str, dict[str, tuple[int, int, tuple[int, ...], str]]] = {
    "sd1": {
        "down_blocks.0": (320, 2, (1, 1), "down"),
        "down_blocks.1": (640, 2, (1, 1), "down"),
        "down_blocks.2": (1280, 2, (1, 1), "down"),
        "down_blocks.3": (1280, 2, (), ""),
        "mid_block": (1280, 2, (1,), ""),
        "up_blocks.0": (1280, 3, (), "up"),
        "up_blocks.1": (1280, 3, (1, 1, 1), "up"),
        "up_blocks.2": (640, 3, (1, 1, 1), "up"),
        "up_blocks.3": (320, 3, (1, 1, 1), ""),
    },
    "sdxl": {
        "down_blocks.0": (320, 2, (), "down"),
        "down_blocks.1": (640, 2, (2, 2), "down"),
        "down_blocks.2": (1280, 2, (10, 10), ""),
        "mid_block": (1280, 2, (10,), ""),
        "up_blocks.0": (1280, 3, (10, 10, 10), "up"),
        "up_blocks.1": (640, 3, (2, 2, 2), "up"),
        "up_blocks.2": (320, 3, (), ""),
    },
    "sdxl-refiner": {
        "down_blocks.0": (384, 2, (), "down"),
        "down_blocks.1": (768, 2, (4, 4), "down"),
        "down_blocks.2": (1536, 2, (4, 4), "down"),
        "down_blocks.3": (1536, 2, (), ""),
        "mid_block": (1536, 2, (4,), ""),
        "up_blocks.0": (1536, 3, (), "up"),
        "up_blocks.1": (1536, 3, (4, 4, 4), "up"),
        "up_blocks.2": (768, 3, (4, 4, 4), "up"),
        "up_blocks.3": (384, 3, (), ""),
    },
}
LEVELS["sd2"] = LEVELS["sd1"]


def _blocks(architecture: str, component: str) -> list[Block]:
    return blocks(build_plan(detect(bundled().architectures[architecture].layout())), component)


@pytest.mark.parametrize("name", LEVELS)
def test_the_levels_of_a_published_unet(name: str) -> None:
    found = _blocks(name, "unet")
    shape = {b.name: (b.channels, b.resnets, b.attention, b.resamples) for b in found}
    assert {key: value for key, value in shape.items() if "block" in key} == LEVELS[name]
    first = ["conv_in", "time_embedding"] + ["add_embedding"] * ("xl" in name)
    assert list(shape) == [*first, *LEVELS[name], "conv_norm_out", "conv_out"]


@pytest.mark.parametrize(
    ("name", "component"), [(n, c) for n, parts in PARAMETERS.items() for c in parts]
)
def test_the_parameters_of_the_blocks_add_up_to_the_published_number(
    name: str, component: str
) -> None:
    found = _blocks(name, component)
    assert sum(block.parameters for block in found) == PARAMETERS[name][component]


@pytest.mark.parametrize("name", bundled().architectures)
def test_the_parameters_of_the_blocks_are_those_of_the_plan(name: str) -> None:
    plan = build_plan(detect(bundled().architectures[name].layout()))
    for component in plan.detection.require()[0].models:
        if component.name in plan.absent:
            continue
        sizes = []
        given = {(target.component, target.key) for target in plan.identities}  # by no file
        for slot in plan.tensors(component.name).values():
            if (slot.component, slot.key) in given:
                continue
            size = 1
            for n in slot.shape:
                size *= n
            sizes.append(size)
        found = blocks(plan, component.name)
        assert sum(block.parameters for block in found) == sum(sizes) > 0
        assert len({block.name for block in found}) == len(found)


def test_a_vae_runs_from_the_image_to_the_latents_and_back() -> None:
    found = _blocks("sd1", "vae")
    half = [block.name for block in found].index("post_quant_conv")
    encoder = [block.name for block in found[:half]]
    decoder = [block.name for block in found[half:]]
    levels = [f"encoder.down_blocks.{n}" for n in range(4)]
    ends = ["encoder.mid_block", "encoder.conv_norm_out", "encoder.conv_out", "quant_conv"]
    assert encoder == ["encoder.conv_in", *levels, *ends]
    levels = [f"decoder.up_blocks.{n}" for n in range(4)]
    starts = ["post_quant_conv", "decoder.conv_in", "decoder.mid_block"]
    assert decoder == [*starts, *levels, "decoder.conv_norm_out", "decoder.conv_out"]
    by_name = {block.name: block for block in found}
    assert [by_name[level].channels for level in levels] == [512, 512, 256, 128]
    # attention without transformer blocks
    assert by_name["decoder.mid_block"].attention == (0,)


def test_text_layers_stand_in_the_order_of_their_numbers() -> None:
    found = _blocks("sdxl", "text_encoder_2")
    names = [block.name for block in found]
    layers = [f"text_model.encoder.layers.{n}" for n in range(32)]
    assert names == [
        "text_model.embeddings",
        *layers,
        "text_model.final_layer_norm",
        "text_projection",
    ]
    assert {block.channels for block in found[1:33]} == {1280}


def test_a_block_names_where_its_tensors_stand_in_the_file() -> None:
    found = {block.name: block.original for block in _blocks("sdxl", "unet")}
    unet = "model.diffusion_model."
    assert found["conv_in"] == (unet + "input_blocks.0.0",)
    assert found["mid_block"] == tuple(f"{unet}middle_block.{n}" for n in range(3))
    assert found["up_blocks.2"] == tuple(f"{unet}output_blocks.{n}.0" for n in (6, 7, 8))
    assert found["add_embedding"] == (unet + "label_emb.0.0", unet + "label_emb.0.2")
    text = {block.name: block.original for block in _blocks("sd2", "text_encoder")}
    layer = "cond_stage_model.model.transformer.resblocks.7"
    assert text["text_model.encoder.layers.7"] == (layer,)


def test_z_image_is_in_the_order_of_the_data() -> None:
    plan = build_plan(detect(bundled().architectures["z-image"].layout()))
    names = [block.name for block in blocks(plan, "transformer")]
    before = ["t_embedder", "all_x_embedder", "x_pad_token", "noise_refiner"]
    before += ["cap_embedder", "cap_pad_token", "context_refiner"]
    assert names == [*before, *(f"layers.{n}" for n in range(30)), "all_final_layer"]
    assert sum(b.parameters for b in blocks(plan, "transformer")) == 6_154_908_736
    names = [block.name for block in blocks(plan, "text_encoder")]
    assert names == ["embed_tokens", *(f"layers.{n}" for n in range(36)), "norm"]


def test_flux_has_two_kinds_of_blocks() -> None:
    found = _blocks("flux", "transformer")
    names = [block.name for block in found]
    double = [f"transformer_blocks.{n}" for n in range(19)]
    single = [f"single_transformer_blocks.{n}" for n in range(38)]
    before = ["x_embedder", "context_embedder", "time_text_embed"]
    assert names == [*before, *double, *single, "norm_out", "proj_out"]
    assert {block.channels for block in found if "blocks" in block.name} == {3072}
    assert sum(block.parameters for block in found) == 11_901_408_320
    (drawing,) = draw("transformer", found)
    assert [box.layers for box in drawing.boxes] == [0, 0, 0, 19, 38, 0, 0]


def test_t5_stands_in_the_order_of_its_blocks() -> None:
    found = _blocks("flux", "text_encoder_2")
    middle = [f"encoder.block.{n}" for n in range(24)]
    assert [b.name for b in found] == ["shared", *middle, "encoder.final_layer_norm"]
    assert {block.channels for block in found} == {4096}
