"""Several files in one run: a bad one stops nothing, and nothing is left half-written."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckptconv.batch.run import are_several, expanded, paired, run
from ckptconv.batch.work import Conversion, Pair
from ckptconv.errors import UsageError
from ckptconv.maps.architecture import KeyMaps, bundled
from tests.conftest import Folder, Sample
from tests.support import shell
from tests.support.checkpoints import raw_folder
from tests.support.works import Broken, Deadly


@pytest.fixture
def models(small: Path, tmp_path: Path) -> Path:
    """Gives a folder of files: two that convert, and in the middle one that does not."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("a.safetensors", "c.v1.safetensors"):
        os.link(small, folder / name)
    (folder / "b.safetensors").write_text("no weights")
    return folder


def test_a_run_goes_on_past_a_bad_file_and_ends_with_a_table(
    models: Path, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = shell.run("convert", f"{models}/*.safetensors", out, code=3)
    assert done.stdout.splitlines() == [f"{out}/a", f"{out}/c.v1"]
    rows = done.stderr.partition("\nerror: ")[0].splitlines()[-3:]
    assert [(f"{name}.safetensors" in row, word in row) for row, (name, word) in zip(
        rows, [("a", "done"), ("b", "failed"), ("c.v1", "done")], strict=True
    )] == [(True, True)] * 3  # fmt: skip
    assert f"error: {models / 'b.safetensors'}: this is a text, not a model" in done.stderr
    assert done.stderr.endswith("2 of 3 files done\n")
    assert raw_folder(out / "a") == raw_folder(out / "c.v1") == raw_folder(folder("small"))
    assert not (out / "b").exists()
    again = shell.run("convert", models / "a.safetensors", f"{out}/", code=3)
    assert f"error: {out}/a: exists" in again.stderr
    proof = ["verify", models / "a.safetensors", models / "c.v1.safetensors", out]
    told = json.loads(shell.run(*proof, "--only", "tokenizer", "--json").stdout)
    assert [(each["folder"], each["passed"]) for each in told["files"]] == [
        (f"{out}/{name}", True) for name in ("a", "c.v1")
    ]
    alone = json.loads(shell.run(*proof[:2], f"{out}/a/", "--only", "tokenizer", "--json").stdout)
    assert alone["folder"] == f"{out}/a"


def test_inspect_tells_files_in_the_order_they_are_given(models: Path) -> None:
    files = [models / f"{name}.safetensors" for name in ("c.v1", "b", "a")]
    told = json.loads(shell.run("inspect", *files, "--json", code=3).stdout)["files"]
    assert [each["file"] for each in told] == [str(file) for file in files]
    assert [each.get("architecture") for each in told] == ["sd1", None, "sd1"]
    assert [bool(each["error"]) for each in told] == [False, True, False]
    text = shell.run("inspect", "--hash", *files, code=3).stdout
    assert text.count("scheduler.prediction_type = epsilon") == 2
    assert text.count("this is a text, not a model") == 1


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["convert", "m/a.safetensors", "m/a.ckpt", "out"], "several files would get the same"),
        (["convert", "m/*.pt", "m/x?", "out"], "m/*.pt, m/x?: matches no file"),
        (["convert", "m/a.safetensors", "s3://b/out"], "pip install 'ckptconv[fleet]'"),
        (["convert", "m/a.safetensors", "x9://b/out"], "Protocol not known: x9"),
        (["convert", "m/a.safetensors", "out", "--dask", "tcp://x:1"], "--dask needs Dask"),
        (["convert", "m/*", "out", "--dask", "tcp://x:1", "-j", "2"], "--jobs is for this machine"),
        (["inspect", "m/a.safetensors", "m/b", "--tree"], "--tree: for one file only"),
        (["verify", "m/a.safetensors", "m/b", "out", "--html", "x"], "--html: for one file only"),
    ],
)
def test_wrong_usage_is_told_before_anything_starts(
    args: list[str], sentence: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.parent)
    models.rename("m")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert sentence in shell.run(*args, code=2).stderr
    assert not Path("out").exists()


