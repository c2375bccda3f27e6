"""`ckptconv architectures`: what is known, and what works with it."""

from __future__ import annotations

from typing import Any

import click

from ..maps.architecture import Relative
from ..maps.schema import Named
from .shared import echo_json, echo_lines, echo_table, key_maps, output_options

WORKS = ("detect", "convert", "verify", "export")
"""What works with every relative."""
RUN = ("run",)
"""What also works with those that are a pipeline of their own."""


@click.command("architectures")
@output_options
def command(*, as_json: bool) -> None:
    """List the known architectures with their tasks, and popular models that derive from them."""
    maps = key_maps()
    architectures: list[dict[str, Any]] = [
        {
            "architecture": a.name,
            "title": a.title,
            "tasks": {t.name: t.pipeline for t in a.tasks},
            "components": [c.name for c in a.models],
        }
        for a in maps.architectures.values()
    ]
    known: tuple[Relative, ...] = maps.typed(Named[Relative], "relatives")
    relatives: list[dict[str, Any]] = [
        {
            "name": relative.name,
            "architecture": relative.architecture,
            "task": relative.task,
            "works": [*WORKS, *(() if maps.architectures[relative.architecture].single else RUN)],
        }
        for relative in known
    ]
    if as_json:
        echo_json({"architectures": architectures, "relatives": relatives})
        return
    for row in architectures:
        what = f"{row['architecture']}: {row['title']} ({', '.join(row['components'])})"
        echo_lines([what])
        for task, pipeline in row["tasks"].items():
            click.echo(f"  {task:28} {pipeline}")
    click.echo(f"\n{', '.join(WORKS)}: every relative; run: those that say yes")
    titles = ("relative", "architecture", "task", *RUN)
    cells = [[row[title] for title in ("name", *titles[1:3])] for row in relatives]
    runs = ["yes" if {*RUN} <= {*row["works"]} else "no" for row in relatives]
    echo_table(titles, [[*row, run] for row, run in zip(cells, runs, strict=True)])
