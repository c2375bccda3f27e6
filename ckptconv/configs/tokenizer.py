"""The files of the tokenizers of CLIP and of T5.

T5's is data as well (`data/t5/`): the `tokenizer.json` that transformers reads. Of CLIP's,
the merge table is (`data/clip/`, with its licence). The vocabulary follows from it: the 256 byte
symbols, the same at the end of a word, one entry per merge, and two specials; 49,408 entries, equal
to the published `vocab.json`. Source: https://github.com/openai/CLIP, `simple_tokenizer.py`.
"""

from __future__ import annotations

import importlib.resources
import json
import lzma
from collections.abc import Mapping
from typing import Any

T5 = "T5TokenizerFast"
"""The class of T5's tokenizer, in its configuration."""
END_OF_WORD = "</w>"
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def merges_text() -> str:
    """Returns the content of `merges.txt`: a version line, then one merge a line."""
    data = importlib.resources.files("ckptconv") / "data" / "clip" / "merges.txt"
    return data.read_text(encoding="utf-8")


def t5_text() -> str:
    """Returns the content of T5's `tokenizer.json`."""
    data = importlib.resources.files("ckptconv") / "data" / "t5" / "tokenizer.json.xz"
    return lzma.decompress(data.read_bytes()).decode()


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
    if config.get("tokenizer_class") == T5:
        return {
            "special_tokens_map.json": json.dumps(specials, indent=2, sort_keys=True) + "\n",
            "tokenizer.json": t5_text(),
            "tokenizer_config.json": json.dumps(dict(config), indent=2, sort_keys=True) + "\n",
        }
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
