"""Recognises by its first bytes what is not a checkpoint, such as a web page saved as one."""

from __future__ import annotations

import html
import re
from typing import NamedTuple

ENOUGH = 16 << 10
"""Bytes to look at: a web page has its title in them."""

QUOTED = 120
"""Characters that a message quotes at most."""


class OtherFormat(NamedTuple):
    """What a file is instead, and what its owner can do."""

    what: str
    hint: str


_MODEL = "download the model itself, whose name usually ends in .safetensors or .ckpt"
_ELSEWHERE = "look for a .safetensors version at the source"
_LOG_IN = (
    "the site sent this instead of the file: log in there, accept the licence if there is one, or "
    "give your download program an access token; then download the file again"
)
_ARCHIVES = {
    rb"PK\x05\x06|PK\x07\x08": "zip",
    rb"7z\xbc\xaf\x27\x1c": "7z",
    rb"Rar!\x1a\x07": "rar",
    rb"\x1f\x8b": "gzip",
    rb"BZh\d": "bzip2",
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
}
_OTHERS = {
    rb"\x89PNG": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"GIF8": "a GIF image",
    rb"RIFF....WEBP": "a WebP image",
    rb"%PDF": "a PDF document",
    rb"\x89HDF": "an HDF5 file (Keras)",
    rb"\x93NUMPY": "a NumPy array",
}
# Each row is a pattern of the beginning, what that is, what to do, and a pattern of what to quote.
_ROWS = (
    (
        rb"PK\x03\x04",
        "a PyTorch pickle (.ckpt/.pt) or another zip file",
        f"{_ELSEWHERE}; such a file is accepted only as a whole checkpoint",
        rb"",
    ),
    (
        rb"\x80[\x02-\x05]",
        "a PyTorch pickle (.ckpt/.pt) in the format before release 1.6, or another pickle",
        f"{_ELSEWHERE}; or load it with PyTorch, which runs none of its code with "
        "`torch.load(FILE, map_location='cpu', weights_only=True)`, and save it again",
        rb"",
    ),
    (rb"GGUF", "a GGUF file", "such a file is accepted only as a whole checkpoint", rb""),
    (rb"\x08[\x01-\x14]\x12[\x00-\x7f]", "an ONNX model", _ELSEWHERE, rb""),
    (
        rb"version https?://(?:git-lfs|hawser|git-media)\.|# xet version",
        "a git-lfs pointer, which only stands for the file",
        "run `git lfs install` and `git lfs pull`, or download the file from its page",
        rb"\n(size \d+)",
    ),
    (
        rb"\0{8}(?:\0+\Z|\0{56})",
        "an unfinished download: it begins with zeros",
        "let the download finish, or download the file again",
        rb"",
    ),
    *(
        (magic, f"a {name} archive", "unpack it, and give the model that it contains", rb"")
        for magic, name in _ARCHIVES.items()
    ),
    *((magic, what, _MODEL, rb"") for magic, what in _OTHERS.items()),
    (
        rb"\s*<[!?a-z]",
        "a web page, saved in place of the file",
        _LOG_IN,
        rb"<(?:title|code|message)\b[^>]*>\s*([^<]+)",
    ),
    (
        rb'\s*\{.*"(?:error|message|detail)"\s*:',
        "an error message, saved in place of the file",
        _LOG_IN,
        rb'"(?:error|message|detail)"\s*:\s*"((?:[^"\\]|\\.)+)',
    ),
    (rb"\s*[{[]\s*[\w\"{}[\]]", "a JSON text", f"{_MODEL}, and not the JSON beside it", rb""),
    (
        rb"(?:[\t\n\r\x20-\x7e]|[\xc2-\xf4][\x80-\xbf]+)+[\xc2-\xf4]?\Z",
        "a text, not a model",
        f"{_MODEL}; if the text says that you may not, log in or use an access token",
        rb"\A\s*([^\r\n]+)",
    ),
)
_FORMATS = [
    (re.compile(rb"(?:\xef\xbb\xbf)?(?:%b)" % pattern, re.I | re.S), what, hint, quoted)
    for pattern, what, hint, quoted in _ROWS
]


def other_format(beginning: bytes) -> OtherFormat | None:
    """Returns the format of a file with this beginning (`ENOUGH` bytes), or None."""
    for pattern, what, hint, quoted in _FORMATS:
        if pattern.match(beginning):
            found = re.findall(quoted, beginning, re.I) if quoted else []
            texts = [html.unescape(text.decode(errors="replace")) for text in found[:2]]
            words = " ".join(": ".join(texts).split())
            return OtherFormat(f"{what}: {words[:QUOTED]}" if words else what, hint)
    return None
