"""A converted folder holds the tensors of the file, bit for bit, and says where they come from."""

from __future__ import annotations

import filecmp
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.errors import Incomplete, UsageError
from tests.conftest import Folder, Sample
from tests.support.checkpoints import (
    Raw,
    metadata,
    midget,
    raw,
    raw_folder,
    rewritten,
    save,
    thirds,
    transposed,
)

ARCHITECTURES = ("sd1", "sd2", "sdxl", "sdxl-refiner")


def _contents(tensors: Raw) -> Counter[tuple[str, bytes]]:
    return Counter((dtype, data) for dtype, _, data in tensors.values())


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_file_is_in_the_folder_once_bit_for_bit(
    name: str, sample: Sample, folder: Folder
) -> None:
    source = raw(sample(name))
    out = folder(name)
    aside = raw(out / "ckptconv" / "dropped.safetensors")
    for key, value in aside.items():
        assert value == source[key]
    wanted: Counter[tuple[str, bytes]] = Counter()
    for key, value in source.items():
        if key in aside:
            wanted[value[0], value[2]] += 1
        elif ".attn.in_proj_" in key:
            wanted.update(thirds(value))
        elif key.endswith(".text_projection"):
            wanted[transposed(value)] += 1
        else:
            wanted[value[0], value[2]] += 1
    written = raw_folder(out)
    assert _contents(written) == wanted
    parts = {key.partition("/")[0]: 0 for key in written}
    assert set(parts) - {"ckptconv"} == {
        child.name for child in out.iterdir() if (child / "config.json").is_file()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_dropped_is_kept_aside_with_a_reason(name: str, folder: Folder) -> None:
    out = folder(name)
    reasons = _json(out / "ckptconv" / "source.json")["dropped"]
    assert reasons.keys() == raw(out / "ckptconv" / "dropped.safetensors").keys()
    assert set(reasons.values()) <= {"derived", "training", "unused"}
    dropped = {
        "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "sd2": "cond_stage_model.model.text_projection",
        "sdxl": "denoiser.sigmas",
        "sdxl-refiner": "denoiser.sigmas",
    }
    assert dropped[name] in reasons


def test_a_few_tensors_stand_under_the_names_that_diffusers_gives_them(
    sample: Sample, folder: Folder
) -> None:
    source, out = raw(sample("sdxl")), raw_folder(folder("sdxl"))
    unet = "model.diffusion_model."
    for old, new in {
        unet + "time_embed.0.weight": "unet/time_embedding.linear_1.weight",
        unet + "label_emb.0.2.bias": "unet/add_embedding.linear_2.bias",
        unet + "input_blocks.4.0.emb_layers.1.weight": (
            "unet/down_blocks.1.resnets.0.time_emb_proj.weight"
        ),
        unet + "output_blocks.2.2.conv.weight": "unet/up_blocks.0.upsamplers.0.conv.weight",
        "first_stage_model.decoder.up.3.block.2.conv1.weight": (
            "vae/decoder.up_blocks.0.resnets.2.conv1.weight"
        ),
    }.items():
        assert out[new] == source[old]
    value = source["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"]
    names = [f"text_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    found = [out[f"text_encoder_2/{name}"] for name in names]
    assert [(dtype, data) for dtype, _, data in found] == list(thirds(value))
    width = value[1][1]
    assert all(shape == (width, width) for _, shape, _ in found)
    old = "first_stage_model.encoder.mid.attn_1.q.weight"
    _, shape, data = out["vae/encoder.mid_block.attentions.0.to_q.weight"]
    assert (shape, data) == (source[old][1][:2], source[old][2])


def test_a_second_run_writes_the_same_bytes(small: Path, folder: Folder, tmp_path: Path) -> None:
    again = tmp_path / "again"
    report = ckptconv.convert(small, again)
    files = sorted(str(p.relative_to(again)) for p in again.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(folder("small"), again, files, shallow=False) == (files, [], [])
    assert dict(report.files) == {f: (again / f).stat().st_size for f in files}


def test_the_report_says_what_was_done(small: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = ckptconv.convert(
        small, tmp_path / "out", progress=lambda done, total: calls.append((done, total))
    )
    total = sum(report.files.values())
    assert calls[-1] == (total, total)
    assert {need for _, need in calls} == {total}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert report.out == tmp_path / "out"
    assert report.plan.lossless
    assert report.warnings == ()
    assert 0 < report.seconds < 60


def test_metadata_are_kept_where_a_user_finds_them(small: Path, tmp_path: Path) -> None:
    given = {"format": "np", "modelspec.title": "Ünïcode ✓", "ss_clip_skip": "2"}
    source = save(raw(small), tmp_path / "titled.safetensors", given)
    out = tmp_path / "out"
    ckptconv.convert(source, out)
    for file in out.glob("[!c]*/*.safetensors"):
        assert metadata(file) == {**given, "format": "pt"}
    assert len(list(out.glob("[!c]*/*.safetensors"))) >= 3
    record = _json(out / "ckptconv" / "source.json")
    assert record["source"] == {
        "metadata": given,
        "name": "titled.safetensors",
        "size": source.stat().st_size,
    }
    assert record["architecture"] == "sd1"
    assert record["task"] == "text-to-image"
    assert record["ckptconv_version"] == ckptconv.__version__
    assert record["facts"]["prediction_type"]["source"] == "assumed"
    assert record["assumed"]["scheduler.prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("dtype", "stored", "named"),
    [("fp16", "F16", "float16"), ("bf16", "BF16", "bfloat16"), ("fp32", "F32", "float32")],
)
def test_dtype_casts_every_weight_and_nothing_that_is_kept_aside(
    dtype: str, stored: str, named: str, folder: Folder, small: Path, tmp_path: Path
) -> None:
    import torch

    report = ckptconv.convert(small, tmp_path / "out", dtype=dtype)
    assert report.plan.lossless == (stored == "F32")  # as stored
    plain, cast = raw_folder(folder("small")), raw_folder(tmp_path / "out")
    assert plain.keys() == cast.keys()
    for key, (old, shape, data) in plain.items():
        if key.startswith("ckptconv/"):
            assert cast[key] == (old, shape, data)
            continue
        wanted = torch.frombuffer(bytearray(data), dtype=torch.float32)
        wanted = wanted.to(getattr(torch, named))
        assert cast[key][:2] == (stored, shape)
        assert cast[key][2] == wanted.view(torch.uint8).numpy().tobytes()
    assert _json(tmp_path / "out" / "text_encoder" / "config.json")["torch_dtype"] == "float32"


def test_values_too_large_for_the_dtype_are_reported_by_name(small: Path, tmp_path: Path) -> None:
    tensors = raw(small)
    key = "model.diffusion_model.out.2.bias"
    dtype, shape, data = tensors[key]
    large = np.frombuffer(data, np.float32).copy()
    large[:2] = 1e6, -1e6
    tensors[key] = (dtype, shape, large.tobytes())
    source = save(tensors, tmp_path / "large.safetensors")
    report = ckptconv.convert(source, tmp_path / "out", dtype="fp16")
    assert "unet/conv_out.bias: 2 values are too large for F16: infinite now" in report.warnings


@pytest.mark.parametrize("ema", [False, True])
def test_the_ema_copy_takes_the_place_of_the_unet_on_demand(ema: bool, tmp_path: Path) -> None:
    checkpoint = midget(tmp_path / "ema.safetensors", ema=True)
    source = raw(checkpoint)
    own = {k: v for k, v in source.items() if k.startswith("model.diffusion_model.")}
    numbers = {"model_ema.decay", "model_ema.num_updates"}
    copies = {k: v for k, v in source.items() if k.startswith("model_ema.")}
    copies = {k: v for k, v in copies.items() if k not in numbers}
    assert _contents(own) != _contents(copies)
    ckptconv.convert(checkpoint, tmp_path / "out", ema=ema, only=["unet"])
    written = raw(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert _contents(written) == _contents(copies if ema else own)
    own_key = "model.diffusion_model.input_blocks.0.0.weight"
    key = "model_ema.diffusion_modelinput_blocks00weight" if ema else own_key
    assert written["conv_in.weight"] == source[key]


def test_only_writes_the_components_asked_for(small: Path, folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = ckptconv.convert(small, out, only=(name for name in ("unet", "tokenizer")))
    assert {p.name for p in out.iterdir()} == {"unet", "tokenizer", "ckptconv"}
    whole = folder("small")
    names = [n for n in report.files if not n.startswith("ckptconv/")]
    assert len(names) == 6
    assert filecmp.cmpfiles(whole, out, names, shallow=False) == (names, [], [])


def test_only_of_nothing_known_is_wrong_usage(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sd1 has no component text_encoder_2") as caught:
        ckptconv.convert(small, tmp_path / "out", only=["text_encoder_2", "unet"])
    assert "text_encoder" in caught.value.hint
    assert not any(tmp_path.iterdir())


def test_configs_only_writes_every_other_file(
    sample: Sample, folder: Folder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ckptconv.convert(sample("sdxl"), out, configs_only=True)
    wanted = {str(p.relative_to(folder("sdxl"))) for p in folder("sdxl").rglob("*") if p.is_file()}
    wanted = {name for name in wanted if not name.endswith(".safetensors")}
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == sorted(wanted)
    record = "ckptconv/source.json"  # lists the files
    files.remove(record)
    assert filecmp.cmpfiles(folder("sdxl"), out, files, shallow=False) == (files, [], [])
    assert _json(out / record) | {"files": 0} == _json(folder("sdxl") / record) | {"files": 0}


def test_the_original_config_wins_and_the_disagreement_is_reported(
    small: Path, tmp_path: Path
) -> None:
    yaml = tmp_path / "v1-inference-v.yaml"
    yaml.write_text(
        "model:\n  params:\n    parameterization: v\n    scale_factor: 0.5\n"
        "    linear_start: 0.00085\n"
    )
    out = tmp_path / "out"
    report = ckptconv.convert(small, out, original_config=yaml, configs_only=True)
    assert _json(out / "vae" / "config.json")["scaling_factor"] == 0.5
    assert _json(out / "scheduler" / "scheduler_config.json")["prediction_type"] == "v_prediction"
    assert any("vae.scaling_factor = 0.5, not 0.18215" in w for w in report.warnings)
    assert not any("beta_start" in w for w in report.warnings)
    fact = _json(out / "ckptconv" / "source.json")["facts"]["prediction_type"]
    assert (fact["value"], fact["source"]) == ("v_prediction", "original config")


def test_marks_without_elements_decide_and_are_kept_aside(small: Path, tmp_path: Path) -> None:
    marks: Raw = {"v_pred": ("F32", (0,), b""), "ztsnr": ("F16", (0, 3), b"")}
    source = save({**raw(small), **marks}, tmp_path / "marked.safetensors")
    report = ckptconv.convert(source, tmp_path / "out", dtype="fp16")
    facts = report.plan.detection.facts
    assert (facts["prediction_type"].value, facts["prediction_type"].source) == (
        "v_prediction",
        "marker",
    )
    scheduler = _json(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    aside = raw(tmp_path / "out" / "ckptconv" / "dropped.safetensors")
    assert {key: aside[key] for key in marks} == marks


def test_unknown_keys_are_kept_aside_and_refused_on_demand(
    small: Path, folder: Folder, tmp_path: Path
) -> None:
    tensors = raw(small)
    tensors["mystery.weight"] = ("F32", (2,), b"\0" * 8)
    source = save(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(Incomplete, match="no key map knows 1 of the keys") as caught:
        ckptconv.convert(source, tmp_path / "out", strict=True)
    assert caught.value.problems == ("mystery.weight: unknown",)
    assert not (tmp_path / "out").exists()
    report = ckptconv.convert(source, tmp_path / "out")
    assert report.plan.unclaimed == ("mystery.weight",)
    assert "no key map knows mystery.weight: kept aside" in report.warnings
    written, plain = raw_folder(tmp_path / "out"), raw_folder(folder("small"))
    assert raw(tmp_path / "out/ckptconv/dropped.safetensors")["mystery.weight"][2] == b"\0" * 8
    aside = {key: written.pop(key) for key in [*written] if key not in plain}
    assert _contents(written) == _contents(plain), aside.keys()
    record = _json(tmp_path / "out" / "ckptconv" / "source.json")
    assert record["unclaimed"] == ["mystery.weight"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_anything_is_written(
    small: Path, tmp_path: Path
) -> None:
    gone = "model.diffusion_model.middle_block.1.norm.weight"
    source = rewritten(
        small, tmp_path / "hole.safetensors", lambda key: None if key == gone else key
    )
    with pytest.raises(Incomplete, match=r"not a whole Stable Diffusion 1\.x") as caught:
        ckptconv.convert(source, tmp_path / "out")
    assert caught.value.problems == ("unet: mid_block.attentions.0.norm.weight is missing",)
    assert [p.name for p in tmp_path.iterdir()] == ["hole.safetensors"]
