"""What a trainer does with a pipeline from the file: an adapter in, a step, the LoRA out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from ckptconv import load_pipeline
from tests.conftest import Sample

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def prediction(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    """Runs the UNet on a prompt, as a training step does."""
    names = ("text_encoder", "text_encoder_2")
    encoders = [pipe.components[name] for name in names if pipe.components.get(name)]
    ids = pipe.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    added = {}
    if len(encoders) == 2:
        added["text_embeds"] = outputs[1].text_embeds
        added["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    time = torch.tensor([500])
    made: torch.Tensor = pipe.unet(noise, time, context, added_cond_kwargs=added).sample
    return made


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_an_adapter_trains_saves_and_loads(
    architecture: str, sample: Sample, tmp_path: Path
) -> None:
    pipe = load_pipeline(sample(architecture), device="cpu", dtype="fp32")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = prediction(pipe, noise)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(0)  # of the adapter's first values
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    trained = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    attentions = sum(name.endswith(".to_q") for name, _ in pipe.unet.named_modules())
    assert len(trained) == attentions * len(TARGETS) * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):  # B starts at zero, so A has a gradient from the second step on
        optimizer.zero_grad()
        prediction(pipe, noise).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with_gradient = {n for n, p in pipe.unet.named_parameters() if p.grad is not None}
    assert with_gradient == trained.keys()
    assert all(bool(p.grad is not None and p.grad.any()) for p in trained.values())
    with torch.no_grad():
        after = prediction(pipe, noise)
    assert not torch.allclose(after, before, atol=1e-2)

    type(pipe).save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet))
    again = load_pipeline(sample(architecture), device="cpu", dtype="fp32")
    with torch.no_grad():
        assert torch.equal(prediction(again, noise), before), "training changed the file"
    again.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(prediction(again, noise), after, rtol=1e-4, atol=1e-5)
