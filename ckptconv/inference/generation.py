"""From settings to images: what a pipeline is called with, and the PNG that comes out.

Which settings a task takes is read off the pipeline's own `__call__`, so that a setting that does
not fit is found before the weights are loaded.
"""

from __future__ import annotations

import inspect as python_inspect
import io
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..destination import Destination
from ..detection.facts import hold
from ..errors import CkptconvError, DeviceError, FileRefused, UsageError, option
from ..files import read_small
from ..libraries import library_version
from ..maps.architecture import bundled
from ..version import __version__
from .device import less_memory, memory_errors
from .model import VERIFY, Model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

Pipeline = Any
"""A pipeline of diffusers, whose attributes depend on its class."""

TASKS = (
    *("text-to-image", "image-to-image", "inpainting", "instruct-pix2pix", "depth-to-image"),
    *("image-variation", "upscaling"),
)
"""What a pipeline can be asked for by name."""

CHUNK = "ckptconv"
"""Keyword of the text chunk of a PNG that holds the parameters, as JSON."""

SYNTAX = re.compile(
    r"<lora:[^<>]*>"
    r"|(?<!\\)\(\(.*?\)\)"
    r"|(?<!\\)\([^()]*:\s*[\d.]+\s*\)"
    r"|(?<!\\)\[[^][]*\]"
    r"|\b(?:BREAK|AND)\b"
)
"""What web UIs take for instructions in a prompt: LoRA files, emphasis, and how to split it."""

KEYWORDS = {
    "steps": "num_inference_steps",
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "guidance_rescale": "guidance_rescale",
    "image_guidance": "image_guidance_scale",
    "strength": "strength",
    "noise_level": "noise_level",
    "image": "image",
    "mask": "mask_image",
}
"""By setting, what the pipelines of diffusers call it."""

NEEDED = ("image", "mask")
"""Settings that a task needs if it takes them."""

MOST_IMAGE = 256 << 20
"""Bytes of an image file."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""Of the image files that are read: for others, Pillow calls programs such as Ghostscript."""

RESCALE = 0.7
"""Guidance rescale for a model of zero terminal SNR: https://arxiv.org/abs/2305.08891, 3.4."""


STEPS = 30
"""Denoising steps of a model that does not ask for another number."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an image is made of; None leaves a value to the model or to its pipeline.

    Attributes:
        prompt: what to show.
        negative: what not to show.
        steps: number of denoising steps; that of the model by default, or else `STEPS`.
        guidance: how strongly the prompt guides (classifier-free guidance).
        guidance_rescale: how far guidance is scaled back to the spread of the prediction, 0 to 1.
        image_guidance: how strongly the image guides, in instruct-pix2pix.
        strength: how far an image may change, 0 to 1.
        noise_level: how much noise is put on an image that is upscaled or varied, in steps of its
            noise schedule: 0 to 999.
        size: width and height of the result in pixels; that of the image (times 4, if it is
            upscaled), or of the training, by default.
        image: the image to change.
        mask: where to change it: white is painted anew.
    """

    prompt: str
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    image_guidance: float | None = None
    strength: float | None = None
    noise_level: int | None = None
    size: tuple[int, int] | None = None
    image: Path | None = None
    mask: Path | None = None


def parse_pixels(text: str) -> tuple[int, int]:
    """Returns the width and height that a size means.

    Raises:
        UsageError: it is no size, or not a multiple of 8.

    >>> parse_pixels("768x512"), parse_pixels("512")
    ((768, 512), (512, 512))
    """
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and int(n[:9]) for n in numbers):
        raise UsageError(f"{text!r} is no size", hint="write width x height, such as 768x512")
    width, height = int(numbers[0][:9]), int(numbers[-1][:9])
    if width % 8 or height % 8:
        near = "x".join(str(max(8, round(n / 8) * 8)) for n in (width, height))
        raise UsageError(
            f"size {text} does not divide by 8, the pixels that one latent value stands for",
            hint=f"take {near}",
        )
    return width, height


def prompt_warnings(settings: Settings) -> list[str]:
    """Returns what to say of a prompt that is written in the syntax of a web UI."""
    warnings = []
    for name in ("prompt", "negative"):
        if found := SYNTAX.findall(getattr(settings, name) or ""):
            lora = any(text.startswith("<lora:") for text in found)
            instead = f"; load the LoRA with {option('lora', 'FILE:0.8')}" * lora
            what = f"diffusers reads {', '.join(found)} in the {name} as plain text"
            warnings.append(what + instead)
    return warnings


