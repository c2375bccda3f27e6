"""Are the files of a tokenizer those of T5, in meaning?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ...configs.tokenizer import t5_text
from ...files import read_json, read_small

PIECES = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"
"""SHA-256 of the `spiece.model` of google/t5-v1_1-xxl."""
MOST = 10**7
"""Bytes of a `spiece.model`; the published one has 791,656."""
DECIDING = ("added_tokens", "model", "normalizer", "post_processor", "pre_tokenizer")
"""The entries of a `tokenizer.json` that decide which ids a text becomes."""


def t5_json(path: Path) -> Iterator[str]:
    """Yields where a `tokenizer.json` turns text into other ids than the published one."""
    have, known = read_json(path), json.loads(t5_text())
    for entry in DECIDING:
        if have.get(entry) != known[entry]:
            yield f"its {entry} is not that of google/t5-v1_1-xxl"


def t5_pieces(path: Path) -> Iterator[str]:
    """Yields whether a `spiece.model` is another than the published one."""
    if hashlib.sha256(read_small(path, MOST)).hexdigest() != PIECES:
        yield "is not that of google/t5-v1_1-xxl"
