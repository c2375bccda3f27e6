"""FLUX.1 and what was made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.errors import FileRefused, UsageError
from ckptconv.inference.generation import Settings, with_defaults
from ckptconv.inference.model import open_model
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from tests.support.checkpoints import hollow
from tests.support.properties import Convert, PipelineProperties, PublishedConfigurations
from tests.support.reference import flux, t5
from tests.support.reference.files import FLUX_FILES, all_in_one, transformer_alone
from tests.support.relatives import Relative, assert_equal, exported, run, verified

DEV = all_in_one(flux.TINY_DEV)
TRANSFORMER, T5 = FLUX_FILES["flux1-dev"], FLUX_FILES["t5xxl_fp16"]
PROJECTION = f"{FLUX_FILES['clip_l']}text_projection.weight"
GUIDED = {"transformer.guidance_embeds": True, "scheduler.use_dynamic_shifting": True}
UNGUIDED = {"transformer.guidance_embeds": False, "scheduler.shift": 1.0}
HEADS = {"transformer.num_attention_heads": 3, "text_encoder_2.num_heads": 2}


def says(architecture: str) -> dict[str, str]:
    return {"modelspec.architecture": architecture}


FIRST = Relative("FLUX.1 dev", DEV, {PROJECTION: torch.randn(128, 128).half()}, GUIDED)


class TestProperties(PipelineProperties):
    relatives = (
        FIRST,
        Relative(
            "FLUX.1 dev",
            transformer_alone(flux.TINY_DEV, ""),
            configs=GUIDED,
            variant="transformer alone",
        ),
        Relative(
            "FLUX.1 dev",
            all_in_one(flux.TINY_WIDE) | {T5: partial(t5.T5, t5.TINY_T5_TWICE)},
            configs=HEADS,
            variant="of other sizes, T5's embedding twice",
            slow=True,
        ),
        Relative("FLUX.1 schnell", all_in_one(flux.TINY_SCHNELL), configs=UNGUIDED, slow=True),
        Relative(
            "FLUX.1 schnell",
            transformer_alone(flux.TINY_SCHNELL),
            configs=UNGUIDED,
            variant="transformer alone",
        ),
        Relative("FLUX.1 Fill", all_in_one(flux.TINY_FILL), slow=True),
        Relative("FLUX.1 Fill", transformer_alone(flux.TINY_FILL), variant="transformer alone"),
        Relative("FLUX.1 Krea", DEV, configs=GUIDED, slow=True, metadata=says("flux-1-krea-dev")),
        Relative(
            "FLUX.1 Kontext", DEV, configs=GUIDED, slow=True, metadata=says("flux-1-kontext-dev")
        ),
        Relative("FLUX.1 Depth", all_in_one(flux.TINY_CONTROL), slow=True),
        Relative(
            "FLUX.1 Canny",
            all_in_one(flux.TINY_CONTROL),
            slow=True,
            metadata=says("flux-1-canny-dev"),
        ),
        Relative(
            "FLUX.1 Depth",
            transformer_alone(flux.TINY_CONTROL),
            variant="transformer alone",
        ),
    )


class TestConfigurations(PublishedConfigurations):
    published = ("flux-dev", "flux-schnell")


DONORS = {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5xxl_fp16"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four files of a small FLUX.1; that of T5 holds its embedding twice, as the published."""
    folder, tensors = tmp_path_factory.mktemp("parts"), FIRST.tensors()
    files = {}
    for name, prefix in FLUX_FILES.items():
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if name == "t5xxl_fp16":
            own["encoder.embed_tokens.weight"] = own["shared.weight"].clone()
        files[name] = folder / f"{name}.safetensors"
        save_file(own, files[name])
    return files


@pytest.mark.slow
def test_four_files_make_the_folder_that_one_does(
    parts: Mapping[str, Path], converted: Convert, tmp_path: Path
) -> None:
    file, out = parts["flux1-dev"], tmp_path / "out"
    donors = {name: parts[of] for name, of in DONORS.items()}
    options = [x for name, path in donors.items() for x in (f"--{name.replace('_', '-')}", path)]
    run("convert", file, out, *options)
    run("verify", file, out, *options)
    verified(None, out)
    whole = converted(FIRST).folder
    for path in whole.glob("*/*"):
        here = out / path.relative_to(whole)
        if path.suffix == ".safetensors" and path.parent.name != "ckptconv":
            assert_equal(load_file(here), load_file(path))
        elif path.parent.name != "ckptconv":
            assert here.read_bytes() == path.read_bytes(), path
    assert (out / "model_index.json").read_bytes() == (whole / "model_index.json").read_bytes()
    back = exported(out)  # one file, with all that the folder has
    own = load_file(file)
    assert_equal({key: back[key] for key in own}, own)
    run("convert", tmp_path / "back.safetensors", tmp_path / "again")
    for path in out.glob("*/*.safetensors"):
        if path.parent.name != "ckptconv":
            assert_equal(load_file(tmp_path / "again" / path.relative_to(out)), load_file(path))


