"""A model is put together from the files of a folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.conversion.convert import plan_file
from ckptconv.errors import FileRefused
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from tests.conftest import Sample
from tests.support.checkpoints import hollow, rewritten
from tests.support.shell import run

CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
T5 = "text_encoders.t5xxl.transformer."
PREFIXES = {
    "flux": {"dit": "model.diffusion_model.", "ae": "vae.", "clip_l": CLIP_L, "t5": T5},
    "chroma": {"dit": "model.diffusion_model.", "ae": "vae.", "t5": T5},
    "sd3": {
        **{"dit": "model.diffusion_model.", "ae": "first_stage_model."},
        **{"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5},
    },
    "sd1": {"all": "", "sd-vae": "first_stage_model."},
}
"""By architecture, the files that people hold, and their prefix in the file that holds all."""

LORA = [("lora_unet_x.lora_down.weight", "F16", (4, 8))]


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Makes published files of some names in a folder: each is ARCHITECTURE/FILE of `PREFIXES`."""
    folder.mkdir(exist_ok=True)
    for name, of in files.items():
        architecture, _, part = of.partition("/")
        if not part:
            hollow(folder / f"{name}.safetensors", LORA)
            continue
        prefix = PREFIXES[architecture][part]
        layout = bundled().architectures[architecture].layout().tensors
        hollow(
            folder / f"{name}.safetensors",
            [
                (k.removeprefix(prefix), t.dtype, t.shape)
                for k, t in layout.items()
                if k.startswith(prefix)
            ],
        )
    return folder


FLUX = {"flux1-dev": "flux/dit", "ae": "flux/ae", "clip_l": "flux/clip_l", "t5": "flux/t5"}
FLUX_DONORS = {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5"}


@pytest.mark.parametrize(
    ("files", "donors", "left_out"),
    [
        pytest.param(FLUX, FLUX_DONORS, {}, id="flux"),
        pytest.param({"dit": "flux/dit", "x": "flux/t5"}, {"text_encoder_2": "x"}, {}, id="some"),
        pytest.param(
            {"chroma": "chroma/dit", "ae": "flux/ae", "t5": "flux/t5", "clip_l": "flux/clip_l"},
            {"vae": "ae", "text_encoder": "t5"},
            {"clip_l": "CLIP text encoder, no part of Chroma"},
            id="chroma",
        ),
        pytest.param(
            {f"file {n}": f"sd3/{part}" for n, part in enumerate(reversed(PREFIXES["sd3"]))},
            {
                **{"vae": "file 3", "text_encoder": "file 2"},
                **{"text_encoder_2": "file 1", "text_encoder_3": "file 0"},
            },
            {},
            id="sd3, names that say nothing",
        ),
        pytest.param(
            {"sd3": "sd3/dit", "clip": "sd3/clip_g"}, {"text_encoder_2": "clip"}, {}, id="one CLIP"
        ),
        pytest.param(
            FLUX | {"lora": "lora", "sd-vae": "sd1/sd-vae"},
            FLUX_DONORS,
            {"lora": "this is a LoRA", "sd-vae": "vae: transformer/proj_out.weight has shape"},
            id="what does not belong to it",
        ),
    ],
)
def test_every_file_gets_its_place(
    files: dict[str, str], donors: dict[str, str], left_out: dict[str, str], tmp_path: Path
) -> None:
    folder = write(tmp_path / "parts", files)
    (folder / "more").mkdir()
    write(folder / "more", {"x": "lora"})
    (folder / ".hidden.safetensors").write_bytes(b"junk")
    (folder / "notes.pt").write_bytes(b"junk")
    (folder / "nowhere.ckpt").symlink_to("nothing")
    (folder / "readme.md").write_text("text")
    plan = ckptconv.plan(folder, assemble=True)
    assert plan.assembly
    assert {name: path.stem for name, path in plan.assembly.donors.items()} == donors
    why = {path.stem: text for path, text in plan.assembly.left_out.items()}
    assert why.pop("more").startswith("a folder")
    assert why.pop("nowhere").startswith("the file cannot be read")
    assert why.pop("notes").startswith("this is a text")
    assert "no part of" not in why.get("lora", "")
    assert why.keys() == left_out.keys()
    assert all(why[name].startswith(text) for name, text in left_out.items()), why


@pytest.mark.slow
def test_the_command_says_what_it_took_each_file_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "parts", FLUX | {"lora": "lora"})
    notes = run("plan", folder, "--assemble").stderr
    assert notes.startswith(
        "flux1-dev.safetensors: FLUX.1, text-to-image\nae.safetensors: vae\n"
        "clip_l.safetensors: text_encoder\nt5.safetensors: text_encoder_2\n"
        "lora.safetensors: left out: this is a LoRA"
    )
    said = json.loads(run("plan", folder, "--assemble", "--json").stdout)["assembly"]
    assert said["main"] == str(folder / "flux1-dev.safetensors")
    assert said["donors"]["text_encoder_2"] == str(folder / "t5.safetensors")
    assert [*said["left_out"]] == [str(folder / "lora.safetensors")]


