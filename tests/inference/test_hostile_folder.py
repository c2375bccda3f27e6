"""Nothing in a folder runs code, fills the memory, waits for ever or ends in a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckptconv
from ckptconv import load_pipeline, verify
from ckptconv.configs.allowed import Unbuildable
from ckptconv.errors import FileRefused
from ckptconv.files import MOST_CONFIG, read_json
from ckptconv.inference.generation import Settings, open_images
from ckptconv.inference.model import Blueprint, open_model
from ckptconv.inference.modules import empty_module
from ckptconv.options import Options
from tests.conftest import Copy, Folder
from tests.scramble import CODE, attack
from tests.support.altering import alter
from tests.support.pipelines import assert_same_tokenizer, modules

Change = Callable[[Path], Any]

TEXT, UNET = "text_encoder/config.json", "unet/config.json"
EVIL = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\nclass Evil: pass\n"


def entries(file: str, **values: Any) -> Change:
    return lambda folder: alter(folder / file, **values)


def content(file: str, data: bytes | None) -> Change:
    """Replaces a file; None stands for a pipe that nobody writes to."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file) if data is None else (folder / file).write_bytes(data)

    return change


def gone(*files: str) -> Change:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return change


def link(file: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(to)

    return change


def component(name: str, by: str) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name)
        shutil.copytree(folder / by, folder / name)

    return change


def programs(folder: Path) -> None:
    for name in ("evil.py", "pipeline.py", "unet/evil.py", "unet/pipeline.py"):
        (folder / name).write_text(EVIL)


