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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileRefused
from ..files import MOST_TOKENS, read_json, read_small
from .allowed import LARGEST, TOKENIZER, without_code

T5 = "T5TokenizerFast"
"""The class of T5's tokenizer, in its configuration."""
T5_TOKENS = 32100
NUMBER = re.compile(r"[0-9]{1,9}")
CLIP, QWEN = "CLIPTokenizer", "Qwen2Tokenizer"
UNKNOWN = "tokenizer of no known kind"
END_OF_WORD = "</w>"
SPACE = "Ġ"
"""How byte-level vocabularies write a space."""
VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
PIECES = "spiece.model"
TEMPLATE = "chat_template.jinja"
ADDED = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
"""What is said of a token beside the vocabulary."""
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
class Tables:
    """The tables of a byte-level BPE tokenizer, as one file gives them.

    Attributes:
        vocabulary: token ids.
        merges: in their order, each of two tokens.
        added: ids of the tokens that the file has beside the vocabulary.
        rules: how it changes and splits text, if the file says so.
    """

    vocabulary: Mapping[str, int]
    merges: Sequence[str]
    added: Mapping[str, int]
    rules: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The parsed folder of a byte-level BPE tokenizer.

    Attributes:
        config: content of its `tokenizer_config.json`, with the added tokens of `tokenizer.json`.
        more: content of the JSON files beside it that name tokens.
        tables: by the file that holds them, at least one: `vocab.json`, with `merges.txt`, comes
            before `tokenizer.json`.
        template: its `chat_template.jinja`, if it has that file.
    """

    config: Mapping[str, Any]
    more: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, Tables]
    template: str | None

    @property
    def first(self) -> Tables:
        """The tables that are used."""
        return next(iter(self.tables.values()))

    @property
    def added(self) -> dict[str, int]:
        """The ids of the tokens that other files than those of the tables add."""
        decoder = self.config.get("added_tokens_decoder", {})
        ids = {str(content(t)): int(n) for n, t in decoder.items() if NUMBER.fullmatch(n)}
        return {**self.more.get("added_tokens.json", {}), **ids}

    def ids(self, file: str) -> dict[str, int]:
        """Returns the ids of all tokens, as one file of tables has them, or the only one."""
        tables = self.tables.get(file, self.first)
        return {**self.added, **tables.vocabulary, **tables.added}


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the content of the files of a folder as its class is to read them.

    There is one T5 tokenizer: of a folder with such, ours is taken.

    Args:
        folder: of the tokenizer.
        config: what was kept of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    if _is_t5(folder, _whole(folder)):
        return tokenizer_files({**config, "tokenizer_class": T5})
    return copied_tokenizer(folder, config)


def copied_tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the content of the files that a folder of CLIP's or Qwen's kind becomes.

    They are written from what was parsed. Of a `tokenizer.json`, only the tables are taken: how
    text is split and normalized, which a hostile file could make take forever, is the same for
    every tokenizer of a class.

    Args:
        folder: of the tokenizer.
        config: what was kept of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    found = parsed_tokenizer(folder, config)
    named = {"tokenizer_config.json": found.config, **found.more}
    files = {name: json.dumps(values, indent=2) + "\n" for name, values in named.items()}
    if found.template is not None:
        files[TEMPLATE] = found.template
    files[VOCABULARY] = json.dumps(dict(found.first.vocabulary), ensure_ascii=False)
    files[MERGES] = "\n".join(["#version: 0.2", *found.first.merges]) + "\n"
    return files


def tokenizer_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """Returns the class that the content of a tokenizer's folder is for, and the highest token id.

    Raises:
        FileRefused: a file is missing or makes no sense, or two differ.
    """
    whole = _whole(folder)
    if _is_t5(folder, whole):
        pieces = _model(whole).get("vocab")
        count = len(pieces) if isinstance(pieces, list) else T5_TOKENS
        return T5 if count == T5_TOKENS else UNKNOWN, count - 1
    found = parsed_tokenizer(folder, config)
    tables, vocabulary = found.first, found.ids(VOCABULARY)
    if found.ids(WHOLE) != vocabulary or found.tables.get(WHOLE, tables).merges != tables.merges:
        raise _senseless(folder, f"its {VOCABULARY} or {MERGES} differs from its {WHOLE}")
    last = max([*vocabulary.values(), *found.added.values()])
    if any(token.endswith(END_OF_WORD) for token in tables.vocabulary):
        return CLIP, last
    return QWEN if SPACE in tables.vocabulary else UNKNOWN, last


def parsed_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Reads the folder of a tokenizer of CLIP's or Qwen's kind.

    Args:
        folder: of the tokenizer.
        config: content of its `tokenizer_config.json`.

    Raises:
        FileRefused: a file is missing or makes no sense.
    """
    whole, more = _whole(folder), dict[str, Mapping[str, Any]]()
    for name, keys in {"special_tokens_map.json": TOKENIZER, "added_tokens.json": None}.items():
        if (folder / name).exists():
            said = without_code(read_json(folder / name, MOST_TOKENS))
            more[name] = {k: v for k, v in said.items() if keys is None or k in keys}
    listed, own = whole.get("added_tokens"), config.get("added_tokens_decoder")
    tokens = [t for t in listed if isinstance(t, dict)] if isinstance(listed, list) else []
    decoder = {str(t.get("id")): {k: t[k] for k in ADDED if k in t} for t in tokens}
    decoder |= own if isinstance(own, dict) else {}
    settings = {k: v for k, v in config.items() if k != "added_tokens_decoder"}
    settings |= {"added_tokens_decoder": decoder} if decoder else {}
    tables = {}
    if (folder / VOCABULARY).exists() and (folder / MERGES).exists():
        lines = _text(folder / MERGES).strip().split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        table: Any = read_json(folder / VOCABULARY, MOST_TOKENS)
        tables[VOCABULARY] = Tables(table, lines, {})
    if whole:
        model = _model(whole)
        pairs = model.get("merges")
        pairs = pairs if isinstance(pairs, list) else []
        lines = [" ".join(map(str, p)) if isinstance(p, list) else str(p) for p in pairs]
        added: Any = {str(t.get("content")): t.get("id") for t in tokens}
        tables[WHOLE] = Tables(model.get("vocab") or {}, lines, added, _rules(whole))
    if not tables:
        raise _senseless(folder, f"holds no {VOCABULARY} with a {MERGES}, and no {WHOLE}")
    for each in tables.values():
        numbers = [*each.vocabulary.values()] if isinstance(each.vocabulary, dict) else []
        extra = (*each.added.values(), *more.get("added_tokens.json", {}).values())
        if not numbers or not all(type(n) is int and 0 <= n < LARGEST for n in (*numbers, *extra)):
            raise _senseless(folder, "its vocabulary is no table from tokens to numbers")
        for n, line in enumerate(each.merges, 1):
            if len(line.split(" ")) != 2:
                raise _senseless(folder, f"merge {n:,} is {line[:80]!r}, expected two tokens")
    template = folder / TEMPLATE
    return Tokenizer(settings, more, tables, _text(template) if template.exists() else None)


