"""Malformed safetensors files, and what each refusal must say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ckptconv.dtypes import BITS
from ckptconv.errors import HeaderError
from ckptconv.reading.header import read_header
from ckptconv.reading.tensor import Header

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
        ["neither a safetensors file nor a PyTorch checkpoint", r"begins with b'\x01\xe1"],
    ),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", [r"begins with b'\xff\xff"]),
    "length of 0": (bytes(8) + b"{}", ["not JSON", "Expecting value"]),
    "zeros": (bytes(1000), ["an unfinished download: it begins with zeros"]),
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
    "html": (b"\n<!DOCTYPE html><html></html>", ["this is a web page", "log in"]),
    "html without doctype": (b"<HTML lang='en'>", ["this is a web page"]),
    "xml": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>",
        ["web page, saved in place of the file: AccessDenied"],
    ),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n",
        ["this is a git-lfs pointer", "size 4265380512", "git lfs pull"],
    ),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), ["this is a gzip archive", "unpack it"]),
    "titled html": (
        b"<!DOCTYPE html>\n<html><head><title>\n Log in &amp; accept\n</title>",
        ["saved in place of the file: Log in & accept\n", "access token"],
    ),
    "json of an error": (
        b'{"error":"Unauthorized","message":"The creator requires you to be logged in"}',
        ["saved in place of the file: Unauthorized: The creator requires you to be", "log in"],
    ),
    "json of an inner error": (
        b'{"error": {"code": 401, "message": "no token"}}',
        ["an error message, saved in place of the file: no token\n"],
    ),
    "text": (
        b"Invalid username or password.\nAgain!",
        ["this is a text, not a model: Invalid username or password.\n", "access token"],
    ),
    "old git-lfs": (b"version http://git-media.io/v/2\noid x\n", ["this is a git-lfs pointer"]),
    "git-xet": (b"# xet version 0\nfilesize = 5\n", ["this is a git-lfs pointer"]),
    "empty zip": (b"PK\x05\x06" + bytes(18), ["this is a zip archive", "unpack it"]),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(9), ["this is a 7z archive"]),
    "rar": (b"Rar!\x1a\7\1\0" + bytes(9), ["this is a rar archive"]),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(9), ["this is a PNG image", ".safetensors"]),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", ["this is a JPEG image"]),
    "webp": (b"RIFF\0\x10\0\0WEBPVP8 ", ["this is a WebP image"]),
    "pdf": (b"%PDF-1.7\n", ["this is a PDF document"]),
    "onnx": (b"\x08\7\x12\7pytorch\x1a\5\x31.13", ["this is an ONNX model"]),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(9), ["this is an HDF5 file"]),
    "json": (b'{"weight_map": {}, "metadata": {}}', ["this is a JSON text"]),
    # The JSON.
    "bad utf-8": (pack(b'{"\xff": 1}'), ["not UTF-8", "0xff", "position 2"]),
    "utf-16": (pack("{}".encode("utf-16-le")), ["not JSON"]),
    "byte order mark": (pack("\ufeff{}"), ["begins with", "'{'"]),
    "space first": (pack(" {}"), ["begins with", "'{'"]),
    "list": (pack("[]"), ["begins with", "'{'"]),
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
    "entry list",
    "extra field",
    "shape of 2**63",
    "shape of bits overflows",
}
"""Attacks that safetensors 0.8 accepts. It also lets the last of two tensors of one name win (its
own attack above is refused for the overlap), and it refuses nothing that we accept."""


def check_laws(header: Header, path: Path) -> None:
    """Checks what `read_header` promises of each header."""
    assert header.path == path
    assert header.size == path.stat().st_size
    end = header.data_start
    for info in header.tensors.values():
        assert info.start == end
        assert info.nbytes * 8 == info.numel * BITS[info.dtype]
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
