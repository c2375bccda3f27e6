"""A tokenizer comes from a folder: for every architecture, and checked by its content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.configs.config import Config
from ckptconv.configs.tokenizer import QWEN, merges_text, t5_text, vocabulary
from ckptconv.errors import FileRefused, UsageError
from ckptconv.files import MOST_TOKENS, read_json
from ckptconv.folder.read import ComponentFolder
from ckptconv.maps.architecture import bundled
from ckptconv.verification.checks.tokenizer import RULES, check_tokenizer
from tests.conftest import Sample
from tests.support.qwen import MERGES, SPECIALS, config, write_tokenizer

T5_CONFIG = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
CLIP_CONFIG = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "model_max_length": 77,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "CLIPTokenizer",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each class, and one of none that is known."""
    place = tmp_path_factory.mktemp("tokenizers")
    made = {name: place / name for name in ("clip", "t5", "qwen", "other")}
    vocab = {"vocab.json": json.dumps(vocabulary()), "merges.txt": merges_text()}
    texts = {
        "clip": {"tokenizer_config.json": json.dumps(CLIP_CONFIG), **vocab},
        "t5": {"tokenizer_config.json": json.dumps(T5_CONFIG), "tokenizer.json": t5_text()},
        "other": {
            "tokenizer_config.json": "{}",
            "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}),
        },
    }
    for name, files in texts.items():
        made[name].mkdir()
        for file, text in files.items():
            (made[name] / file).write_text(text, encoding="utf-8")
    write_tokenizer(made["qwen"])
    return made


@pytest.mark.parametrize(
    ("architecture", "option", "kind", "said"),
    [
        ("flux", "tokenizer", "t5", "fits tokenizer_2='"),
        ("flux", "tokenizer_2", "clip", "fits tokenizer='"),
        ("flux", "tokenizer_2", "qwen", "give the tokenizer of this model"),
        ("sd3", "tokenizer_3", "clip", "fits tokenizer='"),
        ("sdxl", "tokenizer_2", "t5", "give the tokenizer of this model"),
        ("z-image", "tokenizer", "clip", "give the folder tokenizer of Z-Image, or that of Qwen3-"),
        ("z-image", "tokenizer", "t5", "give the folder tokenizer of Z-Image"),
        ("z-image", "tokenizer", "other", "give the folder tokenizer of Z-Image"),
    ],
)
def test_one_of_another_class_is_named_with_where_it_fits(
    architecture: str,
    option: str,
    kind: str,
    said: str,
    folders: dict[str, Path],
    sample: Sample,
) -> None:
    names = {"clip": "CLIPTokenizer", "t5": "T5TokenizerFast", "qwen": "Qwen2Tokenizer"}
    choices: dict[str, Any] = {option: folders[kind]}
    with pytest.raises(FileRefused) as caught:
        ckptconv.plan(sample(architecture), **choices)
    found = names.get(kind, "tokenizer of no known kind")
    title = bundled().architectures[architecture].title
    assert f"{folders[kind]}: holds a {found}, but the {option} of {title}" in caught.value.message
    assert said in caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "option", "kind"),
    [("sd1", "tokenizer", "clip"), ("flux", "tokenizer_2", "t5"), ("z-image", "tokenizer", "qwen")],
)
@pytest.mark.parametrize("whole", [False, True])
def test_it_takes_the_place_of_the_bundled_one(
    architecture: str,
    option: str,
    kind: str,
    whole: bool,
    folders: dict[str, Path],
    sample: Sample,
    tmp_path: Path,
) -> None:
    place = folders[kind]
    if whole:  # a diffusers folder
        shutil.copytree(place, tmp_path / "model" / option)
        place = tmp_path / "model"
    out, choices = tmp_path / "out", {option: place}
    report = ckptconv.convert(sample(architecture), out, configs_only=True, **choices)  # type: ignore[arg-type]
    assert report.warnings == ()
    made = {path.name: path.read_bytes() for path in (out / option).iterdir()}
    given = {path.name: path.read_bytes() for path in folders[kind].iterdir()}
    tables = set(given) - {"tokenizer_config.json"}
    if kind != "t5":  # its tables are written from what was parsed
        tables.remove("vocab.json")
        assert json.loads(made["vocab.json"]) == json.loads(given["vocab.json"])
    assert {name: made[name] for name in tables} == {name: given[name] for name in tables}
    said = read_json(out / option / "tokenizer_config.json")
    wanted = bundled().architectures[architecture].components[option]
    assert [said["tokenizer_class"]] == [*bundled().classes(wanted)]
    assert read_json(out / "ckptconv" / "source.json")["donors"][option] == kind * (not whole) + (
        option * whole
    )


