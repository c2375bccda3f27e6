"""Each row of the table of relatives is tested by one file; README and command show the table."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from pathlib import Path

from ckptconv.maps.architecture import bundled
from tests.support.properties import Properties
from tests.support.published_relatives import PUBLISHED
from tests.support.relatives import ROWS, run

README = Path(__file__).parents[2] / "README.md"
MODULES = [
    importlib.import_module(f"{__package__}.{file.stem}")
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if file != Path(__file__)
]
TESTED: list[type[Properties]] = [module.TestProperties for module in MODULES]


def test_every_row_is_tested_by_exactly_one_file() -> None:
    rows = Counter(r.row for tested in TESTED for r in tested.relatives if not r.variant)
    assert rows == Counter(ROWS.keys())
    variants = {r.row: tested for tested in TESTED for r in tested.relatives if r.variant}
    assert all(row in {r.row for r in tested.relatives} for row, tested in variants.items())
    names = Counter(str(r) for tested in TESTED for r in tested.relatives)
    assert max(names.values()) == 1


def test_every_architecture_has_a_row_and_every_task_a_file() -> None:
    known = {(a.name, t.name) for a in bundled().architectures.values() for t in a.tasks}
    named = {(row.architecture, row.task) for row in ROWS.values()}
    assert named <= known
    assert {name for name, _ in named} == set(bundled().architectures)
    # The relatives of SDXL take their tasks from it, so that one of them is tested.
    inherited = {(a, t) for a, t in known if a in ("ssd-1b", "koala-700m", "koala-1b")}
    tested = {(r.architecture.name, r.task_name) for each in TESTED for r in each.relatives}
    assert known - tested == inherited - named


def test_every_published_configuration_is_compared_by_exactly_one_file() -> None:
    classes = [vars(module).get("TestConfigurations") for module in MODULES]
    compared = Counter(name for each in classes if each for name in each.published)
    assert compared == Counter(PUBLISHED.keys())


def test_the_readme_shows_the_table() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| `([^`]+)` \| ([^|]+) \| (yes|[^|]+) \|$", README.read_text(), re.M
    )
    shown = {row[0]: row[1:] for row in rows}
    for name, relative in ROWS.items():
        architecture, task, runs = shown[name]
        assert (architecture, task) == (relative.architecture, relative.task)
        assert (runs == "from its folder") == bool(
            bundled().architectures[relative.architecture].single
        )


def test_the_command_shows_the_table() -> None:
    shown = json.loads(run("architectures", "--json").stdout)
    assert [r["name"] for r in shown["relatives"]] == list(ROWS)
    text = run("architectures").stdout
    assert all(name in text for name in ROWS)
