"""`maps check` passes our maps and teaches whoever writes one; `--key-maps` goes everywhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ckptconv
from ckptconv.cli import main
from ckptconv.maps.architecture import KeyMaps, bundled
from ckptconv.reading.header import header_from_json
from ckptconv.verification.map_checks import check_maps
from ckptconv.verification.result import CHECKS, Check, Problem
from tests.conftest import Folder, Sample
from tests.support.checkpoints import metadata, raw

(OURS,) = bundled().folders


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Gives a copy of our key maps with one architecture, to alter."""
    folder = tmp_path / "key_maps"
    for part in ("shared", "sd2"):
        shutil.copytree(OURS / part, folder / part)
    shutil.copy(OURS / "foreign.yaml", folder)
    return folder


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


def problems(folder: Path) -> list[str]:
    """Returns what is wrong with a folder, each said once."""
    checks = check_maps(KeyMaps([folder]))
    return list(dict.fromkeys(str(problem) for check in checks for problem in check.problems))


@pytest.mark.slow
def test_our_maps_pass() -> None:
    checks = check_maps(bundled())
    assert [problem for check in checks for problem in check.problems] == []
    tried = {(c.component, c.extent.partition(":")[0]) for c in checks if ":" in c.extent}
    assert tried == {
        (a.name, task.name)
        for a in bundled().architectures.values()
        for task in a.tasks
        if a.shows(task)
    }
    assert {check.kind for check in checks} == {"map", "arch", "layout", "task", "sample"}
    assert {check.kind for check in checks} <= CHECKS.keys()


