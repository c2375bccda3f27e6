"""What CI relies on: codes, schemas, reports of what was refused, quiet, and plain terminals."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import pytest
import yaml

import ckptconv
from ckptconv.cli import COMMANDS, main
from ckptconv.reports.junit import junit
from ckptconv.reports.markdown import markdown
from ckptconv.reports.table import table
from ckptconv.verification.result import Check, Problem
from tests.conftest import Folder, Sample
from tests.support import outputs
from tests.support.pages import Parsed, verification
from tests.support.shell import on_a_terminal, run

PACKAGE = Path(ckptconv.__file__).parent
CI = (PACKAGE.parent / "docs" / "ci.md").read_text(encoding="utf-8")


def _codes(tree: ast.AST) -> set[str]:
    """Returns the words that are given as `code=`, or that a class has as its `code`."""
    given = [n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "code"]
    given += [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code"
    ]
    words = [n.value for value in given for n in ast.walk(value) if isinstance(n, ast.Constant)]
    return {word for word in words if isinstance(word, str) and re.fullmatch(r"[a-z-]+", word)}


def test_the_codes_are_those_of_the_page_and_of_the_schema() -> None:
    found = set[str]().union(*(_codes(ast.parse(p.read_text())) for p in PACKAGE.rglob("*.py")))
    listed = outputs.schemas()["common.json"]["$defs"]["error"]["properties"]["code"]["enum"]
    assert sorted(found) == listed
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d) \| .+ \|$", CI, re.MULTILINE)
    assert sorted(code for code, _ in rows) == listed
    exits = {"usage": "2", "check-failed": "1"}
    assert dict(rows) == {code: exits.get(code, "3") for code in listed}


def test_every_command_with_json_has_a_schema_and_can_be_quiet() -> None:
    names = set()

    def look(command: click.Command, name: str) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for each in command.list_commands(context):
                found = command.get_command(context, each)
                assert found
                look(found, f"{name}-{each}" if name else each)
            return
        options = {option.name for option in command.params}
        assert "quiet" in options, name
        if "as_json" in options:
            names.add(name)

    look(main, "")
    assert names == {*COMMANDS, "maps-check"} - {"maps"}
    assert {f"{n}.json" for n in (*names, "common", "error", "files")} == outputs.schemas().keys()
    for name in (*names, "error", "files"):
        assert f"| [`ckptconv/{name}/1`](../ckptconv/data/schemas/{name}.json) |" in CI


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "source": (lambda place: (place / "x.safetensors").write_text("a text"), "not-a-checkpoint"),
    "folder": (lambda place: (place / "out").rename(place / "gone"), "not-found"),
}


@pytest.mark.parametrize("fault", BAD)
def test_the_reports_of_a_verification_that_was_refused_are_written(
    fault: str, small: Path, folder: Folder, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(folder("small"))
    (tmp_path / "x.safetensors").write_bytes(small.read_bytes())
    damage, code = BAD[fault]
    damage(tmp_path)
    paths = [tmp_path / name for name in ("r.xml", "r.html", "r.md")]
    reports = [
        x for pair in zip(("--junit", "--html", "--markdown"), paths, strict=True) for x in pair
    ]
    done = run("verify", tmp_path / "x.safetensors", tmp_path / "out", "--json", *reports, code=3)
    data = json.loads(done.stdout)
    assert (data["schema"], data["version"]) == ("ckptconv/verify/1", ckptconv.__version__)
    assert (data["passed"], data["error"]["code"]) == (False, code)
    (check,) = data["checks"]
    assert (check["check"], check["passed"], len(check["problems"])) == ("input", False, 1)
    said = data["error"]["message"]
    assert done.stderr.endswith(f"error: {said}\nhint: {data['error']['hint']}\n")
    case = ET.parse(paths[0]).getroot()[0]  # noqa: S314  (ours)
    assert (case.get("tests"), case.get("failures")) == ("1", "1")
    assert case[0][0].text == said
    assert "Not verified." in Parsed(paths[1].read_text()).texts["strong"][0]
    assert f"- `model: {said}`" in paths[2].read_text()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("plan no --json", "not-found"),
        ("convert no out --json", "not-found"),
        ("export no out --json", "not-found"),
        ("generate no prompt -o x.png --json", "not-found"),
        ("sample sd1 FILE --json", "exists"),
        ("convert FILE FILE --json", "exists"),
        ("convert FILE out --only hat --json", "usage"),
        ("demo FILE --json", "output"),
        ("inspect x?y --json", "usage"),
    ],
)
def test_a_refusal_is_an_object_on_stdout(
    command: str, code: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*command.replace("FILE", str(small)).split(), code=2 if code == "usage" else 3)
    data = json.loads(done.stdout)
    assert data.keys() == {"schema", "version", "error"}
    assert (data["schema"], data["error"]["code"]) == ("ckptconv/error/1", code)
    assert done.stderr.startswith(f"error: {data['error']['message']}\n")


def test_equal_problems_are_one_line_and_the_limit_is_per_check() -> None:
    lost = [Problem(f"key.{n}", "is missing") for n in range(686)]
    many = [Problem(f"key.{n}", f"differs in {n} values") for n in range(25)]
    checks = (
        Check("unet", "weights", (*lost, Problem("config.json", "is of another class"))),
        Check("unet", "data", tuple(many)),
        Check("vae", "data", (Problem("a", "differs"),)),
    )
    found = verification(checks)
    weights = ["key.0, key.1, key.2 and 683 more: is missing", "config.json: is of another class"]
    data = [*map(str, many[:20]), "... and 5 more (--json lists all)"]
    assert [check.lines for check in checks] == [weights, data, ["a: differs"]]
    assert len(found.problems) == 713
    from ckptconv.commands.verify import as_text
    from ckptconv.reports.html import page

    texts = [as_text(found), markdown(found), junit(found).decode()]
    for line in (*weights, *data, "a: differs"):
        assert all(line in text for text in texts), line
    assert "FAILED: out: 713 problems" in texts[0]
    shown = Parsed(page(None, None, found)).texts
    assert {"key.0, key.1, key.2 and 683 more", "config.json", "key.24"} <= {*shown["code"]}
    assert "5 more" in shown["summary"]


def test_files_that_fail_give_the_highest_exit_code(
    small: Path, folder: Folder, tmp_path: Path
) -> None:
    (tmp_path / "a.safetensors").symlink_to(small)
    (tmp_path / "b.safetensors").write_text("a text")
    files = sorted(tmp_path.iterdir())
    done = json.loads(run("inspect", *files, "--json", code=3).stdout)
    assert done["schema"] == "ckptconv/files/1"
    assert [each["schema"] for each in done["files"]] == ["ckptconv/inspect/1", "ckptconv/error/1"]
    assert [each["file"] for each in done["files"]] == list(map(str, files))
    assert done["files"][0]["error"] is None
    assert done["files"][1]["error"] == done["error"]


@pytest.mark.parametrize("place", [0, 1], ids=["before the command", "after it"])
def test_quiet_leaves_data_and_errors(place: int, small: Path, tmp_path: Path) -> None:
    def quiet(*args: object, code: int = 0) -> tuple[str, str]:
        done = run(*args[:place], "-q", *args[place:], code=code)
        return done.stdout, done.stderr

    out = tmp_path / "out"
    assert quiet("convert", small, out) == (f"{out}\n", "")
    assert quiet("convert", small, out, code=3)[1].startswith(f"error: {out}: exists\n")
    assert quiet("plan", small) == (run("plan", small).stdout, "")
    several = quiet("convert", small, tmp_path / "no", f"{tmp_path}/more/", code=3)
    assert several[0] == f"{tmp_path}/more/small\n"
    assert several[1].startswith(f"error: {tmp_path / 'no'}: ")


@pytest.mark.parametrize("plain", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_plain_terminal_is_sent_no_escape(
    plain: dict[str, str], small: Path, tmp_path: Path
) -> None:
    shown = on_a_terminal("convert", small, tmp_path / "out", **plain)
    assert shown.endswith(f"{tmp_path / 'out'}\n")
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "command", ["inspect --tree --verdicts FILE", "architectures", "-q inspect FILE FILE"]
)
def test_words_are_whole_on_a_terminal_of_80_columns(
    command: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sample("sdxl")
    monkeypatch.chdir(file.parent)
    words = command.replace("FILE", file.name).split()
    narrow, wide = on_a_terminal(*words, COLUMNS="80"), run(*words).output
    assert max(map(len, narrow.splitlines())) <= 80
    assert "\x1b" not in narrow
    frame = re.compile(r":?[-│├└─\s]+")
    assert {*frame.split(narrow)} == {*frame.split(wide)}


@pytest.mark.parametrize("width", range(10, 120, 7))
def test_a_table_keeps_its_words_at_any_width(width: int) -> None:
    row = ["text_encoder_2", "CLIPTextModelWithProjection", "517", "695 M", "F16 x 500, F32 x 17"]
    titles = ("component", "class", "tensors", "params", "dtypes")
    text = table(titles, [row, row], width)
    assert all(text.count(word) >= 2 for cell in row for word in cell.split())
    assert all(title in text for title in titles)
    lines = text.splitlines()
    longest = max(len(word) for line in lines for word in line.split())
    assert max(map(len, lines)) <= max(width, longest + 4)
    if width >= 90:
        assert lines[0].split() == list(titles)
        assert len(lines) == 4


HOOKS = yaml.safe_load((PACKAGE.parent / ".pre-commit-hooks.yaml").read_text())


@pytest.mark.parametrize(("hook", "args"), [*zip(HOOKS, (["out"], ["."]), strict=True)])
@pytest.mark.parametrize("wrong", [(), (Problem("a", "differs"),)])
def test_a_hook_fails_if_a_check_does(
    hook: dict[str, Any],
    args: list[str],
    wrong: tuple[Problem, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert hook.keys() >= {"id", "name", "description", "entry", "language", "files"}
    assert (hook["language"], hook["pass_filenames"]) == ("python", False)
    assert re.search(hook["files"], {"out": "out/model_index.json", ".": "x/arch.yaml"}[args[0]])
    assert f"- id: {hook['id']}\n        args: [" in CI
    checks = (Check("unet", "data", wrong),)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").touch()
    monkeypatch.setattr("ckptconv.batch.work.verify", lambda *_, **__: verification(checks))
    monkeypatch.setattr("ckptconv.commands.maps.check_maps", lambda _: checks)
    program, *words = hook["entry"].split()
    assert program == "ckptconv"
    assert ("a: differs" in run(*words, *args, code=len(wrong)).output) == bool(wrong)


def test_what_the_readme_installs_can_load_a_lora() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("peft>=") for line in project["dependencies"])
