"""Shows that the reference networks are the published ones by name and shape, and compute."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference import layers, text, unet, vae
from tests.support.reference.probe import assert_every_entry_matters, gradients, noise
from tests.support.reference.unet import randomise

HEADERS = Path(__file__).parents[1] / "headers"
UNET = "model.diffusion_model."
FIRST = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."
SDXL_CLIP = "conditioner.embedders.0.transformer."

PUBLISHED: list[tuple[str, str, Callable[[], nn.Module]]] = [
    ("sd15-emaonly-fp32", UNET, lambda: unet.UNet(unet.SD15)),
    ("sd15-full-ema-fp32", UNET, lambda: unet.UNet(unet.SD15)),
    ("sd15-inpainting-fp16", UNET, lambda: unet.UNet(unet.SD15_INPAINT)),
    ("sd21-768-fp32", UNET, lambda: unet.UNet(unet.SD21)),
    ("sdxl-base-fp16", UNET, lambda: unet.UNet(unet.SDXL)),
    ("sdxl-refiner-fp16", UNET, lambda: unet.UNet(unet.REFINER)),
    ("sd15-emaonly-fp32", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sd15-full-ema-fp32", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sd15-inpainting-fp16", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sd21-768-fp32", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sdxl-base-fp16", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sdxl-refiner-fp16", FIRST, lambda: vae.Vae(vae.VAE)),
    ("sd15-emaonly-fp32", CLIP, lambda: text.ClipText(text.CLIP_L)),
    ("sd15-full-ema-fp32", CLIP, lambda: text.ClipText(text.CLIP_L)),
    ("sd15-inpainting-fp16", CLIP, lambda: text.ClipText(text.CLIP_L)),
    ("sdxl-base-fp16", SDXL_CLIP, lambda: text.ClipText(text.CLIP_L)),
    ("sd21-768-fp32", OPENCLIP, lambda: text.OpenClipText(text.OPENCLIP_H)),
    (
        "sdxl-base-fp16",
        "conditioner.embedders.1.model.",
        lambda: text.OpenClipText(text.OPENCLIP_BIGG),
    ),
    (
        "sdxl-refiner-fp16",
        "conditioner.embedders.0.model.",
        lambda: text.OpenClipText(text.OPENCLIP_BIGG),
    ),
]

TINY_UNETS = {
    "sd1": unet.TINY_SD1,
    "lcm": unet.TINY_LCM,
    "sd2": unet.TINY_SD2,
    "sdxl": unet.TINY_SDXL,
    "refiner": unet.TINY_REFINER,
    "ssd1b": unet.TINY_SSD1B,
    "koala": unet.TINY_KOALA,
}


@pytest.mark.parametrize(("header", "prefix", "build"), PUBLISHED)
def test_published_keys_and_shapes(
    header: str, prefix: str, build: Callable[[], nn.Module]
) -> None:
    tensors = json.loads((HEADERS / f"{header}.json").read_text())["tensors"]
    real = {
        key.removeprefix(prefix): tuple(shape)
        for key, (_, shape) in tensors.items()
        if key.startswith(prefix)
    }
    with torch.device("meta"):
        module = build()
    built = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert len(real) > 100
    assert built == real


def ids(config: text.TextConfig) -> Tensor:
    """Two prompts whose end-of-text tokens stand at 5 and 8, padded in the two usual ways."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, config.vocabulary - 2, (2, 12), generator=generator)
    rows[0, 5:] = config.vocabulary - 1
    rows[1, 8:] = 0
    rows[1, 8] = config.vocabulary - 1
    return rows


def unet_inputs(config: unet.UNetConfig) -> dict[str, Any]:
    # 16 is the least that leaves 2x2 at the fourth level: at 1x1 a 3x3 kernel sees only padding.
    inputs = {
        "x": noise(2, config.in_channels, 16, 16).float(),
        "timesteps": torch.tensor([3, 801]),
        "context": noise(2, 7, config.context_dim, seed=2).float(),
    }
    if config.adm_channels is not None:
        inputs["y"] = noise(2, config.adm_channels, seed=3).float()
    if config.cond_proj_dim is not None:
        inputs["guidance"] = noise(2, config.cond_proj_dim, seed=4).float()
    return inputs


