"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.detection.detect import detect, option_fact
from ckptconv.errors import FileRefused, Incomplete
from ckptconv.files import read_json
from ckptconv.inference.generation import Settings, with_defaults
from ckptconv.inference.model import open_model
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from ckptconv.planning.plan import build_plan
from tests.conftest import made
from tests.support import stock
from tests.support.pipelines import assert_same, assert_same_tokenizer
from tests.support.properties import Convert, PipelineProperties, PublishedConfigurations
from tests.support.qwen import write_tokenizer
from tests.support.reference import z_image
from tests.support.reference.files import Z_IMAGE_FILES, z_image_alone, z_image_whole
from tests.support.relatives import Relative, assert_equal, exported, run, verified

ROW = "Z-Image and Z-Image-Turbo"
MEASURED = {
    "transformer.dim": 256,
    "transformer.in_channels": 16,
    "transformer.n_heads": 2,
    "transformer.n_layers": 2,
    "transformer.n_refiner_layers": 1,
    "scheduler.shift": 3.0,
}
ENCODER = {
    "text_encoder.head_dim": 128,
    "text_encoder.hidden_size": 32,
    "text_encoder.num_attention_heads": 4,
    "text_encoder.num_key_value_heads": 2,
    "text_encoder.rope_theta": 1000000,
}
WHOLE = Relative(ROW, z_image_whole(z_image.TINY_Z_IMAGE), configs=MEASURED | ENCODER)


