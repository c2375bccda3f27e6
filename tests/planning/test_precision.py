"""Which layers `--dtype fp8` rounds, and what becomes of the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv import UsageError
from ckptconv.maps.architecture import bundled
from ckptconv.planning.precision import network_of
from tests.conftest import Sample
from tests.support.pipelines import empty

FP8 = torch.float8_e4m3fn
ARCHITECTURES = bundled().architectures
WITH_NETWORK = [name for name, each in ARCHITECTURES.items() if network_of(each)]
FAST = ("flux", "sd3", "sd1", "controlnet-sd1")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in WITH_NETWORK],
)
def test_the_layers_are_those_that_diffusers_keeps_in_fp8(name: str, sample: Sample) -> None:
    made = ckptconv.plan(sample(name), dtype="fp8")
    network = network_of(ARCHITECTURES[name])
    module = empty(made, network)
    module.enable_layerwise_casting(FP8, torch.bfloat16)  # type: ignore[operator]
    wanted = {key for key, tensor in module.state_dict().items() if tensor.dtype == FP8}
    targets = made.tensors(network)
    assert {key for key, target in targets.items() if target.dtype == "F8_E4M3"} == wanted
    assert f"{len(targets) - len(wanted):,} tensors of the {network} are not rounded" in str(
        made.notes
    )
    others = [s for s in made.steps for t in s.targets if t.component != network and s.casts]
    assert not others


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - WITH_NETWORK))
def test_there_is_no_fp8_without_a_network(name: str, sample: Sample) -> None:
    with pytest.raises(UsageError, match="has no such network"):
        ckptconv.plan(sample(name), dtype="fp8")


def test_a_folder_holds_the_rounded_weights(sample: Sample, tmp_path: Path) -> None:
    """The largest value stands for what is larger, whatever the release of torch does."""
    tensors = load_file(sample("sd1", dtype="fp16"))
    large = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[large].view(-1)[:4] = torch.tensor([460.0, -500.0, 6e4, 0.3])
    save_file(tensors, tmp_path / "in.safetensors")
    report = ckptconv.convert(tmp_path / "in.safetensors", tmp_path / "out", dtype="fp8")
    assert "unet/conv_in.weight: 2 values are too large for F8_E4M3: its largest value now" in (
        report.warnings
    )
    (file,) = (tmp_path / "out/unet").glob("*.safetensors")
    weights = load_file(file)
    assert weights["conv_in.weight"].view(-1)[:4].float().tolist() == [448, -448, 448, 0.3125]
    assert weights["conv_norm_out.weight"].dtype == torch.float16
    source = tensors["model.diffusion_model.time_embed.0.weight"]
    assert torch.equal(weights["time_embedding.linear_1.weight"].half(), source.to(FP8).half())
    for dtype in (None, "fp8"):
        found = ckptconv.verify(tmp_path / "in.safetensors", tmp_path / "out", dtype=dtype)
        assert found.passed
    weights["time_embedding.linear_1.weight"].view(torch.uint8)[0, 0] ^= 1
    save_file(weights, file)
    assert not ckptconv.verify(tmp_path / "in.safetensors", tmp_path / "out").passed


def test_export_does_not_round(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not cast to fp8"):
        ckptconv.export(tmp_path, tmp_path / "out", dtype="fp8")
