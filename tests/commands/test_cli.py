"""The command line: data on stdout, all else on stderr, exit codes, and no traceback."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.cli import COMMANDS
from tests.conftest import Sample
from tests.support.checkpoints import midget, save
from tests.support.shell import on_a_terminal, process, run


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_a_help_text(command: list[str], flag: str) -> None:
    text = run(*command, flag).stdout
    assert text.startswith(f"Usage: main {' '.join(command)}".rstrip())
    body = text.split("\n\n")[1].strip()
    assert body.endswith(".")
    if not command:
        assert all(f"\n  {name} " in text for name in COMMANDS)
        said = " ".join(text.split())
        assert "Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 refused (an input," in said


def test_the_version_is_told() -> None:
    assert run("--version").stdout == f"ckptconv, version {ckptconv.__version__}\n"


def test_the_module_runs_and_keeps_data_and_messages_apart(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = process("inspect", "--json", small)
    assert (told.returncode, told.stderr) == (0, "")
    assert json.loads(told.stdout)["architecture"] == "sd1"
    converted = process("convert", small, out)
    assert (converted.returncode, converted.stdout) == (0, f"{out}\n")
    assert "Stable Diffusion 1.x, text-to-image: StableDiffusionPipeline" in converted.stderr
    assert "assumed prediction_type = epsilon: nothing in the file says" in converted.stderr
    again = process("convert", small, out)
    assert (again.returncode, again.stdout) == (3, "")
    assert again.stderr == (
        f"error: {out}: exists\nhint: --overwrite replaces it; or choose another name\n"
    )
    wrong = process("convert")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "Missing argument 'FILE'" in wrong.stderr


def test_a_name_that_is_not_utf8_goes_through(small: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"sd\xff.safetensors")
    try:
        os.link(small, odd)
    except OSError as error:
        pytest.skip(f"this file system wants UTF-8: {error}")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    out = tmp_path / os.fsdecode(b"out\xff")
    converted = process("convert", odd, out, "--configs-only", env=strict)
    assert (converted.returncode, converted.stdout) == (0, f"{out}\n")
    told = process("inspect", "--json", odd, env=strict)
    assert json.loads(told.stdout)["file"] == str(odd)


def _code(path: Path) -> None:
    """Writes a PyTorch checkpoint that would run a command."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\n(S'false'\ntR.")


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def _truncated(path: Path) -> None:
    midget(path)
    os.truncate(path, path.stat().st_size - 1000)


def _lora(path: Path) -> None:
    save({"lora_unet_x.lora_down.weight": ("F16", (1, 1), b"\0\0")}, path)


def _diffusers_unet(path: Path) -> None:
    save({"down_blocks.0.resnets.0.conv1.weight": ("F16", (1, 1), b"\0\0")}, path)


BAD: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "missing": (lambda _: None, "cannot be read: No such file", "not-found"),
    "folder": (Path.mkdir, "this is a folder", "unreadable"),
    "empty": (Path.touch, "the file is empty", "truncated"),
    "text": (
        lambda path: path.write_text("hello, this"),
        "a text, not a model",
        "not-a-checkpoint",
    ),
    "noise": (
        lambda path: path.write_bytes(bytes(range(256)) * 9),
        "neither a safetensors",
        "not-a-checkpoint",
    ),
    "json": (lambda path: path.write_bytes(b"{}" * 40), "is a JSON text", "not-a-checkpoint"),
    "header of no JSON": (
        lambda path: path.write_bytes(struct.pack("<Q", 16) + b"{" * 16),
        "the header is not JSON",
        "not-well-formed",
    ),
    "code": (_code, "the file names code that weights do not need; none of it", "unsafe-pickle"),
    "old pickle": (
        lambda path: path.write_bytes(b"\x80\x02}q\x00."),
        "PyTorch",
        "not-a-checkpoint",
    ),
    "zip": (_zip, "a zip file, but not a PyTorch checkpoint", "not-a-checkpoint"),
    "truncated": (_truncated, "the file is truncated", "truncated"),
    "LoRA": (_lora, "this is a LoRA", "not-a-checkpoint"),
    "no tensors": (lambda path: save({}, path), "the file holds no tensors", "not-a-checkpoint"),
    "diffusers layout": (
        _diffusers_unet,
        "UNet in the diffusers layout already",
        "not-a-checkpoint",
    ),
}


