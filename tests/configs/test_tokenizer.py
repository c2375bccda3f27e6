"""The bundled tokenizer is the published one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ckptconv.configs.config import configs
from ckptconv.configs.tokenizer import merges_text, t5_text, tokenizer_files, vocabulary
from ckptconv.detection.detect import detect
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from ckptconv.planning.plan import build_plan
from tests.conftest import published

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

PADS = [
    ("sd15-emaonly-fp32", "tokenizer", "<|endoftext|>", 49407),
    ("sd21-768-fp32", "tokenizer", "!", 0),
    ("sdxl-base-fp16", "tokenizer", "<|endoftext|>", 49407),
    ("sdxl-base-fp16", "tokenizer_2", "!", 0),
    ("sdxl-refiner-fp16", "tokenizer_2", "!", 0),
]


def config_of(name: str, component: str) -> Mapping[str, Any]:
    plan = build_plan(detect(published(name)), Options(only=frozenset({component})))
    return configs(plan)[component].values


def test_the_vocabulary_has_the_published_ids() -> None:
    vocab = vocabulary()
    assert len(vocab) == 49408
    assert sorted(vocab.values()) == list(range(49408))
    known = {
        "!": 0,
        '"': 1,
        "~": 93,
        "¡": 94,
        "Ā": 188,
        "!</w>": 256,
        "in": 512,
        "th": 513,
        "an": 514,
        "a</w>": 320,
        "the</w>": 518,
        "of</w>": 539,
        "photo</w>": 1125,
        "dog</w>": 1929,
        "cat</w>": 2368,
        "<|startoftext|>": 49406,
        "<|endoftext|>": 49407,
    }
    assert {token: vocab[token] for token in known} == known


def test_the_merges_are_a_version_line_and_48894_pairs() -> None:
    lines = merges_text().splitlines()
    assert lines[0].startswith("#version")
    assert lines[1:3] == ["i n", "t h"]
    assert len(lines) == 1 + 48894
    assert all(len(line.split(" ")) == 2 for line in lines[1:])
    assert merges_text().endswith("\n")


def test_the_files_of_a_tokenizer() -> None:
    config = config_of("sdxl-base-fp16", "tokenizer_2")
    files = tokenizer_files(config)
    assert set(files) == {
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert json.loads(files["vocab.json"]) == vocabulary()
    assert json.loads(files["tokenizer_config.json"]) == config
    assert json.loads(files["special_tokens_map.json"]) == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "!",
        "unk_token": "<|endoftext|>",
    }


@pytest.mark.parametrize(("name", "component", "pad", "pad_id"), PADS)
def test_transformers_reads_the_files_and_gives_the_known_ids(
    tmp_path: Path, name: str, component: str, pad: str, pad_id: int
) -> None:
    from transformers import CLIPTokenizer

    for file, text in tokenizer_files(config_of(name, component)).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a photo of a cat").input_ids == cat
    assert tokenizer("A  Photo of a CAT").input_ids == cat
    assert tokenizer("").input_ids == [49406, 49407]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, pad_id)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert tokenizer.model_max_length == 77
    padded = tokenizer(
        "a photo of a cat " * 30 + "dog", padding="max_length", truncation=True
    ).input_ids
    assert len(padded) == 77
    assert padded[-1] == 49407
    short = tokenizer("a photo of a cat", padding="max_length", truncation=True).input_ids
    assert short == cat + [pad_id] * (77 - len(cat))
    # Words that are cut, signs, and bytes beyond ASCII ("!" may be the padding, a special token).
    text = "xylophonist's café, 3 naïve 猫?"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.replace(" ", "")


# By the tokenizers library, from the bundled file; 1 is the end, 2 what is unknown, 3 a lone space.
# The first five are known from elsewhere: the documentation of transformers has them.
T5_IDS = {
    "translate English to German": [13959, 1566, 12, 2968],
    "summarize:": [21603, 10],
    "The quick brown fox jumps over the lazy dog.": [
        *(37, 1704, 4216, 3, 20400, 4418, 7, 147, 8, 19743, 1782, 5),
    ],
    "<extra_id_0> of <extra_id_99>": [32099, 13, 32000],
    "<pad>": [0],
    "": [],
    "</s>": [1],
    "a photo of a cat": [3, 9, 1202, 13, 3, 9, 1712],
    "  two  spaces ": [192, 4856],
    "A\tB\nC": [71, 272, 205],
    "don't": [278, 31, 17],
    "1234567890": [586, 3710, 4834, 3940, 2394],
    "ALL CAPS ÄÖÜ": [8229, 205, 28231, 3, 2, 14858],
    "Straße": [5438, 5202, 15],
    "ñandú": [3, 2, 232, 2],
    "Ünïcödé — “quotes”": [3, 14858, 29, 2, 75, 1872, 3764, 3, 318, 105, 8270, 15, 7, 153],
    "e\N{COMBINING ACUTE ACCENT} \N{LATIN SMALL LETTER E WITH ACUTE}": [3, 154, 3, 154],
    "fi \N{LATIN SMALL LIGATURE FI} ligature": [361, 361, 3, 17140, 2693],
    "½ ² ™": [209, 2, 357, 204, 3, 2305],
    "C++ (code) {x}": [205, 16702, 41, 4978, 61, 3, 2, 226, 2],
    "\N{NO-BREAK SPACE}nbsp\N{ZERO WIDTH SPACE}zw": [3, 29, 115, 7, 102, 3, 172, 210],
    "日本語": [3, 2],
    "emoji \N{SLIGHTLY SMILING FACE}": [3, 15, 51, 21892, 3, 2],
    "x" * 40: [3, *[19230] * 20],
}


@pytest.mark.parametrize("text", T5_IDS)
def test_t5_gives_the_published_ids(text: str) -> None:
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(t5_text()).encode(text).ids == [*T5_IDS[text], 1]


@pytest.mark.slow
def test_transformers_reads_the_files_of_t5(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5Tokenizer

    plan = build_plan(detect(bundled().architectures["flux"].layout()))
    files = tokenizer_files(configs(plan)["tokenizer_2"].values)
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    for cls in (T5Tokenizer, AutoTokenizer):
        tokenizer = cls.from_pretrained(tmp_path)
        assert {text: tokenizer(text).input_ids[:-1] for text in T5_IDS} == T5_IDS
        assert tokenizer.model_max_length == 512
        padded = tokenizer("a cat " * 600, padding="max_length", truncation=True).input_ids
        assert (len(padded), padded[-1]) == (512, 1)
        short = tokenizer("</s>", padding="max_length", max_length=4, truncation=True).input_ids
        assert short == [1, 1, 0, 0]
