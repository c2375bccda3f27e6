"""Components that do not belong together are refused, with the shapes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ckptconv.cli import main
from ckptconv.detection.detect import detect
from ckptconv.errors import Incomplete
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from ckptconv.planning.plan import Plan, build_plan
from ckptconv.sample import layout_of
from tests.conftest import Folder, made
from tests.support.checkpoints import raw, save

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CONV_IN, CONV_OUT = f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight"
LATENTS = f"{VAE}decoder.conv_in.weight"
IMAGE = f"{UNET}label_emb.0.0.weight"
ATTENTION = "transformer_blocks.0.attn2.to_k.weight"
TASKS = [
    (a, t) for a in bundled().architectures.values() if not a.single for t in a.tasks if a.shows(t)
]

Wrong = dict[str, tuple[int, int]]
"""By key of the file, an axis and a wrong length."""


def plan_of(architecture: str, task: str | None = None, wrong: Wrong | None = None) -> Plan:
    layout = layout_of(bundled().architectures[architecture], task=task, full=True)
    shapes = {key: shape for key, _, shape in layout}
    for key, (axis, length) in (wrong or {}).items():
        shapes[key] = (*shapes[key][:axis], length, *shapes[key][axis + 1 :])
    return build_plan(detect(made(shapes)))


@pytest.mark.parametrize(
    ("architecture", "task"), [pytest.param(a.name, t.name, id=f"{a}-{t.name}") for a, t in TASKS]
)
def test_the_components_of_every_published_file_fit_together(architecture: str, task: str) -> None:
    plan = plan_of(architecture, task)
    assert plan.problems == plan.misfits == ()
    found = plan.detection.require()[0]
    joined = {name for joint in found.joints for name in (*joint.reads, *joint.gives)}
    models = {component.name for component in found.models} - {"depth_estimator"}
    assert models <= {name.partition("/")[0] for name in joined}
    start = {"unet/conv_in.weight", "transformer/context_embedder.weight"}
    start |= {"transformer/cap_embedder.1.weight"}
    assert any(start & joint.reads.keys() for joint in found.joints)


@pytest.mark.parametrize(
    ("architecture", "task", "wrong", "said"),
    [
        (
            "sd1",
            None,
            {f"{UNET}output_blocks.3.1.{ATTENTION}": (1, 64)},
            f"unet/up_blocks.1.attentions.0.{ATTENTION} has shape [1280, 64], but axis 1 should be "
            "768: text_encoder/text_model.final_layer_norm.weight has shape [768]",
        ),
        (
            "sd1",
            None,
            {LATENTS: (1, 16)},
            "unet/conv_out.weight has shape [4, 320, 3, 3], but axis 0 should be 16: "
            "vae/decoder.conv_in.weight has shape [512, 16, 3, 3]",
        ),
        (
            "sd1",
            "controlnet",
            {f"control_model.input_blocks.1.1.{ATTENTION}": (1, 1024)},
            f"controlnet/down_blocks.0.attentions.0.{ATTENTION} has shape [320, 1024], but axis 1 "
            "should be 768: text_encoder/text_model.final_layer_norm.weight has shape [768]",
        ),
        (
            "sd1",
            "controlnet",
            {"control_model.middle_block_out.0.weight": (0, 640)},
            "controlnet/controlnet_mid_block.weight has shape [640, 1280, 1, 1], but axis 0 should "
            "be 1280: unet/mid_block.resnets.0.conv1.weight has shape [1280, 1280, 3, 3]",
        ),
        (
            "sdxl",
            None,
            {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (0, 512)},
            f"unet/down_blocks.1.attentions.0.{ATTENTION} has shape [640, 2048], but axis 1 should "
            "be 1792: text_encoder/text_model.final_layer_norm.weight has shape [512] and "
            "text_encoder_2/text_model.final_layer_norm.weight has shape [1280]",
        ),
        (
            "sdxl",
            None,
            {IMAGE: (1, 2560)},
            "unet/add_embedding.linear_1.weight has shape [1280, 2560], but axis 1 should be 2816: "
            "text_encoder_2/text_projection.weight has shape [1280, 1280] (it reads the pooled "
            "text and 6 numbers of 256 channels each)",
        ),
        (
            "flux",
            None,
            {"vae.decoder.conv_in.weight": (1, 4)},
            "transformer/proj_out.weight has shape [64, 3072], but axis 0 should be 16: "
            "vae/decoder.conv_in.weight has shape [512, 4, 3, 3]",
        ),
        (
            "flux",
            None,
            {f"{UNET}txt_in.weight": (1, 2048)},
            "transformer/context_embedder.weight has shape [3072, 2048], but axis 1 should be 4096"
            ": text_encoder_2/encoder.final_layer_norm.weight has shape [4096]",
        ),
        (
            "chroma",
            None,
            {f"{UNET}txt_in.weight": (1, 2048)},
            "axis 1 should be 4096: text_encoder/",
        ),
        (
            "z-image",
            None,
            {f"{UNET}cap_embedder.1.weight": (1, 2048)},
            "axis 1 should be 2560: text_encoder/norm.weight has shape [2560]",
        ),
        (
            "z-image",
            None,
            {"vae.decoder.conv_in.weight": (1, 4)},
            "transformer/all_x_embedder.2-1.weight has shape [3840, 64], but axis 1 should be 16: ",
        ),
        ("sdxl-refiner", None, {IMAGE: (1, 2816)}, "but axis 1 should be 2560: text_encoder_2/"),
        ("sd2-unclip", None, {IMAGE: (1, 1536)}, "but axis 1 should be 2048: image_encoder/visual"),
    ],
)
def test_a_component_that_does_not_fit_is_named_with_both_shapes(
    architecture: str, task: str | None, wrong: Wrong, said: str
) -> None:
    plan = plan_of(architecture, task, wrong)
    (problem,) = plan.problems
    assert said in problem
    with pytest.raises(Incomplete, match="its components do not fit together"):
        plan.require_complete()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [pytest.param(a.name, t.name, id=f"{a}-{t.name}") for a, t in TASKS if a.main == "unet"],
)
def test_a_unet_of_too_many_outputs_fits_no_latents(architecture: str, task: str) -> None:
    channels = next(t.channels for a, t in TASKS if (a.name, t.name) == (architecture, task))
    problems = plan_of(architecture, task, {CONV_OUT: (0, 8)}).problems
    assert [p.partition(" ")[0] for p in problems[:2]] == [
        "unet/conv_out.weight",
        "unet/conv_in.weight",
    ]
    assert f", {channels}, 3, 3], but axis 1 should be " in problems[1]


@pytest.mark.parametrize("choices", [{"only": ["unet"]}, {"only": ["vae", "text_encoder"]}])
def test_what_is_left_out_is_joined_to_nothing(small: Path, choices: Any) -> None:
    tensors = {k: s for k, (_, s, _) in raw(small).items()}
    wide = tensors | {LATENTS: (64, 16, 3, 3)}
    assert build_plan(detect(made(wide))).problems
    assert not build_plan(detect(made(wide)), Options.of(choices)).problems


@pytest.fixture
def misfit(small: Path, tmp_path: Path) -> Path:
    """A small SD1 checkpoint with the VAE of another family."""
    tensors = raw(small)
    dtype, shape, data = tensors[LATENTS]
    tensors[LATENTS] = (dtype, (shape[0], 4 * shape[1], *shape[2:]), data * 4)
    return save(tensors, tmp_path / "misfit.safetensors")


def test_every_command_refuses(misfit: Path, folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = "unet/conv_out.weight has shape [4, 4, 3, 3], but axis 0 should be 16: vae/decoder."
    calls: list[tuple[Any, ...]] = [
        ("inspect", misfit),
        ("plan", misfit),
        ("convert", misfit, out),
        ("verify", misfit, folder("small")),
        ("generate", misfit, "a prompt", "-o", tmp_path / "image.png"),
    ]
    for call in calls:
        result = CliRunner().invoke(main, [*map(str, call)])
        assert result.exit_code == (1 if call[0] == "verify" else 3), call
        assert said in result.output.replace("\n", ""), call
    assert not out.exists()
