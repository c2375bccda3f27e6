"""Are the files of a tokenizer those of CLIP, in meaning?

A folder holds `vocab.json` and `merges.txt`, or `tokenizer.json` as transformers 5 saves it, or
all of them; which one a library reads depends on its version, so each must be right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...configs.config import Config
from ...configs.tokenizer import merges_text, vocabulary
from ...errors import FileRefused
from ...files import read_json
from ...folder.names import CONFIG_FILES
from ...folder.read import ComponentFolder
from ..result import Check, Problem

SPECIALS = "special_tokens_map.json"
COMPARED = ("add_prefix_space", "do_lower_case", "errors", "model_max_length")
"""Entries of the configuration that change the token ids."""

PROBE = "A  Photo of\nthe cat's 42."
"""Upper case, white space, a contraction and digits, in words that are one token each. (Not "!",
which some tokenizers pad with and then take for a special token.)"""
PROBE_TOKENS = ("a", "photo", "of", "the", "cat", "'s", "4", "2", ".")
UNTOLD = "<|endoftext|>"
"""What a special token is in a class that is not told."""


def check_tokenizer(config: Config, part: ComponentFolder, *, ours: bool) -> Check:
    """Compares a tokenizer with what it should be.

    Args:
        config: as it should be.
        part: the component of the folder.
        ours: ckptconv wrote the folder, so that every difference is a later change.
    """
    name, folder = config.component.name, part.folder
    problems: list[Problem] = []
    notes: list[str] = []
    if part.config is None:
        problems.append(Problem(CONFIG_FILES["tokenizer"], "is missing or cannot be read"))
    else:
        wrong = _specials(CONFIG_FILES["tokenizer"], config.values, part.config, whole=True)
        if (folder / SPECIALS).exists() and not ours:  # of two answers, that file's counts
            notes += [f"{problem}, and {SPECIALS} overrules it" for problem in wrong]
        else:
            problems += wrong
        problems += _entries(config.values, part.config)
    known = _known()
    checks = {
        "vocab.json": _vocabulary,
        "merges.txt": _merges,
        "tokenizer.json": _tokenizer_json,
        SPECIALS: _specials_file,
        "added_tokens.json": _added,
    }
    for file, check in checks.items():
        if (folder / file).exists():
            try:
                problems += [Problem(file, what) for what in check(folder / file, known, config)]
            except (OSError, UnicodeDecodeError, FileRefused) as error:
                problems.append(Problem(file, f"cannot be read: {error}"))
    if not (folder / "tokenizer.json").exists():
        for file in ("vocab.json", "merges.txt"):
            if not (folder / file).exists():
                problems.append(Problem(file, "is missing, and there is no tokenizer.json"))
    extent = f"{len(known):,} tokens, {len(_known_merges()):,} merges"
    return Check(name, "tokenizer", tuple(problems), tuple(notes), extent)


@functools.cache
def _known() -> dict[str, int]:
    return vocabulary()


@functools.cache
def _known_merges() -> list[str]:
    return _lines(merges_text())


def _entries(expected: Mapping[str, Any], have: Mapping[str, Any]) -> Iterator[Problem]:
    said = str(have.get("tokenizer_class", expected["tokenizer_class"]))
    if said.removesuffix("Fast") != expected["tokenizer_class"]:
        yield Problem("tokenizer_class", f"is {said!r}, expected {expected['tokenizer_class']!r}")
    for entry in COMPARED:
        if entry not in have and entry != "model_max_length":
            continue
        if have.get(entry) != expected.get(entry):
            what = f"is {have.get(entry)!r}, expected {expected.get(entry)!r}"
            yield Problem(entry, what)


def _specials(
    file: str, expected: Mapping[str, Any], have: Mapping[str, Any], *, whole: bool
) -> Iterator[Problem]:
    """Yields the special tokens that are not as they should be."""
    for entry, want in expected.items():
        if not entry.endswith("_token") or (entry not in have and not whole):
            continue
        said = have.get(entry, UNTOLD if entry != "bos_token" else want)
        text = said.get("content") if isinstance(said, dict) else said
        if text != want:
            yield Problem(entry, f"is {text!r} in {file}, expected {want!r}")
    decoder = have.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        contents = ((k, v.get("content") if isinstance(v, dict) else v) for k, v in decoder.items())
        for what in _unlike({str(text): _number(key) for key, text in contents}, _known()):
            yield Problem("added_tokens_decoder", what)


def _specials_file(path: Path, _known: Mapping[str, int], config: Config) -> Iterator[str]:
    for problem in _specials(path.name, config.values, read_json(path), whole=False):
        yield str(problem)


def _vocabulary(path: Path, known: Mapping[str, int], _config: Config) -> Iterator[str]:
    have = read_json(path)
    if have == known:
        return
    yield from _unlike(have, known)
    if lost := [token for token in known if token not in have]:
        yield f"lacks {len(lost):,} tokens, such as {lost[0]!r}"


def _merges(path: Path, _known: Mapping[str, int], _config: Config) -> Iterator[str]:
    yield from _unlike_merges(_lines(path.read_text(encoding="utf-8")))


def _added(path: Path, known: Mapping[str, int], _config: Config) -> Iterator[str]:
    yield from _unlike(read_json(path), known)


def _tokenizer_json(path: Path, known: Mapping[str, int], _config: Config) -> Iterator[str]:
    from tokenizers import Tokenizer

    data = read_json(path)
    model = data.get("model")
    have = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(have, dict) or not isinstance(merges, list):
        yield "holds no BPE model with a vocabulary and merges"
        return
    yield from _unlike(have, known)
    pairs = [" ".join(map(str, m)) if isinstance(m, list) else str(m) for m in merges]
    yield from _unlike_merges(pairs)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = tokenizer.encode(PROBE).ids
    except Exception as error:  # noqa: BLE001  (the library raises nothing more special)
        yield f"cannot be loaded: {error}"
        return
    tokens = ["<|startoftext|>", *(token + "</w>" for token in PROBE_TOKENS), "<|endoftext|>"]
    wanted = [known[token] for token in tokens]
    if ids != wanted:
        yield f"turns {PROBE!r} into {ids}, expected {wanted}"


def _unlike(have: Mapping[str, Any], known: Mapping[str, int]) -> Iterator[str]:
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
    for n, (said, want) in enumerate(zip(have, wanted, strict=False), 1):
        if said != want:
            yield f"merge {n:,} is {said!r}, expected {want!r}"
            return


def _lines(text: str) -> list[str]:
    """Returns the merges of a file, without its version line."""
    lines = text.splitlines()
    return [line for line in lines[lines[:1] != [] and lines[0].startswith("#version") :] if line]


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1
