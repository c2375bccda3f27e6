"""The files of the CLIP tokenizer, which every architecture of the family uses.

The merge table is data (`data/clip/`, with its licence). The vocabulary follows from it: the 256
byte symbols, the same at the end of a word, one entry per merge, and two specials; 49,408 entries,
equal to the published `vocab.json`. Source: https://github.com/openai/CLIP, `simple_tokenizer.py`.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

END_OF_WORD = "</w>"
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def merges_text() -> str:
    """Returns the content of `merges.txt`: a version line, then one merge a line."""
    data = importlib.resources.files("ckptconv") / "data" / "clip" / "merges.txt"
    return data.read_text(encoding="utf-8")


def vocabulary() -> dict[str, int]:
    """Returns the token ids: 49,408 entries.

    >>> vocabulary()["<|endoftext|>"]
    49407
    """
    symbols = _byte_symbols()
    merges = ["".join(line.split()) for line in merges_text().splitlines()[1:]]
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *merges, *SPECIALS]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the content of every file of a tokenizer's folder, by name.

    Args:
        config: content of `tokenizer_config.json`.
    """
    specials = {k: v for k, v in config.items() if k.endswith("_token")}
    return {
        "merges.txt": merges_text(),
        "special_tokens_map.json": json.dumps(specials, indent=2, sort_keys=True) + "\n",
        "tokenizer_config.json": json.dumps(dict(config), indent=2, sort_keys=True) + "\n",
        "vocab.json": json.dumps(vocabulary(), ensure_ascii=False, separators=(",", ":")),
    }


def _byte_symbols() -> list[str]:
    """Returns a printable character for each byte: itself where it is one, else a stand-in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