def test_nothing_but_a_tokenizer_is_copied(
    folders: dict[str, Path], sample: Sample, tmp_path: Path
) -> None:
    donor, out = tmp_path / "donor", tmp_path / "out"
    shutil.copytree(folders["qwen"], donor)
    config = read_json(donor / "tokenizer_config.json")
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "processor": {"a": 1}}
    (donor / "tokenizer_config.json").write_text(json.dumps(config))
    (donor / "evil.py").write_text("raise SystemExit")
    (donor / "README.md").write_text("of Qwen3")
    (donor / "chat_template.jinja").write_text("{{ messages }}")
    report = ckptconv.convert(sample("z-image"), out, tokenizer=donor, configs_only=True)
    (warning,) = report.warnings
    assert warning.endswith("asks for code from elsewhere, which was left out: auto_map")
    assert {path.name for path in (out / "tokenizer").iterdir()} == {
        *("chat_template.jinja", "merges.txt", "tokenizer_config.json", "vocab.json"),
    }
    kept = read_json(out / "tokenizer" / "tokenizer_config.json")
    assert not {"auto_map", "processor"} & kept.keys()
    assert kept["chat_template"] == config["chat_template"]


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _large(path: Path) -> None:
    os.truncate(path, MOST_TOKENS + 1)


def _no_template(path: Path) -> None:
    values = read_json(path)
    del values["chat_template"]
    path.write_text(json.dumps(values))


def _ids(path: Path) -> None:
    path.write_text(json.dumps({"Ġ": 0, "a": 151936}))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("tokenizer_config.json", Path.unlink, "holds no tokenizer_config.json"),
    ("tokenizer_config.json", _pipe, "holds no tokenizer_config.json"),
    ("tokenizer_config.json", lambda path: path.write_text("[1]"), "holds no JSON object"),
    ("tokenizer_config.json", _no_template, "has no chat template"),
    ("vocab.json", Path.unlink, "holds no vocab.json with a merges.txt, and no tokenizer.json"),
    ("vocab.json", _pipe, "this is not a regular file"),
    ("vocab.json", _large, "a file of this kind has at most 32,000,000"),
    ("vocab.json", lambda path: path.write_text('{"Ġ": -1}'), "is no table from tokens to numbers"),
    ("vocab.json", _ids, "ids go up to 151,936, but text_encoder/embed_tokens.weight has 151,936"),
    ("merges.txt", lambda path: path.write_text("#version\na b c"), "expected two tokens"),
    ("added_tokens.json", lambda path: path.write_text("{"), "cannot be read as JSON"),
    ("chat_template.jinja", lambda path: path.write_bytes(b"\xff"), "is no text"),
]


@pytest.mark.parametrize(("file", "damage", "said"), DAMAGES)
def test_a_damaged_one_is_refused(
    file: str,
    damage: Callable[[Path], object],
    said: str,
    folders: dict[str, Path],
    sample: Sample,
    tmp_path: Path,
) -> None:
    donor, out = tmp_path / "donor", tmp_path / "out"
    shutil.copytree(folders["qwen"], donor)
    damage(donor / file)
    with pytest.raises(FileRefused, match=said):
        ckptconv.convert(sample("z-image"), out, tokenizer=donor, configs_only=True)
    assert not out.exists()