def test_a_transformer_alone_says_what_to_add(parts: Mapping[str, Path], tmp_path: Path) -> None:
    report = ckptconv.convert(parts["flux1-dev"], tmp_path / "out", configs_only=True)
    assert [w.partition(" ")[0] for w in report.warnings] == [*DONORS]
    with pytest.raises(FileRefused, match="has no vae and no text_encoder and no text_encoder_2"):
        ckptconv.load_pipeline(parts["flux1-dev"])


@pytest.mark.parametrize("name", DONORS)
def test_a_file_in_the_wrong_place_is_told_the_right_one(
    name: str, parts: Mapping[str, Path], tmp_path: Path
) -> None:
    for place, of in DONORS.items():
        if place != name:
            choices: dict[str, Any] = {name: parts[of]}
            with pytest.raises(FileRefused, match="cannot give what it is to give") as caught:
                ckptconv.plan(parts["flux1-dev"], **choices)
            assert caught.value.problems == (f"{name}: the file fits {place}={str(parts[of])!r}",)
    wrong: dict[str, Any] = {name: parts["flux1-dev"]}
    with pytest.raises(FileRefused) as caught:
        ckptconv.plan(parts["flux1-dev"], **wrong)
    assert caught.value.problems == (f"{name}: the file holds none that FLUX.1 can have",)


