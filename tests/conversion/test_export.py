"""`export` gives back every tensor bit for bit; what cannot be restored is said.

Files are compared with the safetensors library, never with ckptconv.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from tests.conftest import Copy, Folder, Sample
from tests.support.altering import alter
from tests.support.checkpoints import Raw, metadata, raw, rewritten, save

ARCHITECTURES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
CLIP = "cond_stage_model.transformer.text_model."


def there_and_back(source: Path, place: Path, **choices: Any) -> ckptconv.Exported:
    """Converts and exports; the file is `place / "back.safetensors"`."""
    ckptconv.convert(source, place / "folder", **choices)
    return ckptconv.export(place / "folder", place / "back.safetensors")


def half_and_half(source: Path, path: Path) -> Path:
    """Writes a copy with every other weight in another dtype."""
    tensors: dict[str, torch.Tensor] = {}
    for n, (key, value) in enumerate(sorted(load_file(source).items())):
        other = torch.bfloat16 if n % 4 == 1 else torch.float16
        # The thirds of a joint projection are cut from one tensor, so it has one dtype.
        tensors[key] = value.to(other) if n % 2 and value.dtype == torch.float32 else value
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("sd1", kind) for kind in ("fp32", "fp16", "bf16", "ema", "mixed")),
        ("sd2", "mixed"),
        ("sdxl", "bf16"),
    ],  # the dtype of the published file is below, for all of them
)
def test_convert_and_export_give_back_every_tensor_bit_for_bit(
    name: str, kind: str, sample: Sample, tmp_path: Path
) -> None:
    if kind == "mixed":
        source = half_and_half(sample(name, dtype="fp32"), tmp_path / "mixed.safetensors")
    elif kind == "ema":
        source = sample(name, ema=True)
    else:
        source = sample(name, dtype=kind)
    done = there_and_back(source, tmp_path)
    want, have = raw(source), raw(done.out)
    lost = {key for key in want if key.startswith("model_ema.")}
    assert bool(lost) == (kind == "ema")
    assert have == {key: value for key, value in want.items() if key not in lost}
    assert dict(done.lost) == dict.fromkeys(lost, "training")
    assert metadata(done.out) == metadata(source)
    assert done.as_source == (not lost)
    shutil.rmtree(tmp_path)  # some 300 MB


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        *((name, "ckptconv") for name in ARCHITECTURES),
        ("sd1", "safetensors"),
        ("sdxl", "safetensors"),
    ],
)
def test_the_file_comes_back_byte_for_byte(
    name: str, writer: str, sample: Sample, tmp_path: Path
) -> None:
    source = sample(name)
    if writer == "safetensors":
        tensors, source = load_file(source), tmp_path / "saved.safetensors"
        save_file(tensors, source, {"modelspec.title": 'Ünïcode "title"', "b": "2", "a": "1"})
    done = there_and_back(source, tmp_path)
    assert done.as_source
    assert done.out.read_bytes() == source.read_bytes()


def test_the_ema_copy_becomes_the_unet_and_its_own_weights_are_lost(
    sample: Sample, tmp_path: Path
) -> None:
    source = sample("sd1", ema=True)
    done = there_and_back(source, tmp_path, ema=True)
    want, have = raw(source), raw(done.out)
    unet = [key for key in want if key.startswith("model.diffusion_model.")]
    for key in unet:
        copy = "model_ema." + key.removeprefix("model.").replace(".", "")
        assert have[key] == want[copy]
        assert done.lost[copy] == "left out"  # under its own name
        assert key not in done.lost
    assert set(have) == {key for key in want if not key.startswith("model_ema.")}


# Files of unusual layout.


@pytest.mark.slow
def test_names_and_shapes_that_the_folder_cannot_tell_come_back(
    sample: Sample, tmp_path: Path
) -> None:
    """A text encoder without `text_model.`, and attention of the VAE that is 2-D already."""

    def flat(key: str) -> str:
        return key.replace(CLIP, CLIP.replace("text_model.", ""))

    tensors: Raw = {}
    for key, (dtype, shape, data) in raw(sample("sd1")).items():
        linear = "mid.attn_1" in key and len(shape) == 4
        tensors[flat(key)] = (dtype, shape[:2] if linear else shape, data)
    source = save(tensors, tmp_path / "unusual.safetensors")
    done = there_and_back(source, tmp_path)
    assert raw(done.out) == tensors
    shutil.rmtree(tmp_path / "folder" / "ckptconv")
    plain = ckptconv.export(tmp_path / "folder", tmp_path / "plain.safetensors")
    published = raw(sample("sd1"))
    assert raw(plain.out) == {key: published[key] for key in published.keys() - plain.lost.keys()}


@pytest.mark.slow
def test_a_sd2_file_of_a_pruned_text_tower_comes_back(sample: Sample, tmp_path: Path) -> None:
    tower = "cond_stage_model.model."
    gone = (f"{tower}text_projection", f"{tower}logit_scale", f"{tower}transformer.resblocks.2.")
    source = rewritten(
        sample("sd2"),
        tmp_path / "pruned.safetensors",
        lambda key: None if key.startswith(gone) else key,
    )
    done = there_and_back(source, tmp_path)
    assert raw(done.out) == raw(source)


def test_a_file_without_vae_comes_back_without(sample: Sample, tmp_path: Path) -> None:
    source = rewritten(
        sample("sdxl"),
        tmp_path / "bare.safetensors",
        lambda key: None if key.startswith("first_stage_model.") else key,
    )
    done = there_and_back(source, tmp_path)
    assert raw(done.out) == raw(source)
    assert any("holds no vae, so the file has none" in note for note in done.notes)


# Folders that ckptconv did not write.


@pytest.mark.slow
def test_a_folder_that_diffusers_saved_becomes_a_file_that_converts_back(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    name = "sdxl"
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder(name))  # type: ignore[no-untyped-call]
    pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="10MB")
    done = ckptconv.export(tmp_path / "saved", tmp_path / "out.safetensors")
    assert done.task == "text-to-image"
    assert not done.as_source
    halved = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(sample(name)).items()
    }
    made = load_file(done.out)
    assert made.keys() <= halved.keys()
    for key, value in made.items():
        assert torch.equal(value, halved[key]), key
    noted = json.loads((folder(name) / "ckptconv" / "source.json").read_text())
    dropped = set(noted["dropped"])
    assert halved.keys() - made.keys() == dropped
    assert set(done.lost) == dropped
    ckptconv.convert(done.out, tmp_path / "again")
    assert ckptconv.verify(done.out, tmp_path / "saved").passed


def test_what_a_scheduler_says_goes_into_the_metadata(copy: Copy, tmp_path: Path) -> None:
    altered = copy("sd1")
    scheduler = altered / "scheduler" / "scheduler_config.json"
    alter(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    done = ckptconv.export(altered, tmp_path / "v.safetensors")
    assert metadata(done.out)["modelspec.prediction_type"] == "v"
    assert metadata(done.out)["ss_zero_terminal_snr"] == "True"
    facts = ckptconv.inspect(done.out).facts
    assert (facts["prediction_type"].value, facts["prediction_type"].source) == (
        "v_prediction", "metadata",
    )  # fmt: skip
    assert facts["zero_terminal_snr"].value is True
    assert sum("the scheduler says" in note for note in done.notes) == 2
    shutil.rmtree(altered / "ckptconv")
    assert metadata(ckptconv.export(altered, tmp_path / "w.safetensors").out) == metadata(done.out)


def test_a_safety_checker_is_left_out_and_said_to_be(copy: Copy, tmp_path: Path) -> None:
    altered = copy("sd1")
    (altered / "safety_checker").mkdir()
    (altered / "safety_checker" / "config.json").write_text("{}")
    done = ckptconv.export(altered, tmp_path / "out.safetensors")
    assert done.as_source
    assert [n for n in done.notes if "safety_checker" in n] == [
        "safety_checker has no place in a Stable Diffusion 1.x file and is left out"
    ]


# Options.


def test_a_cast_rounds_the_weights_and_leaves_the_noise_schedule(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "half.safetensors"
    done = ckptconv.export(
        folder("sd2"), out, dtype="fp16", metadata={"modelspec.title": "Half", "x": "a=b"}
    )
    want = load_file(sample("sd2"))
    made = load_file(out)
    assert made.keys() == want.keys()
    for key, value in made.items():
        whole = want[key]
        cast = whole.is_floating_point() and key.startswith(("model.", "first_", "cond_"))
        assert value.dtype == (torch.float16 if cast else whole.dtype), key
        assert torch.equal(value, whole.to(value.dtype))
    assert (metadata(out)["modelspec.title"], metadata(out)["x"]) == ("Half", "a=b")
    assert not done.as_source


@pytest.mark.slow
def test_hashes_of_other_tensors_are_not_carried_over(sample: Sample, tmp_path: Path) -> None:
    source = tmp_path / "hashed.safetensors"
    hashes = {"sshs_model_hash": "ab", "modelspec.hash_sha256": "0xcd", "modelspec.title": "T"}
    save_file(load_file(sample("sd1")), source, hashes)
    done = there_and_back(source, tmp_path)
    assert metadata(done.out) == hashes
    cast = ckptconv.export(tmp_path / "folder", tmp_path / "cast.safetensors", dtype="fp16")
    assert metadata(cast.out) == {"modelspec.title": "T"}
    assert any("sshs_model_hash" in note for note in cast.notes)


def test_progress_reaches_the_whole(folder: Folder, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = ckptconv.export(
        folder("sd1"), tmp_path / "x.safetensors", progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == (done.size, done.size)
    assert steps == sorted(steps)
    assert done.out.stat().st_size == done.size