INDEX = "model_index.json"
REFUSED: dict[str, tuple[Change, str]] = {
    # Classes that are not allowed.
    "a program as a component": (entries(INDEX, unet=["evil", "Evil"]), "unet is .*UNet2DCond"),
    "a module of diffusers": (
        entries(INDEX, unet=["diffusers_modules.local.evil", "Evil"]),
        "unet is .*expected UNet2DCond",
    ),
    "a path as a library": (
        entries(INDEX, unet=["../../unet/evil", "UNet2DConditionModel"]),
        "unet is .*expected UNet2DCond",
    ),
    "an automatic class": (entries(INDEX, text_encoder=["transformers", "AutoModel"]), "AutoModel"),
    "a pipeline as a component": (
        entries(INDEX, unet=["diffusers", "DiffusionPipeline"]),
        "unet is .*DiffusionPipeline",
    ),
    "a custom pipeline": (entries(INDEX, _class_name=["pipeline", "Evil"]), "no pipeline"),
    "a program as the pipeline": (entries(INDEX, _class_name="evil.py"), "no pipeline evil.py"),
    "a component that is a list of nothing": (entries(INDEX, unet=[]), r"unet is \[\], expected"),
    "a component that is a text": (entries(INDEX, unet="x"), "unet is x, expected"),
    "a UNet as the VAE": (
        entries(INDEX, vae=["diffusers", "UNet2DConditionModel"]),
        "vae is .*expected AutoencoderKL",
    ),
    "a scheduler of flow matching": (
        entries(INDEX, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "scheduler is .*expected a scheduler of diffusers for these models",
    ),
    # Weights.
    "pickled weights only": (
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").rename(
            folder / "unet/diffusion_pytorch_model.bin"
        ),
        "its weights are pickles",
    ),
    "an index that leads outside": (
        lambda folder: (
            gone("unet/diffusion_pytorch_model.safetensors")(folder),
            content(
                "unet/diffusion_pytorch_model.safetensors.index.json",
                b'{"weight_map": {"x": "../../x.safetensors"}}',
            )(folder),
        ),
        "names files outside its folder",
    ),
    "the folder of a UNet for the VAE": (component("vae", "unet"), "cannot load the folder"),
    # Numbers that would fill time or memory.
    "a billion layers": (entries(TEXT, num_hidden_layers=10**9), "out of all reason"),
    "a wide network": (entries(UNET, block_out_channels=[10**9] * 4), "out of all reason"),
    "layers in layers": (
        entries(
            UNET,
            transformer_layers_per_block=[200] * 4,
            layers_per_block=200,
        ),
        "far more tensors than the weights",
    ),
    "a network larger than its weights": (
        entries(TEXT, vocab_size=10**6),
        "the weights are not those",
    ),
    "a network with more layers": (entries(TEXT, num_hidden_layers=9), "the weights are not those"),
    "many positions": (
        entries(TEXT, max_position_embeddings=10**6),
        "the weights are not those",
    ),
    "steps": (entries("scheduler/scheduler_config.json", num_train_timesteps=10**9), "all reason"),
    "a long text": (entries("tokenizer/tokenizer_config.json", model_max_length=10**9), "reason"),
    # Damage.
    "no groups": (entries("vae/config.json", norm_num_groups=0), "ZeroDivisionError"),
    "no tokenizer": (gone("tokenizer/vocab.json"), "holds no vocab.json with a merges.txt"),
    "junk as vocabulary": (content("tokenizer/vocab.json", b'{"a": []}'), "vocabulary is no table"),
    "an empty vocabulary": (content("tokenizer/vocab.json", b"{}"), "vocabulary is no table"),
    "junk as merges": (
        content("tokenizer/merges.txt", b"#version: 0.2\nx y\nabc\n"),
        "merge 2 is 'abc'",
    ),
    "half a surrogate pair": (content(UNET, b'{"x": "\\ud800"}'), "cannot be read as JSON"),
    "a list as configuration": (content(UNET, b"[]"), "holds no JSON object"),
    # Files that hang or swell.
    "a pipe as index": (content(INDEX, None), "holds no model_index.json"),
    "a pipe as configuration": (content(UNET, None), "not a regular file"),
    "a pipe as merges": (content("tokenizer/merges.txt", None), "not a regular file"),
    "a device as vocabulary": (link("tokenizer/vocab.json", "/dev/zero"), "not a regular file"),
    "a large configuration": (
        content(UNET, b" " * (MOST_CONFIG + 1)),
        "1,000,001 bytes; a file of this kind has at most 1,000,000",
    ),
    "a large vocabulary": (
        lambda folder: os.truncate(folder / "tokenizer/vocab.json", 10**9),
        "has at most 32,000,000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_folder_is_refused(name: str, copy: Copy) -> None:
    folder, (change, message) = copy("sd1"), REFUSED[name]
    programs(folder)
    if name == "a large vocabulary":  # its file is a link, to write anew
        vocabulary = folder / "tokenizer/vocab.json"
        content("tokenizer/vocab.json", vocabulary.read_bytes())(folder)
    change(folder)
    with pytest.raises(FileRefused, match=message):
        load_pipeline(folder, device="cpu")
    assert not list(folder.rglob("RAN"))


def test_entries_that_ask_for_code_are_not_read_and_verify_names_them(
    copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("sd1")
    files = [*(str(p.relative_to(folder)) for p in folder.glob("*/*config.json")), INDEX]
    for file in files:
        entries(file, **CODE)(folder)
    programs(folder)
    pipe = load_pipeline(folder, device="cpu")
    assert not list(folder.rglob("RAN"))
    assert pipe.text_encoder.config._attn_implementation in (None, "eager", "sdpa")
    configs: list[Any] = [module.config for module in modules(pipe).values()]
    for config in configs:
        text = json.dumps(config.to_dict() if hasattr(config, "to_dict") else dict(config))
        assert "evil" not in text
        assert "someone" not in text
    assert caplog.text.count("asks for code from elsewhere, which was left out: attn_") == 5
    found = {text for text in verify(None, folder).problems if ": asks for code" in text}
    assert found == {
        f"model: {key} of {file.split('/')[0]}: asks for code from elsewhere: ckptconv never reads "
        "it, another program may"
        for key in CODE
        for file in files
    }


def test_code_inside_an_entry_is_not_read(copy: Copy) -> None:
    folder = copy("sd1")
    inside = {"x": {"attn_implementation": "someone/kernel"}}
    entries(TEXT, text_config=inside, num_hidden_layers=1, id2label=inside)(folder)
    assert set(open_model(folder, Options()).blueprints["text_encoder"].config) <= set(
        read_json(folder / TEXT)
    ) - {"text_config", "id2label"}
    assert any(
        "text_config.x.attn_implementation" in text for text in verify(None, folder).problems
    )


def test_programs_in_a_folder_are_named(copy: Copy) -> None:
    folder = copy("sd1")
    programs(folder)
    entries(INDEX, unet=["evil", "Evil"], other=["evil", "Evil"])(folder)
    found = verify(None, folder).problems
    for name in ("evil.py", "unet/pipeline.py", "other", "unet"):
        assert any(text.startswith(f"model: {name}: is ") for text in found)


def test_a_donor_brings_only_what_its_class_takes(small: Path, copy: Copy, tmp_path: Path) -> None:
    folder = copy("small")
    before = read_json(folder / "vae/config.json")
    code = {k: v for k, v in CODE.items() if k != "quantization_config"}  # which is refused
    entries("vae/config.json", **code, _name_or_path="x", unknown=[1], use_quant_conv=True)(folder)
    report = ckptconv.convert(small, tmp_path / "out", vae=folder, configs_only=True)
    written = read_json(tmp_path / "out/vae/config.json")
    assert written == {**before, "use_quant_conv": True}
    assert any("asks for code from elsewhere, which was left out" in w for w in report.warnings)


def test_a_scheduler_keeps_what_another_would_take(copy: Copy) -> None:
    """PNDM has no `clip_sample`, but its published configuration says it for DDIM."""
    folder = copy("sd1")
    entries("scheduler/scheduler_config.json", clip_sample=False, someone="x")(folder)
    config = load_pipeline(folder, device="cpu").scheduler.config
    assert config["clip_sample"] is False
    assert "someone" not in config


def test_positions_that_fill_the_memory_are_not_computed() -> None:
    import diffusers

    values = {"sample_size": 1 << 16, "patch_size": 1, "pos_embed_max_size": 1 << 16}
    blueprint = Blueprint("diffusers", "SD3Transformer2DModel", "model", values, Path("x"))
    with pytest.raises(Unbuildable, match="it computes a tensor of"):
        empty_module(diffusers.SD3Transformer2DModel, blueprint, {}, torch.float16)


@pytest.mark.slow
def test_only_the_tables_of_a_tokenizer_json_are_read(folder: Folder, copy: Copy) -> None:
    from tokenizers import Tokenizer

    place = copy("sd1")
    fast: Any = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    fast.from_pretrained(place / "tokenizer").save_pretrained(place / "tokenizer")
    gone("tokenizer/vocab.json", "tokenizer/merges.txt")(place)
    file = place / "tokenizer/tokenizer.json"
    assert Tokenizer.from_file(str(file))
    growing = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    alter(file, normalizer={"type": "Sequence", "normalizers": [growing] * 9})
    ours = load_pipeline(place, device="cpu").tokenizer
    assert_same_tokenizer(ours, load_pipeline(folder("sd1"), device="cpu").tokenizer)
    assert any("changes or splits text by" in text for text in verify(None, place).problems)


@pytest.mark.parametrize("file", [TEXT, "tokenizer/merges.txt", "ckptconv/layout.json"])
def test_a_pipe_does_not_stop_verify_and_export(file: str, copy: Copy, tmp_path: Path) -> None:
    folder = copy("small")
    content(file, None)(folder)
    assert any(
        "not a regular file" in text or "missing or" in text
        for text in verify(None, folder).problems
    )
    with contextlib.suppress(FileRefused):
        ckptconv.export(folder, tmp_path / "x.safetensors")


@pytest.mark.parametrize("call", [verify, ckptconv.export, load_pipeline, ckptconv.convert])
def test_a_folder_that_cannot_be_read_is_refused(
    call: Any, small: Path, copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("small")

    def refuse(self: Path) -> bool:
        if folder in (self, *self.parents):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    real = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", refuse)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = {
        verify: ((None, folder), {}),
        ckptconv.export: ((folder, tmp_path / "x.safetensors"), {}),
        load_pipeline: ((folder,), {}),
        ckptconv.convert: ((small, tmp_path / "out"), {"vae": folder}),
    }[call]
    with pytest.raises(FileRefused, match=r"cannot be read: Permission denied|this is a folder"):
        call(*arguments[0], **arguments[1])


def test_images_are_read_whole_and_by_pillow_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\xffIHDR")
    (tmp_path / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", 10**9)
    for path in tmp_path.iterdir():
        with pytest.raises(FileRefused, match=path.name):
            open_images(Settings("a cat", image=path))


@pytest.mark.slow
def test_scrambled_folders_end_in_an_answer() -> None:
    """`python -m tests.scramble --rounds 30` does more of them."""
    counts, faults = attack(5, 0, ["sd1"])
    assert faults == []
    assert counts["load refused"] > 0
