"""`ckptconv demo`: every step, on a small synthetic checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..conversion.convert import convert
from ..destination import Destination
from ..detection.detect import inspect
from ..libraries import hide_progress_bars
from ..planning.plan import build_plan
from ..reports.report import inspection
from ..sample import layout_of, write_sample
from .shared import FILE, architecture_named, echo_json, note, output_options

STEPS = 2
SIDE = 64
"""Pixels: enough to see that every network runs."""


@click.command("demo")
@click.argument("folder", type=FILE, default="ckptconv-demo")
@click.option("--arch", default="sdxl", show_default=True, help="Architecture of the sample.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left.")
@output_options
def command(folder: Path, *, arch: str, overwrite: bool, as_json: bool) -> None:
    """Make a sample, inspect it, convert it, and draw a two-step image from it, in FOLDER.

    The weights are random, so the image is noise; it shows that stock diffusers runs the folder.
    Nothing is downloaded.
    """
    echo = note if as_json else click.echo
    architecture, started = architecture_named(arch), time.monotonic()
    sample = folder / f"{arch}.safetensors"
    out, image = folder / arch, Destination(folder / f"{arch}.png", overwrite)
    image.check()
    tensors = layout_of(architecture, dtype="fp32")
    write_sample(architecture, sample, tensors, overwrite=overwrite)
    echo(f"sample:   {sample}")
    plan = build_plan(inspect(sample))
    data = inspection(plan.detection, plan)
    echo(f"inspect:  {data['title']}, {data['task']}, {data['prediction_type']['value']}")
    report = convert(sample, out, overwrite=overwrite)
    echo(f"convert:  {report.out} ({len(report.files)} files, {report.seconds:.2f} s)")
    note("generate: loading diffusers ...")
    with image.new() as hidden:
        _draw(report.out, hidden)
    echo(f"generate: {image.path}")
    seconds = time.monotonic() - started
    note(f"done in {seconds:.0f} s")
    if as_json:
        places = {"sample": str(sample), "out": str(report.out), "image": str(image.path)}
        what = {"architecture": arch, "task": data["task"]}
        echo_json({**places, **what, "seconds": round(seconds, 3)})


def _draw(model: Path, image: Path) -> None:
    hide_progress_bars()
    from diffusers import DiffusionPipeline
    from PIL import Image

    pipeline = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        str(model), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    inputs = {"prompt": "a demonstration", "num_inference_steps": STEPS}
    if "Img2Img" in type(pipeline).__name__:
        inputs |= {"image": Image.new("RGB", (SIDE, SIDE), "gray"), "strength": 1.0}
    else:
        inputs |= {"height": SIDE, "width": SIDE}
    pipeline(**inputs).images[0].save(image, format="PNG")
