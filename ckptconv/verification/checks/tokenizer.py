"""Are the files of a tokenizer those of CLIP or of T5 in meaning, or those of the donor?

A folder holds `vocab.json` and `merges.txt`, or `tokenizer.json` as transformers 5 saves it, or
all of them; which one a library reads depends on its version, so each must be right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...configs.config import Config
from ...configs.tokenizer import (
    CLIP,
    QWEN,
    T5,
    VOCABULARY,
    content,
    merges_text,
    parsed_tokenizer,
    vocabulary,
)
from ...errors import FileRefused
from ...files import MOST_TOKENS, read_json, read_small
from ...folder.names import CONFIG_FILES
from ...folder.read import ComponentFolder
from ..result import Check, Problem
from .t5 import t5_json, t5_pieces

SPECIALS = "special_tokens_map.json"
COMPARED = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 10**30,
}
"""Entries of the configuration that change the token ids, and their defaults."""
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
UNLIKE = "is not that of the donor"

PROBE = "A  Photo of\nthe cat's 42."
"""Upper case, white space, a contraction and digits, in words that are one token each. (Not "!",
which some tokenizers pad with and then take for a special token.)"""
PROBE_TOKENS = ("a", "photo", "of", "the", "cat", "'s", "4", "2", ".")
NEEDED = ("vocab.json", "merges.txt", "spiece.model")
"""Files without which there must be a `tokenizer.json`."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PATTERNS = (r"\s+", WORDS, rf"<\|startoftext\|>|<\|endoftext\|>|{WORDS}")
"""The patterns by which every CLIP tokenizer splits a text."""
BYTES = {"type": "ByteLevel"}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splits(pattern: str, bytes_: Mapping[str, Any], **behavior: Any) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, **behavior}
    return {"type": "Sequence", "pretokenizers": [split, bytes_]}


RULES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    QWEN: [
        {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": _splits(
                QWEN_WORDS, {**BYTES, "use_regex": False}, behavior="Isolated"
            ),
        }
    ],
    CLIP: [
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Replace", "pattern": {"Regex": PATTERNS[0]}, "content": " "},
                    {"type": "Lowercase"},
                ],
            },
            "pre_tokenizer": _splits(pattern, BYTES, behavior="Removed", invert=True),
            "post_processor": {
                "type": "RobertaProcessing",
                "sep": ["<|endoftext|>", 49407],
                "cls": ["<|startoftext|>", 49406],
            },
            "model": {"unk_token": "<|endoftext|>", "end_of_word_suffix": "</w>"},
        }
        for pattern in PATTERNS[1:]
    ],
}
"""How the libraries' classes change and split text, as they write it into a `tokenizer.json`."""
UNSET = "<|endoftext|>"
"""The class's default for special tokens."""


def check_tokenizer(config: Config, part: ComponentFolder, *, ours: bool) -> Check:
    """Compares a tokenizer with what it should be.

    In a folder of `ours`, which ckptconv wrote, every difference is a later change.
    """
    if donor := config.folder:
        findings = _unlike_donor(config, part, donor)
        return Check.of(config.component.name, "tokenizer", findings, f"as in {donor.name}")
    clip = f"{len(_known()):,} tokens, {len(_known_merges()):,} merges"
    extent = "32,100 pieces" if config.values["tokenizer_class"] == T5 else clip
    return Check.of(config.component.name, "tokenizer", _findings(config, part, ours), extent)


def _unlike_donor(config: Config, part: ComponentFolder, donor: Path) -> Iterator[Problem]:
    """Yields in what a tokenizer differs from the donor, in any file that a library may read."""
    settings, own = CONFIG_FILES["tokenizer"], part.config or {}
    try:
        have, want = parsed_tokenizer(part.folder, own), parsed_tokenizer(donor, config.values)
    except FileRefused as error:
        yield Problem(settings, error.message)
        return
    yield from _entries(config.values, own)
    for file, tables in have.tables.items():
        theirs = want.tables.get(file, want.first)
        rules = RULES.get(config.values["tokenizer_class"].removesuffix("Fast"), ())
        right = {
            "vocabulary": have.ids(file) == want.ids(file),
            "merges": tables.merges == theirs.merges,
            "splitting of text": tables.rules is None or tables.rules in (theirs.rules, *rules),
        }
        for what in (what for what, same in right.items() if not same):
            yield Problem(what if file == VOCABULARY else f"{what} in {file}", UNLIKE)
    known = {**want.ids(VOCABULARY), **want.added}
    added = [*have.added.items(), *have.more.get("added_tokens.json", {}).items()]
    if any(known.get(token) != number for token, number in added):
        yield Problem("added tokens", UNLIKE)
    theirs_said = want.more.get(SPECIALS, {})
    said = have.more.get(SPECIALS, {})
    for name in TOKENS:
        expected = content(config.values.get(name, theirs_said.get(name)))
        if content(own.get(name, said.get(name))) != expected:
            yield Problem(name, UNLIKE)
        if content(said.get(name, expected)) != content(theirs_said.get(name, expected)):
            yield Problem(f"{name} in {SPECIALS}", UNLIKE)
    template, wanted = (
        found.config.get("chat_template") if found.template is None else found.template
        for found in (have, want)
    )
    if template != wanted:
        yield Problem("chat template", UNLIKE)


