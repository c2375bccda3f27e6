"""The steps of action.yml: runs ckptconv, and reports to GitHub what came of it.

The standard library is all it needs. Inputs are environment variables; their text is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHOWN = 20
"""Problems in an annotation."""


def prepare() -> int:
    """Makes the folder of the reports, and finds names for the artifact and the cache."""
    if os.environ["COMMAND"] not in ("convert", "verify"):
        annotate("the input command is neither convert nor verify")
        return 1
    # Two jobs of a matrix differ in their index, and two uses in a job in what they work on.
    job = ("GITHUB_JOB", "JOB_INDEX", "COMMAND", "FILE", "FOLDER", "OPTIONS", "LAYOUT")
    place = Path(os.environ["GITHUB_ACTION_PATH"], "pyproject.toml")
    packages = (os.environ["PACKAGE"], os.environ["TORCH_INDEX"], place.read_text(), sys.version)
    report = tempfile.mkdtemp(prefix="ckptconv-report.", dir=os.environ["RUNNER_TEMP"])
    artifact = "-".join((os.environ["NAME"], digest(*(os.environ[name] for name in job))))
    output(folder=report, artifact=artifact, packages=digest(*packages))
    return 0


def run(command: str) -> int:
    """Runs a command; its JSON goes to the report, and what it says to the log as well."""
    report = Path(os.environ["REPORT"])
    program = Path(os.environ["RUNNER_TEMP"], "ckptconv", "bin", "ckptconv")
    places = {"--html": "report.html", "--junit": "junit.xml", "--markdown": "summary.md"}
    try:
        options = shlex.split(os.environ["OPTIONS"])
    except ValueError as error:
        annotate(f"the options cannot be split into words: {error}")
        return 2
    for option, name in places.items() if command == "verify" else ():
        options += [option, str(report / name)]
    words = [str(program), command, "--json", *options, "--"]
    words += [os.environ["FILE"], os.environ["FOLDER"]]
    with (
        (report / f"{command}.json").open("wb") as data,
        (report / "log.txt").open("ab") as log,
        subprocess.Popen(words, stdout=data, stderr=subprocess.PIPE) as running,  # noqa: S603
    ):
        for line in running.stderr or ():
            log.write(line)
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    return running.returncode


def result() -> int:
    """Writes the summary, the outputs and, if it failed, an annotation."""
    report = Path(os.environ["REPORT"])
    data = {**read(report / "convert.json"), **read(report / "verify.json")}
    log = read_text(report / "log.txt")
    passed = bool(data.get("passed"))
    error = data.get("error") or (
        {} if passed else {"message": "ckptconv gave no result; the log of the job says why"}
    )
    output(
        passed=str(passed).lower(),
        architecture=str(data.get("architecture") or ""),
        code=str(error.get("code", "")),
    )
    # four spaces keep any text as it is
    stopped = "### ckptconv stopped\n\n" + "".join(f"    {line}\n" for line in log.splitlines())
    text = read_text(report / "summary.md") or stopped
    sys.stdout.write(text)
    with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
        summary.write(text)
    if error:
        lines = [error["message"], *(f"- {p}" for p in error.get("problems", ())[:SHOWN])]
        hint = error.get("hint")
        annotate("\n".join([*lines, *([f"hint: {hint}"] if hint else [])]), os.environ["FILE"])
    return 0


def annotate(text: str, file: str = "") -> None:
    """Prints an error that GitHub shows beside a file; its text cannot end the command."""
    where = f" file={escaped(file, ':,')}" if file else ""
    sys.stdout.write(f"::error{where}::{escaped(text)}\n")


def escaped(text: str, more: str = "") -> str:
    """Escapes what means something in a command of a workflow."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def output(**values: str) -> None:
    """Sets outputs of the step."""
    with Path(os.environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as file:
        file.writelines(f"{name}={' '.join(value.split())}\n" for name, value in values.items())


def digest(*texts: str) -> str:
    """Returns a short name for some texts."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:12]


def read(path: Path) -> dict[str, Any]:
    """Returns the JSON of a command; nothing if it did not run or did not end."""
    try:
        found: dict[str, Any] = json.loads(read_text(path))
    except ValueError:
        return {}
    return found


def read_text(path: Path) -> str:
    """Returns a text, or none if the file is not there."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


STEPS = {"prepare": prepare, "result": result}

if __name__ == "__main__":
    step = sys.argv[1]
    sys.exit(STEPS[step]() if step in STEPS else run(step))
