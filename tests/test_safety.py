"""A run that fails, is stopped or is killed leaves no folder that looks finished."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.conversion import export as exporting
from ckptconv.conversion import write as execute
from ckptconv.errors import FileRefused, OutputError
from ckptconv.files import Files
from ckptconv.signals import ENDING
from ckptconv.streaming import stream
from tests.conftest import Folder, Sample
from tests.kill import Kill, Killer, Tally
from tests.planning.test_adapters import styled
from tests.support.checkpoints import raw_folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_parent_that_cannot_be_written_is_refused(small: Path, tmp_path: Path) -> None:
    parent = tmp_path
    if os.geteuid() == 0:  # may write everywhere, but not here
        parent = Path("/sys")
        if not parent.is_dir():
            pytest.skip("root may write every folder of this system")
    else:
        parent.chmod(0o555)
    before = _names(parent)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        ckptconv.convert(small, parent / "ckptconv-out")
    assert "nothing was left behind" in caught.value.hint
    assert _names(parent) == before


def test_too_small_a_disk_is_said_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(execute, "write", lambda *_: pytest.fail("it began to write"))
    with pytest.raises(OutputError) as caught:
        ckptconv.convert(small, tmp_path / "out")
    assert "the disk has 1,000 bytes free, and the folder needs" in caught.value.message
    assert "choose another disk" in caught.value.hint
    assert _names(tmp_path) == []


def test_room_for_exactly_the_folder_is_enough(
    small: Path, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(p.stat().st_size for p in folder("small").rglob("*") if p.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert sum(ckptconv.convert(small, tmp_path / "out").files.values()) == need
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(OutputError, match="free 1 bytes, or choose") as caught:
        ckptconv.convert(small, tmp_path / "again")
    assert f"needs {need:,}" in str(caught.value)


def _lie_about_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the check before the first byte pass, as if another program filled the disk then."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 60))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or not mount or not umount:
        pytest.skip("only root can mount a small disk")
    made = subprocess.run(  # noqa: S603  (no shell)
        [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run([umount, disk], check=True)  # noqa: S603  (no shell)


def test_a_disk_that_is_too_small_is_left_as_it_was(small: Path, tiny_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"the disk has .* bytes free, and the folder needs"):
        ckptconv.convert(small, tiny_disk / "out")
    assert _names(tiny_disk) == []


def test_a_disk_that_fills_up_is_left_as_it_was(
    small: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lie_about_room(monkeypatch)
    with pytest.raises(OutputError) as caught:
        ckptconv.convert(small, tiny_disk / "out")
    assert caught.value.message == f"{tiny_disk / 'out'}: cannot be written: the disk is full"
    assert "nothing was left behind" in caught.value.hint
    assert _names(tiny_disk) == []


def test_files_that_may_not_grow_are_refused_and_leave_nothing(small: Path, tmp_path: Path) -> None:
    code = "import sys; from ckptconv.cli import main; main(sys.argv[1:])"
    run = subprocess.run(  # noqa: S603  (no shell)
        [sys.executable, "-c", code, "convert", small, tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert run.returncode == 3
    assert run.stderr.startswith(f"error: {tmp_path / 'out'}: cannot be written: File too large\n")
    assert "Traceback" not in run.stderr
    assert _names(tmp_path) == []


def test_another_file_system_takes_the_same_bytes(small: Path, folder: Folder) -> None:
    if not os.access("/dev/shm", os.W_OK):  # noqa: S108  (asked for on purpose)
        pytest.skip("this system has no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        ckptconv.convert(small, Path(memory) / "out")
        assert raw_folder(Path(memory) / "out") == raw_folder(folder("small"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_nothing_and_the_old_folder_as_it_was(
    error: BaseException,
    small: Path,
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(folder("small"), tmp_path / "out")
    calls = []

    def fail(*_: Any) -> int:
        calls.append(1)
        raise error

    monkeypatch.setattr(Files, "write", fail)
    for name in ("out", "new"):
        with pytest.raises((OutputError, KeyboardInterrupt)):
            ckptconv.convert(small, tmp_path / name, overwrite=True)
    assert calls
    assert _names(tmp_path) == ["out"]
    assert raw_folder(tmp_path / "out") == raw_folder(folder("small"))


@pytest.mark.parametrize("change", ["overwritten in place", "replaced", "removed"])
@pytest.mark.parametrize("role", ["source", "donor", "adapter", "original config"])
def test_an_input_that_changes_midway_is_refused_and_leaves_nothing(
    role: str, change: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: tmp_path / f"{name}.safetensors" for name in ("source", "donor", "adapter")}
    for path in (inputs["source"], inputs["donor"]):
        shutil.copyfile(small, path)
    styled(small).save(inputs["adapter"])
    yaml = inputs["original config"] = tmp_path / "config.yaml"
    yaml.write_text("model:\n  params:\n    parameterization: v\n")
    changed = inputs[role]

    def change_first(*args: Any) -> list[str]:
        if change == "overwritten in place":
            with changed.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\n")
        elif change == "replaced":
            shutil.copyfile(changed, tmp_path / "other")
            (tmp_path / "other").replace(changed)
        done = stream.write(*args)
        if change == "removed":
            changed.unlink()
        return done

    monkeypatch.setattr(execute, "write", change_first)
    said = f"{changed}: another program changed it while it was read"
    with pytest.raises(FileRefused, match=re.escape(said)):
        ckptconv.convert(
            inputs["source"],
            tmp_path / "out",
            vae=inputs["donor"],
            lora=inputs["adapter"],
            original_config=yaml,
        )
    assert not [name for name in _names(tmp_path) if "out" in name]


def test_a_folder_that_changes_while_it_is_exported_is_refused(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder("small"), tmp_path / "model")

    def change_first(*args: Any) -> list[str]:
        os.utime(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
        return stream.write(*args)

    monkeypatch.setattr(exporting, "write", change_first)
    with pytest.raises(FileRefused, match=r"vae/.*: another program changed it"):
        ckptconv.export(tmp_path / "model", tmp_path / "out")
    assert _names(tmp_path) == ["model"]


def test_a_source_that_shrinks_midway_is_refused_and_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.safetensors"
    shutil.copyfile(small, source)

    def shrink_first(*args: Any) -> list[str]:
        os.truncate(source, source.stat().st_size // 2)
        return stream.write(*args)

    monkeypatch.setattr(execute, "write", shrink_first)
    with pytest.raises(FileRefused, match="became shorter while it was read"):
        ckptconv.convert(source, tmp_path / "out")
    assert _names(tmp_path) == ["source.safetensors"]


SLOW = """
import signal, sys, time
from ckptconv.__main__ import run
from ckptconv.files import Files
from ckptconv.streaming import stream

