"""Ranges of bytes are read and written whole, by several threads, with and without `preadv`."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.errors import CkptconvError, FileRefused
from ckptconv.files import MOST_JSON, ByteCounter, Files, read_json, read_range
from ckptconv.folder.read import read_folder
from ckptconv.maps.architecture import bundled
from ckptconv.maps.yaml_files import Document
from ckptconv.verification.checks.data import Bytes
from tests.conftest import Folder
from tests.support.checkpoints import raw_folder

CALLS = ("preadv", "pwrite", "pread", "pwritev")
"""What Windows lacks."""

with_and_without = pytest.mark.parametrize("windows", [False, True])


def _take_away(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CALLS if windows else ():
        monkeypatch.delattr(os, name)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of 100,000 bytes, in which every offset can be told."""
    path = tmp_path / "numbers"
    path.write_bytes(b"".join(n.to_bytes(4, "little") for n in range(25_000)))
    return path


@with_and_without
def test_ranges_are_read_at_their_offsets(
    windows: bool, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_away(windows, monkeypatch)
    data = numbers.read_bytes()
    with Files() as files:
        for start, nbytes in ((0, 100_000), (99_999, 1), (7, 50_001), (100_000, 0), (5, 0)):
            assert files.read(numbers, start, nbytes) == data[start : start + nbytes]
            assert read_range(numbers, start, nbytes) == data[start : start + nbytes]
        buffer = bytearray(b"-" * 8)
        files.read_into(numbers, 40, memoryview(buffer)[2:6])
    assert buffer == b"--\x0a\0\0\0--"


@with_and_without
def test_threads_share_files_without_disturbing_each_other(
    windows: bool, numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_away(windows, monkeypatch)
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(100_000))
    starts = list(range(0, 100_000, 100)) * 2
    random.Random(0).shuffle(starts)  # noqa: S311  (no secret)
    with Files() as files, ThreadPoolExecutor(8) as pool:

        def move(start: int) -> None:
            files.write(copy, start, files.read(numbers, start, 100))

        list(pool.map(move, starts))
    assert copy.read_bytes() == numbers.read_bytes()


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_call_that_moves_less_than_asked_is_gone_on_with(
    name: str, numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copy = getattr(os, name), tmp_path / "copy"
    copy.touch()

    def shortened(file: int, data: Any, offset: int) -> int:
        return int(real(file, [data[0][:777]] if name == "preadv" else data[:777], offset))

    monkeypatch.setattr(os, name, shortened)
    with Files() as files:
        files.write(copy, 0, files.read(numbers, 0, 100_000))
    assert copy.read_bytes() == numbers.read_bytes()


@with_and_without
def test_a_file_that_became_shorter_is_refused(
    windows: bool, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_away(windows, monkeypatch)
    with Files() as files:
        assert len(files.read(numbers, 99_000, 1000)) == 1000
        for read in (files.read, files.mapped, read_range):
            with pytest.raises(FileRefused) as caught:
                read(numbers, 99_000, 1001)
            assert caught.value.message == f"{numbers}: the file became shorter while it was read"
            assert "wait until it is done" in caught.value.hint


@with_and_without
def test_a_file_that_cannot_be_read_any_more_is_refused(
    windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _take_away(windows, monkeypatch)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    with Files() as files:
        for name, why in (("gone", "No such file or directory"), ("folder", "Is a directory")):
            for read in (files.read, files.mapped, read_range):
                with pytest.raises(FileRefused) as caught:
                    read(tmp_path / name, 0, 1)
                assert caught.value.message == (
                    f"{tmp_path / name}: the file cannot be read any more: {why}"
                )
                assert "put it back" in caught.value.hint
        with pytest.raises(FileRefused, match="cannot be read any more: cannot mmap an empty file"):
            files.mapped(tmp_path / "empty", 0, 1)


def test_an_error_while_reading_names_the_file(
    numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(FileRefused, match="numbers: the file cannot be read any more: Input/out"):
        read_range(numbers, 0, 1)


def test_what_is_written_must_exist(tmp_path: Path) -> None:
    with Files() as files, pytest.raises(FileNotFoundError):
        files.write(tmp_path / "gone", 0, b"x")


def test_mapped_bytes_outlive_the_files_and_keep_what_is_written_to_themselves(
    numbers: Path,
) -> None:
    before = numbers.read_bytes()
    with Files() as files:
        view, other = files.mapped(numbers, 4, 8), files.mapped(numbers, 8, 4)
    assert view == before[4:12]
    view[:4] = b"mine"
    assert view[4:] == other == before[8:12]
    assert numbers.read_bytes() == before


def test_files_are_closed_at_the_end_whatever_happens(
    numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    real = Path.open

    def spy(*args: Any, **options: Any) -> Any:
        opened.append(real(*args, **options))
        return opened[-1]

    monkeypatch.setattr(Path, "open", spy)
    with pytest.raises(KeyboardInterrupt), Files() as files:  # noqa: PT012
        files.read(numbers, 0, 1)
        files.read(numbers, 0, 1)
        files.write(numbers, 0, b"x")
        raise KeyboardInterrupt
    assert [file.closed for file in opened] == [True, True]  # one to read, one to write


def test_a_conversion_and_its_comparison_need_no_call_that_windows_lacks(
    small: Path, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = raw_folder(folder("small"))
    _take_away(True, monkeypatch)
    ckptconv.convert(small, tmp_path / "out")
    assert raw_folder(tmp_path / "out") == wanted
    read = Bytes.of(
        read_folder(tmp_path / "out", bundled()),
        ckptconv.plan(small),
        finite=True,
    )
    read.run(lambda _done, _total: None)
    assert read.nbytes > 1e6
    assert not read.different


def test_a_counter_reports_every_sum_of_several_threads() -> None:
    seen: list[tuple[int, int]] = []
    counter = ByteCounter(1000, lambda *sums: seen.append(sums))
    threads = [threading.Thread(target=counter.add, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counter.finish()
    sums = [done for done, _ in seen]
    assert sums == sorted(sums)
    assert sums[-2:] == [780, 1000]
    assert counter.done == counter.total == 1000
    assert {total for _, total in seen} == {1000}


@pytest.mark.parametrize("what", ["pipe", "device", "large"])
def test_a_file_that_hangs_or_swells_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, MOST_JSON + 1)
    expected = "has 100,000,001 bytes" if what == "large" else "is not a regular file"
    for reader in (read_json, Document):
        with pytest.raises(CkptconvError, match=expected):
            reader(path)
