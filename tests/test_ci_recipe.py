"""What docs/ci.md and action.yml tell a CI to run is run here, on a small sample."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

import ckptconv
from ckptconv.reports.markdown import markdown
from ckptconv.verification.result import Check, Problem
from tests.conftest import Sample
from tests.support.pages import EVIL, HOSTILE, hostile_file, verification

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
BASH = str(shutil.which("bash"))

OURS = f'#!/bin/sh\nexec "{sys.executable}" -m ckptconv "$@"\n'
"""Stands for an installed `ckptconv`."""
PYTHON = """#!/bin/sh
test "$1 $2" = "-m venv" || exec "PYTHON" "$@"
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> "$PIP_LOG"\\n' > "$3/bin/pip"
cp "$(dirname "$0")/ckptconv" "$3/bin/ckptconv"
chmod +x "$3/bin/pip"
""".replace("PYTHON", sys.executable)
"""Stands for a `python3` that makes an environment whose pip only notes what it should install."""


def blocks(language: str) -> list[str]:
    """Returns the code blocks of docs/ci.md in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Returns the environment of a runner: our programs first on the PATH."""
    found = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    return found | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def bash(script: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a script as GitHub does for `shell: bash`."""
    command = [BASH, "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(  # noqa: S603  (the text of our own files)
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@dataclass
class Job:
    """A job that ran the action: which steps ran, what they printed, what they left."""

    folder: Path
    ran: dict[str, bool] = field(default_factory=dict)
    said: str = ""
    used: dict[str, dict[str, str]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    @property
    def artifact(self) -> dict[str, str]:
        return self.used.get("Upload the report", {})

    @property
    def summary(self) -> str:
        return (self.folder / "summary").read_text()

    @property
    def report(self) -> Path:
        return next((self.folder / "temp").glob("ckptconv-report.*"))


def run_action(folder: Path, given: dict[str, str], index: int = 0) -> Job:
    """Runs the steps as a GitHub runner would: conditions, environment and files included."""
    inputs = {n: str(i.get("default", "")) for n, i in ACTION["inputs"].items()} | given
    program(folder / "bin", "python3", PYTHON)
    program(folder / "bin", "ckptconv", OURS)
    (folder / "temp").mkdir()
    files = {name: folder / name for name in ("output", "summary")}
    for file in files.values():
        file.touch()
    job, steps, failed = Job(folder), dict[str, Any](), False

    def value(expression: str) -> str:
        kind, name, *rest = expression.strip().split(".")
        if kind == "steps":
            return str(steps.get(name, {}).get(rest[0], {}).get(rest[1], ""))
        runner = {"temp": str(folder / "temp"), "os": "Linux", "arch": "X64"}
        return {"inputs": inputs, "runner": runner, "strategy": {"job-index": str(index)}}[kind][
            name
        ]

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{(.*?)\}\}", lambda found: value(found[1]), text)

    def holds(condition: str) -> bool:
        """Evaluates `a && b`, of `always()` and comparisons; a failure stops what is not always."""
        parts = condition.removeprefix("${{").removesuffix("}}").split("&&")
        for part in map(str.strip, parts):
            if part == "always()":
                continue
            left, operator, right = part.split()
            if left.endswith(".outcome"):
                found = steps.get(left.split(".")[1], {}).get("outcome", "skipped")
            else:
                found = value(left)
            if (found == right.strip("'")) != (operator == "=="):
                return False
        return "always()" in condition or not failed

    for step in STEPS:
        if not holds(step.get("if", "")) if "if" in step else failed:
            continue
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
            job.used[step["name"]] = {k: filled(str(text)) for k, text in step["with"].items()}
            job.ran[step["name"]] = True
            continue
        env = environment(
            folder / "bin",
            RUNNER_TEMP=str(folder / "temp"),
            GITHUB_ACTION_PATH=str(ROOT),
            GITHUB_JOB="convert",
            GITHUB_OUTPUT=str(files["output"]),
            GITHUB_STEP_SUMMARY=str(files["summary"]),
            PIP_LOG=str(folder / "pip"),
        )
        done = bash(step["run"], folder, env | {k: filled(v) for k, v in step["env"].items()})
        job.said += done.stdout + done.stderr
        job.ran[step["name"]] = done.returncode == 0
        failed |= done.returncode != 0
        if "id" in step:
            outputs = dict(line.split("=", 1) for line in files["output"].read_text().splitlines())
            outcome = "failure" if done.returncode else "success"
            steps[step["id"]] = {"outputs": outputs, "outcome": outcome}
    job.outputs = {name: filled(entry["value"]) for name, entry in ACTION["outputs"].items()}
    return job


def run_recipe(folder: Path) -> Path:
    """Runs the shell recipe of the page, but for its installation; returns where it ran."""
    _, make, convert = blocks("sh")
    env = environment(program(folder / "bin", "ckptconv", OURS))
    done = bash(make + convert, folder, env)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def both(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """Runs the recipe and the action side by side: most of either is an import of torch."""
    place = tmp_path_factory.mktemp("with spaces")
    for name in ("my model.safetensors", "my vae.safetensors"):
        (place / name).symlink_to(sample("sd1"))
    with ThreadPoolExecutor(2) as pool:
        recipe = pool.submit(run_recipe, tmp_path_factory.mktemp("recipe"))
        action: Future[Job] = pool.submit(
            run_action,
            place,
            {
                "file": "my model.safetensors",
                "folder": "the model",
                "options": "--dtype bf16 --vae 'my vae.safetensors'",
                "layout": "--variant bf16  --max-shard-size 10MB",
            },
        )
        return recipe.result(), action.result()


def check_reports(folder: Path, summary: str) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "Verified." in page
    suite = ET.parse(folder / "junit.xml").getroot()  # noqa: S314  (ours)
    assert suite.attrib["failures"] == "0"
    assert int(suite.attrib["tests"]) > 10
    assert summary.startswith("### Verified: `")
    assert "| `unet` | data | ok: `686 tensors" in summary


def test_the_shell_recipe_converts_verifies_and_reports(both: tuple[Path, Job]) -> None:
    recipe, _ = both
    assert (recipe / "tiny" / "model_index.json").is_file()
    check_reports(recipe / "report", (recipe / "report" / "summary.md").read_text())


def test_the_action_converts_verifies_reports_and_uploads(both: tuple[Path, Job]) -> None:
    _, job = both
    assert job.ran == dict.fromkeys((step["name"] for step in STEPS), True), job.said
    check_reports(job.report, job.summary)
    weights = {path.name for path in (job.folder / "the model" / "unet").glob("*.safetensors*")}
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in weights
    assert job.artifact["path"] == str(job.report)
    assert re.fullmatch(r"ckptconv-report-[0-9a-f]{12}", job.artifact["name"])
    assert job.outputs == {
        "passed": "true",
        "architecture": "sd1",
        "code": "",
        "report": str(job.report),
        "artifact": job.artifact["name"],
    }
    assert "::error" not in job.said
    cache = job.used["Restore the cache of pip"]
    assert cache["path"] == f"{job.folder}/temp/ckptconv-pip"
    assert re.fullmatch(r"ckptconv-Linux-X64-[0-9a-f]{12}", cache["key"])
    assert job.summary in job.said
    assert json.loads((job.report / "verify.json").read_text())["error"] is None
    assert (job.folder / "pip").read_text().splitlines() == [
        "install --quiet --index-url https://download.pytorch.org/whl/cpu torch",
        f"install --quiet {ROOT}",
    ]


def test_the_action_reports_a_refused_file_as_text(tmp_path: Path) -> None:
    lora = hostile_file(tmp_path / "a $(touch owned) `lora`.safetensors")
    given = {"file": str(lora), "folder": "model", "package": "ckptconv==1"}
    job = run_action(tmp_path, given)
    assert [name for name, fine in job.ran.items() if not fine] == ["Convert"]
    assert "Verify" not in job.ran
    assert job.ran["Upload the report"]
    heading, *lines = job.summary.splitlines()
    assert heading == "### ckptconv stopped"
    assert any("this is a LoRA" in line for line in lines)
    assert all(line.startswith("    ") for line in lines if line)
    assert not (tmp_path / "owned").exists()
    found = {name: job.outputs[name] for name in ("passed", "architecture", "code")}
    assert found == {"passed": "false", "architecture": "", "code": "not-a-checkpoint"}
    (error,) = (line for line in job.said.splitlines() if line.startswith("::"))
    assert error.startswith(f"::error file={lora}::{lora}: this is a LoRA")
    assert "%0A- it holds the key " in error
    assert (tmp_path / "pip").read_text().splitlines()[1] == "install --quiet ckptconv==1"


def test_the_action_can_verify_alone_and_fails_without_a_folder(
    sample: Sample, tmp_path: Path
) -> None:
    given = {"file": str(sample("sd1")), "folder": "-gone", "report-name": ""}
    job = run_action(tmp_path, given | {"command": "verify"})
    assert "Convert" not in job.ran
    assert job.ran["Verify"] is False
    assert job.summary.startswith("### Not verified: `-gone`")
    assert {path.name for path in job.report.iterdir()} >= {"report.html", "junit.xml"}
    assert (job.outputs["passed"], job.outputs["code"]) == ("false", "not-found")
    assert job.artifact == {}


def test_no_two_artifacts_have_one_name(tmp_path: Path) -> None:
    names = set()
    given = {"file": "a", "folder": "b", "command": "verify"}
    cases = [(given, 0), (given, 1), (given | {"file": "c"}, 0), (given | {"options": "--ema"}, 0)]
    for number, (inputs, index) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        names.add(run_action(tmp_path / str(number), inputs, index).outputs["artifact"])
    assert len(names) == len(cases)


def test_the_action_refuses_an_unknown_command(tmp_path: Path) -> None:
    job = run_action(tmp_path, {"command": "delete", "file": "a", "folder": "b"})
    assert job.ran == {"Prepare the report": False}
    assert "::error::the input command is neither convert nor verify" in job.said


@pytest.mark.parametrize("step", [s for s in STEPS if "run" in s], ids=lambda step: step["name"])
def test_no_input_is_pasted_into_a_script(step: dict[str, Any]) -> None:
    assert "${{" not in step["run"]
    assert step["shell"] == "bash"
    used = set(re.findall(r"\$\{?([A-Z_]+)", step["run"]))
    if "action.py" in step["run"]:
        used |= set(re.findall(r'"([A-Z_]+)"', (ROOT / "action.py").read_text())) & {*step["env"]}
    given = {"RUNNER_TEMP", "GITHUB_ACTION_PATH", "PIP_CACHE_DIR"}
    assert used - given == step["env"].keys()


@pytest.mark.parametrize(
    "script", [*blocks("sh"), *(s["run"] for s in STEPS if "run" in s)], ids=lambda s: s[:30]
)
def test_every_script_is_well_formed(script: str) -> None:
    done = subprocess.run(  # noqa: S603  (only parsed)
        [BASH, "-n"], input=script, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_examples_of_the_page_agree_with_the_action() -> None:
    gitlab, github, _ = map(yaml.safe_load, blocks("yaml"))
    used = github["jobs"]["convert"]["steps"][-1]["with"]
    required = {name for name, entry in ACTION["inputs"].items() if entry.get("required")}
    assert required <= used.keys() <= ACTION["inputs"].keys()
    rows = re.findall(r"^\| (`[^|]*`) \| .* \| .* \|$", PAGE.split("## GitHub")[1], re.MULTILINE)
    assert [n for row in rows for n in re.findall("`(.*?)`", row)] == list(ACTION["inputs"])
    lines = gitlab["convert"]["script"]
    assert lines[3:] == [
        "ckptconv convert model.safetensors model",
        "ckptconv verify model.safetensors model --html report/report.html "
        "--junit report/junit.xml",
    ]


def test_the_test_on_the_page_passes_and_fails_as_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (text,) = blocks("python")
    names: dict[str, Any] = {}
    exec(text, names)  # noqa: S102  (our own page)
    test = names["test_the_folder_is_the_checkpoint_converted"]
    found = verification((Check("vae", "data", (), (), "248 tensors"),))
    monkeypatch.setattr(ckptconv, "verify", lambda _file, _folder: found)
    test()
    found = verification((Check("vae", "data", (Problem("a.key", "differs"),)),))
    with pytest.raises(AssertionError, match=r"vae: a\.key: differs"):
        test()


def test_a_summary_keeps_hostile_text_in_its_code_spans() -> None:
    problems = tuple(Problem(value, value) for value in (*HOSTILE, "a`b`|c\n\n# d"))
    checks = (Check("unet", "weights", problems, HOSTILE, HOSTILE[0]), Check("vae|", "data"))
    text = markdown(verification(checks, Path(f"`{EVIL}`\n# x")))
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == "### Not verified: `out`"
    assert lines[2:5] == [
        "| --- | --- | --- |",
        f"| `unet` | weights | {len(problems)} wrong |",
        "| `vae\\|` | data | ok: ` ` |",
    ]
    assert len(lines) == 6 + len(problems)
    for line in lines[6:]:
        assert re.fullmatch(r"- `[^`\x00-\x1f\u202e]*`", line)
    assert lines[-1] == "- `unet: a'b'\\|c # d: a'b'\\|c # d`"


def test_a_summary_counts_what_it_leaves_out() -> None:
    problems = tuple(Problem(f"key.{n}", f"differs by {n}") for n in range(25))
    text = markdown(verification((Check("unet", "data", problems),)))
    assert "25 problems:" in text
    assert text.count("differs") == 20
    assert "- `unet: ... and 5 more (--json lists all)`" in text
