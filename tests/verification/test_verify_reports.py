"""`verify` reads in little memory, and reports on the terminal, as JSON and as JUnit XML."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

import ckptconv
from ckptconv.cli import main
from ckptconv.errors import FileRefused, UsageError
from ckptconv.maps.architecture import bundled
from ckptconv.reports.junit import junit
from ckptconv.verification.result import CHECKS, Check, Problem, Verification
from tests.conftest import Copy, Folder, Sample
from tests.support.altering import resave
from tests.support.checkpoints import raw

# Streaming.


def test_comparing_and_looking_take_little_memory(sample: Sample, folder: Folder) -> None:
    from ckptconv.folder.read import read_folder
    from ckptconv.verification.checks.data import Bytes

    model = read_folder(folder("sd2"), bundled())
    read = Bytes.of(model, ckptconv.plan(sample("sd2")), finite=True)
    assert read.nbytes > 150e6
    steps: list[int] = []
    tracemalloc.start()
    try:
        read.run(lambda done, _total: steps.append(done))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not read.different
    assert not read.nonfinite
    assert peak < 25e6
    assert steps == sorted(steps)
    looked_at = sum(tensor.nbytes for tensor in read.looked_at.values())
    assert steps[-1] >= read.nbytes + looked_at > 2 * 150e6


def test_a_file_that_shrinks_meanwhile_is_refused(sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole)
    cut = False

    def progress(_done: int, _total: int) -> None:
        nonlocal cut
        if not cut:
            cut = True
            os.truncate(path, 1_000_000)

    with pytest.raises(FileRefused, match="became shorter"):
        ckptconv.verify(sample("sd1"), folder, progress=progress)


# Reports.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_reports_and_exits_with_one_on_problems(
    sample: Sample, copy: Copy, tmp_path: Path
) -> None:
    folder = copy("sd1")
    good = run("verify", sample("sd1"), folder, "--finite")
    assert good.exit_code == 0
    assert good.stdout.splitlines()[-1].startswith(
        f"passed: {folder} is {sample('sd1')}, converted"
    )
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    resave(path, lambda key: key.replace("up_blocks", "on_blocks"))
    bad = run("verify", sample("sd1"), folder, "--junit", tmp_path / "report.xml")
    assert bad.exit_code == 1
    lines = re.findall(r"^  - (.* and [\d,]+ more: .*)$", bad.stdout, re.MULTILINE)
    assert len(lines) == bad.stdout.count("\n  - ") == 4
    data = json.loads(run("verify", sample("sd1"), folder, "--json").stdout)
    assert data["passed"] is False
    problems = [p["where"] for c in data["checks"] for p in c["problems"]]
    lost = [key for key in raw(path) if key.startswith("on_blocks")]
    assert set(problems) == {*lost, *(key.replace("on_blocks", "up_blocks") for key in lost)}
    suite = ET.parse(tmp_path / "report.xml").getroot()[0]  # noqa: S314  (ours)
    cases = {(case.get("classname"), case.get("name")): case for case in suite}
    assert set(cases) == {(f"ckptconv.{c['component']}", c["check"]) for c in data["checks"]}
    failed = {key for key, case in cases.items() if case.find("failure") is not None}
    assert failed == {("ckptconv.unet", "weights"), ("ckptconv.unet", "data")}
    assert suite.get("failures") == "2"
    failure = cases["ckptconv.unet", "data"].find("failure")
    assert failure is not None
    assert str(failure.text).splitlines() == lines[2:]


def test_wrong_usage_of_the_command_exits_with_two(sample: Sample, folder: Folder) -> None:
    assert run("verify").exit_code == 2
    assert run("verify", "a", "x/a", "b").exit_code == 2  # two folders of one name
    assert run("verify", sample("sd1"), folder("sd1"), "--only", "nothing").exit_code == 2
    with pytest.raises(UsageError):
        ckptconv.verify(sample("sd1"), folder("sd1"), only=["nothing"])
    report = run("verify", sample("sd1"), folder("sd1"), "--junit", "/dev/null/x.xml")
    assert (report.exit_code, "null: is not a folder" in report.stderr) == (3, True)


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a checkpoint and a folder, and a verification that finds nothing wrong."""
    for name in ("x.safetensors", "out/unet/w.safetensors", "out/unet/config.json", "vae.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    found = Verification(tmp_path / "out", None, "", "", (Check("unet", "data", ()),), 0, 0.0)
    monkeypatch.setattr("ckptconv.batch.work.verify", lambda *_args, **_options: found)
    return tmp_path


XML = '<?xml version="1.0"?>\n'
THERE: dict[str, tuple[str, str]] = {
    "another tool's report": (XML + '<!-- by another tool -->\n<testsuite name="x"/>', ""),
    "nothing but a root": ("<testsuites>", ""),
    "text": ("of the last run", "is not a JUnit report"),
    "other XML": (XML + "<project><testsuite/></project>", "is not a JUnit report"),
    "an empty file": ("", "is not a JUnit report"),
}


@pytest.mark.parametrize("what", THERE)
def test_a_junit_report_replaces_the_last_one_and_nothing_else_unasked(
    what: str, checked: Path
) -> None:
    (text, said), report = THERE[what], checked / "report.xml"
    report.write_text(text)
    names = sorted(checked.iterdir())
    done = run("verify", checked / "out", "--junit", report)
    assert (done.exit_code, said in done.stderr) == (3 if said else 0, True)
    if said:
        assert "--overwrite replaces it" in done.stderr
        assert report.read_text() == text
        assert run("verify", checked / "out", "--junit", report, "--overwrite").exit_code == 0
    assert ET.parse(report).getroot().tag == "testsuites"  # noqa: S314  (ours)
    assert sorted(checked.iterdir()) == names


def test_two_reports_do_not_share_a_file(checked: Path) -> None:
    (checked / "link").symlink_to(checked / "report")
    given = ("--junit", checked / "report", "--markdown", checked / "link")
    done = run("verify", checked / "out", *given)
    assert (done.exit_code, "two reports have the same name" in done.stderr) == (2, True)
    assert not (checked / "report").exists()


@pytest.mark.parametrize("option", ["--junit", "--markdown", "--html"])
def test_no_report_is_written_to_what_is_verified(
    option: str, checked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checked / "link").symlink_to("x.safetensors")
    monkeypatch.delattr("ckptconv.batch.work.verify")  # refused before the work
    files = [file for file in checked.rglob("*") if file.is_file()]
    assert len(files) == 5
    for file in files:
        done = run(
            *("verify", checked / "x.safetensors", checked / "out", "--vae", checked / "vae.pt"),
            *(option, file, "--overwrite"),
        )
        assert done.exit_code == 3
        assert "is one of the files to read" in done.stderr
        assert file.read_text() == "precious"


def test_a_summary_is_appended(checked: Path) -> None:
    summary = checked / "summary.md"
    summary.write_text("before\n")
    assert run("verify", checked / "out", "--markdown", summary).exit_code == 0
    assert summary.read_text().startswith("before\n")
    assert len(summary.read_text().splitlines()) > 1


def test_a_junit_report_holds_any_name(tmp_path: Path) -> None:
    nasty = "a\x00\x1b[31m<&\ud800\uffff]]>"
    check = Check("unet", "data", (Problem(nasty, "differs"),), (nasty,))
    text = junit(Verification(tmp_path, None, "", "", (check,), 0, 0.0))
    failure = ET.fromstring(text)[0][0].find("failure")  # noqa: S314  (ours)
    assert failure is not None
    assert failure.text == "a\ufffd\ufffd[31m<&\ufffd\ufffd]]>: differs"


def test_every_kind_of_check_is_described(sample: Sample, folder: Folder) -> None:
    found = ckptconv.verify(sample("sd1"), folder("sd1"), finite=True)
    assert {check.kind for check in found.checks} <= CHECKS.keys()


@pytest.mark.parametrize("option", ["--assemble", "--vae", "--tokenizer"])
def test_no_report_replaces_a_file_of_a_folder_that_is_read(option: str, tmp_path: Path) -> None:
    parts, inside = tmp_path / "parts", tmp_path / "parts" / "vae"
    inside.mkdir(parents=True)
    file = parts / "flux1-dev.ckpt" if option == "--assemble" else inside / "vocab"
    file.write_bytes(b"weights")
    (tmp_path / "out").mkdir()
    source = [parts, option] if option == "--assemble" else [tmp_path / "x.ckpt", option, parts]
    done = run("verify", *source, tmp_path / "out", "--junit", file, "--overwrite")
    assert "is one of the files to read" in done.stderr
    assert file.read_bytes() == b"weights"
    own = parts / "report.xml"  # a report that stands there is not
    for _ in range(2):
        run("verify", *source, tmp_path / "out", "--junit", own, "--overwrite")
        assert own.is_file()
