"""`ckptconv maps`: for whoever writes key maps."""

from __future__ import annotations

from pathlib import Path

import click

from ..conversion.write import layout_text
from ..reading.source import open_header
from ..verification.map_checks import check_maps
from .shared import FILE, echo_json, json_option, key_maps
from .verify import checks_as_text


@click.group("maps")
def command() -> None:
    """Check key maps: those that come with ckptconv, or your own."""


@command.command("header")
@click.argument("file", type=FILE)
def header(file: Path) -> None:
    """Print the header of the checkpoint FILE as a layout.json: names, dtypes and shapes."""
    click.echo(layout_text(open_header(file)), nl=False)


@command.command("check")
@click.argument("folder", type=FILE, metavar="[DIR]", required=False)
@json_option
@click.pass_context
def check(ctx: click.Context, /, folder: Path | None, *, as_json: bool) -> None:
    """Check every map and every architecture, with those of the folder DIR before all others.

    Each architecture is tried on the header of its published file, with the input channels of
    every task, and as a small sample; the real classes must expect just the tensors that come out.

    Exits with 1 if anything is wrong.
    """
    checks = check_maps(key_maps(folder))
    passed = not any(each.problems for each in checks)
    if as_json:
        echo_json({"passed": passed, "checks": [each.as_data() for each in checks]})
    else:
        click.echo(checks_as_text(checks))
        click.echo("passed" if passed else "FAILED")
    if not passed:
        ctx.exit(1)