SD2 = "sd2/arch.yaml"
VAE = "shared/maps/vae-blocks.yaml"
OPENCLIP = "shared/maps/openclip-blocks.yaml"


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        (  # a misspelled target
            VAE,
            "decoder.norm_out: decoder.conv_norm_out",
            "decoder.norm_out: decoder.norm_out",
            [
                "vae: decoder.norm_out.weight: first_stage_model.decoder.norm_out.weight becomes "
                "it, but AutoencoderKL has no such tensor; "
                "the nearest that it expects is decoder.conv_norm_out.weight",
                "vae: decoder.conv_norm_out.weight: AutoencoderKL expects it, but no line gives "
                "it; the nearest that a line gives is decoder.norm_out.weight",
            ],
        ),
        (  # a line too few
            VAE,
            "  decoder.conv_out: decoder.conv_out\n",
            "",
            [
                "first_stage_model.decoder.conv_out.weight: no line covers it: add one to `blocks` "
                "of {folder}/shared/maps/vae.yaml, or to `drop` with a reason",
            ],
        ),
        (  # a forgotten squeeze
            VAE,
            "q.weight: {squeeze: to_q.weight}",
            "q.weight: to_q.weight",
            [
                "vae: encoder.mid_block.attentions.0.to_q.weight: AutoencoderKL expects "
                "[512, 512], first_stage_model.encoder.mid.attn_1.q.weight [512, 512, 1, 1] gives "
                "[512, 512, 1, 1]: write {{squeeze: encoder.mid_block.attentions.0.to_q.weight}}",
            ],
        ),
        (  # a matrix that is stored the other way round
            "sd2/layout.json",
            '"model.diffusion_model.time_embed.0.weight": ["F32", [1280, 320]]',
            '"model.diffusion_model.time_embed.0.weight": ["F32", [320, 1280]]',
            [
                "unet: time_embedding.linear_1.weight: UNet2DConditionModel expects [1280, 320], "
                "model.diffusion_model.time_embed.0.weight [320, 1280] gives [320, 1280]: "
                "if the name is right, write {{transpose: time_embedding.linear_1.weight}}",
            ],
        ),
        (  # two lines for one key
            VAE,
            "  quant_conv: quant_conv\n",
            "  quant_conv: quant_conv\n  quant_conv.weight: other\n",
            [
                "shared/maps/vae: {folder}/shared/maps/vae.yaml: the key map breaks a law: "
                "'quant_conv' and 'quant_conv.weight' can match the same key",
            ],
        ),
        (  # an operation that there is not
            VAE,
            "{squeeze: to_q.weight}",
            "{squash: to_q.weight}",
            ["'squash' is neither a kind of this map nor an operation"],
        ),
        (VAE, "kinds:", "kinds: [", [f"shared/maps/vae-blocks: {{folder}}/{VAE}: not a YAML"]),
        (
            SD2,
            "is: 2, because: SD2",
            "is: 3, because: SD2",
            [
                "detect: does not hold for layout.json: input_blocks.1.1.proj_in.weight has rank "
                "2, needed 3 (SD2 projects with linear layers)",
            ],
        ),
        (
            SD2,
            "pipeline: StableDiffusionInpaintPipeline",
            "pipeline: StableDiffusionInpaintingPipeline",
            ["tasks: diffusers has no pipeline StableDiffusionInpaintingPipeline"],
        ),
        (
            SD2,
            "{extends: shared/configs/tokenizer, pad_token",
            "{extends: shared/configs/tokeniser, pad_token",
            ["shared/configs/tokeniser.yaml: no such file in {folder}"],
        ),
        (
            "shared/configs/unet-sd2.yaml",
            "use_linear_projection: true",
            "use_linear_projection: false",
            [
                "unet: down_blocks.0.attentions.0.proj_in.weight: UNet2DConditionModel expects "
                "[320, 320, 1, 1], model.diffusion_model.input_blocks.1.1.proj_in.weight "
                "[320, 320] gives [320, 320]: check the line, and the configuration in arch.yaml",
            ],
        ),
        (
            "shared/configs/unet.yaml",
            "layers_per_block: !count down_blocks.0.resnets",
            "layers_per_block: !count down_blocks.0.resnet",
            [
                "unet: down_blocks.0.resnets.0.conv1.bias: "
                "model.diffusion_model.input_blocks.1.0.in_layers.2.bias becomes it, "
                "but UNet2DConditionModel has no such tensor",
            ],
        ),
        (SD2, "aliases:", "alias:", ["unknown word 'alias'; did you mean 'aliases'?"]),
        (
            "sd2/sample.yaml",
            "divides:",
            "divdes:",
            ["unknown word 'divdes'; did you mean 'divides'"],
        ),
        (
            "foreign.yaml",
            "title: ",
            "titel: ",
            ["[0]: unknown word 'titel'; did you mean 'title'?"],
        ),
        ("shared/hints.yaml", "words: ", "wrods: ", ["unknown word 'wrods'; did you mean 'words"]),
        ("shared/facts.yaml", "{last: ", "{lst: ", ["unknown word 'lst'; did you mean 'last'?"]),
        ("shared/configs/vae.yaml", "!count", "!cuont", ["unknown hole '!cuont'; did you mean '!"]),
        (
            "shared/components/vae.yaml",
            "first_stage_model.,",
            "first_stage.,",
            ["vae: no key of layout.json begins with"],
        ),
    ],
)
def test_a_mistake_is_found_and_said_how_to_mend(
    file: str, before: str, after: str, said: list[str], own: Path
) -> None:
    edit(own / file, (before, after))
    found = problems(own)
    for text in said:
        wanted = text.replace("{folder}", str(own)).replace("{{", "{").replace("}}", "}")
        assert any(wanted in problem for problem in found), found[:5]


def test_a_joint_projection_is_recognised(own: Path) -> None:
    edit(
        own / OPENCLIP,
        (
            "attn.in_proj_bias: {split_rows: [self_attn.q_proj.bias, self_attn.k_proj.bias, "
            "self_attn.v_proj.bias]}",
            "attn.in_proj_bias: self_attn.q_proj.bias",
        ),
    )
    found = problems(own)
    assert any(
        p.endswith("write {split_rows: [the query's name, the key's, the value's]}") for p in found
    )


def test_two_architectures_for_one_file_are_an_error(own: Path) -> None:
    shutil.copytree(own / "sd2", own / "twin")
    found = problems(own)
    assert any("several architectures match" in p and "overlap" in p for p in found)


