"""`ckptconv maps`: tools for authors of key maps."""

from __future__ import annotations

from pathlib import Path

import click

from ..conversion.write import layout_text
from ..reading.source import open_header
from ..verification.map_checks import check_maps
from ..verification.result import failure
from .shared import FILE, echo_json, exit_for, key_maps, output_options, quiet_option
from .verify import checks_as_text


@click.group("maps")
def command() -> None:
    """Check key maps: those that come with ckptconv, or your own."""


@command.command("header")
@click.argument("file", type=FILE)
@quiet_option
def header(file: Path) -> None:
    """Print the header of the checkpoint FILE as a layout.json: names, dtypes and shapes."""
    click.echo(layout_text(open_header(file)), nl=False)


@command.command("check")
@click.argument("folder", type=FILE, metavar="[DIR]", required=False)
@output_options
def check(folder: Path | None, *, as_json: bool) -> None:
    """Check every key map and every architecture, those in the folder DIR included.

    Each architecture is tried on the header of its published file, with the input channels of
    every task, and on a small sample. The tensors that come out must be exactly those that the
    classes of diffusers and transformers expect.

    Exits with 1 if anything is wrong.
    """
    checks = check_maps(key_maps(folder))
    error = failure("the key maps", checks)
    if as_json:
        echo_json({"passed": not error, "checks": [each.as_data() for each in checks]}, error)
    else:
        click.echo(checks_as_text(checks))
        click.echo("FAILED" if error else "passed")
    exit_for(error)
