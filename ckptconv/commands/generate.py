"""`ckptconv generate`: images straight from a checkpoint."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..conversion.write import parse_size
from ..dtypes import FP8
from ..errors import UsageError, printable
from ..inference.adapt import add_loras, find_scheduler, read_loras, set_scheduler
from ..inference.device import limit_memory, pick_device
from ..inference.generation import (
    TASKS,
    Settings,
    call_arguments,
    check,
    check_outputs,
    described,
    generate,
    negative_warnings,
    open_images,
    parse_pixels,
    prompt_warnings,
    save_png,
    with_defaults,
)
from ..inference.memory import Setting, choose, job_of, size_of_result, tile_vae
from ..inference.model import is_pipeline_folder, open_model
from ..inference.pipeline import OFFLOADS, build_pipeline, pipeline_class, with_storage
from ..libraries import hide_progress_bars
from .shared import (
    FILE,
    echo_json,
    is_animated,
    note,
    options_of,
    output_options,
    plan_options,
    progress,
)

DTYPE_ON_CPU = "fp32"
"""Unless another is asked for: a convolution in fp16 takes a thousand times longer on most CPUs."""


@click.command("generate")
@click.argument("file", type=FILE)
@click.argument("prompt")
@click.option("-o", "--out", type=FILE, required=True, help="The PNG to write.")
@click.option("--negative", metavar="TEXT", help="What not to show.")
@click.option("--steps", type=click.IntRange(min=1), help="Of the model by default, or 30.")
@click.option("--guidance", "--cfg", type=float, help="How strongly the prompt guides.")
@click.option(
    "--guidance-rescale",
    type=click.FloatRange(0, 1),
    help="Scale guidance back; 0.7 for a model of zero terminal SNR.",
)
@click.option("--image-guidance", type=float, help="How strongly the image guides.")
@click.option(
    "--noise-level", type=click.IntRange(0, 999), help="Of the image to upscale or to vary."
)
@click.option("--size", metavar="WxH", help="In pixels, multiples of 8: 768x512, or 512.")
@click.option("--width", metavar="W", help="With --height, the same as --size WxH.")
@click.option("--height", metavar="H", help="With --width, the same as --size WxH.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Of the noise; drawn and printed by default."
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images to make, the seed one higher for each.",
)
@click.option(
    "--scheduler",
    "--sampler",
    metavar="NAME",
    help="A sampler, such as 'DPM++ 2M Karras' or 'Euler a', or a class of diffusers.",
)
@click.option("--task", type=click.Choice(TASKS), help="What the weights are made for by default.")
@click.option("--image", type=FILE, help="The image to change, to vary or to upscale.")
@click.option("--mask", type=FILE, help="Where to change it: white is painted anew.")
@click.option("--strength", type=float, help="How far the image may change, above 0 to 1.")
@click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="May be repeated.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, mps, cpu or auto.")
@click.option(
    "--offload", type=click.Choice(list(OFFLOADS)), help="Let weights wait in main memory."
)
@click.option(
    "--device-map", type=click.Choice(["balanced"]), help="Spread a model over several GPUs."
)
@click.option(
    "--storage",
    type=click.Choice([FP8]),
    help="Keep the weights of the UNet or transformer (not of the text encoders) in fp8; compute "
    "in --dtype, or bf16.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Choose dtype, storage, offload and VAE tiling to stay within it, such as 8GB, or refuse.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the UNet or transformer: slow start, fast steps.",
)
@plan_options
@click.option("--overwrite", is_flag=True, help="Replace images that are there.")
@output_options
def command(
    file: Path,
    prompt: str,
    *,
    out: Path,
    size: str | None,
    width: str | None,
    height: str | None,
    seed: int | None,
    count: int,
    scheduler: str | None,
    task: str | None,
    loras: tuple[str, ...],
    device: str,
    offload: str | None,
    device_map: str | None,
    storage: str | None,
    memory: str | None,
    compiled: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images of PROMPT with the checkpoint (or the diffusers folder) FILE.

    Options that are not given take the defaults of the model, or of its diffusers pipeline, and the
    size is then the one that the model was trained at. On a CPU the weights become fp32 by default.
    The PNG holds its parameters in a text chunk. The same seed gives the same image.
    """
    if (width is None) != (height is None) or (size and width is not None):
        raise UsageError("--width and --height go together, without --size")
    size = size if width is None else f"{width}x{height}"
    settings = Settings(
        prompt,
        size=parse_pixels(size) if size else None,
        **{name: options[name] for name in Settings.__annotations__ if name in options},
    )
    read = [path for path in (file, settings.image, settings.mask) if path]
    outputs = check_outputs(out, count, overwrite=overwrite, inputs=read)
    place, reason = pick_device(device)
    decided = with_storage(options_of(options), storage)
    if place.type == "cpu" and decided.dtype is None:
        decided = replace(decided, dtype=DTYPE_ON_CPU)
    adapters, room = read_loras(loras), parse_size(memory) if memory else 0
    if room and device_map:
        raise UsageError("--memory is for one device, and --device-map for several")
    beside = bool(adapters) and is_pipeline_folder(file, decided)
    if beside and storage:
        raise UsageError(
            "--storage fp8 and --lora exclude each other for a diffusers folder: diffusers cannot "
            "compute with a LoRA beside weights in fp8",
            hint="convert the checkpoint with --lora, and take the folder that comes out",
        )
    model = open_model(file, decided)
    merging = replace(decided, lora=tuple(adapters))
    # Of the names that the LoRAs of transformers have, diffusers does not know all.
    if adapters and not beside and "transformer" in model.blueprints:
        decided, model = merging, open_model(file, merging)
    hide_progress_bars()
    cls, task = pipeline_class(model, task)
    settings = with_defaults(model, settings)
    check(cls, task, settings)
    images = open_images(settings)
    chosen = find_scheduler(scheduler) if scheduler else None
    for warning in (*prompt_warnings(settings), *negative_warnings(cls, settings)):
        note(f"warning: {printable(warning)}")
    note(f"device {place}: {reason}")
    setting = Setting(model.dtype, storage, offload)
    if room:
        job = job_of(model, size_of_result(model, settings, images), place.type)
        asked = replace(setting, dtype=options["dtype"] or "")
        setting, why = choose(replace(job, fp8=not beside), room, asked)
        note(f"memory: {setting}: {why}")
        limit_memory(place, room)
    # Beside weights in fp8, diffusers would round a LoRA and fail to compute.
    if setting.storage:
        decided = merging
    if setting.dtype != model.dtype or decided.lora:
        model = open_model(file, replace(decided, dtype=setting.dtype))
    started = time.monotonic()
    with progress("loading") as show:
        pipe = build_pipeline(
            model,
            device=str(place),
            task=task,
            offload=setting.offload,
            device_map=device_map,
            storage=setting.storage,
            progress=show,
        )
    loaded = time.monotonic()
    for warning in set_scheduler(pipe, *chosen) if chosen else ():
        note(f"warning: {printable(warning)}")
    add_loras(pipe, [] if decided.lora else adapters)
    if setting.tiling:
        tile_vae(pipe)
    if compiled:
        (getattr(pipe, "unet", None) or pipe.transformer).compile()
    pipe.set_progress_bar_config(disable=not is_animated())
    arguments = call_arguments(pipe, settings, images)
    first = secrets.randbelow(2**32) if seed is None else seed
    made = []
    for number, output in enumerate(outputs):
        image = generate(pipe, arguments, first + number)
        values = described(pipe, settings, arguments) | {
            "seed": first + number,
            "width": image.width,
            "height": image.height,
            "task": task,
            **({"sampler": scheduler} if scheduler else {}),
            "model": file.name,
            "loras": [{"file": a.path.name, "scale": a.scale} for a in adapters],
            "device": str(place),
            **({"storage": setting.storage} if setting.storage else {}),
        }
        save_png(image, output, values)
        made.append({"file": str(output.path), **values})
        note(f"{output.path}: seed {first + number}")
        if not as_json:
            click.echo(output.path)
    if as_json:
        seconds = {"load": loaded - started, "generate": time.monotonic() - loaded}
        echo_json({"images": made, "seconds": {k: round(v, 3) for k, v in seconds.items()}})


# A pipeline needs all of its components, so there is no choice among them; and --lora is above.
command.params = [option for option in command.params if option.name not in ("only", "lora")]
