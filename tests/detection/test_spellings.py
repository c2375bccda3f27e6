"""Files whose keys have other names than the original ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.configs.config import configs
from ckptconv.detection.detect import detect
from ckptconv.errors import FileRefused, Incomplete
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from ckptconv.planning.plan import build_plan
from ckptconv.reading.tensor import Header
from ckptconv.reading.tensor import Tensor as Info
from ckptconv.sample import layout_of
from tests.support.oracle import loaded
from tests.support.relatives import assert_equal, round_trip
from tests.support.spellings import (
    DTYPES,
    SPELLINGS,
    openclip_as_transformers,
    plan_of,
    spelled,
    written,
)
from tests.walk import all_the_way

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tests.conftest import Sample


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd2", "sdxl", "sdxl-refiner", "koala-700m"])
def test_a_unet_in_the_diffusers_layout_is_told_by_its_original_names(
    name: str, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample(name), tmp_path / "whole", only=["unet"])
    lone = tmp_path / "whole/unet/diffusion_pytorch_model.safetensors"
    report = ckptconv.convert(lone, tmp_path / "out")
    assert report.plan.detection.require()[0].name == name
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        whole, out = tmp_path / "whole/unet" / file, tmp_path / "out/unet" / file
        if file == "config.json":
            assert json.loads(whole.read_bytes()) == json.loads(out.read_bytes())
        else:
            assert_equal(load_file(whole), load_file(out))
    assert ckptconv.verify(lone, tmp_path / "out").passed
    ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    original = {k: v for k, v in load_file(sample(name)).items() if k.startswith("model.diff")}
    assert_equal(load_file(tmp_path / "back.safetensors"), original)


@pytest.mark.parametrize("old", [False, True])
def test_a_vae_in_the_diffusers_layout_may_have_the_oldest_names(
    old: bool, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample("sd1"), tmp_path / "whole", only=["vae"])
    want = load_file(tmp_path / "whole/vae/diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    given = dict(want)
    for now, before in names.items() if old else ():
        given = {
            k.replace(f"attentions.0.{now}.", f"attentions.0.{before}."): v
            for k, v in given.items()
        }
    assert (given.keys() != want.keys()) == old
    save_file(given, tmp_path / "vae.safetensors")
    ckptconv.convert(tmp_path / "vae.safetensors", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), want)
    assert ckptconv.verify(tmp_path / "vae.safetensors", tmp_path / "out").passed
    assert not any(loaded(diffusers.AutoencoderKL, tmp_path / "out").training for _ in [0])


@pytest.mark.parametrize("name", ["sd1"])
def test_the_ema_copy_of_a_unet_is_enough(name: str, sample: Sample, tmp_path: Path) -> None:
    tensors = load_file(sample(name, ema=True))
    stripped = {k: v for k, v in tensors.items() if not k.startswith("model.diffusion_model.")}
    save_file(stripped, tmp_path / "ema.safetensors")
    report = ckptconv.convert(tmp_path / "ema.safetensors", tmp_path / "out")
    assert "the EMA copy is all that the file has of its UNet" in report.warnings
    ckptconv.convert(sample(name, ema=True), tmp_path / "want", ema=True)
    file = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(tmp_path / "out" / file), load_file(tmp_path / "want" / file))
    assert ckptconv.verify(tmp_path / "ema.safetensors", tmp_path / "out").passed


PLACES = {
    "sdxl": ("conditioner.embedders.1.", "text_encoder_2"),
    "sdxl-refiner": ("conditioner.embedders.0.", "text_encoder_2"),
    "sd2": ("cond_stage_model.", "text_encoder"),
}
"""Where an OpenCLIP text tower lies, and the component that it becomes."""


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits query, key and value in the names of OpenCLIP, as some merging tools do."""
    parts: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if ".attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                parts[key.replace("in_proj_", f"{name}_proj.")] = part.clone()
        else:
            parts[key] = value
    return parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd2", "apart"), ("sdxl", "as transformers"), ("sdxl-refiner", "apart")],
)
def test_an_openclip_tower_may_be_split_already(
    name: str, kind: str, sample: Sample, tmp_path: Path
) -> None:
    prefix, component = PLACES[name]
    tensors = load_file(sample(name))
    ckptconv.convert(sample(name), tmp_path / "want", only=[component])
    want = load_file(tmp_path / "want" / component / "model.safetensors")
    if kind == "apart":
        given = apart(tensors)
    else:
        given = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        given |= {f"{prefix}transformer.{k}": v for k, v in want.items()}
    assert given.keys() != tensors.keys()
    save_file(given, tmp_path / "given.safetensors")
    ckptconv.convert(tmp_path / "given.safetensors", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / component / "model.safetensors"), want)
    round_trip(tmp_path / "given.safetensors", tmp_path / "out")