def content(token: Any) -> Any:
    """Returns the text of a token, which a configuration may write with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _text(path: Path) -> str:
    try:
        return read_small(path, MOST_TOKENS).decode()
    except UnicodeDecodeError as error:
        raise FileRefused(f"{path}: is no text: {error}", hint="copy it again") from error


def _whole(folder: Path) -> dict[str, Any]:
    """Returns the content of `tokenizer.json`; an empty table if there is none."""
    path = folder / WHOLE
    return read_json(path, MOST_TOKENS) if path.exists() else {}


def _is_t5(folder: Path, whole: Mapping[str, Any]) -> bool:
    """Whether a folder holds a unigram model and no table of CLIP's or Qwen's kind."""
    return not (folder / VOCABULARY).exists() and (
        (folder / PIECES).exists() or _model(whole).get("type") == "Unigram"
    )


def _model(whole: Mapping[str, Any]) -> dict[str, Any]:
    model = whole.get("model")
    return model if isinstance(model, dict) else {}


def _rules(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a `tokenizer.json` changes and splits text, less what changes no token id."""
    steps = {name: whole.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
    after = steps["post_processor"]
    if isinstance(after, dict) and (
        after.get("type") == "ByteLevel"
        or (after.get("type") == "TemplateProcessing" and not after.get("special_tokens"))
    ):
        del steps["post_processor"]
    model = {k: v for k, v in _model(whole).items() if k not in ("type", "vocab", "merges")}
    plain = _plain({**steps, "model": _plain(model)})
    return {name: step for name, step in plain.items() if step}


def _plain(part: Any) -> Any:
    """Returns a part of a `tokenizer.json` without offsets and what is off by default."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    # a step of the kind ByteLevel splits by its own pattern unless this is false
    shown = {k: v for k, v in part.items() if (k == "use_regex") != bool(v) and k != "trim_offsets"}
    return {key: _plain(value) for key, value in shown.items()}


def _senseless(folder: Path, what: str) -> FileRefused:
    return FileRefused(f"{folder}: {what}", hint="copy the folder again from its source")


def _byte_symbols() -> list[str]:
    """Returns a printable character for each byte: itself where it is one, else a stand-in."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
