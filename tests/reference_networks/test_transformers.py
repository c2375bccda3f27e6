"""The reference networks of FLUX.1, Chroma and Z-Image are the published ones, and compute."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ckptconv.maps.architecture import bundled
from tests.support.reference import flux, qwen3, t5, vae, z_image
from tests.support.reference.probe import assert_every_entry_matters, gradients, noise
from tests.support.reference.unet import randomise

T5 = "text_encoders.t5xxl.transformer."
QWEN3 = "text_encoders.qwen3_4b.transformer."
PUBLISHED: list[tuple[str, str, Callable[[], nn.Module], int]] = [
    ("flux", "model.diffusion_model.", lambda: flux.Flux(flux.DEV), 780),
    ("flux", "vae.", lambda: vae.Vae(vae.VAE_16), 244),
    ("flux", T5, lambda: t5.T5(t5.XXL), 219),
    ("chroma", "model.diffusion_model.", lambda: flux.Flux(flux.CHROMA), 643),
    ("z-image", "model.diffusion_model.", lambda: z_image.ZImage(z_image.Z_IMAGE), 453),
    ("z-image", QWEN3, lambda: qwen3.Qwen3(qwen3.QWEN3_4B), 398),
]


@pytest.mark.parametrize(("layout", "prefix", "build", "count"), PUBLISHED)
def test_published_keys_and_shapes(
    layout: str, prefix: str, build: Callable[[], nn.Module], count: int
) -> None:
    tensors = bundled().architectures[layout].layout().tensors
    real = {k.removeprefix(prefix): t.shape for k, t in tensors.items() if k.startswith(prefix)}
    with torch.device("meta"):
        built = {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
    assert len(real) == count
    assert built == real


@pytest.mark.parametrize(
    "config", [flux.TINY_DEV, flux.TINY_SCHNELL, flux.TINY_CHROMA], ids=["dev", "schnell", "chroma"]
)
def test_the_prediction_depends_on_every_weight_and_input(config: flux.FluxConfig) -> None:
    model = randomise(flux.Flux(config), 0).double()
    inputs = {
        "img": noise(2, 6, config.channels),
        "txt": noise(2, 5, config.text_width, seed=2),
        "time": torch.tensor([0.3, 0.9], dtype=torch.float64),
        "positions": noise(11, 3, seed=3),
    }
    if config.pooled_width:
        inputs["pooled"] = noise(2, config.pooled_width, seed=4)
    if config.guidance:
        inputs["guidance"] = torch.tensor([1.0, 3.5], dtype=torch.float64)
    for value in inputs.values():
        value.requires_grad_()
    out = model(**inputs)
    assert out.shape == (2, 6, config.out_channels)
    assert 0.1 < float(out.detach().std()) < 10
    # After the last double block the text goes on, after the last single one it does not. The norm
    # of the keys keeps their bias from cancelling in the softmax.
    # Chroma's guidance is 0: the sines of that are, and what they are multiplied with is idle.
    idle = ("distilled_guidance_layer.in_proj.weight",) if config.approximator else ()
    assert_every_entry_matters(gradients(model, out), idle=idle)
    for name, value in inputs.items():
        assert value.grad is not None, name
        assert bool((value.grad.abs() > 0).all()), name


def test_attention_sees_how_far_tokens_are_apart_and_not_where_they_are() -> None:
    q, k, v = (noise(1, 7, 2, 128, seed=seed) for seed in range(3))
    positions = noise(7, 3, seed=4) * 9
    moved = positions + torch.tensor([2.0, -5.0, 11.0])
    out = flux.attended(q, k, v, positions)
    torch.testing.assert_close(flux.attended(q, k, v, moved), out)
    assert not torch.allclose(flux.attended(q, k, v, 2 * positions), out, atol=0.01)
    for axis in range(3):
        changed = positions.clone()
        changed[0, axis] += 1
        assert not torch.allclose(flux.attended(q, k, v, changed), out, atol=1e-3)


def test_z_image_depends_on_every_weight_and_input() -> None:
    config = z_image.TINY_Z_IMAGE
    model = randomise(z_image.ZImage(config), 0).double()
    inputs = {
        "latents": noise(2, config.channels, 6, 10),
        "text": noise(2, 5, config.text_width, seed=2),
        "time": torch.tensor([0.3, 0.9], dtype=torch.float64),
    }
    for value in inputs.values():
        value.requires_grad_()
    out = model(**inputs)
    assert out.shape == inputs["latents"].shape
    assert 0.1 < float(out.detach().std()) < 10
    assert_every_entry_matters(gradients(model, out))
    for name, value in inputs.items():
        assert value.grad is not None, name
        assert bool((value.grad.abs() > 0).all()), name


def test_qwen3_depends_on_every_weight_and_on_no_later_token() -> None:
    model = randomise(qwen3.Qwen3(qwen3.TINY_QWEN3), 0).double()
    ids = torch.randint(2, 1000, (2, 12), generator=torch.Generator().manual_seed(3))
    before, last = model(ids)
    grads = gradients(model, last)
    assert_every_entry_matters(grads, idle=("embed_tokens.weight",))
    rows = grads["model.embed_tokens.weight"].sum(1).nonzero().flatten().tolist()
    assert rows == sorted(set(ids.flatten().tolist()))
    assert not torch.allclose(before, last)
    torch.testing.assert_close(model(ids[:, :7])[1], last[:, :7])


def test_t5_depends_on_every_weight() -> None:
    config = t5.TINY_T5
    model = randomise(t5.T5(config), 0).double()
    ids = torch.randint(2, config.vocabulary, (2, 12), generator=torch.Generator().manual_seed(3))
    grads = gradients(model, model(ids))
    assert_every_entry_matters(grads, idle=("shared.weight", "relative_attention_bias.weight"))
    rows = grads["shared.weight"].sum(1).nonzero().flatten().tolist()
    assert rows == sorted(set(ids.flatten().tolist()))
    classes = {t5.bucket(key - query, config.buckets) for key in range(12) for query in range(12)}
    assert grads[t5.BIAS].sum(1).nonzero().flatten().tolist() == sorted(classes)


def test_distances_share_a_class_the_more_the_farther_they_are() -> None:
    before = [t5.bucket(-distance, 32) for distance in range(200)]
    assert before[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert before == sorted(before)
    assert [before.count(n) for n in range(8, 16)] == [4, 4, 7, 9, 14, 18, 27, 109]
    assert before[128:] == [15] * 72
    assert [t5.bucket(distance, 32) for distance in range(1, 200)] == [n + 16 for n in before[1:]]
