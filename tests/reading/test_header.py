"""The safetensors header: every refusal, the library's own files, the bundled headers."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ckptconv.dtypes import BITS, BLOCKS, FLOATS
from ckptconv.errors import HeaderError
from ckptconv.reading import header as module
from ckptconv.reading.header import encode_header, header_from_json, read_header
from ckptconv.reading.tensor import Header, Tensor
from tests.support.attacks import (
    ATTACKS,
    LENIENT,
    NUMPY_DTYPES,
    ONE,
    check_laws,
    check_like_library,
    entry,
    library_reads,
    library_refuses,
    one,
    pack,
    refusal,
)

FIXTURES = sorted((Path(__file__).parents[1] / "headers").glob("*.json"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that a test may write, again and again, to read it back."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


@pytest.mark.parametrize("name", ATTACKS)
def test_refusals_say_what_is_wrong(name: str, scratch: Path) -> None:
    content, fragments = ATTACKS[name]
    scratch.write_bytes(content)
    text = refusal(scratch)
    assert [fragment for fragment in fragments if fragment not in text] == [], text


def test_the_library_refuses_the_same_files() -> None:
    assert {name for name, (content, _) in ATTACKS.items() if not library_refuses(content)} == (
        LENIENT
    )


def test_a_repeated_tensor_is_refused_where_the_library_takes_the_last(scratch: Path) -> None:
    content = pack(f'{{"bad": {ONE}, "bad": {ONE}}}', bytes(4))
    assert not library_refuses(content)
    scratch.write_bytes(content)
    assert "'bad' occurs more than once" in refusal(scratch)


def test_metadata_that_are_null_are_none(scratch: Path) -> None:
    content = pack(
        {"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        bytes(4),
    )
    assert not library_refuses(content)
    scratch.write_bytes(content)
    header = read_header(scratch)
    assert (header.metadata, list(header.tensors)) == ({}, ["a"])


def test_paths_that_are_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refusal(tmp_path / "missing.safetensors")
    assert "this is a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(tmp_path / "fifo")  # and does not wait for a writer
    with pytest.raises(HeaderError, match="null byte"):
        read_header("a\0b")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret.safetensors"
    path.write_bytes(pack({}))
    monkeypatch.setattr(os, "open", denied)
    assert "cannot be read: Permission denied" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({"a": entry()}))
    before = path.stat()
    path.write_bytes(path.read_bytes()[:40])
    monkeypatch.setattr(os, "fstat", lambda _: before)
    assert "became shorter" in refusal(path)


def test_a_false_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((99_000_000).to_bytes(8, "little") + b"{" + bytes(1000))
    tracemalloc.start()
    text = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "98,998,999 of them are missing" in text
    assert peak < 100_000


def test_the_data_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    beginning, infos = encode_header([("a", "F32", (2**34,))], {})
    path.write_bytes(beginning)
    os.truncate(path, infos["a"].end)  # 64 GiB, all of it a hole
    tracemalloc.start()
    header = read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert header.tensors["a"].nbytes == 2**36
    assert peak < 100_000


def test_dtypes_are_those_of_the_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        library_reads(one("X"))
    assert str(caught.value).split("`")[3::2] == sorted(BITS, key=str(caught.value).index)
    assert {dtype for dtype in BITS if "F" in dtype} | BLOCKS.keys() == FLOATS


@pytest.mark.parametrize("dtype", BITS)
def test_bits_are_those_of_the_library(dtype: str, scratch: Path) -> None:
    beginning, infos = encode_header([("a", dtype, (3, 8))], {})
    assert infos["a"].nbytes == 3 * BITS[dtype]
    content = beginning + bytes(infos["a"].nbytes)
    assert not library_refuses(content)
    assert library_refuses(content + bytes(1))
    check_like_library(content, scratch)


def test_files_of_the_library(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        f"{name}.{shape}": np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        for name, dtype in NUMPY_DTYPES.items()
        for shape in [(), (5,), (2, 3), (0,)]
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np", "é": "\U0001f600"})
    header = read_header(path)
    check_laws(header, path)
    assert header.metadata == {"format": "np", "é": "\U0001f600"}
    assert header.tensors.keys() == arrays.keys()
    content = path.read_bytes()
    for name, array in arrays.items():
        info = header.tensors[name]
        assert info.dtype == name.split(".")[0]
        assert info.shape == array.shape
        assert info.numel == array.size
        assert content[info.start : info.end] == array.tobytes()


def test_scalars_and_empty_tensors_keep_the_order_of_the_data(scratch: Path) -> None:
    tensors = [("z", "F16", (0,)), ("y", "F32", ()), ("x", "I8", (3, 0)), ("b", "I64", (1,))]
    beginning, infos = encode_header(tensors, {}, scratch)
    scratch.write_bytes(beginning + bytes(12))
    header = read_header(scratch)
    assert list(header.tensors) == ["z", "y", "x", "b"]
    assert header.tensors == infos
    assert [info.nbytes for info in infos.values()] == [0, 4, 0, 8]
    assert [info.numel for info in infos.values()] == [0, 1, 0, 1]
    arrays = safetensors.numpy.load_file(scratch)
    assert {name: arrays[name].shape for name in arrays} == {n: shape for n, _, shape in tensors}


def test_tensors_are_listed_in_the_order_of_the_data(scratch: Path) -> None:
    empty = entry(shape=[0], data_offsets=[0, 0])
    entries = {"b": entry(data_offsets=[4, 8]), "a": entry(), "empty": empty}
    scratch.write_bytes(pack({"__metadata__": {"k": "v"}, **entries}, bytes(8)))
    header = read_header(str(scratch))
    assert list(header.tensors) == ["empty", "a", "b"]
    place = (header.size - 4, header.size)
    assert header.tensors["b"] == Tensor(scratch, "b", "F32", (1,), *place)


def test_a_file_without_tensors(scratch: Path) -> None:
    content, infos = encode_header([], {})
    assert (content, infos) == (b"\x08" + bytes(7) + b"{}      ", {})  # as the library writes it
    scratch.write_bytes(content)
    assert read_header(scratch) == Header(scratch, {}, {}, 16, 16)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ([("a", "F32", (1,)), ("a", "F16", (1,))], {}, "tensor 'a': the name is taken"),
        ([("__metadata__", "F32", (1,))], {}, "the name is taken"),
        ([("a", "f32", (1,))], {}, "'f32' is not a dtype"),
        ([("a", "F32", (-1,))], {}, r"the shape \(-1,\) is not"),
        ([("a", "F32", (2**62,))], {}, "overflows"),
        ([("a", "F4", (3,))], {}, "12 bits, not whole bytes"),
        ([("\ud800", "F32", ())], {}, "surrogates not allowed"),
        ([], {"k": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_encode_header_refuses(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_header(tensors, metadata)


def test_encode_header_refuses_a_header_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_HEADER", 64)
    with pytest.raises(ValueError, match="has 80 bytes; the format allows 64"):
        encode_header([("a", "F32", (1,))], {"k": "v"})


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_saved_headers(path: Path, scratch: Path) -> None:
    header = header_from_json(path)
    saved = json.loads(path.read_text())
    assert header.path == path
    assert header.metadata == saved["metadata"]
    assert list(header.tensors) == list(saved["tensors"])
    assert header.data_start == 0
    assert [[info.dtype, list(info.shape)] for info in header.tensors.values()] == list(
        saved["tensors"].values()
    )
    # As a file, with all of its gigabytes a hole, it reads the same for the library and for us.
    tensors = [(name, info.dtype, info.shape) for name, info in header.tensors.items()]
    beginning, infos = encode_header(tensors, header.metadata, scratch)
    scratch.write_bytes(beginning)
    os.truncate(scratch, len(beginning) + header.size)
    assert read_header(scratch) == Header(
        scratch, infos, header.metadata, len(beginning), len(beginning) + header.size
    )
    with safetensors.safe_open(scratch, framework="np") as opened:
        assert set(opened.keys()) == set(infos)
    scratch.unlink()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "KeyError: 'metadata'"),
        ('{"metadata": {}}', "KeyError: 'tensors'"),
        ('{"metadata": {}, "tensors": []}', "AttributeError"),
        ('{"metadata": {}, "tensors": {"a": ["F32"]}}', "ValueError"),
        ('{"metadata": {}, "tensors": {"a": 1}}', "TypeError"),
        ('{"metadata": {}, "tensors": {"a": ["F99", [1]]}}', "'F99' is not a dtype"),
        ('{"metadata": {"k": 1}, "tensors": {}}', "the value of 'k' is 1"),
        ("[]", "not an object"),
        ("", "not JSON"),
    ],
)
def test_saved_headers_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    path.write_text(text)
    with pytest.raises(HeaderError, match=problem) as caught:
        header_from_json(path)
    assert "saved.json" in str(caught.value)
    assert caught.value.hint


def test_saved_header_missing(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"none\.json: the file cannot be read: No such file"):
        header_from_json(tmp_path / "none.json")