def _findings(config: Config, part: ComponentFolder, ours: bool) -> Iterator[Problem | str]:
    folder, expected, settings = part.folder, config.values, CONFIG_FILES["tokenizer"]
    t5 = expected["tokenizer_class"] == T5
    if part.config is None:
        yield Problem(settings, "is missing or cannot be read")
    else:
        overruled = (folder / SPECIALS).exists() and not ours  # of two answers, that file's counts
        for problem in _specials(settings, expected, part.config, whole=True):
            yield f"{problem}, and {SPECIALS} overrules it" if overruled else problem
        yield from _entries(expected, part.config)
    checks: dict[str, Callable[[Path], Iterable[object]]] = (
        {"tokenizer.json": t5_json, "spiece.model": t5_pieces}
        if t5
        else {
            "vocab.json": _vocabulary,
            "merges.txt": lambda path: _unlike_merges(
                _lines(read_small(path, MOST_TOKENS).decode())
            ),
            "tokenizer.json": _tokenizer_json,
            SPECIALS: lambda path: _specials(SPECIALS, expected, _table(path), whole=False),
            "added_tokens.json": lambda path: _unlike(_table(path)),
        }
    )
    for file, check in checks.items():
        if (folder / file).exists():
            try:
                yield from [Problem(file, str(what)) for what in check(folder / file)]
            except (OSError, UnicodeDecodeError, FileRefused) as error:
                yield Problem(file, f"cannot be read: {error}")
        elif file in NEEDED and not (folder / "tokenizer.json").exists():
            yield Problem(file, "is missing, and there is no tokenizer.json")


_known = functools.cache(vocabulary)


@functools.cache
def _known_merges() -> list[str]:
    return _lines(merges_text())


def _entries(expected: Mapping[str, Any], have: Mapping[str, Any]) -> Iterator[Problem]:
    wanted = expected["tokenizer_class"]
    said = str(have.get("tokenizer_class", wanted))
    if said.removesuffix("Fast") != wanted.removesuffix("Fast"):
        yield Problem("tokenizer_class", f"is {said!r}, expected {wanted!r}")
    for entry, default in COMPARED.items():
        found, want = have.get(entry), expected.get(entry)
        silent = entry not in have and entry != "model_max_length"
        if found != want and not silent and (want is not None or found != default):
            yield Problem(entry, f"is {found!r}, expected {want!r}")


def _specials(
    file: str, expected: Mapping[str, Any], have: Mapping[str, Any], *, whole: bool
) -> Iterator[Problem]:
    """Yields special tokens that are wrong; one that is not there is, in a file that is whole."""
    for entry, want in expected.items():
        if entry.endswith("_token") and (entry in have or whole):
            found = content(have.get(entry, UNSET if entry != "bos_token" else want))
            if found != want:
                yield Problem(entry, f"is {found!r} in {file}, expected {want!r}")
    decoder = have.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbers = {str(content(token)): _number(key) for key, token in decoder.items()}
        for what in _unlike(numbers) if expected["tokenizer_class"] != T5 else ():
            yield Problem("added_tokens_decoder", what)


def _vocabulary(path: Path) -> Iterator[str]:
    have, known = _table(path), _known()
    yield from _unlike(have)
    if lost := [token for token in known if token not in have]:
        yield f"lacks {len(lost):,} tokens, such as {lost[0]!r}"


def _tokenizer_json(path: Path) -> Iterator[str]:
    from tokenizers import Tokenizer

    data = _table(path)
    model = data.pop("model", None)
    have, merges = (model.get(k) if isinstance(model, dict) else None for k in ("vocab", "merges"))
    if not isinstance(have, dict) or not isinstance(merges, list):
        yield "holds no BPE model with a vocabulary and merges"
        return
    yield from _unlike(have)
    yield from _unlike_merges(
        [" ".join(map(str, m)) if isinstance(m, list) else str(m) for m in merges]
    )
    if strange := list(_strange(data)):  # it may take forever
        yield f"changes or splits text by {strange[0][:80]!r}, which CLIP's does not"
        return
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(PROBE).ids
    except BaseException as error:  # the library raises nothing more special, or panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        yield f"cannot be loaded: {error}"
        return
    tokens = ["<|startoftext|>", *(token + "</w>" for token in PROBE_TOKENS), "<|endoftext|>"]
    wanted = [_known()[token] for token in tokens]
    if ids != wanted:
        yield f"turns {PROBE!r} into {ids}, expected {wanted}"


def _strange(part: object) -> Iterator[str]:
    """Yields patterns and replacements that are not those of CLIP, at any depth."""
    if isinstance(part, dict):
        pattern = part.get("Regex", PATTERNS[0])
        if pattern not in PATTERNS:
            yield str(pattern)
        if part.get("type") == "Replace" and part.get("content") != " ":
            yield str(part.get("content"))
    for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _strange(item)


def _table(path: Path) -> dict[str, Any]:
    return read_json(path, MOST_TOKENS)


def _unlike(have: Mapping[str, Any]) -> Iterator[str]:
    known = _known()
    wrong = [token for token, number in have.items() if known.get(token) != number]
    if wrong:
        first = wrong[0]
        yield (
            f"{len(wrong):,} tokens have another id, such as {first!r}: {have[first]!r}, "
            f"expected {known.get(first, 'none')}"
        )


def _unlike_merges(have: list[str]) -> Iterator[str]:
    wanted = _known_merges()
    if len(have) != len(wanted):
        yield f"holds {len(have):,} merges, expected {len(wanted):,}"
    for n, (found, want) in enumerate(zip(have, wanted, strict=False), 1):
        if found != want:
            yield f"merge {n:,} is {found!r}, expected {want!r}"
            return


def _lines(text: str) -> list[str]:
    """Returns the merges of a file, without its version line."""
    lines = text.splitlines()
    if lines and lines[0].startswith("#version"):
        del lines[0]
    return [line for line in lines if line]


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1
