"""What may be replaced, and that whatever is made appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ckptconv.destination import check_destination, check_room, new_file, new_folder, writing
from ckptconv.errors import OutputError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_name_may_be_written(tmp_path: Path) -> None:
    for overwrite in (False, True):
        check_destination(tmp_path / "new", overwrite=overwrite)


def test_a_file_may_be_replaced_on_demand_only(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OutputError) as caught:
        check_destination(path, overwrite=False)
    assert caught.value.message == f"{path}: exists"
    assert caught.value.hint == "overwrite=True replaces it; or choose another name"
    check_destination(path, overwrite=True)


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
        check_destination(path, overwrite=True)
    assert caught.value.message == (
        f"{path}: exists and is {found.strip()}; it is not a regular file, "
        "so overwrite=True does not remove it"
    )
    assert caught.value.hint == "remove it yourself, or choose another name"


def test_the_caller_says_what_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a poem")
    check_destination(path, overwrite=True, kind=("a poem", lambda _: True))
    with pytest.raises(OutputError, match="is a file; it is not a novel, so overwrite=True does"):
        check_destination(path, overwrite=True, kind=("a novel", lambda _: False))


def test_an_input_is_never_replaced_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path, link = tmp_path / "folder" / "x", tmp_path / "link"
    path.write_text("weights")
    link.symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    for one in (path, link, tmp_path / "folder" / ".." / "folder" / "x", tmp_path / "hard"):
        with pytest.raises(OutputError, match="x: is one of the files to read") as caught:
            check_destination(path, overwrite=True, inputs=["elsewhere", str(one)])
        assert caught.value.hint == "choose another name"
        if one.name == "hard":  # the folder may go, the other name stays
            continue
        with pytest.raises(OutputError, match=f"holds the input {one}, so overwrite=True does not"):
            check_destination(
                path.parent, overwrite=True, inputs=[one], kind=("a folder", Path.is_dir)
            )


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
        lambda: check_destination(path, overwrite=True),
        lambda: check_destination(path, append=True),
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
        check_destination(tmp_path / "x", overwrite=True)


def test_text_is_appended_through_links_but_not_to_inputs_or_folders(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "link"
    path.write_text("one ")
    link.symlink_to(path)
    check_destination(link, append=True)
    with writing(link), link.open("a") as file:
        file.write("two")
    assert path.read_text() == "one two"
    check_destination(tmp_path / "new", append=True, inputs=[path])
    with pytest.raises(OutputError, match="link: is one of the files to read"):
        check_destination(link, append=True, inputs=[path])
    with pytest.raises(OutputError, match="is a folder"):
        check_destination(tmp_path, append=True)
    with (
        pytest.raises(OutputError, match="cannot be written: Is a directory") as caught,
        writing(tmp_path, "write elsewhere"),
    ):
        tmp_path.write_text("three")
    assert caught.value.hint == "write elsewhere"


def test_room_is_counted_in_bytes(tmp_path: Path) -> None:
    check_room(tmp_path / "x", 1, "the file")
    with pytest.raises(OutputError, match=r"x: the disk has [\d,]+ bytes free, and the file needs"):
        check_room(tmp_path / "x", 1 << 60, "the file")


@pytest.mark.parametrize("name", ["x", "n" * 255, "ü" * 127])  # 255 bytes are the longest
def test_a_file_appears_whole(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in ("new", "newer"):
        before = _names(tmp_path)
        with new_file(path) as hidden:
            hidden.write_text(content)
            (other,) = set(_names(tmp_path)) - set(before)
            assert other.startswith(f".{name[0]}")
        assert path.read_text() == content
        assert _names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["x", "n" * 255])
def test_a_folder_appears_whole_and_nothing_of_the_old_one_stays(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in ("new", "newer"):
        with new_folder(path) as hidden:
            assert _names(hidden) == []
            (hidden / content).touch()
        assert _names(path) == [content]
        assert _names(tmp_path) == [name]


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), "cannot be written: the disk is full"),
    (OSError(errno.EIO, "Input/output error"), "cannot be written: Input/output error"),
    (KeyboardInterrupt("stop"), "stop"),
    (RuntimeError("a fault of ours"), "a fault of ours"),
]


@pytest.mark.parametrize(("error", "said"), ERRORS)
@pytest.mark.parametrize("there", [False, True])
def test_an_exception_leaves_everything_as_it_was(
    error: BaseException, said: str, there: bool, tmp_path: Path
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    if there:
        file.write_text("old")
        (folder / "old").mkdir(parents=True)
    before = _names(tmp_path)
    with pytest.raises((OutputError, KeyboardInterrupt, RuntimeError), match=said) as caught:  # noqa: SIM117, PT012
        with new_file(file) as hidden:
            hidden.write_text("half")
            raise error
    if isinstance(caught.value, OutputError):
        assert caught.value.hint == "nothing was left behind; choose another place"
    with pytest.raises((OutputError, KeyboardInterrupt, RuntimeError), match=said):  # noqa: SIM117, PT012
        with new_folder(folder) as hidden:
            (hidden / "half").touch()
            raise error
    assert _names(tmp_path) == before
    if there:
        assert file.read_text() == "old"
        assert _names(folder) == ["old"]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("moved", [".partial", "folder"])
def test_the_old_folder_comes_back_whichever_rename_is_interrupted(
    error: BaseException, moment: str, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    (folder / "old").mkdir(parents=True)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if not self.name.endswith(moved):
            return real(self, target)
        if moment == "after":
            real(self, target)
        raise error

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((OutputError, KeyboardInterrupt)), new_folder(folder) as hidden:
        (hidden / "new").mkdir()
    assert _names(tmp_path) == ["folder"]
    assert _names(folder) == ["new" if (moment, moved) == ("after", ".partial") else "old"]


def test_what_another_program_made_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for new in (new_file, new_folder):
        with pytest.raises(OutputError, match="another program made it meanwhile"):  # noqa: SIM117
            with new(path):
                path.write_text("theirs")
        assert path.read_text() == "theirs"
        assert _names(tmp_path) == ["x"]
        path.unlink()


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_missing_parents_are_made_and_removed_after_a_failure(
    new: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path
) -> None:
    path = tmp_path / "a" / "b" / "x"
    check_destination(path)
    with pytest.raises(KeyboardInterrupt), new(path):
        raise KeyboardInterrupt
    assert _names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), new(path):  # noqa: PT012
        (tmp_path / "a" / "theirs").touch()
        raise KeyboardInterrupt
    assert _names(tmp_path / "a") == ["theirs"]
    with new(path) as hidden:
        hidden.touch()
    assert _names(path.parent) == ["x"]


def test_a_parent_that_is_needed_to_append_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="gone: is not a folder"):
        check_destination(tmp_path / "gone" / "x", append=True)
