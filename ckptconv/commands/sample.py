"""`ckptconv sample`: a synthetic checkpoint, for tests and CI without weights."""

from __future__ import annotations

from pathlib import Path

import click

from ..reports.numbers import size
from ..sample import layout_of, write_sample
from .shared import (
    FILE,
    architecture_named,
    dtype_name,
    echo_json,
    note,
    output_options,
    progress,
)


@click.command("sample")
@click.argument("architecture")
@click.argument("file", type=FILE)
@click.option("--full", is_flag=True, help="Write the published size (SDXL: 6.9 GB).")
@click.option("--task", help="Task of the model, such as inpainting.")
@click.option(
    "--dtype", callback=dtype_name, metavar="DTYPE", help="Of the weights: fp16, bf16, fp32 or fp8."
)
@click.option("--ema", is_flag=True, help="Add an EMA copy of the UNet.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the weights."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@output_options
def command(
    architecture: str,
    file: Path,
    *,
    full: bool,
    task: str | None,
    dtype: str | None,
    ema: bool,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write FILE, a checkpoint of ARCHITECTURE in the original layout with random weights."""
    known = architecture_named(architecture)
    tensors = layout_of(known, task=task, full=full, dtype=dtype, ema=ema)
    with progress("writing") as show:
        written = write_sample(known, file, tensors, seed=seed, overwrite=overwrite, progress=show)
    note(f"{size(written)}, {len(tensors):,} tensors")
    if as_json:
        named = {"out": str(file), "architecture": known.name}
        echo_json({**named, "tensors": len(tensors), "size": written})
    else:
        click.echo(file)
