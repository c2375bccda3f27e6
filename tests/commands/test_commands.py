"""What each command prints and does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ckptconv.maps.architecture import bundled
from tests.conftest import Sample
from tests.support.checkpoints import midget, raw, raw_folder, rewritten, save
from tests.support.shell import run

VAE = "first_stage_model."


def test_inspect_shows_what_the_file_is_and_why(small: Path) -> None:
    text = run("inspect", small).stdout
    assert text.startswith(f"{small}: Stable Diffusion 1.x, text-to-image (")
    assert "architecture: sd1    pipeline: StableDiffusionPipeline" in text
    assert "prediction_type: epsilon (assumed: nothing in the file says otherwise" in text
    assert "\n  - the UNet has 4 input channels: text-to-image\n" in text
    for row in ("unet", "vae", "text_encoder"):
        assert re.search(rf"^{row} +\w+ +[\d,]+ +[\d.]+ [kM]? +[\d.]+ [kM]B  F32$", text, re.M)
    assert "scheduler.prediction_type = epsilon" in text
    assert "Traceback" not in text


def test_inspect_says_what_is_missing_unknown_or_wrong(small: Path, tmp_path: Path) -> None:
    path = rewritten(
        small, tmp_path / "x.safetensors", lambda key: None if key.startswith(VAE) else key
    )
    assert "missing components:\n  - vae\n" in run("inspect", path).stdout
    tensors = {**raw(small), "mystery[red]": ("F32", (1,), b"\0" * 4)}
    del tensors["model.diffusion_model.out.2.bias"]
    text = run("inspect", save(tensors, tmp_path / "y.safetensors"), code=3).stdout
    assert "problems:\n  - unet: conv_out.bias is missing\n" in text
    assert "unclaimed keys:\n  - mystery[red]\n" in text


def test_inspect_draws_the_tree_and_its_parameters_add_up(sample: Sample) -> None:
    text = run("inspect", "--tree", sample("sdxl")).stdout
    tree = text[text.index("StableDiffusionXLPipeline\n├") :]
    assert re.search(
        r"down_blocks\.1: 128 channels, 2 resnets, attention depth 2\+2, downsample, [\d,]+ param",
        tree,
    )
    assert re.search(r"mid_block: 256 channels, 2 resnets, attention depth 2, [\d,]+ param", tree)
    assert re.search(r"up_blocks\.2: 64 channels, 3 resnets, [\d,]+ param", tree)
    data = json.loads(run("inspect", "--json", sample("sdxl")).stdout)
    for part in re.split(r"\n[├└]── ", tree)[1:]:
        name = part.partition(":")[0]
        total, *counts = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", part))
        assert total == sum(counts) == data["components"][name]["parameters"]
        assert len(counts) >= 4


def test_inspect_shows_every_verdict_and_the_hashes_on_demand(small: Path) -> None:
    plain = run("inspect", small).stdout
    text = run("inspect", "--verdicts", "--hash", small).stdout
    assert text.startswith(plain)
    more = text[len(plain) :]
    assert "sd1: matches\n" in more
    for name in bundled().architectures.keys() - {"sd1"}:
        assert f"{name}: does not match\n  - " in more
    data = json.loads(run("inspect", "--json", "--hash", small).stdout)
    assert data["hashes"].keys() == {"sha256", "short", "sshs_model_hash"}
    assert all(f"\n{name}: {value}\n" in more for name, value in data["hashes"].items())
    assert "hashes" not in json.loads(run("inspect", "--json", small).stdout)


def test_inspect_of_a_lora_shows_the_verdicts_as_well(tmp_path: Path) -> None:
    save({"lora_unet_x.lora_down.weight": ("F16", (1, 1), b"\0\0")}, tmp_path / "lora.safetensors")
    text = run("inspect", "--verdicts", tmp_path / "lora.safetensors", code=3).stdout
    assert "this is a LoRA" in text
    assert "sdxl: does not match\n  - " in text
    data = json.loads(run("inspect", "--json", tmp_path / "lora.safetensors", code=3).stdout)
    assert data["architecture"] is None


def test_plan_has_a_line_for_every_key(small: Path) -> None:
    result = run("plan", small)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert sorted(line[0] for line in lines) == sorted(raw(small))
    by_key = {line[0]: line[1:] for line in lines}
    assert by_key["model.diffusion_model.out.2.bias"] == ["rename", "unet/conv_out.bias", "F32 [4]"]
    assert by_key["betas"] == ["drop", "ckptconv/betas (derived)", "F32 [1000]"]
    assert result.stderr == f"{len(lines)} keys; lossless; missing components: none\n"


def test_plan_shows_casts_and_what_is_wrong(small: Path, tmp_path: Path) -> None:
    tensors = {**raw(small), "mystery": ("F32", (1,), b"\0" * 4)}
    tensors = {key: value for key, value in tensors.items() if not key.startswith(VAE)}
    del tensors["model.diffusion_model.out.2.bias"]
    path = save(tensors, tmp_path / "odd.safetensors")
    result = run("plan", "--dtype", "fp16", path, code=3)
    assert "\nmystery\tdrop\tckptconv/mystery (unknown)\tF32 [1]\n" in result.stdout
    assert "unet/conv_norm_out.bias\tF32 to F16 [4]" in result.stdout
    assert "not lossless; missing components: vae\n" in result.stderr
    assert "problem: unet: conv_out.bias is missing\n" in result.stderr
    data = json.loads(run("plan", "--json", path, code=3).stdout)
    assert data["problems"] == ["unet: conv_out.bias is missing"]
    assert (data["absent"], data["lossless"]) == (["vae"], True)


def test_plan_json_has_every_key(small: Path) -> None:
    data = json.loads(run("plan", "--json", small).stdout)
    assert data["lossless"] is True
    assert {row["source"] for row in data["keys"]} == raw(small).keys()
    assert data["keys"][0].keys() >= {"source", "op", "targets", "shape", "dtype", "reason"}


def test_convert_passes_every_option_on(small: Path, tmp_path: Path) -> None:
    source = midget(tmp_path / "ema.safetensors", ema=True)
    yaml = tmp_path / "v1.yaml"
    yaml.write_text("model: {params: {scale_factor: 0.5}}\n")
    out = tmp_path / "out"
    out.mkdir()
    options: list[object] = ["--dtype", "bf16", "--variant", "ema", "--max-shard-size", "100KB"]
    options += [
        "--only",
        "unet, scheduler,vae",
        "--vae",
        small,
        "--prediction-type",
        "v_prediction",
    ]
    options += ["--ema", "--zero-terminal-snr", "--original-config", yaml, "--overwrite", "--json"]
    result = run("convert", source, out, *options)
    data = json.loads(result.stdout)
    assert (data["out"], data["architecture"], data["task"]) == (str(out), "sd1", "text-to-image")
    assert data["pipeline"] == "StableDiffusionPipeline"
    assert data["lossless"] is False
    assert data["facts"]["prediction_type"] == {"value": "v_prediction", "source": "option"}
    assert data["facts"]["zero_terminal_snr"] == {"value": True, "source": "option"}
    assert any("scaling_factor = 0.5" in line for line in data["warnings"])
    assert {p.name for p in out.iterdir()} == {"unet", "scheduler", "vae", "ckptconv"}
    assert (out / "unet/diffusion_pytorch_model.safetensors.index.ema.json").is_file()
    assert {dtype for dtype, _, _ in raw_folder(out / "unet").values()} == {"BF16"}
    assert set(data["files"]) == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}


def test_convert_warns_on_stderr_of_what_is_missing(small: Path, tmp_path: Path) -> None:
    path = rewritten(
        small, tmp_path / "x.safetensors", lambda key: None if key.startswith(VAE) else key
    )
    result = run("convert", path, tmp_path / "out", "--configs-only")
    assert "warning: vae is not in the file, so model_index.json says null" in result.stderr
    assert "supply it with --vae FILE" in result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert list(tmp_path.rglob("*.safetensors")) == [path]


def test_convert_refuses_unknown_keys_on_demand(small: Path, tmp_path: Path) -> None:
    tensors = {**raw(small), "mystery": ("F32", (1,), b"\0" * 4)}
    path = save(tensors, tmp_path / "odd.safetensors")
    refused = run("convert", path, tmp_path / "out", "--strict", code=3)
    assert "  - mystery: unknown\nhint: without --strict they are kept aside" in refused.stderr
    result = run("convert", path, tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    assert data["unclaimed"] == ["mystery"]
    assert data["warnings"] == ["no key map knows mystery: kept aside"]


def test_architectures_lists_them_with_their_tasks() -> None:
    rows = json.loads(run("architectures", "--json").stdout)["architectures"]
    assert {row["architecture"] for row in rows} >= {"sd1", "sd2", "sdxl", "sdxl-refiner"}
    by_name = {row["architecture"]: row for row in rows}
    assert by_name["sdxl"]["tasks"]["inpainting"] == "StableDiffusionXLInpaintPipeline"
    assert by_name["sdxl-refiner"]["components"] == ["unet", "vae", "text_encoder_2"]
    text = run("architectures").stdout
    for row in rows:
        assert row["architecture"] in text
        assert all(pipeline in text for pipeline in row["tasks"].values())


def test_sample_writes_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    options = ["--task", "inpainting", "--dtype", "bf16", "--seed", "3"]
    result = run("sample", "sd1", path, *options)
    assert result.stdout == f"{path}\n"
    assert "MB" in result.stderr
    data = json.loads(run("inspect", "--json", path).stdout)
    assert (data["architecture"], data["task"]) == ("sd1", "inpainting")
    assert data["components"]["unet"]["dtypes"] == {"BF16": 686}
    first = path.read_bytes()
    assert "exists" in run("sample", "sd1", path, *options, code=3).stderr
    run("sample", "sd1", path, *options, "--overwrite")
    assert path.read_bytes() == first


def test_demo_draws_an_image_and_prints_where_everything_is(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "demo"
    lines = run("demo", folder, "--arch", "sd1").stdout.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert found["sample"].strip() == str(folder / "sd1.safetensors")
    assert found["inspect"].strip() == "Stable Diffusion 1.x, text-to-image, epsilon"
    assert found["convert"].strip().startswith(f"{folder / 'sd1'} (")
    image = Image.open(found["generate"].strip())
    assert image.size == (64, 64)
    assert (folder / "sd1" / "model_index.json").is_file()
    assert "exists" in run("demo", folder, "--arch", "sd1", code=3).stderr
    again = run("demo", folder, "--arch", "sd1", "--overwrite", "--json")
    assert json.loads(again.stdout)["image"] == found["generate"].strip()


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ((), "DiffusionPipeline.from_pretrained('OUT')"),
        (
            ("--dtype", "FP16"),
            "DiffusionPipeline.from_pretrained('OUT', torch_dtype=torch.float16)",
        ),
        (("--dtype", "bfloat16"), "..., torch_dtype=torch.bfloat16)"),
        (("--dtype", "half", "--variant", "fp16"), "..., variant='fp16')"),
        (("--only", "unet"), ""),
        (("--configs-only",), ""),
    ],
)
def test_convert_ends_with_the_call_that_loads_the_folder(
    options: tuple[str, ...], call: str, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    lines = run("convert", small, out, *options).stderr.splitlines()
    start, _, end = call.replace("OUT", str(out)).rpartition("...")
    assert lines[-1].startswith(f"load it with {start}") == bool(call)
    assert lines[-1].endswith(end)


def test_convert_without_out_makes_a_folder_next_to_each_file(small: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.ckpt"):
        (tmp_path / name).hardlink_to(small)
    alone = run("convert", tmp_path / "a.safetensors", "--configs-only")
    assert alone.stdout == f"{tmp_path / 'a'}\n"
    assert run("convert", f"{tmp_path}/?.*", "--configs-only", "--overwrite").stdout.split() == [
        str(tmp_path / name) for name in "ab"
    ]
    assert "OUT is missing" in run("convert", "https://host/x.ckpt", code=2).stderr


@pytest.mark.parametrize("name", ["taken", "taken/inside"])
def test_demo_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = run("demo", tmp_path / name, code=3)
    assert "taken: is not a folder" in result.stderr


def test_names_and_metadata_do_not_command_the_terminal(tmp_path: Path) -> None:
    evil, path = "evil\x1b[2J\u202e", tmp_path / "evil.safetensors"
    save({evil: ("F16", (1,), b"\0\0")}, path)
    assert "evil\\x1b[2J\\u202e" in run("inspect", path, code=3).stdout
    save(
        {**raw(midget(tmp_path / "small.safetensors")), evil: ("F16", (1,), b"\0\0")},
        path,
        {"x": evil},
    )
    shown = [run("inspect", path).stdout, run("plan", path).stdout]
    shown.append(run("convert", path, tmp_path / "out").stderr)
    assert all("evil\\x1b[2J\\u202e" in text for text in shown)
    assert not any("\x1b" in text or "\u202e" in text for text in shown)