class TestProperties(PipelineProperties):
    relatives = (
        WHOLE,
        Relative(
            ROW,
            z_image_alone(z_image.TINY_Z_IMAGE, ""),
            configs=MEASURED,
            variant="transformer alone",
        ),
        Relative(
            ROW,
            z_image_alone(z_image.TINY_WIDE),
            configs={"transformer.n_heads": 3, "transformer.n_refiner_layers": 2},
            variant="of other sizes",
            slow=True,
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("z-image-turbo",)


(TASK,) = bundled().architectures["z-image"].tasks
DONORS = {"vae": "ae", "text_encoder": "qwen_3_4b"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a small Z-Image: that of Qwen3 has its head, and there is a tokenizer."""
    folder, tensors = tmp_path_factory.mktemp("parts"), WHOLE.tensors()
    files = {"tokenizer": write_tokenizer(folder / "tokenizer")}
    for name, prefix in Z_IMAGE_FILES.items():
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if name == "qwen_3_4b":
            own["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
        files[name] = folder / f"{name}.safetensors"
        save_file(own, files[name])
    return files


def given(parts: dict[str, Path]) -> dict[str, Any]:
    return {name: parts[of] for name, of in (DONORS | {"tokenizer": "tokenizer"}).items()}


@pytest.mark.slow
def test_its_files_make_the_folder_that_one_does(
    parts: dict[str, Path], converted: Convert, tmp_path: Path
) -> None:
    file, out, whole = parts["z_image_turbo_bf16"], tmp_path / "out", tmp_path / "whole"
    report = ckptconv.convert(file, out, **given(parts))
    assert report.warnings == ()
    verified(file, out, **given(parts))
    verified(None, out)
    ckptconv.convert(converted(WHOLE).file, whole, tokenizer=parts["tokenizer"])
    for path in whole.rglob("*.*"):
        here = out / path.relative_to(whole)
        if path.suffix == ".safetensors" and path.parent.name != "ckptconv":
            assert_equal(load_file(here), load_file(path))
        elif path.parent.name != "ckptconv":
            assert here.read_bytes() == path.read_bytes(), path
    back = exported(out)
    assert_equal({key: back[key] for key in load_file(file)}, load_file(file))


@pytest.mark.slow
def test_a_pipeline_from_the_file_is_that_of_the_folder(
    parts: dict[str, Path], converted: Convert, tmp_path: Path
) -> None:
    file, out = converted(WHOLE).file, tmp_path / "out"
    ckptconv.convert(file, out, tokenizer=parts["tokenizer"])
    ours = ckptconv.load_pipeline(file, device="cpu", tokenizer=parts["tokenizer"])
    assert_same(ours, ckptconv.load_pipeline(out, device="cpu"))
    theirs = stock.load(out, torch_dtype=torch.float16)
    assert_same(ours, theirs)
    theirs.save_pretrained(tmp_path / "saved")  # as release 5 of transformers writes it
    verified(file, tmp_path / "saved", tokenizer=parts["tokenizer"])
    verified(None, tmp_path / "saved")
    saved = ckptconv.load_pipeline(tmp_path / "saved", device="cpu")
    assert_same_tokenizer(ours.tokenizer, saved.tokenizer)
    assert saved.text_encoder.config.rope_parameters["rope_theta"] == 1000000
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}
    images = [
        pipe("a cat", guidance_scale=0, generator=torch.Generator().manual_seed(1), **settings)
        for pipe in (ours.to(torch.float32), theirs.to(torch.float32))
    ]
    first, second = (np.asarray(made.images[0]) for made in images)
    assert (first == second).all()
    assert first.std() > 1


def test_without_a_tokenizer_it_converts_and_says_what_to_add(
    converted: Convert, tmp_path: Path
) -> None:
    made = converted(WHOLE)
    supply = "tokenizer=FOLDER (the folder tokenizer of Z-Image, or that of Qwen3-4B)"
    report = ckptconv.convert(made.file, tmp_path / "out", configs_only=True)
    said = f"tokenizer is not in the file, so model_index.json says null: supply it with {supply}"
    assert report.warnings == (said,)
    assert read_json(tmp_path / "out" / "model_index.json")["tokenizer"] == [None, None]
    with pytest.raises(Incomplete, match="has no tokenizer, which its pipeline needs") as caught:
        ckptconv.load_pipeline(made.file)
    assert caught.value.hint.startswith(f"supply what is missing: {supply}; or, in Python, ")
    pipeline = ckptconv.load_pipeline(made.file, device="cpu", components={"tokenizer": None})
    assert pipeline.tokenizer is None


@pytest.mark.parametrize("name", DONORS)
def test_a_file_in_the_wrong_place_is_told_the_right_one(name: str, parts: dict[str, Path]) -> None:
    file = parts["z_image_turbo_bf16"]
    (other,) = DONORS.keys() - {name}
    wrong: dict[str, Any] = {name: parts[DONORS[other]]}
    with pytest.raises(FileRefused, match="cannot give what it is to give") as caught:
        ckptconv.plan(file, **wrong)
    place = str(parts[DONORS[other]])
    assert caught.value.problems == (f"{name}: the file fits {other}={place!r}",)


def test_a_text_encoder_comes_from_a_folder_of_the_whole_language_model(
    parts: dict[str, Path], converted: Convert, tmp_path: Path
) -> None:
    """So the published folder of Z-Image has it: with a head in its class and in its names."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    config = read_json(converted(WHOLE).folder / "text_encoder" / "config.json")
    config["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(parts["qwen_3_4b"])
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    out = tmp_path / "out"
    ckptconv.convert(parts["z_image_turbo_bf16"], out, text_encoder=tmp_path)
    assert read_json(out / "model_index.json")["text_encoder"] == ["transformers", "Qwen3Model"]
    assert_equal(
        load_file(out / "text_encoder" / "model.safetensors"),
        load_file(converted(WHOLE).folder / "text_encoder" / "model.safetensors"),
    )
    verified(parts["z_image_turbo_bf16"], out, text_encoder=tmp_path)


def test_what_the_network_does_not_use_may_be_no_number(tmp_path: Path) -> None:
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    tensors = WHOLE.tensors()
    tensors["model.diffusion_model.norm_final.weight"] = torch.full((256,), torch.nan).half()
    save_file(tensors, file)
    report = ckptconv.convert(file, out)
    assert [w.partition(" ")[0] for w in report.warnings] == ["tokenizer"]
    verified(file, out, finite=True)
    verified(None, out, finite=True)
    ckptconv.export(out, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("release", "shift", "steps", "guidance"), [(None, 3.0, 9, 0), ("base", 6.0, 50, 4)]
)
def test_a_release_has_its_scheduler_and_its_settings(
    release: str | None, shift: float, steps: int, guidance: float, tmp_path: Path, parts: Any
) -> None:
    file, out = parts["z_image_turbo_bf16"], tmp_path / "out"
    run("convert", file, out, *(["--release", release] if release else []))
    assert read_json(out / "scheduler" / "scheduler_config.json")["shift"] == shift
    verified(file, out)
    verified(None, out)
    for path, options in ((file, Options(release=release)), (out, Options())):
        model = open_model(path, options, given=("vae", "text_encoder", "tokenizer"))
        settings = with_defaults(model, Settings("a fox"))
        assert (settings.steps, settings.guidance) == (steps, guidance)


@pytest.mark.parametrize(
    ("name", "release", "said"),
    [
        ("z_image_turbo_bf16", None, False),
        ("zImageTurbo_turbo", None, False),
        ("z_image_base_bf16", None, True),
        ("z_image_base_bf16", "base", False),
    ],
)
def test_a_name_that_says_base_is_answered_with_the_option(
    name: str, release: str | None, said: bool
) -> None:
    layout = bundled().architectures["z-image"].layout()
    decided = {"release": option_fact("release", release)} if release else {}
    found = detect(replace(layout, path=Path(f"{name}.safetensors")), decided=decided)
    assert ["release='base'" in note for note in found.notes] == [True] * said
    assert found.facts["release"].source == ("option" if release else "assumed")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(
    "lost",
    ["x_pad_token", "cap_pad_token", "layers.0.adaLN_modulation.0.weight"],
)
def test_without_what_only_it_has_it_is_no_z_image(prefix: str, lost: str) -> None:
    tensors = {
        prefix + key.removeprefix("model.diffusion_model."): tensor.shape
        for key, tensor in bundled().architectures["z-image"].layout().tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    assert detect(made(tensors)).architecture is bundled().architectures["z-image"].for_task(TASK)
    del tensors[prefix + lost]
    found = detect(made(tensors))
    assert found.architecture is None or build_plan(found).problems
