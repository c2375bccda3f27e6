"""The files of tokenizers: those of CLIP and of T5 are bundled, others come from a folder.

T5's is data (`data/t5/`): the `tokenizer.json` that transformers reads. Of CLIP's,
the merge table is (`data/clip/`, with its licence). The vocabulary follows from it: the 256 byte
symbols, the same at the end of a word, one entry per merge, and two specials; 49,408 entries, equal
to the published `vocab.json`. Source: https://github.com/openai/CLIP, `simple_tokenizer.py`.
"""

from __future__ import annotations

import importlib.resources
import json
import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileRefused
from ..files import MOST_TOKENS, read_json, read_small
from .allowed import LARGEST, TOKENIZER

T5 = "T5TokenizerFast"
"""The class of T5's tokenizer, in its configuration."""
T5_TOKENS = 32100
NUMBER = re.compile(r"[0-9]{1,9}")
CLIP, QWEN = "CLIPTokenizer", "Qwen2Tokenizer"
UNKNOWN = "tokenizer of no known kind"
END_OF_WORD = "</w>"
SPACE = "Ġ"
"""How byte-level vocabularies write a space."""
WHOLE = "tokenizer.json"
PIECES = "spiece.model"
TEMPLATE = "chat_template.jinja"
FILES = (
    *("vocab.json", "merges.txt", WHOLE, TEMPLATE),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""What is copied of a tokenizer's folder, beside its configuration."""
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


@dataclass(frozen=True, slots=True)
class _Tables:
    """What a byte-level BPE tokenizer consists of; `files` are those that hold the tables as is."""

    vocabulary: Mapping[str, int]
    merges: str
    config: Mapping[str, Any]
    more: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Path]

    @property
    def last(self) -> int:
        """The highest token id."""
        added = self.more.get("added_tokens.json", {}).values()
        ids: list[int] = [*self.vocabulary.values(), *added, *self.decoder.values()]
        return max(ids)

    @property
    def decoder(self) -> dict[str, int]:
        """The ids of the tokens that the configuration adds."""
        added = self.config.get("added_tokens_decoder") or {}
        return {str(content(t)): int(n) for n, t in added.items() if NUMBER.fullmatch(n)}


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, str | Path]:
    """Returns the files of a folder as its class is to read them; a path stands for one as it is.

    There is one T5 tokenizer: of a folder with such, ours is taken. Of a `tokenizer.json`, only the
    tables are taken. How text is split and normalized, which a hostile file could make take
    forever, is the same for every tokenizer of a class.

    Args:
        folder: of the tokenizer.
        config: what was kept of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    if _is_t5(folder):
        return dict(tokenizer_files({**config, "tokenizer_class": T5}))
    tables = _read_tables(folder, config)
    files: dict[str, str | Path] = {
        name: json.dumps(values)
        for name, values in {"tokenizer_config.json": tables.config, **tables.more}.items()
    }
    if (folder / TEMPLATE).exists():
        files[TEMPLATE] = _text(folder / TEMPLATE)
    whole = {"vocab.json": json.dumps(tables.vocabulary), "merges.txt": tables.merges}
    files |= tables.files or whole
    return files


def copied_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the content of the files that a folder of a tokenizer becomes: copies of its own.

    Args:
        folder: of the tokenizer.
        config: content of `tokenizer_config.json`.

    Raises:
        FileRefused: a file cannot be read or makes no sense.
    """
    _read_tables(folder, config)
    found = {name: _text(folder / name) for name in FILES if (folder / name).exists()}
    return {**found, "tokenizer_config.json": json.dumps(dict(config), indent=2) + "\n"}


def tokenizer_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the class that the content of a tokenizer's folder is for, and the highest token id.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    if _is_t5(folder):
        pieces = _model(folder).get("vocab")
        count = len(pieces) if isinstance(pieces, list) else T5_TOKENS
        return T5 if count == T5_TOKENS else UNKNOWN, count - 1
    tables = _read_tables(folder, config)
    if any(token.endswith(END_OF_WORD) for token in tables.vocabulary):
        return CLIP, tables.last
    return QWEN if SPACE in tables.vocabulary else UNKNOWN, tables.last


def meaning(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the token ids of a text, whichever files of a folder say so.

    Args:
        folder: of the tokenizer.
        config: content of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    tables = _read_tables(folder, config)
    more = tables.more.get("added_tokens.json", {})
    template = folder / TEMPLATE
    return {
        "vocabulary": {**tables.vocabulary, **more, **tables.decoder},
        "merges": [line for line in tables.merges.split("\n")[1:] if line],
        "special tokens": {n: content(config.get(n)) for n in ("eos_token", "pad_token")},
        "chat template": _text(template) if template.exists() else config.get("chat_template"),
    }


def content(token: Any) -> Any:
    """Returns the text of a token, which a configuration may write with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _read_tables(folder: Path, config: Mapping[str, Any]) -> _Tables:
    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", WHOLE))
    config, files = dict(config), dict[str, Path]()
    if not isinstance(config.get("added_tokens_decoder"), dict):
        config.pop("added_tokens_decoder", None)
    if vocab.exists() and merges.exists():
        files = {path.name: path.resolve() for path in (vocab, merges)}
        table: Any = read_json(vocab, MOST_TOKENS)
        text = read_small(merges, MOST_TOKENS).decode(errors="replace").strip()
    elif whole.exists():
        data, model = read_json(whole, MOST_TOKENS), _model(folder)
        table, pairs, added = model.get("vocab"), model.get("merges"), data.get("added_tokens")
        pairs, added = (each if isinstance(each, list) else [] for each in (pairs, added))
        lines = (" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in pairs)
        text = "\n".join(["#version: 0.2", *lines])
        tokens = [token for token in added if isinstance(token, dict)]
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
    return _Tables(table, text, config, extra, files)


def _text(path: Path) -> str:
    """Returns the text of a file; one that should be JSON holds an object."""
    if path.suffix == ".json":
        read_json(path, MOST_TOKENS)
    try:
        return read_small(path, MOST_TOKENS).decode()
    except UnicodeDecodeError as error:
        raise FileRefused(f"{path}: is no text: {error}", hint="copy it again") from error


def _is_t5(folder: Path) -> bool:
    """Whether a folder holds a unigram model and no table of CLIP's or Qwen's kind."""
    return not (folder / "vocab.json").exists() and (
        (folder / PIECES).exists() or _model(folder).get("type") == "Unigram"
    )


def _model(folder: Path) -> dict[str, Any]:
    """Returns the model in a `tokenizer.json`; an empty one if there is none."""
    path = folder / WHOLE
    model = read_json(path, MOST_TOKENS).get("model") if path.exists() else None
    return model if isinstance(model, dict) else {}


def _senseless(folder: Path, what: str) -> FileRefused:
    return FileRefused(f"{folder}: {what}", hint="copy the folder again from its source")


def _byte_symbols() -> list[str]:
    """Returns a printable character for each byte: itself where it is one, else a stand-in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
