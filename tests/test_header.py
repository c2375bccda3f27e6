"""The safetensors header: every refusal, the library's own files, round trips and fuzzing."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv import header as module
from ckptconv.errors import HeaderError
from ckptconv.header import (
    DTYPE_BITS,
    FLOATS,
    Header,
    TensorInfo,
    encode_header,
    header_from_json,
    read_header,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

FIXTURES = sorted((Path(__file__).parent / "headers").glob("*.json"))
NUMPY_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
    "C64": np.complex64,
}
FUZZ = settings(max_examples=250, deadline=None, database=None)


def pack(header: object, data: bytes = b"") -> bytes:
    """A file of this header (bytes, text, or an object to write as JSON) and this data."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(
    dtype: object = "F32", shape: object = (1,), data_offsets: object = (0, 4), **more: object
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


def one(dtype: object = "F32", shape: object = (1,), data_offsets: object = (0, 4)) -> bytes:
    """A file of one tensor `bad`, of 4 bytes unless the arguments say otherwise."""
    return pack({"bad": entry(dtype, shape, data_offsets)}, bytes(4))


def one_raw(shape: str = "[1]", data_offsets: str = "[0, 4]") -> bytes:
    """The same, with parts of the JSON as they are given."""
    fields = f'"dtype": "F32", "shape": {shape}, "data_offsets": {data_offsets}'
    return pack(f'{{"bad": {{{fields}}}}}', bytes(4))


def refusal(path: Path | str) -> str:
    """The message of the refusal of a file, which has what every refusal must have."""
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    text = str(caught.value)
    assert Path(path).name in caught.value.message
    assert caught.value.hint
    assert text.isprintable() or all(line.isprintable() for line in text.split("\n"))
    return text


def library_reads(content: bytes) -> dict[str, tuple[str, list[int]]]:
    """What the library finds in a file: dtype and shape by name. It raises SafetensorError."""
    views: Any = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    return {name: (view["dtype"], view["shape"]) for name, view in views}


def library_refuses(content: bytes) -> bool:
    try:
        library_reads(content)
    except safetensors.SafetensorError:
        return True
    return False