def test_files_are_paired_with_folders_as_cp_does(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x[1].ckpt").touch()
    assert expanded(["x[1].ckpt", "./*.ckpt"]) == ["x[1].ckpt", "./x[1].ckpt"]
    assert not are_several(["x[1].ckpt"], "out")
    assert are_several(["x[1].ckpt"], "out/")
    assert are_several(["*.ckpt"], "out")
    assert not are_several(["x.ckpt"], f"{folder('small')}/")  # it is a model, not for models
    pairs = paired(["s3://b/m.safetensors.index.json", "d/n.ckpt"], "s3://b/out/")
    assert [pair.out for pair in pairs] == ["s3://b/out/m", "s3://b/out/n"]
    with pytest.raises(UsageError, match="matches no file"):
        expanded(["*.pt"])


def test_key_maps_are_sent_as_the_names_of_their_folders(tmp_path: Path) -> None:
    own = KeyMaps([tmp_path, *bundled().folders])
    sent = pickle.dumps([bundled(), own])
    assert all(os.fsencode(folder) not in sent for folder in bundled().folders)
    ours, both = pickle.loads(sent)  # noqa: S301  (ours)
    assert ours is bundled()
    assert both.folders == own.folders


def test_a_bug_is_told_with_its_traceback_and_the_run_goes_on() -> None:
    outcomes = run(Broken(), [Pair("a"), Pair("b"), Pair("c")])
    assert [str(outcome.error or "") for outcome in outcomes] == [
        "",
        "b: ckptconv failed: ZeroDivisionError: integer division or modulo by zero",
        "",
    ]
    assert "1 // (pair.source" in outcomes[1].traceback


def test_a_worker_that_is_killed_costs_its_own_file_only(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    os.link(models / "a.safetensors", models / "d.safetensors")
    pairs = paired(expanded([f"{models}/*"]), str(out))
    told: list[tuple[int, ...]] = []
    outcomes = run(Deadly(), pairs, processes=2, progress=lambda *now: told.append(now))
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == [
        f"{models}/b.safetensors: the process that worked on it died: SIGKILL, as when the memory "
        "is full"
    ]
    assert sorted(path.name for path in out.iterdir()) == ["a", "c.v1", "d"]
    assert told == sorted(told)
    assert told[-1] == (4, told[-1][2], sum(file.stat().st_size for file in models.iterdir()))
    assert not multiprocessing.active_children()


def test_ctrl_c_leaves_nothing_half_written(sample: Sample, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = [tmp_path / f"{n}.safetensors" for n in range(80)]  # more than end before the signal
    for file in files:
        os.link(sample("sd1"), file)
    command = [sys.executable, "-m", "ckptconv", "convert", "-j", "2", *map(str, files), str(out)]
    # Whatever runs in the background of a shell ignores Ctrl-C, and so does what it starts.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(  # noqa: S603  (no shell)
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeds,
    ) as running:
        while running.poll() is None and not (out.is_dir() and any(out.iterdir())):
            time.sleep(0.005)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, told = running.communicate(timeout=60)  # how fast is no matter for a test
    assert running.returncode == 130
    assert told == "interrupted\n"
    left = list(out.iterdir()) if out.is_dir() else []
    assert len(left) < len(files)
    assert all((path / "model_index.json").is_file() for path in left)


def test_files_of_the_user_in_a_remote_folder_stay(small: Path) -> None:
    from fsspec.implementations.memory import (  # type: ignore[import-untyped]  # no stubs
        MemoryFileSystem,
    )

    store, pairs = MemoryFileSystem(), [Pair(str(small), "memory://strangers/x")]
    convert = Conversion(overwrite=True)
    assert not any(outcome.error for outcome in run(convert, pairs) + run(convert, pairs))
    store.pipe_file("/strangers/x/lora/mine.safetensors", b"mine")
    (refused,) = run(convert, pairs)
    assert "memory://strangers/x: holds what ckptconv did not write" in str(refused.error)
    assert "  - lora/mine.safetensors" in str(refused.error)
    assert store.cat_file("/strangers/x/lora/mine.safetensors") == b"mine"
    for record in (b"{", b"[]", b'{"files": ["lora/mine.safetensors"]}'):
        store.pipe_file("/strangers/x/ckptconv/source.json", record)
        (refused,) = run(convert, pairs)
        assert "is not a converted folder that lists its files" in str(refused.error)