def test_a_missing_layout_is_named(own: Path) -> None:
    (own / "sd2" / "layout.json").unlink()
    assert any("sd2/layout.json: no such file" in p for p in problems(own))


# The command line.


def run(*arguments: object, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=env)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Gives a folder with an sd1 of its own, which extends our maps."""
    folder = tmp_path / "mine"
    shutil.copytree(OURS / "sd1", folder / "sd1")
    edit(
        folder / "sd1" / "arch.yaml",
        ("title: Stable Diffusion 1.x", "title: My model"),
        ("scaling_factor: 0.18215", "scaling_factor: 0.5"),
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "environment"])
def test_own_key_maps_reach_every_command(
    how: str, mine: Path, sample: Sample, tmp_path: Path
) -> None:
    option = ["--key-maps", mine] if how == "option" else []
    env = {"CKPTCONV_KEY_MAPS": str(mine)} if how == "environment" else None

    def call(*arguments: object) -> Any:
        result = run(*option, *arguments, env=env)
        assert result.exit_code == 0, result.output
        return result

    source, folder = sample("sd1"), tmp_path / "folder"
    known = json.loads(call("architectures", "--json").stdout)
    titles = {row["title"] for row in known["architectures"]}
    assert titles >= {"My model", "Stable Diffusion 2.x"}
    assert "My model" in call("inspect", source).stdout
    call("plan", source)
    assert "My model" in call("convert", source, folder).stderr
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    assert "passed" in call("verify", source, folder).stdout
    assert "My model" in call("export", folder, tmp_path / "x.safetensors").stderr
    assert run("verify", source, folder).exit_code == 1  # by our maps, the factor is wrong


def test_the_check_exits_with_one_on_problems(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check("sd1", "layout", (Problem("tasks", "diffusers has no pipeline MyPipeline"),))
    right = Check("sdxl", "layout", (), (), "text-to-image: 2,516 keys")
    monkeypatch.setattr("ckptconv.commands.maps.check_maps", lambda _maps: (wrong, right))
    result = run("maps", "check", mine)
    assert result.exit_code == 1
    assert "  - tasks: diffusers has no pipeline MyPipeline\n" in result.stdout
    assert result.stdout.endswith("FAILED\n")
    assert re.search("^sdxl +layout +ok: text-to-image: 2,516 keys$", result.stdout, re.MULTILINE)


def test_the_check_takes_a_folder_or_that_of_all_commands(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, ...]] = []

    def check(maps: KeyMaps) -> tuple[Check, ...]:
        asked.append(maps.folders)
        return (Check("maps", "map", (), (), "1 map"),)

    monkeypatch.setattr("ckptconv.commands.maps.check_maps", check)
    for arguments in (["maps", "check"], ["maps", "check", mine]):
        assert run(*arguments).exit_code == 0
    result = run("--key-maps", mine, "maps", "check", "--json")
    data = json.loads(result.stdout)
    assert (data["passed"], data["checks"][0]["extent"]) == (True, "1 map")
    assert asked == [(OURS,), (mine, OURS), (mine, OURS)]


def test_the_header_of_a_file_becomes_a_layout(sample: Sample, tmp_path: Path) -> None:
    result = run("maps", "header", sample("sdxl"))
    assert result.exit_code == 0
    (tmp_path / "layout.json").write_text(result.stdout)
    made = header_from_json(tmp_path / "layout.json")
    have = {key: (info.dtype, info.shape) for key, info in made.tensors.items()}
    assert have == {key: value[:2] for key, value in raw(sample("sdxl")).items()}
    assert made.metadata == metadata(sample("sdxl"))


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_a_folder_without_maps_is_wrong_usage(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / place
    for arguments in (["maps", "check", folder], ["--key-maps", folder, "architectures"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "is no folder of key maps" in result.stderr


def test_python_takes_key_maps_too(mine: Path, sample: Sample, folder: Folder) -> None:
    maps = KeyMaps([mine, OURS])
    found = ckptconv.verify(sample("sd1"), folder("sd1"), maps=maps)
    assert [p for p in found.problems if "scaling_factor" in p]
