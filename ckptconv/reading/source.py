"""Chooses the reader of a file by its first bytes, not by its name."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import FileRefused
from ..files import open_regular
from .header import read_header
from .shards import open_index
from .tensor import Header

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
"""The name of one file of a sharded checkpoint."""


def open_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file, a PyTorch checkpoint, or a sharded checkpoint.

    Args:
        path: the file, or the index of the shards (`.safetensors.index.json`).

    Raises:
        FileRefused: it cannot be read, or is none of these; or as `read_pickled` says.
    """
    path = Path(path)
    if path.name.endswith(".safetensors.index.json"):
        return open_index(path)
    if part := PART.fullmatch(path.name):
        raise FileRefused(
            f"{path}: is part {int(part[2])} of {int(part[3])} of a checkpoint",
            hint=f"give the index of the parts, {part[1]}.safetensors.index.json",
        )
    with open_regular(path) as (file, _):
        beginning = file.read(9)
    if not is_zip(beginning):
        return read_header(path)
    from .pickled import read_pickled  # a quarter of the time of an inspection

    return read_pickled(path)


def is_zip(beginning: bytes) -> bool:
    """Whether a file with these first bytes is a zip file, as PyTorch checkpoints are."""
    # A safetensors file begins with the length of its header, which may be any number, and "{".
    return beginning.startswith(b"PK\x03\x04") and beginning[8:9] != b"{"
