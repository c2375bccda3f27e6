"""What is said of a file agrees with the file."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from ckptconv.reading.header import read_header
from ckptconv.reports.report import hashes, inspection, plan_rows
from tests.conftest import Sample
from tests.support.checkpoints import midget, raw, rewritten, save

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def _inspection(path: Path) -> dict[str, Any]:
    detection = ckptconv.inspect(path)
    return inspection(detection, None if detection.refusal else build_plan(detection))


def test_an_inspection_holds_what_was_promised(small: Path) -> None:
    data = _inspection(small)
    assert data.keys() >= {
        *("architecture", "task", "pipeline", "prediction_type", "components", "evidence"),
        *("missing", "unclaimed"),
    }
    assert (data["architecture"], data["task"]) == ("sd1", "text-to-image")
    assert data["pipeline"] == "StableDiffusionPipeline"
    assert data["prediction_type"].keys() == {"value", "source", "detail"}
    assert data["prediction_type"]["value"] == "epsilon"
    assert data["prediction_type"]["source"] == "assumed"
    assert data["assumed"] == {"scheduler.prediction_type": "epsilon"}
    assert (data["missing"], data["unclaimed"], data["problems"]) == ([], [], [])
    assert len(data["evidence"]) >= 5
    assert (data["size"], data["tensors"]) == (small.stat().st_size, len(raw(small)))
    assert json.loads(json.dumps(data)) == data


def test_the_components_are_counted_as_they_stand_in_the_file(small: Path, tmp_path: Path) -> None:
    tensors = raw(small)
    mixed = {
        key: ("F16", shape, data[: len(data) // 2])
        if key.startswith(PREFIXES["vae"]) and "decoder" in key
        else (dtype, shape, data)
        for key, (dtype, shape, data) in tensors.items()
    }
    path = save(mixed, tmp_path / "mixed.safetensors")
    data = _inspection(path)
    assert data["components"].keys() == PREFIXES.keys()
    for name, prefix in PREFIXES.items():
        held = [v for k, v in mixed.items() if k.startswith(prefix) and k != POSITIONS]
        found = data["components"][name]
        assert found["tensors"] == len(held)
        assert found["parameters"] == sum(math.prod(shape) for _, shape, _ in held)
        assert found["bytes"] == sum(len(data) for _, _, data in held)
        assert found["dtypes"] == Counter(dtype for dtype, _, _ in held)
    assert set(data["components"]["vae"]["dtypes"]) == {"F16", "F32"}
    assert data["components"]["text_encoder"]["class"] == "CLIPTextModel"


def test_a_component_that_is_not_there_is_missing(small: Path, tmp_path: Path) -> None:
    vae = PREFIXES["vae"]
    path = rewritten(small, tmp_path / "x.safetensors", lambda k: None if k.startswith(vae) else k)
    data = _inspection(path)
    assert data["missing"] == ["vae"]
    assert data["components"].keys() == {"unet", "text_encoder"}


def test_an_ema_copy_is_told(small: Path, tmp_path: Path) -> None:
    assert not _inspection(small)["ema"]
    path = midget(tmp_path / "ema.safetensors", ema=True)
    data = _inspection(path)
    assert data["ema"]
    assert data["dropped"]["training"] == len([k for k in raw(path) if k.startswith("model_ema.")])


def test_problems_and_unknown_keys_are_told(small: Path, tmp_path: Path) -> None:
    tensors = raw(small)
    tensors["mystery"] = ("F32", (1,), b"\0" * 4)
    del tensors["model.diffusion_model.out.2.bias"]
    path = save(tensors, tmp_path / "odd.safetensors")
    data = _inspection(path)
    assert data["unclaimed"] == ["mystery"]
    assert data["problems"] == ["unet: conv_out.bias is missing"]


def test_a_file_that_is_refused_has_no_architecture_but_every_verdict(tmp_path: Path) -> None:
    lora = {"lora_unet_down_blocks_0.lora_down.weight": ("F16", (1, 1), b"\0" * 2)}
    data = _inspection(save(lora, tmp_path / "lora.safetensors"))
    assert data["architecture"] is data["task"] is data["pipeline"] is None
    assert data["verdicts"].keys() == bundled().architectures.keys()
    assert all(v["failing"] and not v["matches"] for v in data["verdicts"].values())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_key_has_its_row(name: str, sample: Sample) -> None:
    path = sample(name, dtype="fp16")
    source = raw(path)
    rows = plan_rows(ckptconv.plan(path))
    assert [row["source"] for row in rows] == list(read_header(path).tensors)
    for row in rows:
        dtype, shape, _ = source[row["source"]]
        assert (row["dtype"], tuple(row["shape"])) == (dtype, shape)
        assert row["target_dtype"] == dtype
        assert len(row["targets"]) == len(row["target_shapes"]) >= 1
        elements = sum(math.prod(target) for target in row["target_shapes"])
        assert elements == math.prod(shape)
        assert bool(row["reason"]) == (row["op"] == "drop")
        assert all(t.startswith("ckptconv/") for t in row["targets"]) == (row["op"] == "drop")
    ops = Counter(row["op"] for row in rows)
    wanted = {"sd1": {"rename", "squeeze", "drop"}, "sd2": {"rename", "split_rows", "drop"}}
    wanted["sdxl"] = {"rename", "squeeze", "split_rows", "transpose", "drop"}
    assert ops.keys() >= wanted[name]
    targets = [target for row in rows for target in row["targets"]]
    assert len(targets) == len(set(targets))


def test_rows_show_casts_and_unknown_keys(small: Path, tmp_path: Path) -> None:
    path = save({**raw(small), "mystery": ("F32", (1,), b"\0" * 4)}, tmp_path / "odd.safetensors")
    rows = {row["source"]: row for row in plan_rows(ckptconv.plan(path, dtype="bf16"))}
    assert (rows["mystery"]["op"], rows["mystery"]["reason"]) == ("drop", "unknown")
    assert rows["mystery"]["targets"] == ["ckptconv/mystery"]
    row = rows["model.diffusion_model.out.0.weight"]
    assert (row["dtype"], row["target_dtype"]) == ("F32", "BF16")
    assert rows["betas"]["target_dtype"] == "F32"


def test_hashes_are_those_that_users_know(small: Path) -> None:
    header = read_header(small)
    data = small.read_bytes()
    whole = hashlib.sha256(data).hexdigest()
    start = 8 + int.from_bytes(data[:8], "little")
    assert hashes(header) == {
        "sha256": whole,
        "short": whole[:10],
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
    }


def test_the_hash_of_a_file_larger_than_the_buffer(sample: Sample) -> None:
    path = sample("sd1", dtype="fp16")
    assert path.stat().st_size > 5 << 20
    with path.open("rb") as file:
        assert (
            hashes(read_header(path))["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
        )
