"""The files of the CLIP tokenizer, which every architecture of the family uses.

The merge table is data (`data/clip/`, with its licence). The vocabulary follows from it: the 256
byte symbols, the same at the end of a word, one entry per merge, and two specials; 49,408 entries,
equal to the published `vocab.json`. Source: https://github.com/openai/CLIP, `simple_tokenizer.py`.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileRefused
from ..files import MOST_TOKENS, read_json, read_small
from .allowed import LARGEST, TOKENIZER

END_OF_WORD = "</w>"
WHOLE = "tokenizer.json"
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


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, str | Path]:
    """Returns the same of what a folder holds; a path stands for a file that can be used as it is.

    Of a `tokenizer.json` only the tables are taken. How text is split and normalized, which a
    hostile file could make take forever, is the same for every tokenizer of this class.

    Args:
        folder: of the tokenizer.
        config: what was kept of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", WHOLE))
    config, as_is = dict(config), dict[str, str | Path]()
    if vocab.exists() and merges.exists():
        as_is = {path.name: path.resolve() for path in (vocab, merges)}
        table: Any = read_json(vocab, MOST_TOKENS)
        text = read_small(merges, MOST_TOKENS).decode(errors="replace").strip()
    elif whole.exists():
        data = read_json(whole, MOST_TOKENS)
        model, added = data.get("model"), data.get("added_tokens")
        model = model if isinstance(model, dict) else {}
        table, pairs = model.get("vocab"), model.get("merges")
        lines = (" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in pairs or ())
        text = "\n".join(["#version: 0.2", *lines])
        tokens = [token for token in added or () if isinstance(token, dict)]
        more = {str(t.get("id")): {k: v for k, v in t.items() if k != "id"} for t in tokens}
        config["added_tokens_decoder"] = more | (config.get("added_tokens_decoder") or {})
    else:
        what = f"{folder}: holds no vocab.json with a merges.txt, and no {WHOLE}"
        raise FileRefused(what, hint="copy the folder again from its source")
    extra = {}
    for name, keys in {"special_tokens_map.json": TOKENIZER, "added_tokens.json": None}.items():
        if (folder / name).exists():
            said = read_json(folder / name, MOST_TOKENS)
            extra[name] = {k: v for k, v in said.items() if keys is None or k in keys}
    numbers = [*table.values()] if isinstance(table, dict) else [None]
    numbers += extra.get("added_tokens.json", {}).values()
    if not numbers or not all(type(n) is int and 0 <= n < LARGEST for n in numbers):
        raise _senseless(folder, "its vocabulary is no table from tokens to numbers")
    for n, line in enumerate(text.split("\n")[1:], 1):
        if len(line.split(" ")) != 2:
            raise _senseless(folder, f"merge {n:,} is {line[:80]!r}, expected two tokens")
    files: dict[str, str | Path] = {
        name: json.dumps(values)
        for name, values in {"tokenizer_config.json": config, **extra}.items()
    }
    return files | (as_is or {vocab.name: json.dumps(table), merges.name: text})


def _senseless(folder: Path, what: str) -> FileRefused:
    return FileRefused(f"{folder}: {what}", hint="copy the folder again from its source")


def _byte_symbols() -> list[str]:
    """Returns a printable character for each byte: itself where it is one, else a stand-in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