LOOKED_INTO = ("LoRA", "no tensors", "diffusers layout")
"""What `inspect` has something to say of beside the refusal."""


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "plan --json", "convert"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_a_sentence_and_no_traceback(
    command: str, kind: str, tmp_path: Path
) -> None:
    make, sentence, code = BAD[kind]
    path = tmp_path / "bad.safetensors"
    make(path)
    out = [tmp_path / "out"] if command == "convert" else []
    result = run(*command.split(), path, *out, code=3)
    assert re.search(sentence, result.output)
    assert str(path) in result.output
    assert "hint" in result.output
    if "--json" in command:
        assert json.loads(result.stdout)["error"]["code"] == code
    if command != "inspect" and kind not in LOOKED_INTO:
        assert result.stderr.startswith(f"error: {path}: ")
    if command == "convert":
        assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_bad_file_gives_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    _code(path)
    refused = process("convert", path, tmp_path / "out")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr.startswith(f"error: {path}: the file names code")
    assert "hint: delete the file unless you know" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["frobnicate"], "there is no command 'frobnicate'; it is one of inspect, plan"),
        (["convrt", "FILE"], "no command 'convrt'; did you mean `ckptconv convert`?"),
        (["FILE"], "did you mean `ckptconv inspect /"),
        (["no.safetensors"], "did you mean `ckptconv inspect no.safetensors`?"),
        (["inspect"], "Missing argument 'FILE'"),
        (["inspect", "FILE", "--frob"], "No such option"),
        (["convert", "FILE", "OUT", "--dtype", "fp6"], "dtype 'fp6' is unknown"),
        (["convert", "FILE", "OUT", "--max-shard-size", "5XB"], "'5XB' is not a size"),
        (["convert", "FILE", "OUT", "--max-shard-size", "0"], "'0' is not a size"),
        (["convert", "FILE", "OUT", "--variant", "a/b"], "variant 'a/b' cannot stand in a file"),
        (["convert", "FILE", "OUT", "--only", "unet,hat"], "sd1 has no component hat"),
        (["convert", "FILE", "OUT", "--only", ","], "names no component"),
        (["convert", "FILE", "OUT", "--prediction-type", "x"], "'x' is not one of"),
        (["convert", "FILE", "OUT", "--text-encoder-2", "FILE"], "text_encoder_2 is given, but"),
        (["plan", "FILE", "--only", "hat"], "sd1 has no component hat"),
        (["sample", "sd9", "OUT"], "architecture 'sd9' is unknown"),
        (["sample", "sd1", "OUT", "--task", "dance"], "sd1 has no task 'dance'"),
        (["sample", "sd1", "OUT", "--seed", "-1"], "-1 is not in the range"),
        (["sample", "sd1", "OUT", "--seed", "x"], "'x' is not a valid integer"),
        (["demo", "OUT", "--arch", "sd9"], "architecture 'sd9' is unknown"),
    ],
)
def test_wrong_usage_exits_with_2(
    args: list[str], sentence: str, small: Path, tmp_path: Path
) -> None:
    places = {"FILE": small, "OUT": tmp_path / "out"}
    result = run(*(places.get(arg, arg) for arg in args), code=2)
    assert sentence in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_broken_pipe_is_no_traceback(sample: Sample) -> None:
    command = f"{sys.executable} -m ckptconv plan {sample('sdxl')} | head -n 1"
    piped = subprocess.run(command, shell=True, capture_output=True, text=True)  # noqa: S602
    assert piped.stdout.count("\n") == 1
    assert "Traceback" not in piped.stderr


def test_progress_is_silent_without_a_terminal_and_shown_on_one(
    small: Path, tmp_path: Path
) -> None:
    silent = process("convert", small, tmp_path / "one")
    assert "\x1b" not in silent.stderr
    assert "converting" not in silent.stderr
    shown = on_a_terminal("convert", small, tmp_path / "two", COLUMNS="100")
    assert "converting" in shown
    total = sum(p.stat().st_size for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert f"{total / 1e6:.1f}/{total / 1e6:.1f} MB" in shown