def rows_used(grad: Tensor) -> list[int]:
    return [row for row, total in enumerate(grad.sum(1).tolist()) if total > 0]


@pytest.mark.parametrize("name", TINY_UNETS)
def test_unet_output_depends_on_every_weight_and_input(name: str) -> None:
    config = TINY_UNETS[name]
    model = randomise(unet.UNet(config), 0)
    inputs = unet_inputs(config)
    leaves = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]
    out = model(**inputs)
    assert out.shape == (2, config.out_channels, 16, 16)
    assert 0.1 < float(out.detach().std()) < 10
    assert_every_entry_matters(gradients(model, out))
    assert all(bool((leaf.grad.abs() > 0).all()) for leaf in leaves)


@pytest.mark.parametrize("config", [vae.TINY_VAE, vae.TINY_VAE_LINEAR])
def test_vae_output_depends_on_every_weight(config: vae.VaeConfig) -> None:
    model = randomise(vae.Vae(config), 0).double()
    mean, logvar = model.encode(noise(2, 3, 16, 16))
    image = model.decode(mean)
    assert mean.shape == logvar.shape == (2, 4, 2, 2)
    assert image.shape == (2, 3, 16, 16)
    out = torch.cat([logvar.flatten(1), image.flatten(1)], dim=1)
    # Softmax cancels what all keys share: no output can tell one key bias from another.
    assert_every_entry_matters(gradients(model, out), idle=("attn_1.k.bias",))


def test_clip_output_depends_on_every_weight() -> None:
    config = text.TINY_CLIP
    model = randomise(text.ClipText(config), 0).double()
    prompts = ids(config)
    out = model(prompts)
    assert len(out.hidden_states) == config.layers + 1
    grads = gradients(model, out.last)
    idle = ("k_proj.bias", "token_embedding.weight", "position_embedding.weight")
    assert_every_entry_matters(grads, idle=idle)
    embeddings = "text_model.embeddings."
    tokens = sorted(set(prompts.flatten().tolist()))
    assert rows_used(grads[embeddings + "token_embedding.weight"]) == tokens
    assert rows_used(grads[embeddings + "position_embedding.weight"]) == list(range(12))


def test_openclip_pooled_output_depends_on_every_weight() -> None:
    config = replace(text.TINY_OPENCLIP, projection=96)
    model = randomise(text.OpenClipText(config), 0).double()
    out = model(ids(config))
    assert out.pooled.shape == (2, 96)
    idle = ("in_proj_bias", "logit_scale", "token_embedding.weight", "positional_embedding")
    grads = gradients(model, out.pooled)
    assert_every_entry_matters(grads, idle=idle)
    for layer in range(config.layers):
        q, k, v = grads[f"transformer.resblocks.{layer}.attn.in_proj_bias"].chunk(3)
        assert min(q.min(), v.min()) > 1e-9 > 1e-12 > k.max()
    # What stands behind the later end-of-text token (place 8) has no say.
    assert rows_used(grads["positional_embedding"]) == list(range(9))


def test_openclip_outputs_are_what_their_names_say() -> None:
    config = text.TINY_OPENCLIP
    model = randomise(text.OpenClipText(config), 0).double()
    prompts = ids(config)
    before = model(prompts)
    assert torch.equal(before.penultimate_normed, model.ln_final(before.penultimate))
    ends = torch.stack([before.last[0, 5], before.last[1, 8]])
    projected = torch.einsum("bw,wp->bp", ends, model.text_projection)
    torch.testing.assert_close(before.pooled, projected)
    assert not torch.allclose(before.pooled, ends @ model.text_projection.T, atol=0.1)

    model.get_parameter("transformer.resblocks.2.mlp.c_proj.bias").data += noise(config.width)
    after = model(prompts)
    assert torch.equal(before.penultimate, after.penultimate)
    assert not torch.allclose(before.last, after.last, atol=0.1)