def test_no_tensor_is_lost_to_a_name_that_another_has(sample: Sample, tmp_path: Path) -> None:
    ckptconv.convert(sample("sd2"), tmp_path / "whole", only=["unet"])
    tensors = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    twin = "model.diffusion_model.out.0.bias"
    save_file({**tensors, twin: torch.ones(3)}, tmp_path / "twin.safetensors")
    plan = ckptconv.plan(tmp_path / "twin.safetensors")
    sources = {source.name for step in plan.steps for source in step.sources}
    assert sources == {*tensors, twin}
    assert plan.unclaimed == ("conv_norm_out.bias",)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("sd1", ["VAE attention with biases of three axes", "UNet and VAE of node editors"]),
        pytest.param("sd2", ["SD2 saved by SGM", "_orig_mod. in the middle"], marks=SLOW),
        pytest.param("sdxl", ["SDXL of node editors, by the names of transformers"], marks=SLOW),
        pytest.param("sdxl", ["projection as a linear layer", "any other prefix"], marks=SLOW),
    ],
)
def test_a_spelling_goes_all_the_way(
    name: str, some: list[str], sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample(name), tmp_path / "want")
    others = spelled(load_file(sample(name)))
    for spelling in some:
        all_the_way(others[spelling], tmp_path / "want", tmp_path)


@pytest.mark.parametrize(
    ("equal", "key"), [(True, "q.bias"), (False, "q.bias"), (True, "k.weight")]
)
def test_two_spellings_of_one_tensor_must_agree(
    equal: bool, key: str, sample: Sample, tmp_path: Path
) -> None:
    tensors = load_file(sample("sd1"))
    usual = f"first_stage_model.decoder.mid.attn_1.{key}"
    twin = usual.replace(".attn_1.", ".attn_1.to_")
    given = {**tensors, twin: tensors[usual] if equal else tensors[usual] + 1}
    save_file({k: v.clone() for k, v in given.items()}, tmp_path / "twin.safetensors")
    if not equal:
        with pytest.raises(Incomplete, match=f"{twin} and {usual}"):
            ckptconv.convert(tmp_path / "twin.safetensors", tmp_path / "out")
        return
    report = ckptconv.convert(tmp_path / "twin.safetensors", tmp_path / "out")
    assert any("another spelling" in warning for warning in report.warnings)
    round_trip(tmp_path / "twin.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "long", "limits"),
    [
        ("sd1", ["cond_stage_model.transformer."], {"tokenizer": 248}),
        ("sdxl", ["conditioner.embedders.0.transformer."], {"tokenizer": 77, "tokenizer_2": 77}),
        (
            "sdxl",
            ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
            {"tokenizer": 248, "tokenizer_2": 248},
        ),
    ],
)
def test_the_tokenizer_follows_a_longer_text_encoder(
    name: str, long: list[str], limits: Mapping[str, int]
) -> None:
    dtypes = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}
    tensors = {
        key: torch.empty(
            (248, *shape[1:]) if key.startswith(tuple(long)) and shape[:1] == (77,) else shape,
            dtype=dtypes[dtype],
            device="meta",
        )
        for key, dtype, shape in layout_of(bundled().architectures[name])
    }
    built = configs(plan_of(tensors))
    assert {n: built[n].values["model_max_length"] for n in limits} == limits


def sample_of(name: str) -> dict[str, Tensor]:
    """Returns the tensors of a small file, without values."""
    dtypes = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}
    layout = layout_of(bundled().architectures[name])
    return {k: torch.empty(s, dtype=dtypes[d], device="meta") for k, d, s in layout}


MARK = torch.empty(0, device="meta")
NODES = SPELLINGS["UNet and VAE of node editors"]


def test_what_marks_a_file_is_found_inside_a_wrapper_around_other_prefixes() -> None:
    marked = {**NODES(sample_of("sdxl")), "v_pred": MARK, "ztsnr": MARK}
    plan = plan_of({f"state_dict.{key}": tensor for key, tensor in marked.items()})
    assert plan.detection.facts["prediction_type"].value == "v_prediction"
    assert plan.detection.facts["zero_terminal_snr"].value is True
    assert not plan.unclaimed


def test_a_key_that_is_nothing_but_a_prefix_is_a_stray() -> None:
    plan = plan_of({**sample_of("sd1"), "model.diffusion_model.": MARK})
    assert (plan.unclaimed, plan.absent) == (("model.diffusion_model.",), ())


def test_a_whole_tower_under_other_names_gives_its_last_but_one_layer_too() -> None:
    tensors = sample_of("sd2")
    usual = written(plan_of(tensors))
    spell = openclip_as_transformers("cond_stage_model.model.", "text_encoders.clip_h.transformer.")
    assert written(plan_of(spell(tensors))) == usual


