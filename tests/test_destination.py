"""What may be replaced, and that whatever is made appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptconv import destination, in_place
from ckptconv.destination import Destination, Kind, TextFile, check_room
from ckptconv.errors import OutputError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_name_may_be_written(tmp_path: Path) -> None:
    for overwrite in (False, True):
        Destination(tmp_path / "new", overwrite).check()


def test_a_file_may_be_replaced_on_demand_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OutputError) as caught:
        Destination(path).check()
    assert caught.value.message == f"{path}: exists"
    assert caught.value.hint == "overwrite=True replaces it; or choose another name"
    Destination(path, overwrite=True).check()


MAKERS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to(__file__),
    "a link ": lambda path: path.symlink_to("nowhere"),
    "a device or a pipe": os.mkfifo,
}


@pytest.mark.parametrize("found", MAKERS)
def test_nothing_but_a_regular_file_is_replaced(found: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    MAKERS[found](path)
    with pytest.raises(OutputError) as caught:
        Destination(path, overwrite=True).check()
    assert caught.value.message == (
        f"{path}: exists and is {found.strip()}; it is not a regular file, "
        "so overwrite=True does not remove it"
    )
    assert caught.value.hint == "remove it yourself, or choose another name"


def test_the_caller_says_what_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a poem")
    Destination(path, True, Kind("a poem", lambda _: True)).check()
    with pytest.raises(OutputError, match="is a file; it is not a novel, so overwrite=True does"):
        Destination(path, True, Kind("a novel", lambda _: False)).check()


def test_an_input_is_never_replaced_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path, link = tmp_path / "folder" / "x", tmp_path / "link"
    path.write_text("weights")
    link.symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    for one in (path, link, tmp_path / "folder" / ".." / "folder" / "x", tmp_path / "hard"):
        with pytest.raises(OutputError, match="x: is one of the files to read") as caught:
            Destination(path, True, inputs=["elsewhere", str(one)]).check()
        assert caught.value.hint == "choose another name"
        if one.name == "hard":  # the folder may go, the other name stays
            continue
        with pytest.raises(OutputError, match=f"holds the input {one}, so overwrite=True does not"):
            Destination(path.parent, True, Kind("a folder", Path.is_dir), inputs=[one]).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taken/x", "{place}/taken: is not a folder"),
        ("x" * 300, "{path}: cannot be looked at: File name too long"),
        ("null\0", "{path}: cannot be looked at: "),
    ],
)
def test_a_place_where_nothing_can_be_is_refused(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (tmp_path / "taken").touch()
    checks: tuple[Callable[[], None], ...] = (
        Destination(path, overwrite=True).check,
        TextFile(path).check,
    )
    for check in checks:
        with pytest.raises(OutputError) as caught:
            check()
        assert caught.value.message.startswith(message.format(place=tmp_path, path=path))


def test_a_folder_that_may_not_be_looked_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "lstat", denied)
    with pytest.raises(OutputError, match="x: cannot be looked at: Permission denied"):
        Destination(tmp_path / "x", overwrite=True).check()


def test_text_is_appended_through_links_to_text_files_only(tmp_path: Path) -> None:
    path, link, data = tmp_path / "x", tmp_path / "link", tmp_path / "data"
    path.write_text("one ")
    link.symlink_to(path)
    data.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    os.mkfifo(tmp_path / "pipe")
    TextFile(link).append("two")
    assert path.read_text() == "one two"
    TextFile(tmp_path / "new", [path]).append("three")
    assert (tmp_path / "new").read_text() == "three"
    for file, said in (
        (TextFile(link, [path]), "link: is one of the files to read"),
        (TextFile(tmp_path), "is a folder, and not a text file"),
        (TextFile(tmp_path / "pipe"), "is a device or a pipe, and not a text file"),
        (TextFile(data), "data: holds other data than text"),
        (TextFile(tmp_path / "gone" / "x"), "gone: is not a folder"),
    ):
        with pytest.raises(OutputError, match=said):
            file.append("four")
    assert data.read_bytes() == b"\x08\0\0\0\0\0\0\0{}"


def test_room_is_counted_in_bytes(tmp_path: Path) -> None:
    check_room(tmp_path / "x", 1, "the file")
    with pytest.raises(OutputError, match=r"x: the disk has [\d,]+ bytes free, and the file needs"):
        check_room(tmp_path / "x", 1 << 60, "the file")


FOLDER = Kind("a folder", Path.is_dir, lambda path: [p.name for p in path.glob("mine*")])
"""May be replaced if it has no file of the user's."""


