"""Shows that the reference networks of SD 1's, SD 2's and SDXL's relatives are the published ones.

No headers are at hand: their sizes are compared with those of the libraries' own classes, made
from the published configurations.
"""

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference import controlnet, dpt, files, layers, schedule, unet, vision
from tests.support.reference.probe import assert_every_entry_matters, gradients, noise
from tests.support.reference.unet import randomise

published = cache(lambda name: files.layout(files.FILES[name]))


def latents(config: unet.UNetConfig, y: Tensor) -> dict[str, Tensor]:
    # 16 is the least that leaves 2x2 at the fourth level: at 1x1 a 3x3 kernel sees only padding.
    return {
        "x": noise(1, config.in_channels, 16, 16).float(),
        "timesteps": torch.tensor([801]),
        "context": noise(1, 7, config.context_dim, seed=2).float(),
        "y": y,
    }


@pytest.mark.parametrize("name", files.FILES)
def test_a_small_file_has_the_keys_of_the_published_one(name: str) -> None:
    def first_blocks(layout: dict[str, tuple[int, ...]]) -> dict[str, int]:
        # Repeated layers are fewer in the small ones; all else is there, with as many dimensions.
        repeated = ("transformer_blocks", "resblocks", "blocks")
        return {
            key: len(shape)
            for key, shape in layout.items()
            for parts in [key.split(".")]
            if all(parts[i + 1] == "0" for i, part in enumerate(parts) if part in repeated)
        }

    small = files.layout(files.TINY_FILES[name])
    assert first_blocks(small) == first_blocks(published(name))
    assert len(small) <= len(published(name))


@pytest.mark.parametrize(
    ("file", "prefix", "keys", "parameters"),
    [
        ("controlnet-sd1", "control_model.", 340, 361_279_120),
        ("controlnet-sdxl", "control_model.", 844, 1_251_014_160),
        ("x4-upscaler", "model.diffusion_model.", 687, 473_398_020),
        ("sd2-unclip-h", "embedder.model.visual.", 392, 632_076_800),
        ("sd2-unclip-l", "embedder.model.", 446, 427_616_513),
        ("sd2-depth", "depth_model.model.", 368, 123_146_985),
    ],
)
def test_networks_have_the_published_size(
    file: str, prefix: str, keys: int, parameters: int
) -> None:
    shapes = [shape for key, shape in published(file).items() if key.startswith(prefix)]
    assert (len(shapes), sum(map(math.prod, shapes))) == (keys, parameters)


def test_every_weight_of_a_controlnet_matters() -> None:
    config = controlnet.TINY_CONTROL_SDXL
    assert config.adm_channels is not None
    model = randomise(controlnet.ControlNet(config), 0)
    hint = noise(1, 3, 128, 128, seed=5).float().requires_grad_()
    y = noise(1, config.adm_channels, seed=3).float()
    out = model(hint=hint, **latents(config, y))
    assert [x.shape[-1] for x in out.down] == [16, 16, 16, 8, 8, 8, 4, 4, 4]
    assert out.middle.shape == (1, 256, 4, 4)
    grads = gradients(model, torch.cat([x.flatten(1) for x in (*out.down, out.middle)], dim=1))
    assert_every_entry_matters(grads)
    assert hint.grad is not None
    assert (hint.grad != 0).all()


def test_every_weight_of_the_upscaler_matters() -> None:
    config = unet.TINY_X4_UPSCALER
    model = randomise(unet.UNet(config), 0)
    grads = gradients(model, model(**latents(config, torch.tensor([350]))))
    assert_every_entry_matters(grads, idle=("label_emb.weight",))
    assert grads["label_emb.weight"].amin(dim=1).nonzero().tolist() == [[350]]


def test_the_upscaler_has_self_attention_at_the_deepest_level_and_in_the_middle_only() -> None:
    with torch.device("meta"):
        model = unet.UNet(unet.X4_UPSCALER)
    has = {
        name.partition(".1.transformer_blocks")[0]: not block.cross_only
        for name, block in model.named_modules()
        if isinstance(block, layers.TransformerBlock)
    }
    across = [f"input_blocks.{i}" for i in (4, 5, 7, 8)]
    across += [f"output_blocks.{i}" for i in range(3, 9)]
    own = [*(f"input_blocks.{i}" for i in (10, 11)), "middle_block"]
    own += [f"output_blocks.{i}" for i in range(3)]
    assert has == dict.fromkeys(across, False) | dict.fromkeys(own, True)


@pytest.mark.parametrize("cross_only", [True, False])
def test_without_self_attention_no_pixel_sees_another(cross_only: bool) -> None:
    block = layers.TransformerBlock(64, 96, 2, cross_only)
    randomise(block, 0).double()
    x, context = noise(2, 9, 64), noise(2, 7, 96, seed=2)
    changed = torch.cat([noise(2, 1, 64, seed=3), x[:, 1:]], dim=1)
    before, after = block(x, context), block(changed, context)
    assert torch.allclose(before[:, 1:], after[:, 1:]) == cross_only


