"""`verify` passes what is right, whoever made it, and finds and names what is wrong."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from ckptconv.configs.config import configs, model_index
from ckptconv.detection.detect import detect
from ckptconv.errors import FileRefused
from ckptconv.folder.read import ComponentFolder
from ckptconv.planning.plan import build_plan
from ckptconv.verification.checks.config import check_config, check_index
from ckptconv.verification.result import Problem
from tests.conftest import Copy, Folder, Sample, published
from tests.mutations import DAMAGES, LAYOUTS, linked, outcome
from tests.support.altering import alter, kinds, resave
from tests.support.checkpoints import raw, save
from tests.support.published import FOLDERS

ARCHITECTURES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
SHARDED = ("sd2", "sdxl-refiner")
"""Whose damages are made to sharded folders in fp16; those of the others to plain ones."""


@pytest.fixture(scope="session")
def base(
    sample: Sample, folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Gives the folder that the damages of an architecture are made to."""
    made: dict[str, Path] = {}

    def convert(name: str) -> Path:
        if name not in SHARDED:
            return folder(name)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("sharded") / name
            ckptconv.convert(sample(name), made[name], **LAYOUTS["sharded"])
        return made[name]

    return convert


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_folder_verifies_against_its_file_and_alone(
    name: str, sample: Sample, base: Callable[[str], Path]
) -> None:
    found = ckptconv.verify(sample(name), base(name), finite=True)
    assert found.problems == ()
    assert found.architecture == name
    models = {c.component for c in found.checks if c.kind == "weights"}
    assert models == {c.component for c in found.checks if c.kind == "data"} >= {"unet", "vae"}
    assert {c.kind for c in found.checks} == {
        "source", "index", "weights", "config", "data", "finite", "tokenizer", "record",
    }  # fmt: skip
    alone = ckptconv.verify(None, base(name))
    assert alone.problems == ()
    assert (alone.architecture, alone.task, alone.nbytes) == (name, found.task, 0)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(ARCHITECTURES[(n + turn) % 4], damage, id=f"{damage.__name__}-{turn}")
        for n, damage in enumerate(DAMAGES)
        for turn in (0, 1)
    ],  # tests/mutations.py is run by hand for more
)
def test_a_damage_is_found_and_named(
    name: str,
    damage: Callable[[Path, random.Random], Any],
    sample: Sample,
    base: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    damaged = linked(base(name), tmp_path / "copy")
    done = damage(damaged, random.Random(f"suite {name} {damage.__name__}"))  # noqa: S311
    assert outcome(sample(name), damaged, done) == "", done.what


# Folders that ckptconv did not write.


@pytest.mark.slow
def test_a_folder_that_diffusers_saved_verifies(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    name = "sdxl"
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder(name))  # type: ignore[no-untyped-call]
    pipeline.save_pretrained(tmp_path / "plain")
    pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size="10MB")
    assert not (tmp_path / "plain" / "ckptconv").exists()
    assert len(list((tmp_path / "fp16" / "unet").glob("*.fp16-*-of-*.safetensors"))) > 1
    for saved in ("plain", "fp16"):
        assert ckptconv.verify(sample(name), tmp_path / saved, finite=True).problems == ()
        assert ckptconv.verify(None, tmp_path / saved).problems == ()


def test_older_names_of_the_text_encoder_and_of_the_vae_verify(sample: Sample, copy: Copy) -> None:
    """Flat names, position_ids, and the VAE's attention as diffusers had it before 0.17."""
    folder = copy("sd1")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(key: str) -> str:
        for new, before in old.items() if "mid_block.attentions" in key else ():
            key = key.replace(f".{new}.", f".{before}.")
        return key

    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    resave(vae, older)
    assert "encoder.mid_block.attentions.0.query.weight" in raw(vae)
    ids = ("I64", (1, 77), np.arange(77).tobytes())
    resave(
        folder / "text_encoder" / "model.safetensors",
        lambda key: key.removeprefix("text_model."),
        {"embeddings.position_ids": ids},
    )
    shutil.rmtree(folder / "ckptconv")
    assert ckptconv.verify(sample("sd1"), folder).problems == ()

    ids = ("I64", (1, 77), np.arange(77)[::-1].tobytes())
    resave(
        folder / "text_encoder" / "model.safetensors",
        lambda key: key,
        {"embeddings.position_ids": ids},
    )
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    assert list(found) == [("text_encoder", "weights")]
    (problem,) = found["text_encoder", "weights"]
    assert str(problem) == "embeddings.position_ids: holds (76, 75, 74)..., expected 0, 1, 2, ..."