@pytest.fixture(params=["one step", "two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can exchange two names, and one that can only rename."""
    if request.param == "two renames":
        monkeypatch.setattr(in_place, "_call", lambda: None)
    return str(request.param)


def test_this_system_exchanges_names(tmp_path: Path) -> None:
    """Otherwise the tests with `system` would test the same thing twice."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert in_place.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "b"


@pytest.mark.parametrize("name", ["x", "n" * 255, "ü" * 127])  # 255 bytes are the longest
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_what_is_made_appears_whole_and_nothing_of_the_old_stays(
    system: str, name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    for content in ("new", "newer"):
        before = _names(tmp_path)
        with Destination(
            path, True, FOLDER if make is Path.mkdir else destination.FILE
        ).new() as it:
            make(it)
            (it / content if it.is_dir() else it).write_text(content)
            (other,) = set(_names(tmp_path)) - set(before)
            assert other.startswith(f".{name[0]}")
        assert (path / content if path.is_dir() else path).read_text() == content
        assert _names(tmp_path) == [name]
        assert not path.is_dir() or _names(path) == [content]


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "cannot be written: the disk is full"),
    (OSError(errno.EIO, "Input/output error"), "cannot be written: Input/output error"),
    (KeyboardInterrupt("stop"), "stop"),
    (RuntimeError("a fault of ours"), "a fault of ours"),
]
RAISED = (OutputError, KeyboardInterrupt, RuntimeError)


def _half(path: Path) -> None:
    path.mkdir()
    (path / "half").touch()


@pytest.mark.parametrize(("error", "said"), ERRORS)
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("make", [Path.touch, _half])
def test_an_exception_leaves_everything_as_it_was(
    error: BaseException, said: str, there: bool, make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    if there:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(RAISED, match=said) as caught, Destination(path, True, FOLDER).new() as it:  # noqa: PT012
        make(it)
        raise error
    if isinstance(caught.value, OutputError):
        assert caught.value.hint == "nothing was left behind; choose another place"
    assert _names(tmp_path) == ["x"] * there
    assert not there or _names(path) == ["old"]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(4))
def test_the_old_folder_comes_back_whichever_rename_is_interrupted(
    system: str,
    error: BaseException,
    moment: str,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "folder"
    (folder / "old").mkdir(parents=True)
    real, count = Path.rename, itertools.count()

    def rename(self: Path, target: Path) -> Path | bool:
        if next(count) != number:
            return real(self, target)
        if moment == "after":
            real(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", rename)
    with contextlib.suppress(OutputError, KeyboardInterrupt):  # noqa: SIM117
        with Destination(folder, True, FOLDER).new() as hidden:
            (hidden / "new").mkdir(parents=True)
    assert _names(folder) in (["old"], ["new"])
    monkeypatch.undo()
    with Destination(folder, True, FOLDER).new() as hidden:
        (hidden / "newer").mkdir(parents=True)
    assert _names(tmp_path) == ["folder"]
    assert _names(folder) == ["newer"]


@pytest.mark.parametrize(
    "theirs", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")]
)
@pytest.mark.parametrize("make", [Path.touch, _half])
def test_what_another_program_made_meanwhile_stays(
    system: str, theirs: Callable[[Path], None], make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    with pytest.raises(OutputError, match="another program made it meanwhile"):  # noqa: SIM117, PT012
        with Destination(path).new() as hidden:
            make(hidden)
            theirs(path)
            state = path.lstat()
    assert path.lstat().st_ino == state.st_ino
    assert _names(tmp_path) == ["x"]


def test_with_overwrite_too_nothing_but_the_kind_is_replaced_at_the_end(
    system: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    for there in (False, True):
        with pytest.raises(OutputError, match="is a file; it is not a folder"):  # noqa: SIM117, PT012
            with Destination(path, True, FOLDER).new() as hidden:
                hidden.mkdir()
                if there:
                    path.rmdir()
                path.write_text("theirs")
        assert path.read_text() == "theirs"
        assert _names(tmp_path) == ["x"]
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("moment", ["before the end", "at the last moment"])
def test_a_file_that_the_user_adds_meanwhile_is_not_replaced(
    system: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.mkdir()

    def add() -> None:
        (path / "mine").write_text("mine")

    if moment == "at the last moment":  # after the last look from outside
        real = Destination._require_replaceable
        looks = itertools.count(1)

        def look(self: Destination) -> None:
            real(self)
            if next(looks) == 3:
                add()

        monkeypatch.setattr(Destination, "_require_replaceable", look)
    place = Destination(path, True, FOLDER)
    place.check()
    with pytest.raises(OutputError, match="holds what ckptconv did not") as caught:  # noqa: SIM117, PT012
        with place.new() as hidden:
            hidden.mkdir()
            if moment == "before the end":
                add()
    assert caught.value.problems == ("mine",)
    assert (path / "mine").read_text() == "mine"
    assert _names(tmp_path) == ["x"]


@pytest.mark.parametrize("name", [".", "..", "/", "folder/..", "../here", "link"])
def test_the_current_folder_and_those_that_hold_it_are_no_destination(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is the current folder, or one that holds it"):
            Destination(Path(name), overwrite, FOLDER).check()


def test_nothing_is_written_in_a_folder_that_is_read(tmp_path: Path) -> None:
    inside = tmp_path / "model" / "unet"
    inside.mkdir(parents=True)
    for path in (inside / "x", tmp_path / "model" / "new" / "x", inside / ".." / "x"):
        with pytest.raises(OutputError, match=r"lies in .*model, which is read"):
            Destination(path, closed=tmp_path / "model").check()
    Destination(inside / ".." / ".." / "x", closed=tmp_path / "model").check()


def _killed(path: Path, change: Callable[[Path], object]) -> None:
    """Makes a folder in another process, which is killed after a change to its hidden folder."""
    if not (pid := os.fork()):
        try:
            with Destination(path, True, FOLDER).new() as new:
                new.mkdir()
                (new / "half").touch()
                change(new.parent)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _without_lock(hidden: Path) -> None:
    in_place.discard(hidden)
    (hidden / "lock").unlink()


def _with_empty_lock(hidden: Path) -> None:
    in_place.discard(hidden)
    os.truncate(hidden / "lock", 0)


LEFT: dict[str, Callable[[Path], object]] = {
    "half a folder": lambda _: None,
    "a folder without a lock": _without_lock,
    "an empty lock": _with_empty_lock,
    "the lock alone": in_place.discard,
    "a folder that was exchanged": lambda hidden: (hidden / "new").replace(hidden / "swap"),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_killed_run_left_is_removed_by_the_next(
    left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _killed(tmp_path / "x", LEFT[left])
    (hidden,) = tmp_path.iterdir()
    Destination(tmp_path / "other").check()
    assert _names(tmp_path) == [hidden.name]
    Destination(tmp_path / "x", kind=FOLDER).check()
    assert _names(tmp_path) == []
    said = [f"{hidden}: removed; it is what a killed run left"]
    assert caplog.messages == said * ("half" in left or "exchanged" in left or "alone" in left)


def test_a_run_that_goes_on_keeps_its_hidden_folder(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with Destination(path).new() as one:
        one.touch()
        Destination(path).check()
        with Destination(path).new() as other:
            other.touch()
        with contextlib.suppress(OutputError):
            Destination(path).check()
        assert one.exists()
        path.unlink()


def _locked(path: Path, name: str) -> int:
    path.mkdir(parents=True)
    return (path / "lock").write_text(name)


OTHERS: dict[str, Callable[[Path], object]] = {
    "a file": Path.touch,
    "a link": lambda path: path.symlink_to("x"),
    "no lock": lambda path: (path / "new").mkdir(parents=True),
    "another lock": lambda path: _locked(path, "y"),
    "more": lambda path: [_locked(path, "x"), (path / "z").write_text("")],
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_certainly_ours_is_not_removed(what: str, tmp_path: Path) -> None:
    path = tmp_path / ".x.0123abcd.partial"
    OTHERS[what](path)
    before = sorted(tmp_path.rglob("*"))
    Destination(tmp_path / "x").check()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_a_killed_run_moved_away_is_put_back(
    overwrite: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x"
    path.mkdir()
    (path / "mine").touch()
    _killed(tmp_path / "y", lambda hidden: path.rename(hidden / "old"))
    (hidden,) = tmp_path.iterdir()
    (hidden / "lock").write_text("x")
    hidden.rename(tmp_path / hidden.name.replace("y", "x"))
    with pytest.raises(OutputError):
        Destination(path, overwrite, FOLDER).check()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "mine"]
    assert f"{path}: put back; a run was stopped while it replaced this" in caplog.messages


@pytest.mark.parametrize("name", ["swap", "old"])
def test_what_stood_there_and_is_the_users_is_never_removed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x"
    _killed(path, lambda hidden: (hidden / name / "mine").mkdir(parents=True))
    path.mkdir()
    for _ in range(2):
        Destination(path, True, FOLDER).check()
        (mine,) = tmp_path.rglob("mine")
        assert f"{mine.parent}: stood at {path} before, and is yours to move" in caplog.text
        caplog.clear()


def test_the_old_folder_stays_if_its_place_was_taken_before_the_new_one_was_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x"
    _killed(path, lambda hidden: (hidden / "old" / "inside").mkdir(parents=True))
    path.write_text("mine")
    with pytest.raises(OutputError, match="it is not a folder"):
        Destination(path, True, FOLDER).check()
    assert next(tmp_path.rglob("inside")).is_dir()
    assert f"old: stood at {path} before, and is yours to move" in caplog.text


def test_read_only_folders_of_the_old_folder_go_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "old").touch()
    (path / "inside").chmod(0o555)
    real = os.unlink

    def unlink(name: Any, *, dir_fd: int | None = None) -> None:  # as for a user who is not root
        inner = os.stat(dir_fd if dir_fd is not None else Path(name).parent)  # noqa: PTH116
        if not inner.st_mode & 0o200:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    with Destination(path, True, FOLDER).new() as hidden:
        hidden.mkdir()
    assert _names(tmp_path) == ["x"]
    assert _names(path) == []


def test_what_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x"
    path.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_args, **_words: None)
    with Destination(path, True, FOLDER).new() as hidden:
        hidden.mkdir()
    assert f"{hidden.parent}: could not be removed; remove it yourself" in caplog.messages


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_missing_parents_are_made_and_removed_after_a_failure(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "a" / "b" / "x"
    place = Destination(path)
    place.check()
    with pytest.raises(KeyboardInterrupt), place.new():
        raise KeyboardInterrupt
    assert _names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), place.new():  # noqa: PT012
        (tmp_path / "a" / "theirs").touch()
        raise KeyboardInterrupt
    assert _names(tmp_path / "a") == ["theirs"]
    with place.new() as hidden:
        make(hidden)
    assert _names(path.parent) == ["x"]
