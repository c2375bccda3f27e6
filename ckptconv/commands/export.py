"""`ckptconv export`: a diffusers folder becomes one file in the original layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from ..conversion.export import Exported, export
from ..dtypes import CASTS as DTYPES
from ..reports.numbers import size
from .shared import FILE, echo_json, json_option, key_maps, progress


def _pairs(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if bad := [
        text for text, (key, equals, _) in zip(given, pairs, strict=True) if not (key and equals)
    ]:
        raise click.BadParameter(f"{bad[0]!r} is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


@click.command("export")
@click.argument("folder", type=FILE, metavar="DIR")
@click.argument("out", type=FILE, metavar="FILE")
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="Cast the weights; as stored by default."
)
@click.option(
    "--metadata",
    multiple=True,
    callback=_pairs,
    metavar="KEY=VALUE",
    help="An entry of the header, such as modelspec.title=Name; repeat it for more.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there.")
@json_option
def command(
    folder: Path,
    out: Path,
    *,
    dtype: str | None,
    metadata: dict[str, str],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn the diffusers folder DIR into one file in the original layout.

    DIR may come from any program. What `convert` kept aside goes back, so that the weights return
    bit for bit; what cannot be restored is listed. FILE appears when it is complete, or not at all.
    """
    with progress("exporting") as show:
        done = export(
            folder,
            out,
            dtype=dtype,
            metadata=metadata,
            maps=key_maps(),
            overwrite=overwrite,
            progress=show,
        )
    if as_json:
        echo_json(as_data(done))
        return
    click.echo(f"{done.architecture.title}, {done.task}: {done.tensors:,} tensors", err=True)
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    if done.restored:
        click.echo(
            f"restored, as the conversion kept them: {len(done.restored):,} tensors", err=True
        )
    for reason, count in Counter(done.lost.values()).items():
        some = [key for key, why in done.lost.items() if why == reason][:3]
        more = ", ..." if count > len(some) else ""
        click.echo(f"not restored ({reason}): {count:,}: {', '.join(some)}{more}", err=True)
    if done.as_source:
        click.echo("tensor for tensor the source, in its order", err=True)
    click.echo(f"{size(done.size)} in {done.seconds:.1f} s", err=True)
    click.echo(out)


def as_data(done: Exported) -> dict[str, Any]:
    """Returns what an export did as plain data, for `--json`."""
    return {
        "out": str(done.out),
        "architecture": done.architecture.name,
        "task": done.task,
        "tensors": done.tensors,
        "size": done.size,
        "restored": list(done.restored),
        "lost": dict(done.lost),
        "as_source": done.as_source,
        "notes": list(done.notes),
        "seconds": round(done.seconds, 3),
    }
