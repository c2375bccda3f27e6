"""Adapters that are added to the weights while they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import ckptconv
from ckptconv import CkptconvError, load_pipeline
from ckptconv.cli import main
from ckptconv.maps.architecture import bundled
from ckptconv.options import adapter_file
from ckptconv.reading.source import open_header
from tests.conftest import Sample
from tests.support.adapters import Adapter, layers
from tests.support.pipelines import modules

CLIP = "conditioner.embedders.0.transformer."
UNET = "model.diffusion_model."
TEXT = (".self_attn.", ".mlp.")


def names(module: nn.Module, *ends: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the layers of a module of a library, by its own names."""
    return {
        name: tuple(m.weight.shape)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and name.endswith(ends or ("",))
    }


def kohya_with_names_of_diffusers(adapter: Adapter, _path: Path, pipe: Any) -> None:
    adapter.kohya("lora_unet_", names(pipe.unet))  # convolutions, too: LoCon
    text = names(pipe.text_encoder)
    adapter.kohya("lora_te_text_model_", text, alpha=2)


def kohya_with_original_names(adapter: Adapter, path: Path, pipe: Any) -> None:
    blocks = ("input_blocks.3", "input_blocks.4", "middle_block.1", "output_blocks.2")
    ends = ("input_blocks.0", "time_embed", "label_emb", "out.2")
    adapter.kohya("lora_unet_", layers(path, UNET, *blocks, *ends))
    adapter.kohya("lora_te1_", layers(path, CLIP, *TEXT), alpha=None)
    adapter.kohya("lora_te2_", names(pipe.text_encoder_2, "_proj", "fc1", "fc2"), alpha=0.5)


def peft_with_settings(adapter: Adapter, _path: Path, pipe: Any) -> None:
    unet = names(pipe.unet, "to_q", "to_v", "proj_in", "conv1")
    adapter.peft("unet.", unet)
    adapter.peft("text_encoder.", names(pipe.text_encoder, "q_proj"))
    first = next(iter(unet))
    adapter.settings(
        unet__r=3,
        unet__lora_alpha=6,
        unet__alpha_pattern={first: 12, "proj_in": 1.5},
        unet__target_modules=list(unet),
        text_encoder__r=3,
        text_encoder__lora_alpha=5,
        text_encoder__use_rslora=True,
        text_encoder__target_modules=["q_proj"],
    )


def dora_of_peft(adapter: Adapter, _path: Path, pipe: Any) -> None:
    adapter.peft("unet.", names(pipe.unet, "to_q", "to_out.0", "proj_in", "conv2"), magnitudes=True)


def attention_processors(adapter: Adapter, _path: Path, pipe: Any) -> None:
    for name, shape in names(pipe.unet, "to_q", "to_k", "to_v", "to_out.0").items():
        place, _, leaf = name.removesuffix(".0").rpartition(".")
        lora = f"unet.{place}.processor.{leaf}_lora"
        adapter.lora(lora, shape, ".down.weight", ".up.weight")
    for name, shape in names(pipe.text_encoder, "q_proj", "out_proj", "fc1").items():
        lora = f"text_encoder.text_model.{name}.lora_linear_layer"
        adapter.lora(lora, shape, ".down.weight", ".up.weight")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Pipelines of diffusers, by architecture: whoever changes one puts its weights back."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "write", "changed"),
    [
        ("sd1", kohya_with_names_of_diffusers, 294),
        ("sdxl", kohya_with_original_names, 106),
        ("sd1", peft_with_settings, 104),
        ("sd1", dora_of_peft, 102),
        ("sd1", attention_processors, 134),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_weights_are_those_of_load_and_fuse_in_diffusers(
    architecture: str,
    write: Callable[[Adapter, Path, Any], None],
    changed: int,
    sample: Sample,
    pipelines: dict[str, Any],
    tmp_path: Path,
) -> None:
    source, adapter = sample(architecture), Adapter()
    if architecture not in pipelines:
        pipelines[architecture] = load_pipeline(source, device="cpu", dtype="fp32")
    pipe = pipelines[architecture]
    write(adapter, source, pipe)
    file = adapter.save(tmp_path / "adapter.safetensors")
    parts = {n: m for n, m in modules(pipe).items() if n != "vae"}
    ckptconv.convert(source, tmp_path / "out", dtype="fp32", only=parts, lora=[f"{file}:0.8"])
    before = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in parts.items()}
    pipe.load_lora_weights(tmp_path, weight_name=file.name, local_files_only=True)
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    count = 0
    for name, module in parts.items():
        (weights,) = (tmp_path / "out" / name).glob("*.safetensors")
        ours, theirs = load_file(weights), module.state_dict()
        for key, tensor in ours.items():
            wanted = theirs[key if key in theirs else key.removeprefix("text_model.")]
            np.testing.assert_allclose(tensor, wanted, rtol=1e-5, atol=1e-6, err_msg=key)
        assert len(ours) == len(theirs)
        count += sum(not torch.equal(t, before[name][key]) for key, t in theirs.items())
        module.load_state_dict(before[name])
    assert count == changed