def _whole(ids: dict[str, int], added: dict[str, int]) -> str:
    """Returns a `tokenizer.json` of the small tokenizer of Qwen's kind, with other tokens."""
    first = 256 + len(MERGES)
    tokens = {token: first + n for n, token in enumerate(SPECIALS)} | added
    symbols = [*[*vocabulary()][:256], *("".join(merge.split()) for merge in MERGES)]
    return json.dumps(
        {
            "added_tokens": [{"id": n, "content": token} for token, n in tokens.items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": RULES[QWEN][0]["pre_tokenizer"],
            "model": {
                "type": "BPE",
                "vocab": {token: n for n, token in enumerate(symbols)} | ids,
                "merges": list(MERGES),
            },
        }
    )


@pytest.mark.parametrize(
    ("ids", "added", "alone", "said"),
    [
        ({"a": 1_000_000}, {}, True, "ids go up to 1,000,000"),
        ({}, {"<far>": 1_000_000}, True, "ids go up to 1,000,000"),
        ({}, {"<far>": 1_000_000}, False, "ids go up to 1,000,000"),
        ({"a": 1_000_000}, {}, False, "vocab.json or merges.txt differs from its tokenizer.json"),
        ({}, {"<far>": -1}, True, "is no table from tokens to numbers"),
    ],
)
def test_the_ids_of_a_tokenizer_json_are_checked(
    ids: dict[str, int],
    added: dict[str, int],
    alone: bool,
    said: str,
    sample: Sample,
    tmp_path: Path,
) -> None:
    donor = write_tokenizer(tmp_path / "donor")
    (donor / "tokenizer.json").write_text(_whole(ids, added))
    if alone:
        (donor / "vocab.json").unlink()
    with pytest.raises(FileRefused, match=said):
        ckptconv.convert(sample("z-image"), tmp_path / "out", tokenizer=donor, configs_only=True)


def test_what_asks_for_code_is_copied_from_no_file(sample: Sample, tmp_path: Path) -> None:
    donor, code = write_tokenizer(tmp_path / "donor"), {"auto_map": {"AutoTokenizer": "evil.T"}}
    specials = {"eos_token": {"content": "<|im_end|>", **code}, **code}
    (donor / "special_tokens_map.json").write_text(json.dumps(specials))
    (donor / "tokenizer.json").write_text(_whole({}, {})[:-1] + ', "auto_map": {"a": "b"}}')
    ckptconv.convert(sample("z-image"), tmp_path / "out", tokenizer=donor, configs_only=True)
    made = {path.name: path.read_text() for path in (tmp_path / "out" / "tokenizer").iterdir()}
    assert json.loads(made["special_tokens_map.json"]) == {"eos_token": {"content": "<|im_end|>"}}
    assert not [name for name, text in made.items() if "auto_map" in text]


def test_a_file_and_a_missing_folder_are_no_tokenizer(small: Path, tmp_path: Path) -> None:
    for place in (small, tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(FileRefused, match=r"holds no tokenizer_config.json|File name too long"):
            ckptconv.plan(small, tokenizer=place)


def test_an_architecture_without_it_takes_none(small: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="tokenizer_3 is given, but it is not a component") as told:
        ckptconv.plan(small, tokenizer_3=folders["t5"])
    assert told.value.hint.endswith("given are unet, vae, text_encoder, tokenizer")


def _swapped(data: dict[str, Any]) -> None:
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _slow(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}


CHANGES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("vocab.json", lambda data: data.update({"a": data["b"], "b": data["a"]}), "vocabulary"),
    ("tokenizer.json", _swapped, "vocabulary in tokenizer.json"),
    ("tokenizer.json", lambda data: data["model"]["merges"].pop(), "merges in tokenizer.json"),
    ("tokenizer.json", _slow, "splitting of text in tokenizer.json"),
    (
        "tokenizer.json",
        lambda data: data.update(normalizer=None, pre_tokenizer=None),
        "splitting of text in tokenizer.json",
    ),
    ("added_tokens.json", lambda data: data.update({"<|im_end|>": 3}), "added tokens"),
    (
        "special_tokens_map.json",
        lambda data: data.update(eos_token="<|im_start|>"),  # noqa: S106
        "eos_token in special_tokens_map.json",
    ),
    (
        "tokenizer_config.json",
        lambda data: data.update(eos_token="<|im_start|>"),  # noqa: S106
        "eos_token",
    ),
    (
        "tokenizer_config.json",
        lambda data: data.update(tokenizer_class="CLIPTokenizer"),
        "tokenizer_class",
    ),
    ("tokenizer_config.json", lambda data: data.update(chat_template="x"), "chat template"),
]


@pytest.fixture(scope="module")
def with_qwen(folders: dict[str, Path], sample: Sample, tmp_path_factory: Any) -> Path:
    out = Path(tmp_path_factory.mktemp("with_qwen")) / "out"
    ckptconv.convert(sample("z-image"), out, tokenizer=folders["qwen"])
    (out / "tokenizer" / "tokenizer.json").write_text(_whole({}, {}))
    assert ckptconv.verify(sample("z-image"), out, tokenizer=folders["qwen"]).problems == ()
    return out


@pytest.mark.parametrize(("file", "change", "where"), CHANGES)
def test_a_changed_file_is_a_problem_whatever_the_others_say(
    file: str,
    change: Callable[[dict[str, Any]], object],
    where: str,
    folders: dict[str, Path],
    with_qwen: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(with_qwen / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / file
    data = read_json(path) if path.exists() else {}
    change(data)
    path.write_text(json.dumps(data))
    tokenizer = bundled().architectures["z-image"].components["tokenizer"]
    values = {**config(), "tokenizer_class": QWEN}
    found = check_tokenizer(
        Config(tokenizer, values, {}, folder=folders["qwen"]),
        ComponentFolder(
            tmp_path / "tokenizer", read_json(tmp_path / "tokenizer" / "tokenizer_config.json")
        ),
        ours=True,
    )
    assert [problem.where for problem in found.problems] == [where]


def test_another_tokenizer_than_the_donor_is_a_problem(
    folders: dict[str, Path], sample: Sample, tmp_path: Path
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    ckptconv.convert(sample("z-image"), out, tokenizer=folders["qwen"])
    shutil.copytree(folders["qwen"], other)
    (other / "merges.txt").write_text("#version: 0.2\nc a\n")
    (check,) = ckptconv.verify(sample("z-image"), out, tokenizer=other).problems
    assert check == "tokenizer: merges: is not that of the donor"
