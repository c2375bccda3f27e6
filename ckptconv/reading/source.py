"""Which reader a file needs, told by its first bytes and not by its name."""

from __future__ import annotations

from pathlib import Path

from ..files import opened
from .header import Header, read_header

__all__ = ["is_zip", "open_header"]


def open_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file, or what serves as one in a PyTorch checkpoint.

    Args:
        path: the file.

    Raises:
        FileRefused: the file cannot be read, or is neither; or as `read_pickled` says.
    """
    path = Path(path)
    with opened(path) as (file, _):
        beginning = file.read(9)
    if not is_zip(beginning):
        return read_header(path)
    from .pickled import read_pickled  # a quarter of the time of an inspection

    return read_pickled(path)


def is_zip(beginning: bytes) -> bool:
    """Whether a file that begins so is a zip file, as PyTorch checkpoints are."""
    # A safetensors file begins with the length of its header, which may be any number, and "{".
    return beginning.startswith(b"PK\x03\x04") and beginning[8:9] != b"{"