ONE = json.dumps(entry())
ATTACKS: dict[str, tuple[bytes, list[str]]] = {
    # Not a safetensors file, or not a whole one.
    "empty file": (b"", ["the file is empty (0 bytes)"]),
    "7 bytes": (bytes(7), ["truncated", "it has 7 bytes", "length of its header"]),
    "8 bytes": (pack({"bad": entry()})[:8], ["truncated", "it has 8 bytes"]),
    "header cut": (
        pack({"bad": entry()})[:-1],
        ["truncated", "header takes 63 bytes", "1 of them"],
    ),
    "data cut": (
        pack({"bad": entry("F32", [2500], [0, 10000])}, bytes(1000)),
        [
            "truncated",
            "end at byte 10,078",
            "has only 1,078",
            "9,000 bytes are missing",
            "download",
        ],
    ),
    "data missing": (pack({"bad": entry()}), ["truncated", "4 bytes are missing"]),
    "length past the file": (
        (10**6).to_bytes(8, "little") + b"{}",
        ["truncated", "takes 1,000,000 bytes", "999,998 of them are missing"],
    ),
    "length at the limit": ((10**8).to_bytes(8, "little") + b"{}", ["truncated", "100,000,000"]),
    "length past the limit": (
        (10**8 + 1).to_bytes(8, "little") + b"{}",
        ["100,000,001 bytes", "at most 100,000,000"],
    ),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", ["18,446,744,073,709,551,615 bytes"]),
    "length of 0": (bytes(8) + b"{}", ["not JSON", "Expecting value"]),
    "zeros": (bytes(1000), ["not a safetensors file", r"begins with b'\x00", "'{'"]),
    "trailing bytes": (
        pack({"bad": entry()}, bytes(7)),
        ["3 bytes follow the last tensor", "should end", "SHA-256"],
    ),
    # Other formats.
    "zip": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(99), ["this is a PyTorch pickle (.ckpt/.pt)"]),
    "zip, short length": (b"PK\x03\x04" + bytes(99), ["this is a PyTorch pickle (.ckpt/.pt)"]),
    "pickle": (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        ["this is a PyTorch pickle (.ckpt/.pt)"],
    ),
    "pickle 4": (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00", ["this is a PyTorch pickle"]),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(16), ["this is a GGUF file"]),
    "gguf of 123 tensors": (b"GGUF\x03\x00\x00\x00{" + bytes(15), ["this is a GGUF file"]),
    "html": (b"\n<!DOCTYPE html><html></html>", ["this is a web page", "browser"]),
    "html without doctype": (b"<HTML lang='en'>", ["this is a web page"]),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", ["this is a web page"]),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n",
        ["this is a git-lfs pointer", "git lfs pull"],
    ),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), ["this is a gzip file", "gunzip"]),
    "json": (b'{"weight_map": {}, "metadata": {}}', ["this is a JSON text"]),
    # The JSON.
    "bad utf-8": (pack(b'{"\xff": 1}'), ["not UTF-8", "0xff", "position 2"]),
    "utf-16": (pack("{}".encode("utf-16-le")), ["not JSON"]),
    "byte order mark": (pack("\ufeff{}"), ["begins with", "'{'"]),
    "space first": (pack(" {}"), ["begins with b' {}'", "'{'"]),
    "list": (pack("[]"), ["begins with b'[]'", "'{'"]),
    "cut json": (pack('{"bad": '), ["not JSON", "line 1 column 9"]),
    "text after the json": (pack("{}\0"), ["not JSON", "Extra data"]),
    "control character": (pack('{"a\nb": 1}'), ["not JSON", "Invalid control character"]),
    "nan": (pack('{"__metadata__": {"k": NaN}}'), ["the value of 'k' is nan, not a str"]),
    "infinity": (one_raw(shape="[Infinity]"), ["tensor 'bad': the shape [inf] is not a list"]),
    "past the floats": (one_raw(shape="[1e9999]"), ["tensor 'bad': the shape [inf] is not a list"]),
    "nested": (pack('{"bad": ' + "[" * 100_000), ["nested too deeply"]),
    "nested objects": (pack('{"bad": ' + '{"a":' * 100_000), ["nested too deeply"]),
    "nested, but not too deeply": (
        pack('{"bad": ' + "[" * 300 + "]" * 300 + "}"),
        ["tensor 'bad': the entry is [[[[[[[...]]]]]]], not an object"],
    ),
    # Repeated keys.
    "repeated tensor": (
        pack(f'{{"bad": {ONE}, "b": {ONE}, "bad": {ONE}, "c": {ONE}, "c": {ONE}}}', bytes(4)),
        ["repeats keys", "'bad' occurs more than once", "'c' occurs more than once"],
    ),
    "repeated metadata": (pack('{"__metadata__": {}, "__metadata__": {}}'), ["'__metadata__'"]),
    "repeated field": (
        pack(f'{{"bad": {{"dtype": "F32", {ONE[1:]}}}', bytes(4)),
        ["tensor 'bad': the entry repeats the field 'dtype'"],
    ),
    "repeated key of the metadata": (
        pack('{"__metadata__": {"k": "a", "k": "b"}}'),
        ["__metadata__ repeats the key 'k'"],
    ),
    # The metadata.
    "metadata null": (pack({"__metadata__": None}), ["__metadata__ is None, not an object"]),
    "metadata list": (pack({"__metadata__": ["k"]}), ["__metadata__ is ['k'], not an object"]),
    "metadata number": (
        pack({"__metadata__": {"k": 1, "l": "", "m": {}}}),
        ["the value of 'k' is 1, not a str", "the value of 'm' is {}, not a str"],
    ),
    "metadata surrogate": (
        pack({"__metadata__": {"k": "\ud800", "\udfff": ""}}),
        ["'k' holds half of a surrogate pair", r"'\udfff' holds half"],
    ),
    # The entries.
    "entry null": (pack({"bad": None}), ["tensor 'bad': the entry is None, not an object"]),
    "entry text": (pack({"bad": "F32"}), ["tensor 'bad': the entry is 'F32', not an object"]),
    "entry list": (
        pack({"bad": ["F32", [1], [0, 4]]}, bytes(4)),
        ["tensor 'bad': the entry is ['F32', [1], [0, 4]], not an object"],
    ),
    "entry object in list": (
        pack('{"bad": [{"a": 1, "a": 1}]}'),
        ["tensor 'bad': the entry is ["],
    ),
    "missing fields": (
        pack({"bad": {"dtype": "F32"}}),
        ["tensor 'bad': the fields are ['dtype'], not ['data_offsets', 'dtype', 'shape']"],
    ),
    "extra field": (
        pack({"bad": entry(strides=[1])}, bytes(4)),
        ["tensor 'bad': the fields are ['data_offsets', 'dtype', 'shape', 'strides'], not"],
    ),
    "name surrogate": (
        pack({"\ud800": entry()}, bytes(4)),
        [r"tensor '\ud800': the name holds half of a surrogate pair"],
    ),
    "name with escapes": (
        pack({"\x1b[2J\n": entry("F99")}, bytes(4)),
        [r"tensor '\x1b[2J\n': 'F99' is not a dtype"],
    ),
    "name of usual length": (
        pack({"cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.bias": 0}),
        ["tensor 'cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.bias': the"],
    ),
    "long name": (pack({"x" * 10_000: 0}), ["xxx...xxx", "the entry is 0"]),
    "dtype unknown": (one("float32"), ["tensor 'bad': 'float32' is not a dtype of the format"]),
    "dtype in lower case": (one("f32"), ["tensor 'bad': 'f32' is not a dtype of the format"]),
    "dtype list": (one(["F32"]), ["tensor 'bad': ['F32'] is not a dtype of the format"]),
    "dtype null": (one(None), ["tensor 'bad': None is not a dtype of the format"]),
    "shape number": (one(shape=1), ["tensor 'bad': the shape 1 is not a list of integers"]),
    "shape text": (one(shape="1"), ["tensor 'bad': the shape '1' is not a list of integers"]),
    "shape negative": (
        one(shape=[-1, -1]),
        ["the shape [-1, -1] is not a list of integers from 0"],
    ),
    "shape bool": (one(shape=[True]), ["the shape [True] is not a list of integers"]),
    "shape float": (one(shape=[1.0]), ["the shape [1.0] is not a list of integers"]),
    "shape null": (one(shape=[None]), ["the shape [None] is not a list of integers"]),
    "shape of 2**63": (
        pack({"bad": entry(shape=[2**63, 0], data_offsets=[0, 0])}),
        ["to 2**63 - 1"],
    ),
    "shape of 2**64": (one(shape=[0, 2**64], data_offsets=[0, 0]), ["to 2**63 - 1"]),
    "shape of 30 digits": (one_raw(shape=f"[{'9' * 30}]"), ["the shape [1e+30] is not a list"]),
    "shape of 5,000 digits": (one_raw(shape=f"[{'9' * 5000}]"), ["the shape [inf] is not a list"]),
    "shape -0": (one_raw(shape="[-0]"), ["tensor 'bad': the shape [-0.0] is not a list"]),
    "shape overflows": (one(shape=[2**31, 2**31]), ["tensor 'bad': F32 of shape", "overflows"]),
    "shape overflows to 4": (one("U8", [2**32 + 1, 2**32, 4]), ["overflows: 2**63 bits or more"]),
    "shape overflows, then 0": (one(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), ["overflows"]),
    "shape of bits overflows": (
        pack({"bad": entry(shape=[2**62, 0], data_offsets=[0, 0])}),
        ["overflows"],
    ),
    "half a byte": (
        one("F4", [9], [0, 4]),
        ["tensor 'bad': F4 of shape [9] is 36 bits, not whole"],
    ),
    "quarter of a byte": (one("F6_E2M3", [5], [0, 4]), ["F6_E2M3 of shape [5] is 30 bits, not"]),
    "offsets number": (one(data_offsets=4), ["data_offsets are 4, not two integers"]),
    "offsets of 1": (one(data_offsets=[4]), ["data_offsets are [4], not two integers"]),
    "offsets of 3": (one(data_offsets=[0, 2, 4]), ["data_offsets are [0, 2, 4], not two integers"]),
    "offsets float": (one(data_offsets=[0, 4.0]), ["data_offsets are [0, 4.0], not two integers"]),
    "offsets bool": (one(data_offsets=[False, 4]), ["data_offsets are [False, 4], not two"]),
    "offsets negative": (one(data_offsets=[-4, 0]), ["data_offsets are [-4, 0], not two integers"]),
    "offsets -0": (one_raw(data_offsets="[-0, 4]"), ["data_offsets are [-0.0, 4], not two"]),
    "offsets of 2**63": (one(data_offsets=[2**63, 2**63 + 4]), ["to 2**63 - 1"]),
    "offsets reversed": (
        one(data_offsets=[4, 0]),
        ["tensor 'bad': data_offsets [4, 0] hold -4 bytes, but F32 of shape [1] needs 4"],
    ),
    "offsets too short": (
        one(shape=[2]),
        ["tensor 'bad': data_offsets [0, 4] hold 4 bytes, but F32 of shape [2] needs 8"],
    ),
    "offsets too long": (one("F16"), ["hold 4 bytes, but F16 of shape [1] needs 2"]),
    "hole at first": (
        pack({"bad": entry(data_offsets=[4, 8])}, bytes(8)),
        ["tensor 'bad': a hole of 4 bytes precedes it"],
    ),
    "hole between": (
        pack({"a": entry(), "bad": entry(data_offsets=[6, 10])}, bytes(10)),
        ["tensor 'bad': a hole of 2 bytes precedes it"],
    ),
    "overlap": (
        pack({"a": entry(), "bad": entry(data_offsets=[2, 6])}, bytes(6)),
        ["tensor 'bad': it overlaps 'a' by 2 bytes"],
    ),
    "overlap with an earlier one": (
        pack(
            {
                "a": entry(shape=[3], data_offsets=[0, 12]),
                "b": entry(data_offsets=[2, 6]),
                "bad": entry(data_offsets=[8, 12]),
            },
            bytes(12),
        ),
        ["tensor 'b': it overlaps 'a' by 4 bytes", "tensor 'bad': it overlaps 'a' by 4 bytes"],
    ),
    "shared data": (
        pack({"a": entry(), "bad": entry()}, bytes(4)),
        ["tensor 'bad': it overlaps 'a' by 4 bytes"],
    ),
    "empty tensor inside another": (
        pack({"a": entry(), "bad": entry(shape=[0], data_offsets=[2, 2])}, bytes(4)),
        ["tensor 'bad': it overlaps 'a' by 0 bytes"],
    ),
    "several": (
        pack(
            {
                "__metadata__": {"k": 0},
                "a": entry("X"),
                "b": entry(shape=[-1]),
                "c": entry(),
                "d": entry(data_offsets=[0, 5]),
            },
            bytes(4),
        ),
        [
            "malformed",
            "of 'k' is 0",
            "tensor 'a': 'X'",
            "tensor 'b': the shape",
            "tensor 'd': data",
        ],
    ),
    "several holes": (
        pack({f"t{i}": entry(data_offsets=[8 * i + 4, 8 * i + 8]) for i in range(30)}, bytes(240)),
        ["tensor 't0'", "tensor 't19'", "... and 10 more"],
    ),
}

