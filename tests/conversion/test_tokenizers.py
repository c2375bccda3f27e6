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
from ckptconv.configs.tokenizer import merges_text, t5_text, vocabulary
from ckptconv.errors import FileRefused, UsageError
from ckptconv.files import MOST_TOKENS, read_json
from ckptconv.maps.architecture import bundled
from tests.conftest import Sample
from tests.support.qwen import write_tokenizer

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
    tables = given.keys() - {"tokenizer_config.json"}
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


def test_a_file_and_a_missing_folder_are_no_tokenizer(small: Path, tmp_path: Path) -> None:
    for place in (small, tmp_path / "missing", tmp_path / ("x" * 300)):
        with pytest.raises(FileRefused, match=r"holds no tokenizer_config.json|File name too long"):
            ckptconv.plan(small, tokenizer=place)


def test_an_architecture_without_it_takes_none(small: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="tokenizer_3 is given, but it is not a component") as told:
        ckptconv.plan(small, tokenizer_3=folders["t5"])
    assert told.value.hint.endswith("given are unet, vae, text_encoder, tokenizer")


def test_another_tokenizer_than_the_donor_is_a_problem(
    folders: dict[str, Path], sample: Sample, tmp_path: Path
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    ckptconv.convert(sample("z-image"), out, tokenizer=folders["qwen"])
    shutil.copytree(folders["qwen"], other)
    (other / "merges.txt").write_text("#version: 0.2\nc a\n")
    (check,) = ckptconv.verify(sample("z-image"), out, tokenizer=other).problems
    assert check == "tokenizer: merges: is not that of the donor"