def weights_of(source: Path, out: Path, *adapters: str) -> dict[str, torch.Tensor]:
    """Returns a UNet in fp32, converted with adapters."""
    ckptconv.convert(source, out, dtype="fp32", only=["unet"], lora=adapters)
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


def of_peft(config: Any, shape: tuple[int, ...], adapter: Adapter) -> Any:
    """Returns a layer of PEFT for a weight of some shape, with random values."""
    out, wide, *kernel = shape
    base = nn.Conv2d(wide, out, kernel[0], bias=False) if kernel else nn.Linear(wide, out)
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    for parameter in layer.parameters():
        parameter.data = adapter.random(*parameter.shape)
    return layer


CONV, LINEAR, POINT = ".conv1", ".attn1.to_q", ".proj_in"
LYCORIS: list[tuple[str, Any]] = [
    (end, kind(r=rank, alpha=alpha, target_modules=["0"], **options))
    for kind, rank, alpha, options, ends in (
        (peft.LoHaConfig, 2, 3, {}, (CONV, LINEAR, POINT)),
        (peft.LoHaConfig, 2, 3, {"use_effective_conv2d": True}, (CONV,)),
        (peft.LoKrConfig, 1, 3, {}, (CONV, LINEAR, POINT)),
        (peft.LoKrConfig, 1, 3, {"use_effective_conv2d": True}, (CONV,)),
        (peft.LoKrConfig, 1, 3, {"decompose_both": True, "decompose_factor": 4}, (CONV, LINEAR)),
        (peft.LoKrConfig, 64, 64, {}, (CONV, LINEAR)),  # both matrices whole: there is no rank
    )
    for end in ends
]


def test_loha_and_lokr_add_what_peft_adds(small: Path, tmp_path: Path) -> None:
    adapter, wanted = Adapter(), {}
    before = weights_of(small, tmp_path / "before")
    free = {end: [k for k in before if k.endswith(f"{end}.weight")] for end, _ in LYCORIS}
    forms = set()
    for end, config in LYCORIS:
        key = free[end].pop()
        layer = of_peft(config, tuple(before[key].shape), adapter)
        wanted[key] = 0.5 * layer.get_delta_weight("default").detach()
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        parts = {
            p: getattr(layer, p)["default"]
            for p in layer.adapter_layer_names
            if "default" in getattr(layer, p)
        }
        adapter.tensors |= {f"{name}.{p}": t.detach().clone() for p, t in parts.items()}
        adapter.tensors[f"{name}.alpha"] = torch.tensor(float(config.alpha))
        forms.add(frozenset(parts))
    file = adapter.save(tmp_path / "a:b.safetensors")
    after = weights_of(small, tmp_path / "after", f"{file}:0.5")
    for key, tensor in before.items():
        added = wanted.get(key, torch.zeros(()))
        np.testing.assert_allclose(after[key], tensor + added, rtol=1e-5, atol=1e-6, err_msg=key)
    assert len(forms) == 7


def test_a_convolution_with_a_core_is_three_convolutions_in_a_row(
    small: Path, tmp_path: Path
) -> None:
    before, adapter = weights_of(small, tmp_path / "before"), Adapter()
    key = "mid_block.resnets.0.conv1"
    out, wide, *_ = before[f"{key}.weight"].shape
    shapes = {"down": (3, wide, 1, 1), "mid": (2, 3, 3, 3), "up": (out, 2, 1, 1)}
    parts = {role: adapter.random(*shape) for role, shape in shapes.items()}
    name = "lora_unet_" + key.replace(".", "_")
    adapter.tensors = {f"{name}.lora_{role}.weight": tensor for role, tensor in parts.items()}
    file = adapter.save(tmp_path / "adapter.safetensors")
    after = weights_of(small, tmp_path / "after", str(file))
    image = adapter.random(1, wide, 5, 5)
    through = functional.conv2d(functional.conv2d(image, parts["down"]), parts["mid"], padding=1)
    wanted = functional.conv2d(through, parts["up"])
    added = after[f"{key}.weight"] - before[f"{key}.weight"]
    torch.testing.assert_close(
        functional.conv2d(image, added, padding=1), wanted, rtol=1e-4, atol=1e-4
    )