@pytest.mark.parametrize("config", [vision.TINY_VIT_L, vision.TINY_VIT_H])
def test_every_weight_and_pixel_of_an_image_encoder_matters(config: vision.VisionConfig) -> None:
    model = randomise(vision.Visual(config), 0).double()
    image = noise(2, 3, 56, 56).requires_grad_()
    out = model(image)
    assert out.shape == (2, config.projection)
    grads = gradients(model, out)
    assert_every_entry_matters(grads, idle=("in_proj_bias",))
    for layer in range(config.layers):
        q, k, v = grads[f"transformer.resblocks.{layer}.attn.in_proj_bias"].chunk(3)
        # The last layer's queries of the patches go nowhere, the first token's do.
        assert min(q.min(), v.min()) > 1e-12 > k.max()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_an_image_encoder_equals_torchs_own_layers() -> None:
    config = vision.TINY_VIT_H
    model = randomise(vision.Visual(config), 0).double()
    image = noise(2, 3, 56, 56)
    patches = image.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    x = patches.flatten(2) @ model.conv1.weight.flatten(1).T
    x = torch.cat([model.class_embedding.expand(2, 1, -1), x], dim=1) + model.positional_embedding
    x = model.ln_pre(x)
    for block in model.transformer.resblocks:
        own = nn.TransformerEncoderLayer(
            160, config.heads, 640, 0.0, functional.gelu, 1e-5, True, True
        ).double()
        names = {"ln_": "norm", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
        state = block.state_dict()
        for old, new in names.items():
            state = {key.replace(old, new): value for key, value in state.items()}
        own.load_state_dict(state)
        x = own(x)
    torch.testing.assert_close(model(image), model.ln_post(x)[:, 0] @ model.proj)


def test_noise_schedules_closed_form() -> None:
    upscaler = schedule.scaled_linear(1e-4, 0.02)
    assert [float(upscaler[i]) for i in (0, -1)] == pytest.approx([1e-4, 0.02])
    cosine = schedule.NoiseAugmentation()
    for step in (0, 400, 998):
        kept = math.cos(((step + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        kept /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert float(cosine.sqrt_alphas_cumprod[step]) ** 2 == pytest.approx(kept, rel=1e-3)
    assert float(cosine.get_buffer("betas")[-1]) == pytest.approx(0.999)


def test_noise_augmentation_is_in_the_units_of_the_data() -> None:
    model = schedule.NoiseAugmentation().double()
    x, white, mean, std = (noise(2, 8, seed=seed) for seed in range(4))
    level = torch.tensor([0, 999])
    vector = model(x, level, white, mean, std)
    assert vector.shape == (2, 16)
    torch.testing.assert_close(vector[0, :8], x[0], rtol=0, atol=0.1)
    torch.testing.assert_close(vector[1, :8], (white * std + mean)[1], rtol=0, atol=0.01)
    torch.testing.assert_close(vector[:, 8:].float(), unet.timestep_embedding(level, 8))
    # Of a diffusion's own schedule: what the reverse process keeps of start and current step.
    own = schedule.Schedule(schedule.scaled_linear(0.00085, 0.012), posterior=True).double()
    start, current = (own.get_buffer(f"posterior_mean_coef{i}") for i in (1, 2))
    signal = own.get_buffer("sqrt_alphas_cumprod")
    before = own.get_buffer("alphas_cumprod_prev").sqrt()
    torch.testing.assert_close(start + current * signal, before, rtol=1e-4, atol=1e-5)


def test_every_weight_of_the_depth_estimator_matters() -> None:
    config = dpt.TINY_DPT
    model = randomise(dpt.Dpt(config), 0).double()
    image = noise(2, 3, 64, 64).requires_grad_()
    out = model(image)
    assert out.shape == (2, 64, 64)
    assert (out > 0).double().mean() > 0.5  # the last ReLU lets enough through to compare
    assert out.std() > 0.1
    grads = gradients(model, out)
    # The coarsest fusion has nothing finer to add; norm and classifier end another branch.
    unused = (
        "scratch.refinenet4.resConfUnit1.",
        "pretrained.model.norm.",
        "pretrained.model.head.",
    )
    assert {name for name, grad in grads.items() if not grad.any()} == {
        name for name in grads if name.startswith(unused)
    }
    # A ReLU before or behind a convolution may hide a channel on maps this small, not most.
    used = {name: grad for name, grad in grads.items() if not name.startswith(unused)}
    assert min((grad > 1e-13).double().mean() for grad in used.values()) > 0.4
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_the_depth_estimator_pads_so_that_the_odd_pixel_goes_last() -> None:
    ones = torch.ones(1, 1, 4, 4)
    assert dpt.pad_same(ones, 3, 2, 0.0)[0, 0].sum(0).tolist() == [4, 4, 4, 4, 0]
    assert dpt.pad_same(ones, 7, 2, 0.0)[0, 0].sum(0).tolist() == [0, 0, 4, 4, 4, 4, 0, 0, 0]
    assert dpt.pad_same(ones, 3, 1, 0.0)[0, 0].sum(0).tolist() == [0, 4, 4, 4, 4, 0]
    assert dpt.pad_same(ones, 1, 2, 0.0).shape == ones.shape


def test_standardised_convolutions_ignore_scale_and_shift_of_their_weights() -> None:
    conv = randomise(dpt.StdConv(8, 16, 3, stride=2), 0).double()
    x = noise(2, 8, 6, 6)
    before = conv(x)
    weight = conv.weight.data
    normed = functional.instance_norm(weight.flatten(1)[None], eps=1e-8).view_as(weight)
    padded = functional.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(before, functional.conv2d(padded, normed, stride=2))
    conv.weight.data = 3 * weight + noise(16, 1, 1, 1)
    torch.testing.assert_close(conv(x), before, rtol=1e-5, atol=1e-5)