@pytest.mark.parametrize("name", FOLDERS)
def test_published_configurations_raise_no_alarm(name: str) -> None:
    header = {
        "sd15": "sd15-emaonly-fp32",
        "sd15-inpainting": "sd15-inpainting-fp16",
        "sdxl": "sdxl-base-fp16",
        "sdxl-refiner": "sdxl-refiner-fp16",
    }.get(name, "sd21-768-fp32")
    facts = {}
    if name == "sd21-base":
        from ckptconv.detection.detect import option_fact

        facts = {"prediction_type": option_fact("prediction_type", "epsilon")}
    made = build_plan(detect(published(header), decided=facts))
    built = configs(made)
    for component, values in FOLDERS[name].items():
        if component == "model_index":
            check = check_index(model_index(made, built), values, set(built))
        elif component.startswith("tokenizer"):
            continue
        else:
            check = check_config(
                built[component], ComponentFolder(Path(component), values), ours=False
            )
        assert [str(problem) for problem in check.problems] == []


def test_pickled_weights_are_refused_with_a_reason(sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    ((problem,), missing) = found["vae", "weights"], found["vae", "data"]
    assert "its weights are pickles (diffusion_pytorch_model.bin)" in problem.what
    assert len(missing) == 248
    assert set(found) == {("vae", "weights"), ("vae", "data")}


def test_a_second_variant_is_said_not_to_be_checked(sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"anything")
    found = ckptconv.verify(sample("sd1"), folder)
    assert found.passed
    (check,) = (c for c in found.checks if (c.component, c.kind) == ("unet", "weights"))
    assert "diffusion_pytorch_model.fp16.safetensors is another variant" in check.notes[0]


# How the folder was converted.


def test_what_the_folder_notes_of_its_conversion_need_not_be_repeated(
    sample: Sample, tmp_path: Path
) -> None:
    source, folder = sample("sd1", ema=True), tmp_path / "folder"
    ckptconv.convert(source, folder, ema=True, prediction_type="v_prediction")
    found = ckptconv.verify(source, folder)
    assert found.problems == ()
    assert "source.json says that the EMA copy of the UNet was taken" in found.checks[0].notes
    alter(folder / "ckptconv" / "source.json", dropped={}, facts={})
    found = ckptconv.verify(source, folder)
    assert ("unet", "data") in kinds(found)
    assert ckptconv.verify(source, folder, ema=True, prediction_type="v_prediction").passed


def test_assumed_values_may_differ_elsewhere_but_not_be_changed_in_our_folders(
    sample: Sample, copy: Copy
) -> None:
    folder = copy("sd1")
    alter(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    assert list(found) == [("model", "record")]
    assert found["model", "record"][0].where == "prediction_type"
    shutil.rmtree(folder / "ckptconv")
    after = ckptconv.verify(sample("sd1"), folder)
    assert after.passed
    notes = [note for check in after.checks for note in check.notes]
    assert any("prediction_type is 'v_prediction', expected 'epsilon'" in note for note in notes)


def test_another_scheduler_is_a_note_and_another_schedule_is_a_problem(
    sample: Sample, copy: Copy
) -> None:
    folder = copy("sd1")
    alter(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    assert [p.where for p in found["model", "index"]] == ["scheduler"]  # it says PNDM still
    alter(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    after = ckptconv.verify(sample("sd1"), folder)
    assert after.passed
    notes = [note for check in after.checks for note in check.notes]
    said = "steps with EulerDiscreteScheduler, the published folder with PNDMScheduler"
    assert said in notes
    alter(folder / "scheduler" / "scheduler_config.json", beta_end=0.02)
    problems = kinds(ckptconv.verify(sample("sd1"), folder))
    assert [p.where for p in problems["scheduler", "config"]] == ["beta_end"]


@pytest.mark.parametrize("entry", [[1, None], [None, 1], ["nonsense", "CLIPImageProcessor"]])
def test_an_entry_of_the_index_for_an_absent_component_names_nothing(
    entry: list[object], sample: Sample, copy: Copy
) -> None:
    folder = copy("sd1")
    alter(folder / "model_index.json", feature_extractor=entry)
    problems = kinds(ckptconv.verify(sample("sd1"), folder))
    assert [p.where for p in problems["model", "index"]] == ["feature_extractor"]


def test_a_part_of_a_model_verifies_when_it_is_said_which(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    ckptconv.convert(sample("sd1"), tmp_path / "part", only=["vae"])
    assert ckptconv.verify(sample("sd1"), tmp_path / "part", only=["vae"]).problems == ()
    found = kinds(ckptconv.verify(sample("sd1"), tmp_path / "part"))
    assert found["model", "index"][0].where == "model_index.json"
    assert found["unet", "config"] == (Problem("unet", "the folder is missing"),)
    # Of a whole folder, a part can be verified as well.
    assert ckptconv.verify(sample("sd1"), folder("sd1"), only=iter(["unet"])).problems == ()


def test_a_component_that_the_file_lacks_must_be_said_to_come_from_elsewhere(
    sample: Sample, tmp_path: Path
) -> None:
    whole = sample("sd1")
    tensors = raw(whole)
    bare = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    save(bare, tmp_path / "bare.safetensors")
    ckptconv.convert(tmp_path / "bare.safetensors", tmp_path / "out", vae=whole)
    found = ckptconv.verify(tmp_path / "bare.safetensors", tmp_path / "out")
    assert "say with vae where it comes from" in kinds(found)["vae", "data"][0].what
    assert any("source.json says that vae comes from" in n for n in found.checks[0].notes)
    assert ckptconv.verify(tmp_path / "bare.safetensors", tmp_path / "out", vae=whole).passed


def test_keys_that_no_map_knows_are_named(sample: Sample, tmp_path: Path) -> None:
    source = tmp_path / "more.safetensors"
    save({**raw(sample("sd1")), "mystery.weight": ("F32", (1,), b"\0\0\0\0")}, source)
    ckptconv.convert(source, tmp_path / "out")
    found = kinds(ckptconv.verify(source, tmp_path / "out", strict=True))
    assert found == {("model", "source"): (Problem("mystery.weight", "no key map knows it"),)}
    passed = ckptconv.verify(source, tmp_path / "out")
    assert passed.passed
    assert "no key map knows mystery.weight: kept aside" in passed.checks[0].notes


def test_the_folder_of_another_file_is_not_this_one(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save(raw(sample("sd1")), other, {"modelspec.title": "another"})
    found = kinds(ckptconv.verify(other, folder("sd1")))
    assert found == {
        ("model", "record"): (Problem("__metadata__", "layout.json has others than the file"),)
    }
    problems = ckptconv.verify(sample("sd2"), folder("sd1")).problems
    assert len(problems) > 500


def test_a_component_that_the_architecture_does_not_have_is_named(
    sample: Sample, copy: Copy
) -> None:
    folder = copy("sd1")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    what = "a Stable Diffusion 1.x model has no such component"
    assert found == {("text_encoder_2", "data"): (Problem("text_encoder_2", what),)}


# The folder alone.


def test_a_folder_alone_is_checked_as_far_as_that_goes(copy: Copy) -> None:
    folder = copy("sd1")
    alter(folder / "vae" / "config.json", scaling_factor=0.5)
    alter(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    resave(path, lambda key: key.replace("conv_norm_out.bias", "conv_norm_out.shift"))
    found = kinds(ckptconv.verify(None, folder))
    assert [p.where for p in found["vae", "config"]] == ["scaling_factor"]
    assert [p.where for p in found["model", "index"]] == ["_class_name"]
    assert {p.where for p in found["unet", "weights"]} == {
        "conv_norm_out.bias", "conv_norm_out.shift",
    }  # fmt: skip
    said = [p.what for p in found["model", "architecture"]]
    assert said == ["unet: conv_norm_out.bias is missing"]


def test_a_folder_of_no_known_architecture_is_still_held_against_its_classes(
    copy: Copy,
) -> None:
    folder = copy("sd1")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    lost = "mid_block.resnets.1.conv1.weight"
    tensors = {k: v for k, v in raw(path).items() if k != lost}
    path.unlink()
    save(tensors, path)
    found = ckptconv.verify(None, folder)
    assert found.architecture == ""
    problems = kinds(found)
    said = problems["model", "architecture"][0].what
    assert "no known architecture matches; the nearest is sd1" in said
    assert problems["unet", "weights"] == (Problem(lost, "is missing: the class expects it"),)


def test_a_folder_without_unet_is_not_told_alone(copy: Copy) -> None:
    folder = copy("sd1")
    shutil.rmtree(folder / "unet")
    found = kinds(ckptconv.verify(None, folder))
    assert "holds no transformer or unet" in found["model", "architecture"][0].what


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_what_is_no_folder_of_a_model_is_refused(what: str, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("")
    elif what == "empty":
        path.mkdir()
    with pytest.raises(FileRefused, match="holds no component" if what == "empty" else what):
        ckptconv.verify(sample("sd1"), path)