ATTENTION = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn"


def styled(path: Path, alpha: float = 2.0) -> Adapter:
    """Returns an adapter for the queries of a small SD1 checkpoint, UNet and text encoder."""
    adapter = Adapter()
    adapter.kohya(
        "lora_unet_", layers(path, UNET, "input_blocks.1.1.transformer_blocks.0.attn"), alpha
    )
    encoder = layers(path, "cond_stage_model.transformer.", "layers.0.self_attn")
    adapter.kohya("lora_te_", encoder, alpha)
    return adapter


@pytest.fixture
def style(small: Path, tmp_path: Path) -> Path:
    return styled(small).save(tmp_path / "style.safetensors")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_a_merged_folder_is_verified_with_its_adapters(sample: Sample, tmp_path: Path) -> None:
    source, out = sample("sd1", dtype="fp16"), tmp_path / "out"
    style = styled(source).save(tmp_path / "style.safetensors")
    lora = (f"--lora={style}", f"--lora={style}:-0.3")
    report = json.loads(run("convert", source, out, *lora, "--verify", "--json").stdout)
    assert report["verification"]["passed"]
    assert not report["lossless"]
    assert not json.loads(run("plan", source, *lora, "--json").stdout)["lossless"]
    record = json.loads((out / "ckptconv" / "source.json").read_text())
    name = "style.safetensors"
    assert record["adapters"] == [{"name": name, "scale": 1.0}, {"name": name, "scale": -0.3}]
    found = ckptconv.verify(source, out)
    kinds = {(c.component, c.kind) for c in found.checks if c.problems}
    assert kinds == {("unet", "data"), ("text_encoder", "data")}
    (said,) = (note for c in found.checks for note in c.notes if "source.json" in note)
    merged = f"{name}:1.0, {name}:-0.3 was added: give it with"
    assert f"{merged} lora=FILE:SCALE" in said
    assert f"{merged} --lora FILE:SCALE" in run("verify", source, out, code=1).stdout
    notes = ckptconv.export(out, tmp_path / "back.safetensors").notes
    assert any(f"{name} added, which stays in them" in note for note in notes)


def test_the_pipeline_from_the_file_has_the_bits_of_the_folder(
    sample: Sample, tmp_path: Path
) -> None:
    source = sample("sd1", dtype="fp16")
    style = styled(source).save(tmp_path / "style.safetensors")
    pipe = load_pipeline(source, device="cpu", dtype="bf16", lora=[style])
    ckptconv.convert(source, tmp_path / "out", dtype="bf16", lora=[style])
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[key], t) for key, t in pipe.unet.state_dict().items())
    donor = tmp_path / "out" / "text_encoder"
    with pytest.raises(CkptconvError, match="text_encoder, which comes from a diffusers folder"):
        load_pipeline(source, device="cpu", text_encoder=donor, lora=[style])


def test_a_component_that_is_left_out_takes_its_part_of_the_adapter_along(
    small: Path, style: Path, tmp_path: Path
) -> None:
    report = ckptconv.convert(small, tmp_path / "out", only=["unet"], lora=[style])
    assert report.warnings[-1] == (
        f"{style}: 4 layers of text_encoder, which is left out, are passed over"
    )