def alone(config: flux.FluxConfig, file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a transformer alone."""
    built = transformer_alone(config)[TRANSFORMER]().half().state_dict()
    save_file({k: v.contiguous() for k, v in built.items()}, file, dict(metadata or {}))
    return file


def test_a_release_of_the_model_is_not_asked_of_a_donor(tmp_path: Path) -> None:
    for name, prefix in {"flux": "model.diffusion_model.", "sd3": ""}.items():
        layout = bundled().architectures[name].layout().tensors.items()
        hollow(tmp_path / name, [(k, t.dtype, t.shape) for k, t in layout if k.startswith(prefix)])
    plan = ckptconv.plan(tmp_path / "flux", release="kontext", text_encoder_2=tmp_path / "sd3")
    assert plan.detection.facts["release"].value == "kontext"
    assert plan.donors["text_encoder_2"].name == "sd3"


@pytest.mark.slow
def test_an_edited_record_decides_nothing_that_the_file_cannot_be(tmp_path: Path) -> None:
    file, out = alone(flux.TINY_DEV, tmp_path / "model.safetensors"), tmp_path / "out"
    ckptconv.convert(file, out)
    record = out / "ckptconv" / "source.json"
    values = json.loads(record.read_text())
    values["facts"]["release"] |= {"source": "option", "value": "large"}
    record.write_text(json.dumps(values))
    for source in (None, file):
        found = ckptconv.verify(source, out)
        notes = [note for check in found.checks for note in check.notes]
        assert any(note.startswith("release = large (") for note in notes), notes
    ckptconv.export(out, tmp_path / "back.safetensors")


KONTEXT, KREA = says("flux-1-kontext-dev"), says("flux-1-krea-dev")


@pytest.mark.parametrize(
    ("config", "metadata", "option", "release", "source"),
    [
        (flux.TINY_DEV, {}, None, "dev", "assumed"),
        (flux.TINY_DEV, KREA, None, "krea", "metadata"),
        (flux.TINY_DEV, KREA, "kontext", "kontext", "option"),
        (flux.TINY_CONTROL, {}, None, "depth", "assumed"),
        (flux.TINY_CONTROL, KONTEXT, None, "depth", "assumed"),
        (flux.TINY_CONTROL, {}, "canny", "canny", "option"),
        (flux.TINY_SCHNELL, KONTEXT, None, "schnell", "structure"),
        (flux.TINY_FILL, KONTEXT, None, "fill", "task"),
    ],
)
def test_models_that_look_alike_are_told_by_metadata_and_option(
    config: flux.FluxConfig,
    metadata: dict[str, str],
    option: str | None,
    release: str,
    source: str,
    tmp_path: Path,
) -> None:
    file = alone(config, tmp_path / "model.safetensors", metadata)
    plan = ckptconv.plan(file, release=option)
    fact = plan.detection.facts["release"]
    assert (fact.value, fact.source) == (release, source)
    pipeline = plan.detection.require()[1].pipeline
    assert (pipeline == "FluxKontextPipeline") == (release == "kontext")


@pytest.mark.parametrize(
    ("config", "option", "hint"),
    [
        (flux.TINY_DEV, "canny", "it can be dev or krea or kontext"),
        (flux.TINY_CONTROL, "kontext", "it can be depth or canny"),
        (flux.TINY_SCHNELL, "dev", "it can be schnell"),
        (flux.TINY_FILL, "large-turbo", "it can be fill"),
    ],
)
def test_a_release_that_the_file_cannot_be_is_refused(
    config: flux.FluxConfig, option: str, hint: str, tmp_path: Path
) -> None:
    file = alone(config, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"release='{option}' does not fit") as caught:
        ckptconv.plan(file, release=option)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "config", "noted"),
    [
        ("flux1-kontext-dev", flux.TINY_DEV, "release='kontext'"),
        ("FLUX1KreaDev", flux.TINY_DEV, "release='krea'"),
        ("flux1-canny-dev", flux.TINY_CONTROL, "release='canny'"),
        ("flux1-turbo", flux.TINY_DEV, ""),
        ("flux1-dev", flux.TINY_DEV, ""),
    ],
)
def test_a_name_is_answered_with_the_option(
    name: str, config: flux.FluxConfig, noted: str, tmp_path: Path
) -> None:
    notes = ckptconv.inspect(alone(config, tmp_path / f"{name}.safetensors")).notes
    assert noted in "".join(notes) if noted else not notes


MISSING = ("vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("config", "release", "steps", "guidance"),
    [
        (flux.TINY_DEV, None, 28, 3.5),
        (flux.TINY_DEV, "krea", 28, 4.5),
        (flux.TINY_DEV, "kontext", 28, 2.5),
        (flux.TINY_SCHNELL, None, 4, 0),
        (flux.TINY_FILL, None, 50, 30),
        (flux.TINY_CONTROL, None, 30, 10),
        (flux.TINY_CONTROL, "canny", 50, 30),
        (flux.TINY_CHROMA, None, 40, 3),
    ],
)
def test_images_are_made_with_the_settings_of_the_model(
    config: flux.FluxConfig, release: str | None, steps: int, guidance: float, tmp_path: Path
) -> None:
    file = alone(config, tmp_path / "model.safetensors")
    ckptconv.convert(file, tmp_path / "out", release=release)
    for path, said in ((file, Options(release=release)), (tmp_path / "out", Options())):
        model = open_model(path, said, given=MISSING)
        settings = with_defaults(model, Settings("a fox"))
        assert (settings.steps, settings.guidance) == (steps, guidance)
        asked = with_defaults(model, Settings("a fox", steps=7, guidance=1.5))
        assert (asked.steps, asked.guidance) == (7, 1.5)


@pytest.mark.parametrize(
    ("transformer", "other", "loaded"),
    [
        (torch.bfloat16, torch.float16, "bf16"),
        (torch.bfloat16, torch.float32, "bf16"),
        (torch.float16, torch.float32, "fp16"),
        (torch.float32, torch.float16, "fp32"),
        (torch.float8_e4m3fn, torch.float32, "bf16"),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, "bf16"),
        (torch.bfloat16, torch.bfloat16, "bf16"),
    ],
)
def test_all_weights_are_loaded_in_the_dtype_of_the_transformer(
    transformer: torch.dtype, other: torch.dtype, loaded: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    dtypes = {TRANSFORMER: transformer, T5: other}
    built = {p: DEV[p]().state_dict() for p in dtypes}
    save_file(
        {
            p + k: v.to(dtypes[p]).contiguous()
            for p, state in built.items()
            for k, v in state.items()
        },
        file,
    )
    ckptconv.convert(file, tmp_path / "out")
    given = ("vae", "text_encoder")
    for path in (file, tmp_path / "out"):
        model = open_model(path, Options(), given=given)
        assert model.dtype == loaded
        said = [note for note in model.notes if f"all weights are loaded as {loaded}" in note]
        assert len(said) == (len({transformer, other}) > 1 or transformer.itemsize == 1)
        assert open_model(path, Options(dtype="fp32"), given=given).dtype == "fp32"
