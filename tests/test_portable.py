"""The main jobs run where the system lacks what Linux has, as Windows does."""

from __future__ import annotations

import multiprocessing.resource_tracker
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ckptconv
from ckptconv import in_place
from ckptconv.cli import main
from tests.conftest import Sample
from tests.support.checkpoints import raw
from tests.support.pipelines import assert_same

LACKING = (
    *((os, name) for name in ("preadv", "pwrite", "posix_fallocate", "O_NONBLOCK", "O_NOFOLLOW")),
    *((signal, name) for name in ("pthread_sigmask",)),
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away the calls of POSIX, the renames of the system, and links."""
    multiprocessing.resource_tracker.ensure_running()  # Python's own, which needs these calls
    for module, name in LACKING:
        monkeypatch.delattr(module, name)

    def refused(*_: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(Path, "hardlink_to", refused)
    monkeypatch.setattr(in_place, "_call", lambda: None)


def test_a_file_goes_there_and_back(sample: Sample, tmp_path: Path) -> None:
    source, folder, back = sample("sd1"), tmp_path / "folder", tmp_path / "back.safetensors"
    for _ in "once", "again":
        ckptconv.convert(source, folder, overwrite=True)
        ckptconv.export(folder, back, overwrite=True)
    assert ckptconv.verify(source, folder).passed
    assert raw(back) == raw(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "folder"]
    merges = (folder / "tokenizer" / "merges.txt").read_bytes()
    assert b"\r" not in merges


def test_files_of_a_batch(sample: Sample, tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("one.safetensors", "two.safetensors")]
    for path in sources:
        path.write_bytes(sample("sd1").read_bytes())
    folders = tmp_path / "folders"
    done = CliRunner().invoke(main, ["convert", *map(str, sources), f"{folders}/", "-j", "2"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folders.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_a_folder_loads_as_its_file(sample: Sample, tmp_path: Path) -> None:
    ckptconv.convert(sample("sd1"), tmp_path / "folder")
    loaded = [ckptconv.load_pipeline(p, device="cpu") for p in (sample("sd1"), tmp_path / "folder")]
    assert_same(*loaded)


@pytest.mark.skipif(sys.platform == "win32", reason="these calls are there elsewhere alone")
def test_what_is_taken_away_is_what_this_system_has() -> None:
    assert not any(hasattr(module, name) for module, name in LACKING)
