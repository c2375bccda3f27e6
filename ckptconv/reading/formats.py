"""How files of other formats begin: what they are, and what their owner can do."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OtherFormat", "other_format"]


@dataclass(frozen=True, slots=True)
class OtherFormat:
    """A format that is not safetensors: what it is, and what to do with it."""

    what: str
    hint: str


_OLD_PICKLE = (
    "look for a .safetensors version at the source; or load it with PyTorch, which runs nothing "
    "from it with `torch.load(FILE, map_location='cpu', weights_only=True)`, and save it anew"
)
_ZIP = "look for a .safetensors version at the source; only a whole checkpoint can be such a file"

# How files of other formats begin (text in lower case), what they are, and what to do.
_FORMATS = (
    ((b"PK\x03\x04",), "a PyTorch pickle (.ckpt/.pt) or another zip file", _ZIP),
    (
        tuple(b"\x80%c" % n for n in range(2, 6)),
        "a PyTorch pickle (.ckpt/.pt) in the format before release 1.6, or another pickle",
        _OLD_PICKLE,
    ),
    ((b"GGUF",), "a GGUF file", "look for a .safetensors version at the source"),
    ((b"<!doc", b"<html", b"<?xml"), "a web page", "open it in a browser to see what it asks for"),
    ((b"version https://git-lfs",), "a git-lfs pointer", "run `git lfs pull`"),
    ((b"\x1f\x8b",), "a gzip file", "decompress it first, with gunzip"),
    ((b"{",), "a JSON text", "give the .safetensors file, not the JSON file beside it"),
)


def other_format(beginning: bytes) -> OtherFormat | None:
    """Returns the format that a file's first 64 bytes tell, or None.

    Args:
        beginning: the first bytes of the file.
    """
    text = beginning.lstrip().lower()
    for starts, what, hint in _FORMATS:
        if beginning.startswith(starts) or text.startswith(starts):
            return OtherFormat(what, hint)
    return None
