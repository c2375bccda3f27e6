"""What `export` refuses, what the command says, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ckptconv
from ckptconv.cli import main
from ckptconv.errors import FileRefused, NotACheckpoint, OutputError, UsageError
from tests.conftest import Copy, Folder
from tests.support.altering import resave
from tests.support.checkpoints import Raw, metadata, raw, save

QUERY = "decoder.mid_block.attentions.0.to_q.weight"


# Refusals.


def test_a_destination_is_not_replaced_unless_asked(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        ckptconv.export(folder("sd1"), out)
    assert out.read_text() == "mine"
    assert ckptconv.export(folder("sd1"), out, overwrite=True).out.stat().st_size > 1e6
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("/dev/null/x.safetensors", "null: is not a folder"),
        ("", "holds the input"),
        ("n" * 300, "cannot be looked at"),
        ("copy/unet/diffusion_pytorch_model.safetensors", "lies in .*copy, which is read"),
        ("copy/new/x.safetensors", "lies in .*copy, which is read"),
    ],
)
def test_a_place_that_cannot_take_the_file_is_refused(
    out: str, match: str, copy: Copy, tmp_path: Path
) -> None:
    altered = copy("sd1")
    with pytest.raises(OutputError, match=match):
        ckptconv.export(altered, tmp_path / out, overwrite=True)


def test_a_failure_half_way_leaves_nothing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckptconv.streaming.stream._copy", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        ckptconv.export(folder("sd1"), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def lose(key: str) -> Callable[[Raw], Raw]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


@pytest.mark.parametrize(
    ("component", "change", "problem"),
    [
        (
            "unet",
            lambda t: {**t, "down_blocks.0.lora.weight": t["conv_in.bias"]},
            "unet: down_blocks.0.lora.weight: no map knows this key",
        ),
        ("vae", lose("decoder.conv_out.bias"), "vae: decoder.conv_out.bias is missing"),
        (
            "text_encoder_2",
            lose("text_model.encoder.layers.1.self_attn.k_proj.bias"),
            "text_encoder_2: conditioner.embedders.1.model.transformer.resblocks.1.attn."
            "in_proj_bias cannot be put together: "
            "text_model.encoder.layers.1.self_attn.k_proj.bias missing",
        ),
        (
            "text_encoder_2",
            lambda t: {**t, "text_projection.weight": ("F16", (128,), b"\0" * 256)},
            "text_encoder_2: text_projection.weight: needs a matrix, found [128]",
        ),
        (
            "vae",
            lambda t: {**t, QUERY: (t[QUERY][0], (*t[QUERY][1], 1), t[QUERY][2])},
            f"vae: {QUERY}: needs shape [out, in] or [out], found [128, 128, 1]",
        ),
    ],
)  # fmt: skip
def test_what_has_no_way_back_is_refused_and_named(
    component: str, change: Callable[[Raw], Raw], problem: str, copy: Copy, tmp_path: Path
) -> None:
    altered = copy("sdxl")
    (path,) = (altered / component).glob("*.safetensors")
    tensors = change(raw(path))
    path.unlink()
    save(tensors, path)
    with pytest.raises(FileRefused, match="is not a whole Stable Diffusion XL model") as caught:
        ckptconv.export(altered, tmp_path / "x.safetensors")
    assert problem in caught.value.problems
    assert not (tmp_path / "x.safetensors").exists()


def test_parts_of_one_projection_must_share_a_dtype(copy: Copy, tmp_path: Path) -> None:
    altered = copy("sdxl")
    (path,) = (altered / "text_encoder_2").glob("*.safetensors")
    key = "text_model.encoder.layers.0.self_attn.q_proj.bias"
    _, shape, data = raw(path)[key]
    whole = np.frombuffer(data, "<f2").astype("<f4").tobytes()
    resave(path, lambda name: name, {key: ("F32", shape, whole)})
    with pytest.raises(FileRefused) as caught:
        ckptconv.export(altered, tmp_path / "x.safetensors")
    assert "its parts are F16 and F32" in caught.value.problems[0]


def test_a_folder_without_unet_is_refused(copy: Copy, tmp_path: Path) -> None:
    altered = copy("sd1")
    shutil.rmtree(altered / "unet")
    with pytest.raises(NotACheckpoint, match="it holds no transformer or unet"):
        ckptconv.export(altered, tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", ["", "[]", '{"tensors": 3, "metadata": {}}', '{"x": "' + "y"])
def test_a_damaged_note_of_the_layout_is_refused(content: str, copy: Copy, tmp_path: Path) -> None:
    altered = copy("sd1")
    (altered / "ckptconv" / "layout.json").unlink()
    (altered / "ckptconv" / "layout.json").write_text(content)
    with pytest.raises(FileRefused) as caught:
        ckptconv.export(altered, tmp_path / "x.safetensors")
    assert "layout.json" in caught.value.problems[0]


def test_an_unknown_dtype_is_wrong_usage(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'int4' is unknown"):
        ckptconv.export(folder("sd1"), tmp_path / "x.safetensors", dtype="int4")


# The command.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_command_says_what_was_restored_and_what_was_not(
    folder: Folder, copy: Copy, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    whole = run("export", folder("sd2"), out)
    assert whole.exit_code == 0
    assert whole.stdout == f"{out}\n"
    assert "restored, as the conversion kept them: 26 tensors" in whole.stderr
    assert "tensor for tensor the source" in whole.stderr
    altered = copy("sd2")
    shutil.rmtree(altered / "ckptconv")
    less = run("export", altered, out, "--overwrite", "--dtype", "fp16", "--metadata", "a=b=c")
    assert less.exit_code == 0
    assert "not restored (derived): 12: alphas_cumprod, " in less.stderr
    assert metadata(out)["a"] == "b=c"
    data = json.loads(run("export", altered, out, "--overwrite", "--json").stdout)
    assert (data["architecture"], data["as_source"], data["restored"]) == ("sd2", False, [])
    assert data["lost"]["cond_stage_model.model.logit_scale"] == "unused"


def test_the_command_refuses_bad_options(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    assert run("export", folder("sd1"), out, "--metadata", "novalue").exit_code == 2
    assert run("export", folder("sd1"), out, "--dtype", "int4").exit_code == 2
    assert run("export", tmp_path / "nothing", out).exit_code == 3
    assert not out.exists()
