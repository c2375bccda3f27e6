"""The table of relatives is true: each is walked on a file that was made without the key maps.

The files hold reference networks of `tests/support/reference` with random weights. What the table
promises is done as a user does it, with the commands.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from ckptconv.cli import main
from ckptconv.maps.architecture import Relative, bundled
from ckptconv.maps.schema import Named
from tests.architectures.test_oracle import UNETS
from tests.support.reference import controlnet, text, unet, vae
from tests.support.reference.files import TINY_FILES

if TYPE_CHECKING:
    from torch import Tensor, nn

    Parts = dict[str, Callable[[], nn.Module]]

pytestmark = pytest.mark.slow

README = Path(__file__).parents[2] / "README.md"
RELATIVES = {relative.name: relative for relative in bundled().typed(Named[Relative], "relatives")}

CLIP = partial(text.ClipText, text.TINY_CLIP)
OPENCLIP = partial(text.OpenClipText, text.TINY_OPENCLIP)
VAE = partial(vae.Vae, vae.TINY_VAE)
ENCODERS: dict[str, Parts] = {
    "sd1": {"cond_stage_model.transformer.": CLIP},
    "sd2": {"cond_stage_model.model.": OPENCLIP},
    "sdxl": {
        "conditioner.embedders.0.transformer.": CLIP,
        "conditioner.embedders.1.model.": OPENCLIP,
    },
    "refiner": {"conditioner.embedders.0.model.": OPENCLIP},
}


@functools.cache
def network_of(config: unet.UNetConfig) -> Callable[[], nn.Module]:
    """What builds a UNet: the same object for the same UNet, so that it is built once."""
    return partial(unet.UNet, config)


def whole(family: str, network: unet.UNetConfig) -> Parts:
    """What builds a checkpoint: UNet, VAE and text encoders, by prefix."""
    return {
        "model.diffusion_model.": network_of(network),
        "first_stage_model.": VAE,
        **ENCODERS[family],
    }


MEAN, STD = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([0.9, 1.1, 1.2, 0.8])
NOTHING = torch.zeros(0)
SIGMAS = {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
SHALLOW = replace(
    unet.TINY_SDXL,
    input_depth=((0, 0), (1, 1), (2, 2)),
    output_depth=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
    middle_depth=2,
)
SDXL_EDIT = replace(SHALLOW, in_channels=8)
FAT_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""The tensor of SD2 whose values spread more widely in the 768-v model."""

FILES: dict[str, tuple[Parts, Mapping[str, Tensor]]] = {
    "Stable Diffusion 1.x": (whole("sd1", unet.TINY_SD1), {}),
    "SD1 inpainting": (whole("sd1", unet.TINY_SD1_INPAINT), {}),
    "SD1 InstructPix2Pix": (whole("sd1", replace(unet.TINY_SD1, in_channels=8)), {}),
    "SD1 distilled with guidance (LCM)": (whole("sd1", unet.TINY_LCM), {}),
    "SD1 v-prediction": (whole("sd1", unet.TINY_SD1), {"v_pred": NOTHING}),
    "SD1 with a ControlNet in it": (
        whole("sd1", unet.TINY_SD1)
        | {"control_model.": partial(controlnet.ControlNet, controlnet.TINY_CONTROL_SD1)},
        {},
    ),
    "Stable Diffusion 2.x (768-v)": (
        whole("sd2", unet.TINY_SD2),
        {FAT_BIAS: torch.linspace(-1, 1, 64)},
    ),
    "Stable Diffusion 2.x base": (
        whole("sd2", unet.TINY_SD2),
        {FAT_BIAS: torch.linspace(-0.1, 0.1, 64)},
    ),
    "SD2 inpainting": (whole("sd2", replace(unet.TINY_SD2, in_channels=9)), {}),
    "SD2 depth-to-image": (TINY_FILES["sd2-depth"], {}),
    "SD2.1 unCLIP L": (TINY_FILES["sd2-unclip-l"], {}),
    "SD2.1 unCLIP H": (TINY_FILES["sd2-unclip-h"], {}),
    "SD2 x4 upscaler": (TINY_FILES["x4-upscaler"], {}),
    "Stable Diffusion XL": (whole("sdxl", SHALLOW), {}),
    "SDXL refiner": (whole("refiner", unet.TINY_REFINER), {}),
    "SDXL inpainting": (whole("sdxl", replace(SHALLOW, in_channels=9)), {}),
    "SDXL InstructPix2Pix": (whole("sdxl", SDXL_EDIT), {}),
    "SDXL v-prediction, zero terminal SNR": (
        whole("sdxl", SHALLOW),
        {"v_pred": NOTHING, "ztsnr": NOTHING},
    ),
    "Playground v2.5": (whole("sdxl", SHALLOW), {"edm_mean": MEAN, "edm_std": STD}),
    "CosXL": (whole("sdxl", SHALLOW), SIGMAS),
    "CosXL-edit": (whole("sdxl", SDXL_EDIT), SIGMAS),
    "Segmind SSD-1B": (whole("sdxl", UNETS["ssd-1b"]), {}),
    "Segmind Vega": (whole("sdxl", UNETS["vega"]), {}),
    "KOALA-700M": (whole("sdxl", UNETS["koala-700m"]), {}),
    "KOALA-1B": (whole("sdxl", UNETS["koala-1b"]), {}),
    "ControlNet for SD1": (TINY_FILES["controlnet-sd1"], {}),
    "ControlNet for SD2": (TINY_FILES["controlnet-sd2"], {}),
    "ControlNet for SDXL": (TINY_FILES["controlnet-sdxl"], {}),
    "VAE": ({"": VAE}, {}),
    "CLIP text encoder": ({"": CLIP}, {}),
    "OpenCLIP text encoder": ({"": OPENCLIP}, {}),
}
"""By relative, the networks of its file by prefix, and the tensors that mark it."""