@pytest.mark.parametrize(
    ("files", "problems", "commands"),
    [
        pytest.param(
            FLUX | {"ae2": "flux/ae", "t5-fp8": "flux/t5"},
            [
                "vae: several files fit: ae.safetensors, ae2.safetensors",
                "text_encoder_2: several files fit: t5-fp8.safetensors, t5.safetensors",
            ],
            1,
            id="two for one place",
        ),
        pytest.param(
            {"sd3": "sd3/dit", "a": "sd3/clip_l", "b": "sd3/clip_g", "c": "sd3/clip_g"},
            [
                "text_encoder or text_encoder_2: several files fit: "
                "a.safetensors, b.safetensors, c.safetensors"
            ],
            1,
            id="three for two places",
        ),
        pytest.param(
            {"model": "sd1/all", "vae": "sd1/sd-vae"},
            ["vae: several files fit: model.safetensors, vae.safetensors"],
            1,
            id="the model has one",
        ),
        pytest.param(
            FLUX | {"sd3": "sd3/dit"},
            [
                "the model: several files fit: flux1-dev.safetensors (FLUX.1, text-to-image), "
                "sd3.safetensors (Stable Diffusion 3, text-to-image)"
            ],
            0,
            id="two models",
        ),
    ],
)
def test_what_is_not_clear_is_refused_with_the_command_that_says_it(
    files: dict[str, str], problems: list[str], commands: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "parts", files)
    with pytest.raises(FileRefused, match="cannot be told which of its files") as caught:
        ckptconv.plan(folder, assemble=True)
    found = caught.value.problems
    assert len(found) == len(problems)
    assert all(text in line for text, line in zip(problems, found, strict=True)), found
    told = [text for text in caught.value.hint.split("`") if text.startswith("ckptconv convert")]
    assert len(told) == commands
    for command in told:
        words = shlex.split(command)[2:]
        words.remove("OUT")
        run("plan", *words)


def test_a_place_that_an_option_fills_needs_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "parts", FLUX | {"ae2": "flux/ae"})
    plan = ckptconv.plan(folder, assemble=True, vae=folder / ".." / "parts" / "ae2.safetensors")
    assert plan.assembly
    assert {path.name: why for path, why in plan.assembly.left_out.items()} == {
        "ae.safetensors": "vae is not needed"
    }
    assert plan.donors["vae"].name == "ae2.safetensors"


def test_a_component_that_is_given_in_memory_needs_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "parts", FLUX)
    options = Options.of({"assemble": True})
    plan, _ = plan_file(folder, options, without=["text_encoder_2"])
    assert plan.assembly
    assert [*plan.assembly.donors] == ["vae", "text_encoder"]
    assert [*plan.assembly.left_out.values()] == ["text_encoder_2 is not needed"]


@pytest.mark.parametrize(
    ("files", "given", "message", "hint"),
    [
        ({"ae": "flux/ae"}, "", "none of its files is a model", "holds a transformer or a UNet"),
        ({}, "", "a folder without a checkpoint", "give one"),
        ({"ae": "flux/ae"}, "ae.safetensors", "is a file, and assemble takes a folder", "give {}"),
        ({}, "missing", "cannot be read", "check that"),
    ],
)
def test_a_folder_that_gives_no_model_is_refused(
    files: dict[str, str], given: str, message: str, hint: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "parts", files)
    with pytest.raises(FileRefused, match=message) as caught:
        ckptconv.plan(folder / given, assemble=True)
    assert hint.format(folder) in caught.value.hint
    assert (caught.value.code == "not-found") == (given == "missing")


def test_a_folder_of_several_files_is_answered_with_the_option(tmp_path: Path) -> None:
    folder = write(tmp_path / "parts", FLUX)
    assert "`convert` with --assemble puts those together" in run("inspect", folder, code=3).stderr


@pytest.mark.slow
def test_several_folders_are_put_together_at_once(tmp_path: Path) -> None:
    for name in ("part1", "part2"):
        write(tmp_path / name, {name: "chroma/dit", "ae": "flux/ae"})
    done = run("convert", tmp_path / "part*", "--assemble", "--configs-only")
    made = [tmp_path / name / name for name in ("part1", "part2")]
    assert done.stdout.splitlines() == [str(out) for out in made]
    assert f"{tmp_path / 'part2'}: ae.safetensors: vae\n" in done.stderr
    assert all((out / "model_index.json").is_file() for out in made)


@pytest.mark.slow
def test_it_is_what_the_options_give_byte_for_byte(sample: Sample, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, prefix in PREFIXES["flux"].items():
        rewritten(
            sample("flux"),
            folder / f"{name}.safetensors",
            lambda key, prefix=prefix: (  # type: ignore[misc]
                key.removeprefix(prefix) if key.startswith(prefix) else None
            ),
        )
    donors: dict[str, Any] = {
        name: folder / f"{file}.safetensors"
        for name, file in {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5"}.items()
    }
    ckptconv.convert(folder / "dit.safetensors", tmp_path / "out", **donors)
    told = json.loads(run("convert", folder, "--assemble", "--json").stdout)
    assert told["out"] == str(folder / "dit")
    wanted, found = (
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (tmp_path / "out", folder / "dit")
    )
    assert found == wanted
    assert ckptconv.verify(folder, tmp_path / "out", assemble=True).passed
    pipe = ckptconv.load_pipeline(folder, assemble=True, device="cpu")
    assert pipe.text_encoder_2.dtype == pipe.transformer.dtype
