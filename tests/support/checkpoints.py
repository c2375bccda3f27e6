"""Makes checkpoints for tests, and reads files without ckptconv, to hold its output against."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import deserialize, safe_open

from ckptconv.maps.architecture import bundled
from ckptconv.reading.header import encode_header
from ckptconv.sample import layout_of, write_sample

Value = tuple[str, tuple[int, ...], bytes]
"""Dtype, shape and bytes of a tensor."""

Raw = dict[str, Value]
"""The tensors of a file, by name."""

WIDTHS = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element."""


def midget(path: Path, *, ema: bool = False) -> Path:
    """Writes an SD1 checkpoint of 1 MB: every key, but too narrow to run."""

    def shrunk(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if key.startswith("cond_stage_model."):
            return tuple(64 if n == 49408 else n for n in shape)
        if key.startswith(("model", "first_stage_model.")):
            narrow = [n // 8 if n >= 32 else n for n in shape]
            if key.replace(".", "").endswith(("attn2to_kweight", "attn2to_vweight")):
                narrow[1] = shape[1]  # it reads the text encoder's, which stays as it is
            return tuple(narrow)
        return shape

    architecture = bundled().architectures["sd1"]
    layout = layout_of(architecture, ema=ema)
    write_sample(architecture, path, [(k, dtype, shrunk(k, s)) for k, dtype, s in layout])
    return path


def raw(path: Path) -> Raw:
    """Reads a file with the safetensors library."""
    found = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]  # theirs is untyped
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found
    }


def raw_folder(folder: Path) -> Raw:
    """Reads all weights under a folder; their names begin with their sub-folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.name}/{key}": value for file in files for key, value in raw(file).items()
    }


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


def save(tensors: Mapping[str, Value], path: Path, extra: Mapping[str, str] | None = None) -> Path:
    """Writes a file by hand, wide dtypes first."""
    ordered = sorted(tensors.items(), key=lambda item: -WIDTHS[item[1][0]])
    header: dict[str, object] = {"__metadata__": dict(extra)} if extra else {}
    end = 0
    for name, (dtype, shape, data) in ordered:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + len(data))}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(d for _, (_, _, d) in ordered)
    )
    return path


def hollow(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> Path:
    """Writes a file of any size that takes no room on the disk: a header, and a hole."""
    beginning, placed = encode_header([*tensors], {})
    path.write_bytes(beginning)
    os.truncate(path, max((t.end for t in placed.values()), default=len(beginning)))
    return path


def rewritten(source: Path, path: Path, rename: Callable[[str], str | None]) -> Path:
    """Writes a copy of a file with other names; a tensor whose name becomes None is left out."""
    renamed = {rename(name): value for name, value in raw(source).items()}
    return save({name: value for name, value in renamed.items() if name is not None}, path)


def thirds(value: Value) -> Iterable[tuple[str, bytes]]:
    """Cuts query, key and value out of a joint projection."""
    dtype, _, data = value
    assert len(data) % 3 == 0
    third = len(data) // 3
    return ((dtype, data[n * third : (n + 1) * third]) for n in range(3))


def transposed(value: Value) -> tuple[str, bytes]:
    dtype, shape, data = value
    width = len(data) // math.prod(shape)
    return dtype, np.frombuffer(data, f"V{width}").reshape(shape).T.tobytes()
