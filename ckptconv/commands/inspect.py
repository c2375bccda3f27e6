"""`ckptconv inspect`: what a file is, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..batch.work import Inspection, Outcome
from ..destination import Destination
from ..detection.detect import Detection
from ..errors import SHOWN
from ..planning.plan import Plan
from ..reports.numbers import millions, size
from .many import PLACE, Columns, finish, many_options, outcomes_of, why_not
from .shared import (
    FILE,
    columns,
    echo_json,
    echo_lines,
    echo_table,
    exit_for,
    key_maps,
    note,
    output_options,
)

if TYPE_CHECKING:
    from ..reports.network import Block


def _assumed(outcome: Outcome) -> str:
    return ", ".join(f"{k} = {v}" for k, v in outcome.data.get("assumed", {}).items())


COLUMNS: Columns = {
    "architecture": lambda outcome: outcome.data.get("architecture") or "",
    "task": lambda outcome: outcome.data.get("task") or "",
    "size": lambda outcome: size(outcome.data["size"]) if outcome.data else "",
    "assumed, or why not": lambda outcome: why_not(outcome) or _assumed(outcome),
}
COMPONENTS = ("component", "class", "tensors", "params", "size", "dtypes")
HASHES: Columns = {"hash": lambda outcome: outcome.data.get("hashes", {}).get("short", "")}


@click.command("inspect")
@click.argument("files", nargs=-1, type=PLACE, metavar="FILE...")
@click.option("--tree", is_flag=True, help="Draw the network block by block.")
@click.option("--verdicts", is_flag=True, help="Show why each architecture matches or does not.")
@click.option("--hash", "hashed", is_flag=True, help="Compute the hashes (reads the whole file).")
@click.option("--html", type=FILE, help="Write a page about the file, with a drawing of it.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
@many_options
@output_options
def command(
    *,
    files: tuple[str, ...],
    tree: bool,
    verdicts: bool,
    hashed: bool,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what FILE is: architecture, task, components, and the evidence.

    Several files, or a quoted pattern of them, are listed in a table.

    Exits with 3 if FILE is not a checkpoint that can be converted as it is.
    """
    if not files:
        raise click.MissingParameter(param_hint="'FILE'", param_type="argument")
    work = Inspection(hashed, key_maps())
    for_one = {"tree": tree, "verdicts": verdicts, "html": html}
    if outcomes := outcomes_of("inspecting", work, files, None, options, **for_one):
        finish(outcomes, {**COLUMNS, **(HASHES if hashed else {})}, as_json=as_json)
        return
    if html:
        from ..reports.html import PAGE, page  # a tenth of an inspection's time

        destination = Destination(html, overwrite, PAGE, inputs=files)
        destination.check()
    detection, plan, data, error = work.inspect(files[0])
    if html:
        destination.write(page(detection, plan, hashes=data.get("hashes")).encode())
        note(f"page: {html}")
    if as_json:
        echo_json(data, error)
    else:
        _print(data, detection, plan if tree else None, verdicts=verdicts)
    exit_for(error)


def _print(
    data: dict[str, Any], detection: Detection, tree: Plan | None, *, verdicts: bool
) -> None:
    if detection.refusal:
        click.echo(detection.refusal)
    else:
        _print_summary(data)
        if tree and not data["problems"]:
            _print_tree(tree)
    for name, verdict in data["verdicts"].items() if verdicts else ():
        click.echo(f"{name}: {'matches' if verdict['matches'] else 'does not match'}")
        echo_lines(f"  - {line}" for line in verdict["failing"])
    echo_lines(f"{name}: {value}" for name, value in data.get("hashes", {}).items())


def _print_summary(data: dict[str, Any]) -> None:
    lines = [
        f"{data['file']}: {data['title']}, {data['task']} "
        f"({size(data['size'])}, {data['tensors']:,} tensors)",
        f"architecture: {data['architecture']}    pipeline: {data['pipeline']}",
    ]
    for name in ("prediction_type", "zero_terminal_snr"):
        if fact := data.get(name):  # a lone component has none
            lines.append(f"{name}: {fact['value']} ({fact['source']}: {fact['detail']})")
    echo_lines(lines)
    if data["components"]:
        echo_table(COMPONENTS, [_cells(name, row) for name, row in data["components"].items()])
    lines = ["evidence:", *(f"  - {line}" for line in data["evidence"])]
    if data["ema"]:
        lines.append("EMA: the file holds a copy of the UNet; --ema takes it")
    assumed = [f"{k} = {v}" for k, v in data.get("assumed", {}).items()]
    sections: dict[str, list[str]] = {
        "assumed, since the weights cannot tell": assumed,
        "missing components": data["missing"],
        "problems": data["problems"],
        "unclaimed keys": data["unclaimed"],
        "notes": data["notes"],
        "metadata": [f"{k}: {v[:100]}" for k, v in data["metadata"].items()],
    }
    for name, items in sections.items():
        if items:
            lines += [f"{name}:", *(f"  - {item}" for item in items[:SHOWN])]
        if len(items) > SHOWN:
            lines.append(f"  ... and {len(items) - SHOWN} more (--json shows all)")
    echo_lines(lines)


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    """Returns a row of the table of components; one dtype needs no count."""
    dtypes = [f"{dtype} x {count:,}" for dtype, count in row["dtypes"].items()]
    dtypes = list(row["dtypes"]) if len(dtypes) == 1 else dtypes
    counts = (f"{row['tensors']:,}", millions(row["parameters"]), size(row["bytes"]))
    return [name, row["class"], *counts, ", ".join(dtypes)]


def _print_tree(plan: Plan) -> None:
    from rich.console import Console
    from rich.tree import Tree

    from ..reports.network import blocks

    architecture, task = plan.detection.require()
    root = Tree(task.pipeline)
    for component in architecture.models:
        if members := blocks(plan, component.name):
            total = sum(block.parameters for block in members)
            branch = root.add(f"{component.name}: {total:,} parameters")
            for block in members:
                branch.add(f"{block.name}: {', '.join(_traits(block))}")
    Console(color_system=None, width=columns()).print(root)


def _traits(block: Block) -> list[str]:
    traits = []
    if block.channels:
        traits.append(f"{block.channels} channels")
    if block.resnets:
        traits.append(f"{block.resnets} resnets")
    if any(block.attention):
        traits.append(f"attention depth {'+'.join(map(str, block.attention))}")
    elif block.attention:
        traits.append(f"{len(block.attention)} attention")
    if block.resamples:
        traits.append(f"{block.resamples}sample")
    return [*traits, f"{block.parameters:,} parameters"]
