"""PyTorch checkpoints for tests: real ones, and zip files and pickles that torch never writes."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ckptconv.dtypes import BITS
from ckptconv.reading.tensor import Header

MARK, STOP, REDUCE, EMPTY_DICT = b"(", b".", b"R", b"}"


def torch_file(content: object, **options: Any) -> bytes:
    """Returns the file that torch makes of an object."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def checkpoint(code: bytes, **storages: bytes) -> bytes:
    """Returns a checkpoint with this pickle; the storages are named `_0`, `_1`, ..."""
    data = {f"x/data/{name[1:]}": content for name, content in storages.items()}
    return zipped({"x/data.pkl": code, **data})


def text(value: str) -> bytes:
    """Returns the instruction that pushes a text."""
    raw = value.encode(errors="surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    """Returns the instruction that pushes an integer."""
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(of: str) -> bytes:
    """Returns the instruction that pushes a global."""
    return f"c{of.rpartition('.')[0]}\n{of.rpartition('.')[2]}\n".encode()


def numbers(*values: int) -> bytes:
    """Returns the instructions that push a tuple of integers."""
    return MARK + b"".join(map(number, values)) + b"t"


def tensor(
    *,
    kind: str = "torch.FloatStorage",
    key: bytes = text("0"),
    numel: int = 4,
    offset: int = 0,
    shape: bytes = numbers(2, 2),
    stride: bytes = numbers(2, 1),
    more: bytes = b"",
    rebuild: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
    """Returns the instructions that push a tensor of 16 bytes in the storage 0."""
    identity = MARK + text("storage") + name(kind) + key + text("cpu") + number(numel) + b"tQ"
    rest = number(offset) + shape + stride + b"\x89" + name("collections.OrderedDict") + b")R"
    return name(rebuild) + MARK + identity + rest + more + b"tR"


def table(**entries: bytes) -> bytes:
    """Returns a pickle of a dict, whose values are instructions."""
    return b"\x80\x02" + pushed(**entries) + STOP


def pushed(**entries: bytes) -> bytes:
    """Returns the instructions that push a dict."""
    return EMPTY_DICT + MARK + b"".join(text(k) + v for k, v in entries.items()) + b"u"


class Attack:
    """An object whose pickle calls a function with arguments."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touching(path: Path) -> dict[str, Attack]:
    """Returns objects that make a file as soon as they are unpickled, by the global they call."""
    code = f"open({str(path)!r}, 'w').close()"
    return {
        f"{os.system.__module__}.system": Attack(os.system, f"touch {path}"),
        "builtins.eval": Attack(eval, code),
        "builtins.exec": Attack(exec, code),
        "io.open": Attack(open, str(path), "w"),
        "pathlib.Path.touch": Attack(Path.touch, path),
    }


def check_laws(header: Header, path: Path) -> None:
    """Checks what `read_pickled` promises of each header."""
    assert header.path == path
    assert header.size == path.stat().st_size
    last = (0, 0)
    for info in header.tensors.values():
        assert 0 < header.data_start <= info.start <= info.end <= header.size
        assert info.nbytes * 8 == info.numel * BITS[info.dtype]
        assert last <= (info.start, info.end)
        last = info.start, info.end
    assert header.metadata == {}
