"""`ckptconv export`: a diffusers folder becomes one file in the original layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from ..conversion.export import Exported, export
from ..reports.numbers import size
from .shared import FILE, dtype_name, echo_json, key_maps, note, output_options, progress


def _pairs(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in given:
        key, equals, pairs[key] = text.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
    return pairs


@click.command("export")
@click.argument("folder", type=FILE, metavar="DIR")
@click.argument("out", type=FILE, metavar="FILE")
@click.option(
    "--dtype",
    callback=dtype_name,
    metavar="DTYPE",
    help="Cast the weights to fp16, bf16 or fp32; by default they stay as they are.",
)
@click.option(
    "--metadata",
    multiple=True,
    callback=_pairs,
    metavar="KEY=VALUE",
    help="Add an entry to the header, such as modelspec.title=Name; may be repeated.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@output_options
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
        echo_json(done.as_data())
    else:
        _print(done)


def _print(done: Exported) -> None:
    lines = [f"{done.architecture.title}, {done.task}: {done.tensors:,} tensors"]
    lines += [f"note: {note}" for note in done.notes]
    if done.restored:
        lines.append(f"restored, as the conversion kept them: {len(done.restored):,} tensors")
    for reason, count in Counter(done.lost.values()).items():
        some = [key for key, why in done.lost.items() if why == reason][:3]
        more = ", ..." if count > len(some) else ""
        lines.append(f"not restored ({reason}): {count:,}: {', '.join(some)}{more}")
    if done.as_source:
        lines.append("tensor for tensor the source, in its order")
    lines.append(f"{size(done.size)} in {done.seconds:.1f} s")
    note("\n".join(lines))
    click.echo(done.out)