CONFIGS: dict[str, dict[str, Any]] = {
    "SD1 distilled with guidance (LCM)": {"unet.time_cond_proj_dim": 256},
    "SD1 v-prediction": {"scheduler.prediction_type": "v_prediction"},
    "Stable Diffusion 2.x (768-v)": {"scheduler.prediction_type": "v_prediction"},
    "Stable Diffusion 2.x base": {"scheduler.prediction_type": "epsilon"},
    "SD2.1 unCLIP H": {"unet.class_embed_type": "projection"},
    "SD2 x4 upscaler": {
        "unet.only_cross_attention": [True, True, True, False],
        "scheduler.prediction_type": "v_prediction",
    },
    "SDXL v-prediction, zero terminal SNR": {
        "scheduler.prediction_type": "v_prediction",
        "scheduler.rescale_betas_zero_snr": True,
    },
    "Playground v2.5": {
        "vae.latents_mean": pytest.approx(MEAN.tolist()),
        "vae.latents_std": pytest.approx(STD.tolist()),
        "scheduler._class_name": "EDMDPMSolverMultistepScheduler",
    },
    "CosXL": {
        "scheduler._class_name": "EDMEulerScheduler",
        "scheduler.prediction_type": "v_prediction",
    },
    "Segmind Vega": {"unet.mid_block_type": "UNetMidBlock2D"},
    "KOALA-700M": {"unet.mid_block_type": None},
}
"""By relative, values that only it has."""


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


@functools.cache
def state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The tensors of a network with random weights, the same each time."""
    return {k: v.half().contiguous() for k, v in unet.randomise(build(), 1).state_dict().items()}


def written(name: str, path: Path) -> None:
    parts, marks = FILES[name]
    made = {prefix + k: v for prefix, build in parts.items() for k, v in state(build).items()}
    if FAT_BIAS in marks:
        assert made[FAT_BIAS].shape == marks[FAT_BIAS].shape
    save_file({k: v.clone() for k, v in {**made, **marks}.items()}, path)


def test_every_relative_is_walked_and_every_architecture_has_one() -> None:
    assert FILES.keys() == RELATIVES.keys()
    known = {(a.name, t.name) for a in bundled().architectures.values() for t in a.tasks}
    named = {(r.architecture, r.task) for r in RELATIVES.values()}
    assert named <= known
    assert {name for name, _ in named} == set(bundled().architectures)
    assert CONFIGS.keys() <= FILES.keys()


@pytest.mark.parametrize("name", RELATIVES)
def test_what_the_table_promises_is_true(name: str, tmp_path: Path) -> None:
    relative, file, folder = RELATIVES[name], tmp_path / "model.safetensors", tmp_path / "out"
    written(name, file)
    found = json.loads(run("inspect", file, "--json").stdout)
    assert (found["architecture"], found["task"]) == (relative.architecture, relative.task)
    assert not found["unclaimed"]
    assert not found["problems"]
    run("convert", file, folder)
    for place, value in CONFIGS.get(name, {}).items():
        component, _, entry = place.partition(".")
        stem = "scheduler_config" if component == "scheduler" else "config"
        assert json.loads((folder / component / f"{stem}.json").read_bytes())[entry] == value
    run("verify", file, folder)
    run("export", folder, tmp_path / "back.safetensors")
    back, source = load_file(tmp_path / "back.safetensors"), load_file(file)
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)
    if not bundled().architectures[relative.architecture].single:
        makes_an_image(relative.task, file, tmp_path)


STATISTICS = ("mean", "std")
"""Of the image embeddings of unCLIP: no checkpoint holds them, so they are given."""


NEEDS = {
    "controlnet": ["--image"],
    "depth-to-image": ["--image", "--strength"],
    "image-to-image": ["--image", "--strength"],
    "image-variation": ["--image", "--image-normalizer"],
    "inpainting": ["--image", "--mask", "--strength"],
    "instruct-pix2pix": ["--image"],
    "upscaling": ["--image"],
}


def makes_an_image(task: str, file: Path, folder: Path) -> None:
    size = 256 if task == "upscaling" else 64
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    width = TINY_FILES["sd2-unclip-l"]["embedder.model."]().state_dict()["visual.proj"].shape[1]
    save_file({n: torch.ones(1, width) for n in STATISTICS}, folder / "statistics.safetensors")
    values: dict[str, object] = {
        "--image": folder / "image.png",
        "--mask": folder / "image.png",
        "--strength": 1,
    }
    values["--image-normalizer"] = folder / "statistics.safetensors"
    options = [part for option in NEEDS.get(task, ()) for part in (option, values[option])]
    out = folder / "out.png"
    settings = ("--steps", 1, "--size", size, "--seed", 7, "--device", "cpu")
    run("generate", file, "a cat", "-o", out, *settings, *options)
    made = np.asarray(Image.open(out))
    assert made.shape == (size, size, 3)
    assert made.std() > 1


def test_the_readme_shows_the_table() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| `([^`]+)` \| ([^|]+) \| (yes|[^|]+) \|$", README.read_text(), re.M
    )
    shown = {row[0]: row[1:] for row in rows}
    for name, relative in RELATIVES.items():
        architecture, task, runs = shown[name]
        assert (architecture, task) == (relative.architecture, relative.task)
        assert (runs == "no") == bool(bundled().architectures[relative.architecture].single)


def test_the_command_shows_the_table() -> None:
    shown = json.loads(run("architectures", "--json").stdout)
    assert [r["name"] for r in shown["relatives"]] == list(RELATIVES)
    text = run("architectures").stdout
    assert all(name in text for name in RELATIVES)