@pytest.mark.parametrize(
    ("name", "added", "said"),
    [
        (
            "sdxl",
            {"conditioner.embedders.1.model.text_projection.weight": (128, 128)},
            "conditioner.embedders.1.model.text_projection: the file has its tensors in another sp",
        ),
        (
            "sd2",
            {"cond_stage_model.model.transformer.resblocks.0.attn.q_proj.weight": (64, 64)},
            "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight: the file has its ",
        ),
    ],
)
def test_another_spelling_with_other_shapes_is_not_passed_over(
    name: str, added: dict[str, tuple[int, ...]], said: str
) -> None:
    more = {key: torch.empty(shape, device="meta") for key, shape in added.items()}
    problems = plan_of({**sample_of(name), **more}).problems
    assert any(problem.startswith(said) for problem in problems), problems


@pytest.mark.parametrize("equal", [True, False])
def test_two_networks_of_one_kind_must_agree(equal: bool, sample: Sample, tmp_path: Path) -> None:
    tensors = load_file(sample("sd1"))
    key = "decoder.conv_in.bias"
    twins = {
        f"vae.{k.removeprefix('first_stage_model.')}": v.clone()
        for k, v in tensors.items()
        if k.startswith("first_stage_model.")
    }
    twins[f"vae.{key}"] += 0 if equal else 1
    save_file(tensors | twins, tmp_path / "twins.safetensors")
    problems = ckptconv.plan(tmp_path / "twins.safetensors").problems
    assert problems == (
        ()
        if equal
        else (
            "in two spellings that differ, of which one has to go: "
            f"vae.{key} and first_stage_model.{key}",
        )
    )


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("vae", "double_blocks.{}.img_attn.qkv.weight"),
        ("clip-text", "encoder.block.{}.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_component_beside_a_network_of_others_is_not_alone(name: str, others: str) -> None:
    more = {others.format(n): torch.empty(4, 4, device="meta") for n in range(300)}
    path = Path("made.safetensors")
    infos = {
        key: Info(path, key, "F32", tuple(tensor.shape), 0, 0)
        for key, tensor in {**sample_of(name), **more}.items()
    }
    assert detect(Header(path, infos, {}, 0, 0)).refusal


def test_a_layer_more_inside_the_unet_is_said_with_what_that_means() -> None:
    tensors = sample_of("sd1")
    block = "model.diffusion_model.middle_block."
    more = {
        key.replace(f"{block}1.", f"{block}3."): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{block}1.")
    }
    plan = plan_of({**tensors, **more})
    assert set(plan.unclaimed) == set(more)
    assert ["if the network computes with that" in note for note in plan.notes] == [True]


@pytest.mark.parametrize("prefix", ["unet.", "some.trainer."])
def test_the_diffusers_layout_may_have_a_prefix(
    prefix: str, sample: Sample, tmp_path: Path
) -> None:
    ckptconv.convert(sample("koala-700m"), tmp_path / "whole", only=["unet"])
    unet = load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
    plan = plan_of({prefix + key: tensor for key, tensor in unet.items()})
    assert plan.detection.require()[0].name == "koala-700m"
    assert (plan.problems, plan.unclaimed) == ((), ())


def test_a_donor_may_have_any_spelling_and_a_wrong_one_is_named(
    sample: Sample, tmp_path: Path
) -> None:
    vae = {f"module.vae.{key}": tensor for key, tensor in load_file(sample("vae")).items()}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file(dict(NODES(load_file(sample("sd1")))), tmp_path / "nodes.safetensors")
    for donor in ("vae", "nodes"):
        plan = ckptconv.plan(sample("sd1"), vae=tmp_path / f"{donor}.safetensors")
        assert len(plan.tensors("vae")) == 248
        assert plan.problems == ()
    with pytest.raises(FileRefused, match=r"sd2\S*: cannot give what it is to give") as caught:
        ckptconv.plan(sample("sd1"), text_encoder=sample("sd2"))
    (problem,) = caught.value.problems
    assert problem == "text_encoder: the file holds none that Stable Diffusion 1.x can have"


def test_what_is_asked_for_must_be_whole_and_nothing_else_is_spoken_of() -> None:
    tensors = {k: v for k, v in sample_of("sd1").items() if ".quant_conv." not in k}
    detection = plan_of(tensors).detection
    only_vae = build_plan(detection, Options(only=frozenset({"vae"})))
    assert "vae: quant_conv.weight is missing" in only_vae.problems
    only_unet = build_plan(detection, Options(only=frozenset({"unet"})))
    assert (only_unet.problems, only_unet.notes) == ((), ())