def slow(*args, write=Files.write):
    print("copying", flush=True)
    time.sleep(0.02)
    write(*args)

signal.signal(signal.SIGINT, signal.default_int_handler)
Files.write, stream.CHUNK = slow, 10_000
run()
"""
"""Converts in about a second, and says when the first byte is copied."""


def _stopped(number: int, small: Path, out: Path, times: int = 1) -> tuple[int, str]:
    """Sends signals to a conversion midway; returns its exit code and what it said."""
    command = [sys.executable, "-c", SLOW, "convert", str(small), str(out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as run:  # noqa: S603
        assert run.stdout is not None
        assert run.stdout.readline().startswith("copying")  # two threads may say so at once
        assert [name for name in _names(out.parent) if name.endswith(".partial")]
        for _ in range(times):
            run.send_signal(number)
            time.sleep(0.02)
        _, said = run.communicate(timeout=30)
    return run.returncode, said


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGINT, 3),
        (signal.SIGHUP, 1),
        *(pytest.param(number, 1, marks=pytest.mark.slow) for number in ENDING),
    ],
)
def test_a_conversion_that_is_stopped_leaves_nothing(
    number: int, times: int, small: Path, tmp_path: Path
) -> None:
    assert _stopped(number, small, tmp_path / "out", times) == (128 + number, "interrupted\n")
    assert _names(tmp_path) == []


@pytest.mark.parametrize("module", ["ckptconv.cli", "click", "ckptconv.commands.inspect"])
def test_ctrl_c_while_modules_are_imported_is_one_line(module: str, tmp_path: Path) -> None:
    interrupting = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from ckptconv.__main__ import run
sys.argv[2:] = ["inspect", "x"]
assert not [name for name in sys.modules if name in ("click", "ckptconv.files")]
del sys.argv[0]
run()
"""
    command = [sys.executable, "-c", interrupting, module]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  (our own code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_finished(
    small: Path, folder: Folder, tmp_path: Path
) -> None:
    assert _stopped(signal.SIGKILL, small, tmp_path / "out")[0] == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert not list(left.rglob("*.json"))
    for weights in left.rglob("*.safetensors"):
        assert weights.read_bytes()[:8] == b"\0" * 8  # the header is not there yet
    ckptconv.convert(small, tmp_path / "out")
    assert raw_folder(tmp_path / "out") == raw_folder(folder("small"))


@pytest.fixture(scope="module")
def killer(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Killer:
    return Killer(sample("sd1", dtype="fp16"), tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize(
    "kill",
    [
        Kill("convert --overwrite", at="renames", call=5, user=4),  # after the exchange
        Kill("convert --overwrite", at="renames", call=11, exchanges=False),  # no folder is there
        *(
            pytest.param(kill, marks=pytest.mark.slow)
            for kill in (
                Kill("convert", at="calls", call=60),
                Kill("convert --overwrite", at="renames", call=5),
                Kill("export", at="renames", call=1, user=1),
                Kill("export --overwrite", at="renames", call=6),
            )
        ),
    ],
)
def test_a_kill_loses_nothing_and_the_next_run_leaves_nothing(kill: Kill, killer: Killer) -> None:
    """`python -m tests.kill --kills 200` does the same more often, at all moments."""
    killer.tally = Tally()
    killer.kill(kill)
    assert (killer.tally.losses, killer.tally.litter) == ([], [])


@pytest.mark.parametrize("job", ["convert", pytest.param("export", marks=pytest.mark.slow)])
def test_of_two_runs_to_one_place_one_reports_success(job: str, killer: Killer) -> None:
    killer.tally = Tally()
    killer.two_at_once(job)
    assert (killer.tally.losses, killer.tally.litter) == ([], [])