def negative_warnings(cls: type[DiffusionPipeline], settings: Settings) -> list[str]:
    """Returns what to say of a negative prompt that has no effect.

    Args:
        cls: the class of the pipeline.
        settings: with the defaults of the model.
    """
    takes = python_inspect.signature(cls.__call__).parameters
    if not settings.negative or "negative_prompt" not in takes:
        return []
    word = option("negative")
    if "true_cfg_scale" in takes:
        return [f"{word} has no effect: the guidance of {cls.__name__} knows no negative prompt"]
    guidance = settings.guidance
    guidance = takes["guidance_scale"].default if guidance is None else guidance
    if guidance > 1:
        return []
    return [f"{word} has no effect with {option('guidance', guidance)}: it takes more than 1"]


def with_defaults(model: Model, settings: Settings) -> Settings:
    """Returns settings with what a model was made for in the place of what is not given.

    Args:
        model: from `open_model`.
        settings: of the caller.
    """
    task = bundled().pipelines.get(str(model.index.get("_class_name")))
    fitting = [
        defaults.values
        for defaults in (task.defaults if task else ())
        if all(model.entry(place) == value for place, value in defaults.config.items())
        and hold(defaults.facts, model.facts)
    ]
    found: Mapping[str, Any] = {"steps": STEPS, **(fitting[0] if fitting else {})}
    return replace(settings, **{n: v for n, v in found.items() if getattr(settings, n) is None})


def _keywords(takes: Container[str]) -> dict[str, str]:
    """Returns `KEYWORDS` for a pipeline that takes some; one may only follow an image."""
    return KEYWORDS | ({} if "image" in takes else {"image": "control_image"})


def check(cls: type[DiffusionPipeline], task: str, settings: Settings) -> None:
    """Checks that the settings fit a pipeline.

    Args:
        cls: its class.
        task: its name, for the message.
        settings: to check.

    Raises:
        UsageError: some do not; all of them are named.
    """
    takes = python_inspect.signature(cls.__call__).parameters
    problems = []
    for name, keyword in _keywords(takes).items():
        word, value = option(name), getattr(settings, name)
        if value is not None and keyword not in takes:
            problems.append(f"{word} does not fit: {cls.__name__} takes none")
        if value is None and keyword in takes and name in NEEDED:
            problems.append(f"{word} is missing: {task} needs it")
    step = 8 * (scale_of(cls.__name__) or 1)
    if any(n % step for n in settings.size or ()):
        problems.append(f"{option('size')} does not divide by {step}, as {task} needs it")
    if "strength" in takes:
        strength = settings.strength
        strength = takes["strength"].default if strength is None else strength
        steps = settings.steps or takes["num_inference_steps"].default
        if not 0 < strength <= 1:
            problems.append(f"{option('strength', strength)} is not above 0 and at most 1")
        elif int(steps * strength) < 1:
            problems.append(
                f"{option('steps', steps)} times strength {strength} is less than one step"
            )
    if problems:
        raise UsageError(
            f"the options do not fit {task}",
            problems=problems,
            hint=f"{option('task')} asks for another task of the same weights",
        )


