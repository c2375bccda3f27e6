"""The drawing of a network: true to its blocks, and nothing upon anything else."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from ckptconv import inspect
from ckptconv.reports.html.boxes import places
from ckptconv.reports.html.drawing import draw
from ckptconv.reports.network import Block
from tests.conftest import PUBLISHED, Sample
from tests.support.pages import page_of, published_page


def boxes(content: str) -> dict[str, dict[str, float]]:
    """Returns the boxes of the wide drawing of the UNet, by the name that begins their titles."""
    drawing = re.search(r'<svg[^>]*class="network wide".*?</svg>', content, re.DOTALL)
    assert drawing
    found = re.findall(r"<title>([^<:]+):[^<]*</title><rect ([^>]*)>", drawing[0])
    return {
        name: {k: float(v) for k, v in re.findall(r'(\w+)="([\d.]+)"', attributes)}
        for name, attributes in found
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_unet_is_drawn_as_a_u_with_its_skip_connections(name: str) -> None:
    content = published_page(name).content
    at = boxes(content)
    levels = sum(name.startswith("down_blocks") for name in at)
    assert levels >= 3
    for n in range(levels):
        down, up = at[f"down_blocks.{n}"], at[f"up_blocks.{levels - 1 - n}"]
        assert down["y"] == up["y"]
        assert down["x"] + down["width"] < up["x"]
        assert n == 0 or down["y"] > at[f"down_blocks.{n - 1}"]["y"]
        assert n == 0 or down["x"] > at[f"down_blocks.{n - 1}"]["x"]
        assert down["y"] < at["mid_block"]["y"]
    assert content.count('<polyline class="skip"') == 2 * levels  # for the desktop and the phone
    assert content.count("3 skip connections") == levels
    sizes = re.findall(r">(?:1/(\d) of|at) the latent size<", content)
    assert sizes == ["", "2", "4", "8"][:levels]


def test_a_box_says_channels_attention_depth_and_the_place_in_the_file() -> None:
    content = published_page("sdxl-base-fp16").content
    assert (
        "<title>down_blocks.1: 640 channels, 2 resnets, attention of 2+2 transformer blocks, "
        "downsample, 60,105,600 parameters, 2.3% of the component. In the file: "
        "model.diffusion_model.input_blocks.4.0, model.diffusion_model.input_blocks.4.1, "
        "model.diffusion_model.input_blocks.5.0, model.diffusion_model.input_blocks.5.1, "
        "model.diffusion_model.input_blocks.6.0</title>"
    ) in content
    assert re.search(r'<text class="where"[^>]*>input_blocks\.4-6</text>', content)
    signs = re.findall(r'<text class="sign on-attention"[^>]*>(\w+)</text>', content)
    assert Counter(signs) == {"10": 2 * 6, "2": 2 * 5, "A": 2}


def test_a_stack_of_two_layers_is_no_normalization_with_a_convolution(sample: Sample) -> None:
    content = page_of(inspect(sample("sd1")))
    assert "text_model.encoder.layers.0-1" in content
    assert "layers.1 + norm" not in content


def block(name: str, resnets: int = 0, resamples: str = "") -> Block:
    return Block(name, 32, resnets, (), resamples, 100, (f"input_blocks.{name}",))


@pytest.mark.parametrize(
    "members",
    [
        [block("down_blocks.0", 1, "down"), block("down_blocks.1", 1), block("up_blocks.0", 2)],
        [block("down_blocks.0", 2), block("up_blocks.0", 3, "up"), block("up_blocks.1", 3)],
        [block("decoder.conv_in"), block("decoder.up_blocks.0", 3, "up")],
        [block(f"{name}_embedding") for name in ("time", "add", "class", "other")]
        + [block("down_blocks.0", 2), block("mid_block", 1), block("up_blocks.0", 3)],
    ],
    ids=["no middle", "uneven", "half a network", "much beside it"],
)
def test_an_unusual_network_is_drawn_without_a_box_upon_another(members: list[Block]) -> None:
    members = [block("conv_in"), *members, block("conv_norm_out"), block("conv_out")]
    for drawing in draw("unet", members):
        assert {b.name for box in drawing.boxes for b in box.row} == {b.name for b in members}
        for one, other in itertools.combinations(drawing.boxes, 2):
            beside = one.right <= other.x or other.right <= one.x
            assert beside or one.bottom <= other.y or other.bottom <= one.y
        assert max(box.right for box in drawing.boxes) <= drawing.sizes.width
        assert max(box.bottom for box in drawing.boxes) <= drawing.height


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.1.0", "a.2.0", "a.3.1"], "a.1-3"),
        (["a.10", "a.9"], "a.9-10"),
        (["a.1", "a.3"], "a.1, 3"),
        (["a.1"], "a.1"),
        (["mid.attn.k", "mid.block.conv"], "mid"),
        (["a.k", "b.k"], "a, b"),
    ],
)
def test_places_in_the_file_are_said_in_short(names: list[str], short: str) -> None:
    assert places(names) == short
