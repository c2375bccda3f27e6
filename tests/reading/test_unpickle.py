"""Hostile and damaged PyTorch checkpoints: nothing runs, and each refusal says what is wrong."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptconv
from ckptconv.errors import CkptconvError, FileRefused, HeaderError, UnsafePickle
from ckptconv.reading import pickled, unpickle, zip_directory
from ckptconv.reading.source import open_header
from tests.support.pickle_attacks import DOUBLED, PICKLES, WHOLE, ZIPS
from tests.support.pickles import (
    EMPTY_DICT,
    MARK,
    STOP,
    check_laws,
    checkpoint,
    name,
    number,
    numbers,
    pushed,
    table,
    tensor,
    text,
    torch_file,
    touching,
    zipped,
)

MiB = 1 << 20


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that a test may write, again and again."""
    return tmp_path_factory.mktemp("unpickle") / "model.ckpt"


def refused(content: bytes, path: Path) -> FileRefused:
    """Returns the refusal of a file, which took little memory."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileRefused) as caught:
            open_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(content) + 8 * MiB
    assert path.name in caught.value.message
    assert caught.value.hint
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
    return caught.value


@pytest.mark.parametrize("global_", touching(Path("x")))
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused_by_its_name_and_runs_nothing(
    global_: str, protocol: int, tmp_path: Path
) -> None:
    mark = tmp_path / "it ran"
    code = pickle.dumps({"state_dict": {}, "run": touching(mark)[global_]}, protocol)
    path = tmp_path / "model.ckpt"
    refusal = refused(checkpoint(code), path)
    assert isinstance(refusal, UnsafePickle)
    assert repr(global_) in refusal.problems or global_ == "pathlib.Path.touch"
    assert "none of it was run" in refusal.message
    for run in (ckptconv.inspect, ckptconv.plan):
        with pytest.raises(UnsafePickle):
            run(path)
    with pytest.raises(UnsafePickle):
        ckptconv.convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt"]


@pytest.mark.parametrize("global_", touching(Path("x")))
def test_such_a_pickle_does_run_when_python_reads_it(global_: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(touching(mark)[global_], 2))  # noqa: S301  (our own)
    assert mark.exists()


def test_all_names_are_listed_and_those_of_real_checkpoints_are_not(scratch: Path) -> None:
    code = table(
        good=tensor(),
        a=name("os.system") + text("touch x") + b"\x85R",
        b=b"cos\nsystem\n",
        c=text("subprocess") + text("Popen") + b"\x93",
        d=name("__builtin__.eval"),
        e=name("torch.storage._load_from_bytes") + b")R",
        f=name("builtins.getattr") + MARK + name("torch.Size") + text("__class__") + b"tR",
        g=name("evil\x1b[2J.name") + b")R",
        h=name("torch.nn.modules.linear.Linear") + b")\x81",
        i=name("collections.OrderedDict") + b")R",
    )
    refusal = refused(checkpoint(code, _0=bytes(16)), scratch)
    assert isinstance(refusal, UnsafePickle)
    assert refusal.problems == (
        "'os.system'",
        "'subprocess.Popen'",
        "'builtins.eval'",
        "'torch.storage._load_from_bytes'",
        "'builtins.getattr'",
        r"'evil\x1b[2J.name'",
    )


def test_names_are_listed_although_the_pickle_is_broken_before_them(scratch: Path) -> None:
    code = b"\x80\x020" + name("os.system") + MARK + text("x") + b"ios\npopen\n"
    assert refused(checkpoint(code), scratch).problems == ("'os.system'", "'os.popen'")


def test_a_quantized_tensor_is_refused_by_the_name_of_its_function(scratch: Path) -> None:
    sparse = torch.ones(2, 2).to_sparse()
    assert (
        "'torch._utils._rebuild_sparse_tensor'"
        in refused(torch_file({"a": sparse}), scratch).problems
    )


@pytest.mark.parametrize("attack", PICKLES)
def test_a_damaged_pickle_is_refused_with_what_is_wrong(attack: str, scratch: Path) -> None:
    code, fragment = PICKLES[attack]
    refusal = refused(checkpoint(code, _0=bytes(16)), scratch)
    assert fragment in str(refusal)
    assert not isinstance(refusal, UnsafePickle)
    assert "tensor 'bad': " in str(refusal) or b"bad" not in code


def test_what_they_are_made_of_is_a_good_checkpoint(scratch: Path) -> None:
    good = {"a": tensor(), "b": tensor(rebuild="torch._utils._rebuild_tensor")}
    scratch.write_bytes(checkpoint(table(**good), _0=bytes(range(16))))
    header = open_header(scratch)
    assert [(info.dtype, info.shape) for info in header.tensors.values()] == [("F32", (2, 2))] * 2
    info = header.tensors["a"]
    assert scratch.read_bytes()[info.start : info.end] == bytes(range(16))


@pytest.mark.parametrize(
    "more",
    [
        b"r\xff\xff\xff\xff",  # stored as number 2**32 - 1
        text("x") + EMPTY_DICT + DOUBLED + b"Nss",  # as a key
        text("x") + DOUBLED + b"s",
        text("x") + pushed(y=DOUBLED) + b"s",
        b"q\0" + text("state_dict") + b"h\0s",  # the dict in itself
        text("x") + name("numpy.ndarray") + DOUBLED + b"\x81" + DOUBLED + b"bs",
    ],
)
def test_what_would_fill_memory_elsewhere_does_no_harm(more: bytes, scratch: Path) -> None:
    scratch.write_bytes(checkpoint(b"\x80\x02" + pushed(a=tensor()) + more + STOP, _0=bytes(16)))
    tracemalloc.start()
    header = open_header(scratch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(header.tensors) == ["a"]
    assert peak < 4 * MiB


def test_there_is_a_limit_to_the_instructions(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpickle, "MAX_STEPS", 1000)
    code = checkpoint(b"\x80\x02" + b"]" * 2000 + STOP)
    assert "it has more than 1,000 instructions" in str(refused(code, scratch))


def test_there_is_a_limit_to_the_pickle(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_PICKLE", 1000)
    code = checkpoint(table(a=text("x" * 1000)))
    assert "'x/data.pkl' has 1,0" in str(refused(code, scratch))


@pytest.mark.parametrize("attack", ZIPS)
def test_a_damaged_zip_file_is_refused_with_what_is_wrong(attack: str, scratch: Path) -> None:
    content, fragment = ZIPS[attack]
    refusal = refused(content, scratch)
    assert fragment in str(refusal)
    assert ("repacked with compression" in refusal.hint) == (attack == "packed")


def test_a_large_directory_is_not_read(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_directory, "MAX_DIRECTORY", 100)
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *_: pytest.fail("it is read"))
    assert "its directory has 110 bytes, more than 100" in str(refused(WHOLE, scratch))


@pytest.mark.parametrize("zip64", [False, True])
def test_a_directory_of_many_gigabytes_takes_no_memory(zip64: bool, scratch: Path) -> None:
    nbytes = 2**40 if zip64 else 2**32 - 2**20
    ends = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1, 1, min(nbytes, 2**32 - 1), 0, 0)
    if zip64:
        record = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 1, 1, nbytes, 0)
        ends = record + b"PK\x06\x07" + struct.pack("<IQI", 0, nbytes, 1) + ends
    with scratch.open("wb") as hole:
        hole.write(b"PK\x03\x04")
        hole.seek(nbytes)
        hole.write(ends)
    tracemalloc.start()
    with pytest.raises(HeaderError, match=f"its directory has {nbytes:,} bytes, more than"):
        open_header(scratch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MiB
    scratch.unlink()


@pytest.mark.parametrize("flags", [b"\0\x08", b"\0\0"])
def test_a_folder_with_any_name_is_read(flags: bytes, scratch: Path) -> None:
    content = zipped({"\u6a21/data.pkl": table(a=tensor()), "\u6a21/data/0": bytes(16)})
    assert content.count(b"\0\x08\0\0") == 4  # UTF-8, in the headers and the entries
    scratch.write_bytes(content.replace(b"\0\x08\0\0", flags + b"\0\0"))
    assert list(open_header(scratch).tensors) == ["a"]


def test_names_that_a_null_character_would_cut_stay_apart(scratch: Path) -> None:
    content = checkpoint(table(a=tensor()), _0=bytes(16), _10=bytes(16))
    scratch.write_bytes(content.replace(b"x/data/10", b"x/data/0\0"))
    assert list(open_header(scratch).tensors) == ["a"]


def test_offsets_beyond_4_gib_are_read(scratch: Path) -> None:
    far = 5 << 30
    with scratch.open("wb") as hole, zipfile.ZipFile(hole, "w") as file:
        file.writestr("x/data.pkl", table(a=tensor(), b=tensor(key=text("1"))))
        file.writestr("x/data/0", bytes(16))
        hole.seek(far)
        file.start_dir = far
        file.writestr("x/data/1", bytes(range(16)))
    header = open_header(scratch)
    check_laws(header, scratch)
    assert header.tensors["b"].start > far
    with scratch.open("rb") as written:
        written.seek(header.tensors["b"].start)
        assert written.read(16) == bytes(range(16))
    scratch.unlink()


def _script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # new releases of torch discourage it
        script = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2))  # type: ignore[no-untyped-call]
        torch.jit.save(script, buffer)
    return buffer.getvalue()


def _arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


CODE = table(a=tensor())
OTHERS = {
    "script": (_script(), "this is a TorchScript program, not a checkpoint"),
    "arrays": (_arrays(), "a zip file, but not a PyTorch checkpoint"),
    "nothing": (zipped({}), "this is a zip archive"),
    "two roots": (zipped({"x/data.pkl": CODE, "y/data.pkl": CODE}), "with data.pkl, found 2"),
    "no root": (zipped({"data.pkl": CODE}), "with data.pkl, found 0"),
    "deep root": (zipped({"x/y/data.pkl": CODE}), "with data.pkl, found 0"),
    "big end first": (
        zipped({"x/data.pkl": CODE, "x/byteorder": b"big", "x/data/0": bytes(16)}),
        "its byte order is b'big', expected b'little'",
    ),
    "long byte order": (
        zipped({"x/data.pkl": CODE, "x/byteorder": b"little" * 9}),
        "'x/byteorder' has 54 bytes, more than 16",
    ),
    "old format": (
        torch_file({"a": torch.zeros(1)}, _use_new_zipfile_serialization=False),
        "a PyTorch pickle (.ckpt/.pt) in the format before release 1.6, or another pickle",
    ),
    "pickle": (pickle.dumps({"a": 1}, 4), "in the format before release 1.6, or another pickle"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_a_checkpoint_of_torch_is_called_what_it_is(kind: str, scratch: Path) -> None:
    content, what = OTHERS[kind]
    assert what in str(refused(content, scratch))


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "secret").write_bytes(WHOLE)
    for path, what in (
        (tmp_path, "this is a folder"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "none.ckpt", "No such file"),
    ):
        for read in (open_header, pickled.read_pickled):
            with pytest.raises(FileRefused, match=what):
                read(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tensor(key=text("1"))  # beyond what the file object has in its buffer
    scratch.write_bytes(checkpoint(table(a=far), _0=bytes(MiB), _1=bytes(16)))
    load = unpickle.load

    def shrink(*arguments: object) -> object:
        os.truncate(scratch, 40)
        return load(*arguments)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(pickled, "load", shrink)
    with pytest.raises(HeaderError, match="became shorter while it was read"):
        open_header(scratch)


def check_any(content: bytes, path: Path) -> None:
    """Checks that a file gives a header or one of our errors, and takes little memory."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        check_laws(open_header(path), path)
    except CkptconvError as error:
        assert path.name in str(error)  # noqa: PT017 - both outcomes are right
        assert error.hint  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MiB


