"""Tensors arrive as a naive implementation would put them, and never half of a file looks whole."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ckptconv.conversion.convert import plan
from ckptconv.dtypes import BITS
from ckptconv.errors import FileRefused
from ckptconv.files import Files
from ckptconv.planning.step import Step, Target
from ckptconv.reading.header import read_header
from ckptconv.reading.tensor import Tensor
from ckptconv.streaming import stream
from ckptconv.streaming.stream import lay_out, write
from ckptconv.streaming.transfers import Transfer, joined, transfers
from tests.conftest import Sample
from tests.support.steps import DIM, Run, cast_to, copies, in_turns, naive, steps_of_all_kinds


def _refused_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "numpy"):
            return False
    except SafetensorError:
        return True


@settings(max_examples=80, deadline=None)
@given(steps_of_all_kinds(), st.integers(8, 64), st.integers(1, 9))
def test_files_equal_a_naive_implementation_whatever_is_cut_where(
    steps: list[Step], chunk: int, cast_chunk: int
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(stream, "CHUNK", chunk),
        patch.object(stream, "CAST_CHUNK", cast_chunk),
    ):
        run = Run(Path(folder), steps)
        _, progress = run.write()
        assert progress == sum(info.nbytes for file in run.files for info in file.tensors.values())
        for step in steps:
            wanted = naive(step, run.contents)
            for target in step.targets:
                place = run.places[target.component, target.key]
                assert place.file.read_bytes()[place.start : place.end] == wanted[target.key]
        for file in run.files:
            assert file.path.stat().st_size == file.size
            with safe_open(file.path, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                shapes = {key: tuple(opened.get_tensor(key).shape) for key in opened.keys()}  # noqa: SIM118  (no mapping)
            assert shapes == {key: info.shape for key, info in file.tensors.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "F16", "BF16", "U8", "I64", "F8_E4M3"]), DIM),
        max_size=8,
    )
)
def test_every_tensor_is_aligned_to_its_elements_whatever_the_mix(
    tensors: list[tuple[str, int]],
) -> None:
    targets = [Target("unet", f"t{n}", dtype, (size,)) for n, (dtype, size) in enumerate(tensors)]
    file = lay_out(Path("w.safetensors"), targets, {"format": "pt"})
    assert set(file.tensors) == {target.key for target in targets}
    for info in file.tensors.values():
        assert info.start % (BITS[info.dtype] // 8) == 0
    assert file.size == len(file.beginning) + sum(i.nbytes for i in file.tensors.values())


def test_neighbours_become_one_copy(tmp_path: Path) -> None:
    run = Run(tmp_path, copies(50))
    assert len(run.transfers()) == 50
    (whole,) = joined(run.transfers())
    assert (whole.count, whole.nbytes, whole.is_copy) == (50_000, 200_000, True)
    assert whole.source[1] == run.headers["a"].data_start


def test_what_does_not_lie_together_is_not_joined(tmp_path: Path) -> None:
    steps = in_turns(copies(4))
    assert len(list(joined(Run(tmp_path, steps).transfers()))) == 4


def test_casts_are_not_joined_withcopies(tmp_path: Path) -> None:
    steps = copies(3)
    steps[1:2] = cast_to("F16", steps[1:2])
    found = [(p.is_copy, p.count) for p in joined(Run(tmp_path, steps).transfers())]
    assert found == [(True, 1000), (False, 1000), (True, 1000)]


def test_a_whole_checkpoint_takes_few_copies(sample: Sample, tmp_path: Path) -> None:
    made = plan(sample("sd1", dtype="fp16"))
    places: dict[tuple[str, str], Tensor] = {}
    for name in ("unet", "vae", "text_encoder", "ckptconv"):
        file = lay_out(tmp_path / name, made.tensors(name).values(), {})
        places |= {(name, key): tensor for key, tensor in file.tensors.items()}
    parts = list(transfers(made.steps, places))
    assert len(parts) > 900
    assert len(list(joined(parts))) < 30


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_large_piece_is_cut_into_chunks(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", 4096)
    monkeypatch.setattr(stream, "CAST_CHUNK", 300)
    moved: list[Transfer] = []
    real = stream._move

    def spy(piece: Transfer, *rest: Any) -> int:
        moved.append(piece)
        return real(piece, *rest)

    monkeypatch.setattr(stream, "_move", spy)
    Run(tmp_path, cast_to(dtype, copies(5))).write()
    if dtype == "F32":  # 20,000 bytes, joined
        assert sorted(piece.nbytes for piece in moved) == [20_000 % 4096, *[4096] * 4]
    else:  # five tensors of 1000 elements
        assert sorted(piece.count for piece in moved) == [*[100] * 5, *[300] * 15]


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_call_that_moves_less_than_asked_is_gone_on_with(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, name)

    def shortened(file: int, data: Any, offset: int) -> int:
        part = [data[0][:777]] if name == "preadv" else data[:777]
        return int(real(file, part, offset))

    monkeypatch.setattr(os, name, shortened)
    run = Run(tmp_path, copies(3))
    _, progress = run.write()
    assert progress == 12_000
    _check_copied(run)


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_an_error_of_the_system_is_not_swallowed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    kind = FileRefused if name == "preadv" else OSError  # a source names itself
    with pytest.raises(kind, match="Input/output error"):
        Run(tmp_path, copies(3)).write()


def _check_copied(run: Run) -> None:
    (file,) = run.files
    data = file.path.read_bytes()[len(file.beginning) :]
    assert data == b"".join(run.contents.values())


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_source_that_became_shorter_is_refused(tmp_path: Path, dtype: str) -> None:
    run = Run(tmp_path, cast_to(dtype, copies(1)))
    path = run.headers["a"].path
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FileRefused, match="became shorter while it was read") as caught:
        run.write()
    assert str(path) in caught.value.message
    assert "wait until it is done" in caught.value.hint
    assert _refused_by_safetensors(run.files[0].path)


def test_a_source_that_vanished_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, copies(1))
    run.headers["a"].path.unlink()
    with pytest.raises(FileRefused, match=r"cannot be read any more: No such file"):
        run.write()


def test_no_file_is_written_over(tmp_path: Path) -> None:
    run = Run(tmp_path, copies(1))
    run.files[0].path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        run.write()
    assert run.files[0].path.read_bytes() == b"precious"


def test_an_error_in_one_thread_stops_the_others_and_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", 64)
    begun: list[int] = []
    lock = threading.Lock()
    real = Files.write

    def fail_once(self: Files, path: Path, start: int, data: memoryview) -> None:
        with lock:
            begun.append(start)
            if len(begun) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, start, data)

    monkeypatch.setattr(Files, "write", fail_once)
    run = Run(tmp_path, copies(20, size=1600))  # 2,000 chunks
    with pytest.raises(OSError, match="No space left"):
        run.write()
    assert 5 <= len(begun) < 100
    assert _refused_by_safetensors(run.files[0].path)


@pytest.mark.parametrize("moment", [0, 1, 10, 19])
def test_files_of_an_interrupted_run_are_refused_by_every_reader(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []

    def progress(_: int) -> None:
        moved.append(1)
        if len(moved) == moment + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stream, "CHUNK", 4000)
    run = Run(tmp_path, in_turns(copies(20)))
    with pytest.raises(KeyboardInterrupt):
        write(run.files, run.transfers(), progress)
    assert len(run.files) == 2
    for file in run.files:
        assert file.path.stat().st_size == file.size
        assert _refused_by_safetensors(file.path)
        with pytest.raises(FileRefused):
            read_header(file.path)


def test_the_room_is_taken_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, copies(3))

    def full(descriptor: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, run.files[0].size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    done: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        write(run.files, run.transfers(), done.append)
    assert not done


def test_values_that_a_cast_cannot_hold_are_counted_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CAST_CHUNK", 3)
    run = Run(tmp_path, cast_to("F16", copies(3, size=8)))
    too_large = np.array([7e4, 1, -7e4, 2, np.inf, np.nan, 1e5, 65504], np.float32)
    fine = np.ones(8, np.float32)
    path = run.headers["a"].path
    data = path.read_bytes()[: run.headers["a"].data_start]
    path.write_bytes(data + too_large.tobytes() + fine.tobytes() + too_large.tobytes())
    warnings, _ = run.write()
    assert warnings == [
        "unet/s0: 3 values are too large for F16: infinite now",
        "unet/s2: 3 values are too large for F16: infinite now",
    ]


def test_a_file_without_tensors_is_whole(tmp_path: Path) -> None:
    file = lay_out(tmp_path / "w.safetensors", [], {"format": "pt"})
    write([file], [], lambda _: None)
    with safe_open(file.path, "pt") as opened:
        assert list(opened.keys()) == []