@pytest.mark.parametrize("openclip", [False, True])
def test_text_encoders_are_causal(openclip: bool) -> None:
    model = text.OpenClipText(text.TINY_OPENCLIP) if openclip else text.ClipText(text.TINY_CLIP)
    randomise(model, 0)
    prompts = ids(model.config)
    changed = prompts.clone()
    changed[:, 4] += 1
    with torch.no_grad():
        a, b = model(prompts).last, model(changed).last
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert ((a - b)[:, 4:].abs().amax(dim=2) > 1e-4).all()


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def test_openclip_layer_equals_torchs_own() -> None:
    config = text.TINY_OPENCLIP
    layer = randomise(text.OpenClipLayer(config), 0).double()
    own = nn.TransformerEncoderLayer(
        config.width, config.heads, 4 * config.width, 0.0, functional.gelu, 1e-5, True, True
    ).double()
    names = {"ln_": "norm", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    own.load_state_dict(renamed(layer.state_dict(), names))
    x = noise(2, 9, config.width)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), own(x, src_mask=mask))


def test_both_text_encoders_agree_on_one_set_of_weights() -> None:
    config = replace(text.TINY_OPENCLIP, vocabulary=50)
    tower = randomise(text.OpenClipText(config), 0).double()
    clip = text.ClipText(config).double()
    names = {"transformer.resblocks": "text_model.encoder.layers", "ln_final": "final_layer_norm"}
    names |= {"ln_": "layer_norm", "attn.": "self_attn.", "c_fc": "fc1", "c_proj": "fc2"}
    names |= {"final_layer_norm": "text_model.final_layer_norm"}
    names |= {"token_embedding": "text_model.embeddings.token_embedding"}
    names |= {"positional_embedding": "text_model.embeddings.position_embedding.weight"}
    state = renamed(tower.state_dict(), names)
    del state["text_projection"], state["logit_scale"]
    for key in [key for key in state if "in_proj_" in key]:
        for name, part in zip("qkv", state.pop(key).chunk(3), strict=True):
            state[key.replace("in_proj_", f"{name}_proj.")] = part
    state["text_model.embeddings.position_ids"] = torch.arange(config.positions)[None]
    clip.load_state_dict(state)
    prompts = ids(config)
    ours, theirs = clip(prompts), tower(prompts)
    torch.testing.assert_close(ours.hidden_states[-2], theirs.penultimate)
    torch.testing.assert_close(ours.last, theirs.last)


def test_attention_equals_torchs_own() -> None:
    q, k, v = noise(2, 6, 32), noise(2, 6, 32, seed=2), noise(2, 6, 32, seed=3)
    split_q, split_k, split_v = (x.view(2, 6, 4, 8).transpose(1, 2) for x in (q, k, v))
    for causal in (False, True):
        own = functional.scaled_dot_product_attention(split_q, split_k, split_v, is_causal=causal)
        own = own.transpose(1, 2).flatten(2)
        torch.testing.assert_close(text.attention(q, k, v, 4, causal), own)


def test_timestep_embedding_closed_form() -> None:
    built = unet.timestep_embedding(torch.tensor([0, 1, 999]), 8)
    for row, step in zip(built, (0, 1, 999), strict=True):
        angles = [step * frequency for frequency in (1.0, 0.1, 0.01, 0.001)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-4)


def test_activations_closed_form() -> None:
    assert float(text.quick_gelu(torch.tensor(1.0))) == pytest.approx(0.845796, abs=1e-6)
    layer = layers.GEGLU(1, 1)
    layer.proj.weight.data = torch.tensor([[1.0], [0.0]])
    layer.proj.bias.data = torch.tensor([0.0, 1.0])
    # The first half is the value, the second the gate; 0.841345 is Phi(1), tanh gives 0.841192.
    assert layer(torch.tensor([-2.0])).item() == pytest.approx(-2 * 0.841345, abs=1e-5)


def test_downsampling_pads_as_trained() -> None:
    ones = torch.ones(1, 1, 4, 4)
    both_sides, right_and_bottom = layers.downsample(1), vae.Downsample(1)
    for parameter in (*both_sides.parameters(), *right_and_bottom.parameters()):
        parameter.data.fill_(float(parameter.ndim > 1))
    assert both_sides(ones)[0, 0].tolist() == [[4, 6], [6, 9]]
    assert right_and_bottom(ones)[0, 0].tolist() == [[9, 6], [6, 4]]