LENIENT = {
    "space first",
    "repeated key of the metadata",
    "metadata null",
    "entry list",
    "extra field",
    "shape of 2**63",
    "shape of bits overflows",
}
"""Attacks that safetensors 0.8 accepts. It also lets the last of two tensors of one name win (its
own attack above is refused for the overlap), and it refuses nothing that we accept."""


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
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({"a": entry()}))
    before = path.stat()
    path.write_bytes(path.read_bytes()[:40])
    monkeypatch.setattr(Path, "stat", lambda _: before)
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


def test_2500_tensors_are_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = [f"model.diffusion_model.input_blocks.{i}.weight" for i in range(2500)]
    path.write_bytes(encode_header([(name, "F16", (0, 3, 3)) for name in names], {})[0])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        read_header(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # 0.01 where this was written; quadratic time would show


def test_many_repeated_keys_are_refused_quickly(scratch: Path) -> None:
    scratch.write_bytes(pack("{" + ",".join(f'"{i % 50_000}":0' for i in range(100_000)) + "}"))
    start = time.perf_counter()
    refusal(scratch)
    assert time.perf_counter() - start < 2


def check_laws(header: Header, path: Path) -> None:
    """Checks what `read_header` promises of each header."""
    assert header.path == path
    assert header.size == path.stat().st_size
    end = header.data_start
    for info in header.tensors.values():
        assert info.start == end
        assert info.nbytes * 8 == info.numel * DTYPE_BITS[info.dtype]
        end = info.end
    assert end == header.size
    assert all(isinstance(text, str) for item in header.metadata.items() for text in item)


def check_like_library(content: bytes, path: Path) -> None:
    """Checks that a file gives a header or a HeaderError, and that the library is no stricter."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except HeaderError as error:
        assert path.name in str(error)  # noqa: PT017 - both outcomes are right
        assert error.hint  # noqa: PT017
        return
    check_laws(header, path)
    found = {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()}
    assert found == library_reads(content)


def test_dtypes_are_those_of_the_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        library_reads(one("X"))
    assert str(caught.value).split("`")[3::2] == sorted(DTYPE_BITS, key=str(caught.value).index)
    assert {dtype for dtype in DTYPE_BITS if "F" in dtype} == FLOATS


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_bits_are_those_of_the_library(dtype: str, scratch: Path) -> None:
    beginning, infos = encode_header([("a", dtype, (3, 8))], {})
    assert infos["a"].nbytes == 3 * DTYPE_BITS[dtype]
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
    beginning, infos = encode_header(tensors, {})
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
    assert header.tensors["b"] == TensorInfo("F32", (1,), header.size - 4, header.size)


def test_a_file_without_tensors(scratch: Path) -> None:
    content, infos = encode_header([], {})
    assert (content, infos) == (b"\x08" + bytes(7) + b"{}      ", {})  # as the library writes it
    scratch.write_bytes(content)
    assert read_header(scratch) == Header(scratch, {}, {}, 16, 16)


NAMES = st.text(max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
METADATA = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3)


@st.composite
def files(draw: st.DrawFn, dtypes: Sequence[str]) -> tuple[bytes, dict[str, TensorInfo], Any]:
    """A file that `encode_header` begins, what it says of the tensors, and the metadata."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    tensors = [(name, draw(st.sampled_from(dtypes)), draw(SHAPES)) for name in names]
    metadata = draw(METADATA)
    beginning, infos = encode_header(tensors, metadata)
    size = sum(info.nbytes for info in infos.values())
    return beginning + draw(st.binary(min_size=size, max_size=size)), infos, metadata


@FUZZ
@given(files(list(NUMPY_DTYPES)))
def test_round_trip(scratch: Path, file: tuple[bytes, dict[str, TensorInfo], Any]) -> None:
    content, infos, metadata = file
    scratch.write_bytes(content)
    header = read_header(scratch)
    check_laws(header, scratch)
    assert header.tensors == infos
    assert list(header.tensors) == list(infos)
    assert header.metadata == metadata
    assert header.data_start % 8 == 0
    with safetensors.safe_open(scratch, framework="np") as opened:
        assert (opened.metadata() or {}) == metadata
    for arrays in (safetensors.numpy.load(content), safetensors.numpy.load_file(scratch)):
        assert arrays.keys() == infos.keys()
        for name, array in arrays.items():
            info = infos[name]
            assert array.dtype == NUMPY_DTYPES[info.dtype]
            assert array.shape == info.shape
            assert array.tobytes() == content[info.start : info.end]


@FUZZ
@given(
    files([dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8]),
    st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=3),
    st.integers(-20, 20),
)
def test_flipped_and_cut_bytes(
    scratch: Path,
    file: tuple[bytes, dict[str, TensorInfo], Any],
    flips: list[tuple[int, int]],
    growth: int,
) -> None:
    content = bytearray(file[0])
    for position, mask in flips:
        content[position % len(content)] ^= mask
    if growth < 0:
        del content[growth:]
    else:
        content += bytes(growth)
    check_like_library(bytes(content), scratch)