def check_outputs(
    out: Path, count: int, *, overwrite: bool, inputs: Sequence[Path] = ()
) -> list[Destination]:
    """Returns the files to write: `out`, or for several images `out-1`, `out-2`, ...

    Raises:
        UsageError: the name is not that of a PNG.
        OutputError: a file exists, or the folder does not.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"{out}: only PNG is written", hint="end the name in .png")
    paths = [out.with_stem(f"{out.stem}-{n}") for n in range(1, count + 1)] if count > 1 else [out]
    destinations = [Destination(path, overwrite, inputs=inputs) for path in paths]
    for each in destinations:
        each.check()
    return destinations


def open_images(settings: Settings) -> dict[str, Image.Image]:
    """Returns the images that the settings name.

    Raises:
        FileRefused: one cannot be read.
    """
    modes = {"image": "RGB", "mask": "L"}
    paths = {name: getattr(settings, name) for name in modes}
    return {name: _opened(path, modes[name]) for name, path in paths.items() if path}


def call_arguments(
    pipe: Pipeline, settings: Settings, images: Mapping[str, Image.Image]
) -> dict[str, Any]:
    """Returns what a pipeline is called with, all but the random numbers.

    Args:
        pipe: from `load_pipeline`.
        settings: that passed `check`.
        images: from `open_images`; they are brought to one size, that of the result where the
            pipeline paints on them.
    """
    takes = python_inspect.signature(pipe.__call__).parameters
    arguments = {
        keyword: value
        for name, keyword in _keywords(takes).items()
        if name not in images and (value := getattr(settings, name)) is not None
    }
    arguments["prompt"] = settings.prompt
    if settings.guidance_rescale is None and "guidance_rescale" in takes:
        zero_snr = pipe.scheduler.config.get("rescale_betas_zero_snr")
        arguments["guidance_rescale"] = RESCALE if zero_snr else 0.0
    size, times = settings.size, scale_of(type(pipe).__name__)
    if times is None:  # the pipeline looks at the image and does not paint on it
        arguments |= {_keywords(takes)[name]: image for name, image in images.items()}
    elif "image" in images:
        image = images["image"]
        own = (max(8, image.width // 8 * 8), max(8, image.height // 8 * 8))
        size = (size[0] // times, size[1] // times) if size else own
        arguments |= {_keywords(takes)[name]: image.resize(size) for name, image in images.items()}
    if size and "height" in takes:
        arguments["width"], arguments["height"] = size
    if size and "max_area" in takes:  # it would bring both images to one million pixels
        arguments |= {"max_area": size[0] * size[1], "_auto_resize": False}
        arguments |= {name: image.resize(size) for name, image in images.items()}
    return arguments


def scale_of(pipeline: str) -> int | None:
    """Returns how much larger the result of a pipeline is than the image it paints on."""
    task = bundled().pipelines.get(pipeline)
    return task.scale if task else 1


def generate(pipe: Pipeline, arguments: Mapping[str, Any], seed: int) -> Image.Image:
    """Makes one image. The same seed gives the same image.

    Args:
        pipe: from `load_pipeline`.
        arguments: from `call_arguments`.
        seed: of the noise, which is drawn on the CPU: it does not depend on the device.

    Raises:
        DeviceError: the memory ran out, or the dtype overflowed.
        FileRefused: the components of the folder that it comes from do not fit each other.
        UsageError: the pipeline refuses its arguments.
    """
    import numpy as np
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    try:
        with memory_errors("generating", f"take a smaller {option('size')}, or {less_memory()}"):
            # As an array: a PIL image would turn what is not a number into black.
            made = pipe(**arguments, generator=generator, output_type="np")
    except CkptconvError:
        raise
    except ValueError as error:  # from the checks of its own
        raise UsageError(f"diffusers refuses these options: {error}") from error
    except Exception as error:  # the components of a folder need not fit each other
        if not (folder := getattr(pipe.config, "_name_or_path", None)):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FileRefused(f"{folder}: its pipeline cannot run: {why}", hint=VERIFY) from error
    (array,) = made.images
    if not np.isfinite(array).all():
        raise DeviceError(
            "the image is not made of numbers: values overflowed on the way",
            hint=f"take {option('dtype', 'bf16')} or fp32; if that does not help, the checkpoint "
            "is damaged",
        )
    (image,) = pipe.numpy_to_pil(array[None])
    return image  # type: ignore[no-any-return]  # `Pipeline` is not typed


def described(pipe: Pipeline, settings: Settings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of an image, all but the seed, as plain data."""
    takes = python_inspect.signature(pipe.__call__).parameters
    values: dict[str, Any] = {"prompt": settings.prompt}
    for name, keyword in _keywords(takes).items():
        if keyword in takes:
            values[name] = arguments.get(keyword, takes[keyword].default)
    for name in NEEDED:
        if name in values:
            values[name] = getattr(settings, name).name
    return values | {
        "scheduler": type(pipe.scheduler).__name__,
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": {
            "ckptconv": __version__,
            **{name: library_version(name) for name in ("diffusers", "torch")},
        },
    }


def save_png(image: Image.Image, out: Destination, values: Mapping[str, Any]) -> None:
    """Writes a PNG that carries its parameters: whole, or not at all.

    Args:
        image: to write.
        out: the file, from `check_outputs`.
        values: go into a text chunk with the keyword `ckptconv`, as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(values, ensure_ascii=False))
    with out.new() as hidden:
        image.save(hidden, format="PNG", pnginfo=info)


def _opened(path: Path, mode: str) -> Image.Image:
    """Reads an image, turned as its camera says."""
    from PIL import Image, ImageOps

    data = io.BytesIO(read_small(path, MOST_IMAGE))
    try:
        with Image.open(data, formats=FORMATS) as file:
            return ImageOps.exif_transpose(file).convert(mode)
    except Exception as error:  # Pillow raises whatever a damaged file leads to
        raise FileRefused(
            f"{path}: cannot be read as an image: {error}", hint="give a PNG or a JPEG"
        ) from error