FUZZ = settings(max_examples=120, deadline=None, database=None)
REAL = torch_file(
    {"state_dict": {"a": torch.ones(2, 3), "b": torch.nn.Parameter(torch.ones(2))}, "n": 1}
)
KINDS = (WHOLE, REAL, torch_file({"a": torch.ones(2).bfloat16(), "b": {1, "x"}}, pickle_protocol=4))


@FUZZ
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=4),
    st.integers(-30, 30),
)
def test_flipped_and_cut_bytes(
    scratch: Path, whole: bytes, flips: list[tuple[int, int]], growth: int
) -> None:
    content = bytearray(whole)
    for position, mask in flips:
        content[position % len(content)] ^= mask
    check_any(bytes(content[:growth] if growth < 0 else content + bytes(growth)), scratch)


def _codes(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        return file.read(next(n for n in file.namelist() if n.endswith("/data.pkl")))


@FUZZ
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4))
def test_flipped_bytes_of_the_pickle(
    scratch: Path, whole: bytes, changes: list[tuple[int, int]]
) -> None:
    code = bytearray(_codes(whole))
    for position, value in changes:
        code[position % len(code)] = value
    check_any(checkpoint(bytes(code), _0=bytes(24), _1=bytes(8)), scratch)


INSTRUCTIONS = [
    bytes([code]) for code in b"(.0123N]})ltaesudb\x85\x86\x87\x88\x89RQ\x81\x93\x94\x8f\x90"
]
INSTRUCTIONS += [b"q\0", b"h\0", b"q\1", b"h\1", b"K\2", number(2**70), text("a"), text("storage")]
INSTRUCTIONS += [numbers(2, 2), numbers(2, 1), tensor(), pushed(a=tensor()), text("state_dict")]
INSTRUCTIONS += [name(f"torch.{n}") for n in ("FloatStorage", "_utils._rebuild_tensor_v2", "Size")]
INSTRUCTIONS += [name("collections.OrderedDict") + b")R", name("os.system"), b"J\xff\xff\xff\xff"]
INSTRUCTIONS += [name("a.B") + b")R", name("a.B") + b")\x81}b", name("a.b"), b"o", b"ia\nB\n"]


@FUZZ
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=40))
def test_random_instructions(scratch: Path, instructions: list[bytes]) -> None:
    code = b"\x80\x02" + pushed(a=tensor())[:-1] + b"".join(instructions)
    for ending in (b"u.", b"."):
        check_any(checkpoint(code + ending, _0=bytes(16)), scratch)