@FUZZ
@given(st.data())
def test_changed_tokens(scratch: Path, data: st.DataObject) -> None:
    """Swaps one part of a good header for another, so that most files stay valid JSON."""
    tokens = ["0", "1", "4", "-1", "1.0", "true", "null", '"F32"', '"I64"', '"a"', '"shape"']
    tokens += ["[]", "{}", "[0,4]", '"dtype":"F32",', '"__metadata__"', " ", ",", "]", "}"]
    text = '{"__metadata__":{"a":"b"},"a":%s,"b":%s}'
    first, second = json.dumps(entry(shape=[4, 0], data_offsets=[0, 0])), json.dumps(entry())
    header = text % (first.replace(" ", ""), second.replace(" ", ""))
    for _ in range(data.draw(st.integers(1, 3))):
        old, new = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        parts = header.split(old)
        if len(parts) > 1:
            cut = data.draw(st.integers(1, len(parts) - 1))
            header = old.join(parts[:cut]) + new + old.join(parts[cut:])
    check_like_library(pack(header, bytes(4)), scratch)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, object]:
    """The entries of tensors that seldom overlap, leave a hole, or have a false size or shape."""
    found: dict[str, object] = {}
    end = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F4", "F6_E3M2"]))
        shape = draw(st.lists(st.integers(0, 8), max_size=3))
        start = end + draw(RARELY_WRONG)
        end = start + int(np.prod(shape)) * DTYPE_BITS[dtype] // 8 + draw(RARELY_WRONG)
        found[name] = entry(dtype, shape, [start, end])
    order = draw(st.permutations(list(found)))
    return {name: found[name] for name in order}


RARELY_WRONG = st.sampled_from([0] * 20 + [1, -1])


@FUZZ
@given(entries(), RARELY_WRONG)
def test_random_layouts(scratch: Path, document: dict[str, Any], growth: int) -> None:
    size = max((item["data_offsets"][1] for item in document.values()), default=0)
    check_like_library(pack(document, bytes(max(size + growth, 0))), scratch)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["a", "__metadata__", ""])
FIELDS = st.fixed_dictionaries(dict.fromkeys(["dtype", "shape", "data_offsets"], JSON_VALUES))


@settings(FUZZ, max_examples=100)
@given(st.dictionaries(KEYS, FIELDS | JSON_VALUES, max_size=2) | JSON_VALUES)
def test_random_json(scratch: Path, document: object) -> None:
    check_like_library(pack(document, bytes(4)), scratch)


@FUZZ
@given(st.binary(max_size=100))
def test_random_bytes(scratch: Path, content: bytes) -> None:
    check_like_library(content, scratch)
    check_like_library(pack(b"{" + content), scratch)


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
    beginning, infos = encode_header(tensors, header.metadata)
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