def test_output_block_takes_the_skip_second() -> None:
    config = unet.TINY_SDXL
    model = randomise(unet.UNet(config), 0)
    # `_run` walks through the layers of a block itself, so the hooks sit on single layers.
    names = {"skip": "input_blocks.8.1", "middle": "middle_block.2", "joined": "output_blocks.0.0"}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, path in names.items():
        model.get_submodule(path).register_forward_hook(
            lambda _module, args, out, name=name: seen.update({name: (args[0], out)})
        )
    with torch.no_grad():
        model(**unet_inputs(config))
    joined = torch.cat([seen["middle"][1], seen["skip"][1]], dim=1)
    assert torch.equal(seen["joined"][0], joined)


def test_norms_have_the_published_epsilons() -> None:
    for name, module in unet.UNet(unet.TINY_SD1).named_modules():
        if isinstance(module, nn.GroupNorm):
            spatial = name.endswith(".norm")
            assert (module.num_groups, module.eps) == (32, 1e-6 if spatial else 1e-5), name
    for module in vae.Vae(vae.TINY_VAE).modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.num_groups, module.eps) == (32, 1e-6)


def test_heads_are_the_published_ones() -> None:
    def heads(config: unet.UNetConfig) -> list[int]:
        with torch.device("meta"):
            blocks = unet.UNet(config).input_blocks.modules()
        return [block.heads for block in blocks if isinstance(block, layers.Attention)][::2]

    assert heads(unet.SD15) == [8, 8, 8, 8, 8, 8]
    assert heads(unet.SD21) == [5, 5, 10, 10, 20, 20]
    assert heads(unet.SDXL) == [10] * 4 + [20] * 20
    assert heads(unet.REFINER) == [12] * 8 + [24] * 8
    encoders = (text.CLIP_L, text.OPENCLIP_H, text.OPENCLIP_BIGG)
    assert [config.heads for config in encoders] == [12, 16, 20]


def test_linear_and_conv_storage_compute_the_same() -> None:
    pairs: list[tuple[nn.Module, nn.Module, tuple[Tensor, ...]]] = [
        (
            layers.SpatialTransformer(64, 2, 128, 8, linear=False),
            layers.SpatialTransformer(64, 2, 128, 8, linear=True),
            (noise(2, 64, 3, 5), noise(2, 7, 128)),
        ),
        (vae.AttnBlock(64, linear=False), vae.AttnBlock(64, linear=True), (noise(2, 64, 3, 5),)),
    ]
    for conv, linear, inputs in pairs:
        randomise(conv.double(), 0)
        shapes = {key: value.shape for key, value in linear.double().state_dict().items()}
        linear.load_state_dict({k: v.view(shapes[k]) for k, v in conv.state_dict().items()})
        torch.testing.assert_close(conv(*inputs), linear(*inputs))


def test_blocks_are_residual() -> None:
    x, emb, context = noise(1, 64, 4, 4), noise(1, 256), noise(1, 7, 128)
    cases: list[tuple[nn.Module, str, tuple[Tensor, ...]]] = [
        (layers.ResBlock(64, 64, 256), "out_layers.3", (x, emb)),
        (layers.SpatialTransformer(64, 1, 128, 8, linear=False), "proj_out", (x, context)),
        (vae.ResnetBlock(64, 64), "conv2", (x,)),
        (vae.AttnBlock(64, linear=False), "proj_out", (x,)),
    ]
    for block, last, inputs in cases:
        randomise(block.double(), 0)
        assert not torch.allclose(block(*inputs), x, atol=0.1)
        for parameter in block.get_submodule(last).parameters():
            parameter.data.zero_()
        assert torch.equal(block(*inputs), x)


def test_middle_variants() -> None:
    def middle(config: unet.UNetConfig) -> set[str]:
        with torch.device("meta"):
            keys = unet.UNet(config).state_dict()
        return {key.split(".")[1] for key in keys if key.startswith("middle_block.")}

    assert middle(unet.TINY_SDXL) == {"0", "1", "2"}
    assert middle(replace(unet.TINY_SDXL, middle_depth=0)) == {"0", "1"}
    assert middle(unet.TINY_SSD1B) == {"0"}
    assert middle(unet.TINY_KOALA) == set()


def test_randomise_is_seeded_and_leaves_nothing_constant() -> None:
    a, b, c = (randomise(layers.TransformerBlock(64, 96, 8), seed) for seed in (7, 7, 8))
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)
        assert float(x.detach().std()) > 1e-3
    assert float(a.norm1.weight.detach().mean()) == pytest.approx(1, abs=0.1)
