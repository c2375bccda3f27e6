"""`ckptconv sample`: a synthetic checkpoint, for tests and CI without weights."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ..reports.numbers import size
from ..sample import layout_of, write_sample
from .shared import FILE, key_maps, progress


@click.command("sample")
@click.argument("architecture")
@click.argument("file", type=FILE)
@click.option("--full", is_flag=True, help="The published size (SDXL: 6.9 GB).")
@click.option("--task", help="Such as inpainting; sets the UNet's input channels.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), help="Of the weights.")
@click.option("--ema", is_flag=True, help="Add an EMA copy of the UNet.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the random weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
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
) -> None:
    """Write FILE, a checkpoint of ARCHITECTURE in the original layout with random weights."""
    known = key_maps().architectures
    if architecture not in known:
        raise UsageError(
            f"architecture {architecture!r} is unknown", hint=f"it is one of {', '.join(known)}"
        )
    tensors = layout_of(known[architecture], task=task, full=full, dtype=dtype, ema=ema)
    with progress("writing") as show:
        written = write_sample(
            known[architecture], file, tensors, seed=seed, overwrite=overwrite, progress=show
        )
    click.echo(f"{size(written)}, {len(tensors):,} tensors", err=True)
    click.echo(file)
