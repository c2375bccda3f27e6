"""Importing is light, and modules import in one direction."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ckptconv

if TYPE_CHECKING:
    from tests.conftest import Sample

ROOT = Path(ckptconv.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}

ORDER = (
    *(
        "errors",
        "version",
        "signals",
        "dtypes",
        "files",
        "in_place",
        "destination",
        "libraries",
        "reading",
        "maps",
        "options",
    ),
    *("detection", "planning", "configs", "folder", "streaming", "sample", "conversion"),
    *("verification", "inference", "reports", "batch", "commands", "cli", "__main__"),
)
"""The packages, from the ground up: each imports only those before it."""

HEAVY = {
    *("torch", "diffusers", "transformers", "accelerate", "numpy", "rich", "omegaconf"),
    *("click", "jinja2"),
}


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, at any depth and for types as well."""
    found: set[str] = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            names = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
            found |= {name for name in [".".join(filter(None, base)), *names] if name in MODULES}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            absolute = [alias.name for alias in node.names]
            absolute += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "ckptconv" for name in absolute), module
    return frozenset(found)


def reached(module: str) -> dict[str, tuple[str, ...]]:
    """The modules that a module reaches, each with the way to it."""
    ways: dict[str, tuple[str, ...]] = {}
    open_ways: list[tuple[str, ...]] = [(module,)]
    while open_ways:
        way = open_ways.pop()
        for name in imports(way[-1]):
            if name not in ways:
                ways[name] = (*way, name)
                open_ways.append(ways[name])
    return ways


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_reaches_itself(module: str) -> None:
    assert " -> ".join(reached(module).get(module, ())) == ""


def test_packages_import_only_what_stands_before_them() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    wrong = [
        f"{module} imports {name}"
        for module in MODULES.keys() - {"__init__"}
        for name in imports(module) - {"__init__"}
        if place[name.split(".")[0]] > place[module.split(".")[0]]
    ]
    assert not sorted(wrong)


def run(code: str, *arguments: object) -> dict[str, list[str]]:
    """Runs code in a fresh interpreter and returns what it prints: module names by stage."""
    report = "\ndef loaded(): return sorted({m.split('.')[0] for m in sys.modules})\n"
    done = subprocess.run(  # noqa: S603  (our own code)
        [sys.executable, "-c", "import json, sys" + report + code, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    stages: dict[str, list[str]] = json.loads(done.stdout)
    return stages


def test_the_package_and_its_main_job_load_no_heavy_library(tmp_path: Path, sample: Sample) -> None:
    stages = run(
        "stages = {}\n"
        "import ckptconv\n"
        "stages['import'] = loaded()\n"
        "assert ckptconv.inspect(sys.argv[1]).architecture.name == 'sdxl'\n"
        "stages['inspect'] = loaded()\n"
        "assert ckptconv.plan(sys.argv[1]).steps\n"
        "stages['plan'] = loaded()\n"
        "ckptconv.convert(sys.argv[1], sys.argv[2])\n"
        "stages['convert'] = loaded()\n"
        "print(json.dumps(stages))\n",
        sample("sdxl"),
        tmp_path / "out",
    )
    for stage in ("import", "inspect", "plan"):
        assert not HEAVY & set(stages[stage]), stage
    assert not {"torch", "diffusers", "transformers", "accelerate"} & set(stages["convert"])
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_modules_of_commands_load_no_heavy_library() -> None:
    names = [m for m in MODULES if m.startswith(("commands.", "cli")) and "__init__" not in m]
    stages = run(
        "import importlib\n"
        "for name in sys.argv[1:]: importlib.import_module('ckptconv.' + name)\n"
        "print(json.dumps({'commands': loaded()}))\n",
        *names,
    )
    assert not (HEAVY - {"click"}) & set(stages["commands"])


PUBLIC = [
    info.name
    for info in pkgutil.walk_packages([str(ROOT)], "ckptconv.")
    if "__main__" not in info.name
]


@pytest.mark.parametrize("name", ["ckptconv", *PUBLIC])
def test_every_name_without_an_underscore_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for each, value in vars(module).items():
        if inspect.isclass(value) or inspect.isfunction(value):
            mine = value.__module__ == name and not each.startswith("_")
            assert value.__doc__ or not mine, each
