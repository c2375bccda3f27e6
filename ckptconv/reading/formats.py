"""Recognises files of other formats by their first bytes."""

from __future__ import annotations

from typing import NamedTuple


class OtherFormat(NamedTuple):
    """A format that is not safetensors, and what the owner of such a file can do."""

    starts: tuple[bytes, ...]  # text in lower case
    what: str
    hint: str


_ELSEWHERE = "look for a .safetensors version at the source"

_FORMATS = (
    OtherFormat(
        (b"PK\x03\x04",),
        "a PyTorch pickle (.ckpt/.pt) or another zip file",
        f"{_ELSEWHERE}; such a file is accepted only as a whole checkpoint",
    ),
    OtherFormat(
        tuple(b"\x80%c" % protocol for protocol in range(2, 6)),
        "a PyTorch pickle (.ckpt/.pt) in the format before release 1.6, or another pickle",
        f"{_ELSEWHERE}; or load it with PyTorch, which runs none of its code with "
        "`torch.load(FILE, map_location='cpu', weights_only=True)`, and save it again",
    ),
    OtherFormat((b"GGUF",), "a GGUF file", _ELSEWHERE),
    OtherFormat(
        (b"<!doc", b"<html", b"<?xml"),
        "a web page",
        "open it in a browser: the page may ask you to log in or to accept a licence",
    ),
    OtherFormat((b"version https://git-lfs",), "a git-lfs pointer", "run `git lfs pull`"),
    OtherFormat((b"\x1f\x8b",), "a gzip file", "decompress it first, with gunzip"),
    OtherFormat((b"{",), "a JSON text", "give the .safetensors file, not the JSON file beside it"),
)


def other_format(beginning: bytes) -> OtherFormat | None:
    """Returns the format whose files begin with these bytes (64 are enough), or None."""
    for text in (beginning, beginning.lstrip().lower()):
        for candidate in _FORMATS:
            if text.startswith(candidate.starts):
                return candidate
    return None
