"""Chooses the reader of a file by its first bytes, not by its name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import FileRefused
from ..files import open_regular
from .folders import not_a_file
from .gguf import MAGIC, read_gguf
from .header import read_header
from .shards import open_index
from .tensor import Header

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
"""The name of one file of a sharded checkpoint."""


UNFINISHED = (".aria2", ".part", ".crdownload", ".!qB", ".download", ".incomplete")
"""Endings of the names that download programs use until a file is whole."""


def open_header(path: str | Path) -> Header:
    """Reads the header of a safetensors, PyTorch or GGUF file, or of a sharded checkpoint.

    Args:
        path: the file, or the index of the shards (`.safetensors.index.json`).

    Raises:
        FileRefused: it cannot be read, or is none of these; or as `read_pickled` says.
    """
    header = _read(Path(path))
    return replace(header, notes=(*header.notes, *_unfinished(header)))


def _read(path: Path) -> Header:
    with contextlib.suppress(OSError):  # the reader says why a path cannot be read
        if path.is_dir():
            raise not_a_file(path)
    if path.name.endswith(".safetensors.index.json"):
        return open_index(path)
    if part := PART.fullmatch(path.name):
        raise FileRefused(
            f"{path}: is part {int(part[2])} of {int(part[3])} of a checkpoint",
            hint=f"give the index of the parts, {part[1]}.safetensors.index.json",
        )
    with open_regular(path) as (file, _):
        beginning = file.read(9)
    if beginning.startswith(MAGIC):
        return read_gguf(path)
    if not is_zip(beginning):
        return read_header(path)
    from .pickled import read_pickled  # a quarter of the time of an inspection

    return read_pickled(path)


def _unfinished(header: Header) -> Iterator[str]:
    """Yields a note on each file that is still being downloaded, as its neighbours tell."""
    for file in header.files:
        places = [file, *(file.with_name(file.name + ending) for ending in UNFINISHED)]
        with contextlib.suppress(OSError):  # a name that is too long
            for place in places:
                if place.name.endswith(UNFINISHED) and place.exists():
                    yield (
                        f"the download of {file.name} has not finished, as {place.name} tells: let "
                        "it finish, or compare the SHA-256 of the file with the one at its source"
                    )
                    break


def is_zip(beginning: bytes) -> bool:
    """Whether a file with these first bytes is a zip file, as PyTorch checkpoints are."""
    # A safetensors file begins with the length of its header, which may be any number, and "{".
    return beginning.startswith(b"PK\x03\x04") and beginning[8:9] != b"{"
