"""`ckptconv architectures`: what is known, and what works with it."""

from __future__ import annotations

from typing import Any

import click

from ..maps.architecture import Relative
from ..maps.schema import Named
from .shared import console, echo_json, json_option, key_maps

WORKS = ("detect", "convert", "verify", "export")
"""What works with every relative."""
RUN = ("run",)
"""What also works with those that are a pipeline of their own."""


@click.command("architectures")
@json_option
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
    from rich.table import Table

    table = Table("architecture", "title", "task")
    table.add_column("class", no_wrap=True)
    table.add_column("components")
    for row in architectures:
        first, parts = (row["architecture"], row["title"]), ", ".join(row["components"])
        for task, pipeline in row["tasks"].items():
            table.add_row(*first, task, pipeline, parts)
            first, parts = ("", ""), ""
        table.add_section()
    console().print(table)
    table = Table("relative", "architecture", "task", *WORKS, *RUN)
    for row in relatives:
        yes = ["yes" if work in row["works"] else "no" for work in (*WORKS, *RUN)]
        table.add_row(row["name"], row["architecture"], row["task"], *yes)
    console().print(table)
