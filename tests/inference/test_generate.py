"""`ckptconv generate`: every architecture and task makes an image, twice the same."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ckptconv.cli import main
from ckptconv.errors import UsageError, on_the_command_line
from ckptconv.inference.generation import (
    Settings,
    call_arguments,
    check,
    generate,
    negative_warnings,
    parse_pixels,
    prompt_warnings,
)
from ckptconv.inference.model import open_model
from ckptconv.inference.pipeline import load_pipeline, pipeline_class
from ckptconv.options import Options
from tests.conftest import Folder, Sample
from tests.support.pipelines import SMALL, TASKS, WHOLE, Run, parameters, pixels, runner

CASES = [
    (name, own.name, task)
    for name, own in TASKS
    for task in (own.name, *(own.also if name in WHOLE else ()))
    if name in ("sd1", "sdxl-refiner", "sd2-unclip") or task != own.name
]
"""The tasks of one architecture, and those that weights can do besides; the tasks of all others are
run in tests/architectures/."""
NEEDS = {
    "text-to-image": (),
    "controlnet": ("image",),
    "image-to-image": ("image",),
    "depth-to-image": ("image",),
    "instruct-pix2pix": ("image",),
    "image-variation": ("image",),
    "upscaling": ("image",),
    "inpainting": ("image", "mask"),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    pixels = np.zeros((48, 96), np.uint8)
    pixels[:, 48:] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "own", "task"), CASES)
def test_every_task_makes_the_same_image_twice(
    architecture: str, own: str, task: str, sample: Sample, run: Run, image: Path, mask: Path
) -> None:
    file = sample(architecture, task=own)
    given = {"image": image, "mask": mask}
    options = [part for name in NEEDS[task] for part in (f"--{name}", given[name])]
    cls, _ = pipeline_class(open_model(file, Options()), task)
    if "strength" in inspect.signature(cls.__call__).parameters:
        options += ["--strength", "0.9"]
    if task != own:
        options += ["--task", task]
    run(file, *SMALL, *options, out="one.png")
    run(file, *SMALL, *options, out="two.png")
    one, two = image.parent / "one.png", image.parent / "two.png"
    assert one.read_bytes() == two.read_bytes()
    made = pixels(one)
    assert made.shape == (64, 64, 3)
    assert made.std() > 10
    said = parameters(one)
    assert (said["task"], said["seed"], said["model"]) == (task, 7, file.name)
    assert said["pipeline"] == cls.__name__


@pytest.mark.slow
def test_the_whole_program_says_what_matters_and_nothing_else(
    sample: Sample, tmp_path: Path, image: Path
) -> None:
    out = tmp_path / "out.png"
    # This one makes the libraries say the most: two encoders, and a VAE that is upcast and back.
    options = ["--task", "image-to-image", "--image", image, "--strength", "1", "--dtype", "fp16"]
    command = [sys.executable, "-m", "ckptconv", "generate", sample("sdxl"), "a cat", "-o", out]
    done = subprocess.run(  # noqa: S603  (our own command)
        [*map(str, command), *map(str, options), *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert done.stderr.splitlines() == ["device cpu: as asked", f"{out}: seed 7"]
    assert parameters(out)["dtype"] == "float16"
    assert pixels(out).std() > 10


def test_the_png_carries_its_parameters(sample: Sample, run: Run, tmp_path: Path) -> None:
    result = run(sample("sd1"), *SMALL, "--negative", "größer 猫", "--guidance", "3", "--json")
    said = parameters(tmp_path / "out.png")
    (listed,) = json.loads(result.stdout)["images"]
    assert listed == {"file": str(tmp_path / "out.png"), **said}
    versions = said.pop("versions")
    assert versions.keys() == {"ckptconv", "diffusers", "torch"}
    assert said == {
        "prompt": "a cat",
        "negative": "größer 猫",
        "steps": 2,
        "guidance": 3,
        "guidance_rescale": 0.0,
        "seed": 7,
        "width": 64,
        "height": 64,
        "scheduler": "PNDMScheduler",
        "task": "text-to-image",
        "pipeline": "StableDiffusionPipeline",
        "model": sample("sd1").name,
        "loras": [],
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.mark.slow
def test_every_setting_changes_the_image(sample: Sample) -> None:
    pipe = load_pipeline(sample("sd1"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    plain = Settings("a cat", steps=2, size=(64, 64))
    changes: dict[str, Any] = {
        "prompt": "a dog",
        "negative": "a dog",
        "guidance": 1.5,
        "guidance_rescale": 1.0,
        "steps": 3,
        "size": (64, 72),
    }
    asked = [plain, *(replace(plain, **{name: value}) for name, value in changes.items())]
    made = [generate(pipe, call_arguments(pipe, settings, {}), 7) for settings in asked]
    made.append(generate(pipe, call_arguments(pipe, plain, {}), 8))
    assert len({image.tobytes() for image in made}) == len(changes) + 2
    assert made[-2].size == (64, 72)


@pytest.mark.slow
def test_several_images_have_seeds_of_their_own(sample: Sample, run: Run, tmp_path: Path) -> None:
    result = run(sample("sd1"), *SMALL, "--count", "2")
    paths = [tmp_path / "out-1.png", tmp_path / "out-2.png"]
    assert result.stdout.splitlines() == list(map(str, paths))
    assert [parameters(path)["seed"] for path in paths] == [7, 8]
    run(sample("sd1"), *SMALL, "--seed", "8", out="eight.png")
    assert np.array_equal(pixels(paths[1]), pixels(tmp_path / "eight.png"))
    assert not np.array_equal(pixels(paths[0]), pixels(paths[1]))


@pytest.mark.slow
def test_a_seed_is_drawn_and_printed(sample: Sample, run: Run, tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        result = run(sample("sd1"), *SMALL[:4], "--device", "cpu", "--overwrite")
        seed = parameters(tmp_path / "out.png")["seed"]
        assert f"out.png: seed {seed}" in result.stderr
        said.append(seed)
    assert said[0] != said[1]


@pytest.mark.slow
def test_the_size_follows_the_image_and_then_the_training(
    sample: Sample, run: Run, image: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.png"
    with Image.open(image) as file:
        file.resize((75, 43)).save(odd)
    own = ("--steps", "2", "--device", "cpu", "--seed", "1", "--strength", "1")
    run(sample("sd1"), *own, "--task", "image-to-image", "--image", odd)
    assert pixels(tmp_path / "out.png").shape == (40, 72, 3)
    with_config = load_pipeline(sample("sd2"), device="cpu")
    assert with_config.unet.config.sample_size * with_config.vae_scale_factor == 768


@pytest.mark.slow
@pytest.mark.parametrize("task", ["inpainting", "image-to-image"])
def test_an_image_is_what_is_changed(
    task: str, sample: Sample, run: Run, image: Path, mask: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (96, 48), (250, 10, 10)).save(other)
    masked = ("--mask", mask) if task == "inpainting" else ()
    made = []
    for source in (image, other):
        run(
            sample("sd1"), *SMALL, "--steps", "4", "--strength", "0.5", "--task", task,
            "--image", source, *masked, "--overwrite",
        )  # fmt: skip
        made.append(pixels(tmp_path / "out.png"))
    assert np.abs(made[0] - made[1]).mean() > 1


@pytest.mark.slow
def test_zero_terminal_snr_rescales_the_guidance(sample: Sample, run: Run, tmp_path: Path) -> None:
    trained = ("--prediction-type", "v_prediction", "--zero-terminal-snr")
    run(sample("sdxl"), *SMALL, *trained)
    assert parameters(tmp_path / "out.png")["guidance_rescale"] == 0.7
    result = run(sample("sdxl"), *SMALL, *trained, "--overwrite", "--scheduler", "PNDMScheduler")
    assert "warning: PNDMScheduler knows no zero terminal SNR" in result.stderr


def test_what_diffusers_refuses_is_no_traceback(
    sample: Sample, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(StableDiffusionPipeline.__call__)
    def refusing(*_: object, **__: object) -> None:
        raise ValueError("`callback_steps` has to be a positive integer")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.__call__", refusing)
    result = run(sample("sd1"), *SMALL, code=2)
    assert "error: diffusers refuses these options: `callback_steps` has to be" in result.stderr


def test_compile_compiles_the_unet(
    sample: Sample, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__)
    )
    run(sample("sd1"), *SMALL, "--compile")
    assert compiled == ["UNet2DConditionModel"]


@pytest.mark.slow
def test_on_the_cpu_weights_become_fp32_unless_asked(
    sample: Sample, run: Run, tmp_path: Path, folder: Folder
) -> None:
    run(sample("sdxl"), *SMALL)
    assert parameters(tmp_path / "out.png")["dtype"] == "float32"
    run(folder("sdxl"), *SMALL, "--overwrite", "--dtype", "bf16")
    assert parameters(tmp_path / "out.png")["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_folder_makes_the_same_image_as_its_file(
    sample: Sample, folder: Folder, run: Run, tmp_path: Path
) -> None:
    run(sample("sd2"), *SMALL, out="file.png")
    run(folder("sd2"), *SMALL, out="folder.png")
    assert np.array_equal(pixels(tmp_path / "file.png"), pixels(tmp_path / "folder.png"))


IMAGE, MASK = Path("image.png"), Path("mask.png")


@pytest.mark.parametrize(
    ("task", "settings", "problems"),
    [
        (
            "text-to-image",
            {"mask": MASK, "strength": 0.5},
            ["--strength does not fit", "--mask does not fit"],
        ),
        ("text-to-image", {"image_guidance": 2.0}, ["--image-guidance does not fit"]),
        ("image-to-image", {}, ["--image is missing: image-to-image needs it"]),
        ("inpainting", {"image": IMAGE}, ["--mask is missing: inpainting needs it"]),
        (
            "image-to-image",
            {"image": IMAGE, "strength": 1.5},
            ["--strength 1.5 is not above 0 and at most 1"],
        ),
        (
            "image-to-image",
            {"image": IMAGE, "steps": 1},
            ["--steps 1 times strength 0.8 is less than one step"],
        ),
    ],
)
def test_options_that_do_not_fit_the_task(
    task: str, settings: Mapping[str, Any], problems: list[str], sample: Sample
) -> None:
    cls, name = pipeline_class(open_model(sample("sd1"), Options()), task)
    wrong = pytest.raises(UsageError, match=f"the options do not fit {task}")
    with on_the_command_line(), wrong as caught:
        check(cls, name, Settings("a cat", **settings))
    assert len(caught.value.problems) == len(problems)
    for said, problem in zip(caught.value.problems, problems, strict=True):
        assert said.startswith(problem)
    assert "--task" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a (red:1.2) fox", ["(red:1.2)"]),
        ("a ((red)) [fox]", ["((red))", "[fox]"]),
        ("a fox BREAK a hen AND a cock", ["BREAK", "AND"]),
        ("a fox <lora:style:0.8>", ["<lora:style:0.8>"]),
        (r"a fox (vulpes), at 12:30, by j \(\(1\)\), \[sic\], break and", []),
    ],
)
def test_the_syntax_of_web_uis_is_said_to_be_plain_text(text: str, found: list[str]) -> None:
    assert prompt_warnings(Settings("a fox")) == []
    said = prompt_warnings(Settings(text, negative=text))
    assert [f"diffusers reads {', '.join(found)} in the " in line for line in said] == (
        [True, True] if found else []
    )
    assert all(("lora=FILE:0.8" in line) == ("<lora" in text) for line in said)


@pytest.mark.parametrize(
    ("cls", "guidance", "said"),
    [
        ("FluxPipeline", None, "the guidance of FluxPipeline knows no negative prompt"),
        ("FluxKontextPipeline", 9, "the guidance of FluxKontextPipeline knows no negative prompt"),
        ("FluxFillPipeline", None, ""),  # `check` refuses it
        ("StableDiffusion3Pipeline", None, ""),
        ("StableDiffusion3Pipeline", 0, "has no effect with guidance=0: it takes more than 1"),
        ("StableDiffusionXLPipeline", 1, "has no effect with guidance=1: it takes more than 1"),
        ("ChromaPipeline", 3, ""),
    ],
)
def test_a_negative_prompt_without_effect_is_noted(
    cls: str, guidance: float | None, said: str
) -> None:
    pipeline = getattr(diffusers, cls)
    assert negative_warnings(pipeline, Settings("a fox", guidance=guidance)) == []
    found = negative_warnings(pipeline, Settings("a fox", negative="fur", guidance=guidance))
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_options_as_web_uis_call_them(sample: Sample, run: Run, tmp_path: Path) -> None:
    words = ("--cfg", "3", "--width", "72", "--height", "64", "--sampler", "dpm++ 2m sde karras")
    result = run(sample("sd1"), *SMALL[2:], *words, "--negative", "<lora:x:1>")
    assert "warning: diffusers reads <lora:x:1> in the negative as plain text" in result.stderr
    said = parameters(tmp_path / "out.png")
    assert (said["guidance"], said["width"], said["height"]) == (3, 72, 64)
    assert (said["scheduler"], said["sampler"]) == ("DPMSolverMultistepScheduler", words[-1])
    for wrong in (("--width", "64"), ("--size", "64", "--width", "64", "--height", "64")):
        assert "go together, without --size" in run(sample("sd1"), *wrong, code=2).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("60", "60 does not divide by 8"),
        ("64x100", "64x100 does not divide by 8"),
        ("0x64", "no size"),
        ("64x64x64", "no size"),
        ("axb", "no size"),
        ("٦٤", "no size"),
        ("", "no size"),
    ],
)
def test_sizes_are_multiples_of_8(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pixels(text)


def test_a_near_size_is_proposed() -> None:
    with pytest.raises(UsageError) as caught:
        parse_pixels("1023x3")
    assert caught.value.hint == "take 1024x8"
    assert parse_pixels("1024X768") == (1024, 768)


def test_outputs_that_cannot_be(sample: Sample, run: Run, tmp_path: Path) -> None:
    file = sample("sd1")
    assert "only PNG is written" in run(file, out="out.jpg", code=2).stderr
    assert "null: is not a folder" in run(file, out="/dev/null/out.png", code=3).stderr
    (tmp_path / "out.png").write_text("precious")
    assert "--overwrite replaces" in run(file, *SMALL, code=3).stderr
    assert (tmp_path / "out.png").read_text() == "precious"
    (tmp_path / "dir.png").mkdir()
    assert "exists" in run(file, *SMALL, "--overwrite", out="dir.png", code=3).stderr
    (tmp_path / "two-2.png").write_text("precious")
    assert "two-2.png: exists" in run(file, "--count", "2", out="two.png", code=3).stderr


def test_inputs_that_cannot_be(sample: Sample, run: Run, tmp_path: Path) -> None:
    nowhere = ("--task", "image-to-image", "--image", tmp_path / "no.png")
    assert "the file cannot be read" in run(sample("sd1"), *nowhere, code=3).stderr
    text = tmp_path / "text.png"
    text.write_text("no image")
    assert "give a PNG or a JPEG" in run(sample("sd1"), *nowhere[:3], text, code=3).stderr
    assert "cannot do inpainting" in run(
        sample("sd1", task="instruct-pix2pix"), "--task", "inpainting", code=2
    ).stderr  # fmt: skip
    assert "no such file" in run(tmp_path / "no.safetensors", code=3).stderr.lower()


def test_numbers_that_overflow_are_no_image(sample: Sample, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    state = load_file(sample("sd1"))
    state["first_stage_model.decoder.conv_out.bias"].fill_(float("nan"))
    save_file(state, file)
    result = run(file, *SMALL, code=3)
    assert "the image is not made of numbers" in result.stderr
    assert "--dtype bf16 or fp32" in result.stderr
    assert not (tmp_path / "out.png").exists()


def test_a_lack_of_memory_while_generating(
    sample: Sample, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    @functools.wraps(StableDiffusionPipeline.__call__)
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.__call__", full)
    result = run(sample("sd1"), *SMALL[2:], code=3)
    assert "out of memory while generating" in result.stderr
    assert "smaller --size" in result.stderr


def test_there_is_no_choice_of_components(run: Run, sample: Sample) -> None:
    assert "No such option" in run(sample("sd1"), "--only", "unet", code=2).stderr


def test_a_large_fp16_vae_is_upcast_as_diffusers_does(sample: Sample) -> None:
    pipe = load_pipeline(sample("sdxl"), device="cpu")
    assert pipe.vae.config.force_upcast is True
    assert pipe.vae.dtype == torch.float16
    seen = []
    pipe.vae.post_quant_conv.register_forward_hook(
        lambda module, *_: seen.append(module.weight.dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe("a cat", num_inference_steps=1, height=64, width=64, output_type="np")
    assert seen == [torch.float32]
    assert pipe.vae.dtype == torch.float16


def test_every_setting_is_an_option() -> None:
    command = main.get_command(click.Context(main), "generate")
    assert command is not None
    names = {option.name for option in command.params}
    assert set(Settings.__annotations__) <= names