def test_an_alpha_that_is_no_number_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    file = styled(small, math.nan).save(tmp_path / "style.safetensors")
    with pytest.raises(CkptconvError, match=r"style\.safetensors: an alpha of the adapter is nan"):
        ckptconv.convert(small, tmp_path / "out", lora=[file])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_has_no_place_in_the_checkpoint_is_named(small: Path, tmp_path: Path) -> None:
    adapter = styled(small)
    tensors = adapter.tensors
    del tensors[f"{ATTENTION}1_to_q.lora_up.weight"]
    tensors[f"{ATTENTION}1_to_k.lora_up.weight"] = torch.zeros(4, 5)
    tensors[f"{ATTENTION}1_to_v.alpha"] = torch.zeros(2)
    tensors[f"{ATTENTION}1_to_out_0.lora_up.weight"] = torch.zeros(4, 3, dtype=torch.int8)
    tensors["lora_unet_nowhere.alpha"] = torch.zeros(())
    tensors["lora_te2_text_projection.alpha"] = torch.zeros(())
    tensors["transformer.x.alpha"] = torch.zeros(())
    again = ATTENTION.replace("input_blocks_1_1", "down_blocks_0_attentions_0")
    for leaf in ("lora_down.weight", "lora_up.weight", "alpha"):
        tensors[f"{again}2_to_q.{leaf}"] = tensors[f"{ATTENTION}2_to_q.{leaf}"].clone()
    tensors[f"{ATTENTION}2_to_k.lora_A.weight"] = torch.zeros(3, 64)
    tensors[f"{ATTENTION}2_to_v.dora_scale"] = torch.zeros(())
    tensors["emb_params"] = torch.zeros(1, 768)
    file = adapter.save(tmp_path / "style.safetensors")
    with pytest.raises(CkptconvError, match="does not fit Stable Diffusion 1") as caught:
        ckptconv.convert(small, tmp_path / "out", lora=[file])
    weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn{}.weight"
    assert set(caught.value.problems) == {
        f"{ATTENTION}1_to_q: has alpha and down; needed down and up, or all factors of a LoHa or "
        "LoKr",
        f"{ATTENTION}1_to_k: alpha [], down [3, 4], up [4, 5] do not make [4, 4], the shape of "
        + weight.format("1.to_k"),
        f"{ATTENTION}1_to_v: alpha has shape [2], needed one number",
        f"{ATTENTION}1_to_out_0: {ATTENTION}1_to_out_0.lora_up.weight is not of floats, and cannot "
        "be merged",
        "lora_unet_nowhere: unet has no such layer",
        "lora_te2_text_projection: there is no text_encoder_2 to change",
        "transformer.x: there is no transformer to change",
        f"{ATTENTION}2_to_q: changes unet/{weight.format('2.to_q')}, as {again}2_to_q does",
        f"{ATTENTION}2_to_k.lora_down.weight: says the same as {ATTENTION}2_to_k.lora_A.weight",
        f"{ATTENTION}2_to_v.dora_scale: a DoRA of LyCORIS, whose magnitudes diffusers does not "
        "read; needed one of LoRA, LoHa or LoKr",
        "emb_params: not a key of a LoRA, LoHa or LoKr; needed one of LoRA, LoHa or LoKr",
    }
    assert caught.value.hint == "give an adapter that was trained on Stable Diffusion 1.x"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("trained", "title"), [("sdxl", "Stable Diffusion XL"), ("sd2", "Stable Diffusion 2.x")]
)
def test_an_adapter_for_another_architecture_says_so(
    trained: str, title: str, small: Path, tmp_path: Path
) -> None:
    adapter = Adapter()
    for key, info in bundled().architectures[trained].layout().tensors.items():
        if key.startswith(UNET) and key.endswith(".attn2.to_k.weight"):
            name = key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
            adapter.lora(f"lora_unet_{name}", info.shape, ".lora_down.weight", ".lora_up.weight")
    adapter.metadata["ss_base_model_version"] = f"{trained}_base"
    file = adapter.save(tmp_path / "style.safetensors")
    shown = run("plan", small, "--lora", file, code=3).stderr
    assert f"Stable Diffusion 1.x; its metadata say that it is for {trained}_base" in shown
    assert f"hint: it is an adapter for {title}" in shown
    assert shown.endswith(": give it to such a checkpoint\n")


def test_how_the_scale_of_an_adapter_is_written(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    save_file({"x": torch.ones(1)}, odd)
    for text, factor in ((odd, 1.0), (f"{odd}:-2", -2.0)):
        adapter = adapter_file(text)
        assert (open_header(adapter.path).path, adapter.scale) == (odd, factor)
    for scale in ("inf", "-inf", "nan"):
        with pytest.raises(CkptconvError, match=f"the scale is {scale}"):
            adapter_file(f"{odd}:{scale}")
    with pytest.raises(CkptconvError, match="half: the file cannot be read"):
        open_header(adapter_file(f"{odd}:half").path)
