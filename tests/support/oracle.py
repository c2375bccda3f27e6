"""Compares converted modules with the reference networks, which share nothing with the key maps.

The networks in `tests/support/reference` are written from the papers, in plain torch. Both sides
run in float64, where rounding is far below the tolerance and a swapped tensor is far above it.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tests.support.reference import (
    controlnet,
    dpt,
    flux,
    mmdit,
    qwen3,
    schedule,
    t5,
    text,
    unet,
    vae,
    vision,
    z_image,
)
from tests.support.reference.probe import noise

TOLERANCE = 1e-5
"""Relative, as promised; what is found is about 1e-14."""

IDS = torch.tensor([[49406, 320, 2368, 539, 49407, *[0] * 11], [49406, 49407, *[49407] * 14]])
"""Two token sequences with an end of text in the middle, padded as the two tokenizers do."""

PIECES = torch.tensor([[3, 9, 1782, 13, 3, 9, 1712, 1], [1782, 13, 1, *[0] * 5]])
"""The same for T5."""

STEPS = torch.tensor([7.0, 801.0], dtype=torch.float64)
POOLED = text.TINY_OPENCLIP.projection


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3, "the reference gives nothing to compare"
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < TOLERANCE


def loaded(cls: Any, folder: Path) -> Any:
    """Loads a folder in float64 as a user would; no key may be missing or left over."""
    module, info = cls.from_pretrained(folder, torch_dtype=torch.float64, output_loading_info=True)
    assert not any(info.values()), info
    return module.eval()


def component(folder: Path, name: str) -> Path:
    """Returns the folder of a component, which is the whole folder where it stands alone."""
    return folder / name if (folder / name).is_dir() else folder


@singledispatch
def compare(network: nn.Module, folder: Path) -> None:
    """Asserts that a module of a converted folder computes what its reference network computes.

    The bias of attention keys is compared directly: softmax cancels it, so no output depends on it.

    Args:
        network: the reference network, float64, with the weights of the file.
        folder: what the file was converted to.
    """
    raise NotImplementedError(f"no comparison for {type(network).__name__}")


@compare.register
def _(network: schedule.Schedule, folder: Path) -> None:
    """Noise schedules are no part of a diffusers module."""


@compare.register
@torch.no_grad()
def _(network: unet.UNet, folder: Path) -> None:
    config = network.config
    model = loaded(diffusers.UNet2DConditionModel, component(folder, "unet"))
    torch.manual_seed(0)
    x = torch.randn(2, config.in_channels, 16, 16, dtype=torch.float64)
    context = torch.randn(2, 5, config.context_dim, dtype=torch.float64)
    y = guidance = None
    extra: dict[str, Any] = {}
    if config.noise_levels:
        extra["class_labels"] = y = torch.tensor([20, 350])
    elif config == unet.TINY_UNCLIP:  # takes an image embedding where SDXL takes text and sizes
        extra["class_labels"] = y = torch.randn(2, 2 * 96, dtype=torch.float64)
    elif config.adm_channels:
        y, extra["added_cond_kwargs"] = conditioning(config.adm_channels)
    if config.cond_proj_dim:
        guidance = torch.randn(2, config.cond_proj_dim, dtype=torch.float64)
        extra["timestep_cond"] = guidance
    agree(
        model(x, STEPS, context, **extra).sample,
        network(x, STEPS, context, y, guidance),
    )


def conditioning(width: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns SDXL's added conditioning, as the original network takes it and as diffusers does.

    The original takes pooled text and embedded sizes as one vector; diffusers embeds the sizes
    itself, 256 wide each, as it does the timestep.
    """
    ids = torch.randint(0, 1024, (2, (width - POOLED) // 256))
    pooled = torch.randn(2, POOLED, dtype=torch.float64)
    sizes = unet.timestep_embedding(ids.flatten().double(), 256).reshape(2, -1).double()
    return torch.cat([pooled, sizes], dim=1), {"text_embeds": pooled, "time_ids": ids}


@compare.register
@torch.no_grad()
def _(network: controlnet.ControlNet, folder: Path) -> None:
    config = network.config
    model = loaded(diffusers.ControlNetModel, component(folder, "controlnet"))
    torch.manual_seed(0)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    hint = torch.rand(2, 3, 128, 128, dtype=torch.float64)
    context = torch.randn(2, 5, config.context_dim, dtype=torch.float64)
    y, added = conditioning(config.adm_channels) if config.adm_channels else (None, None)
    ours = model(x, STEPS, context, controlnet_cond=hint, added_cond_kwargs=added)
    theirs = network(x, hint, STEPS, context, y)
    for one, other in zip(ours.down_block_res_samples, theirs.down, strict=True):
        agree(one, other)
    agree(ours.mid_block_res_sample, theirs.middle)


@compare.register
@torch.no_grad()
def _(network: vae.Vae, folder: Path) -> None:
    model = loaded(diffusers.AutoencoderKL, component(folder, "vae"))
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    mean, logvar = network.encode(image)
    latents = model.encode(image).latent_dist
    agree(latents.mean, mean)
    agree(latents.logvar, logvar.clamp(-30, 20))
    agree(model.decode(mean).sample, network.decode(mean))
    key = model.encoder.mid_block.attentions[0].to_k.bias
    assert torch.equal(key, network.state_dict()["encoder.mid.attn_1.k.bias"])


@compare.register
@torch.no_grad()
def _(network: text.ClipText, folder: Path) -> None:
    projected = isinstance(network, text.ClipTextWithProjection)
    plain = type(network) is text.ClipText
    cls = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
    second = projected and (folder / "text_encoder_2").is_dir()
    model = loaded(cls, component(folder, "text_encoder_2" if second else "text_encoder"))
    ours, theirs = model(IDS, output_hidden_states=True), network(IDS)
    agree(ours.last_hidden_state, theirs.last)
    agree(ours.hidden_states[-2], theirs.hidden_states[-2])
    at_end = theirs.last[torch.arange(len(IDS)), IDS.argmax(-1)]
    if plain:  # FLUX conditions on the state of the end of text
        agree(ours.pooler_output, at_end)
    else:
        agree(
            ours.text_embeds,
            network.pooled(IDS) if isinstance(network, text.ClipTextWithProjection) else at_end,
        )


@compare.register
@torch.no_grad()
def _(network: text.OpenClipText, folder: Path) -> None:
    theirs = network(IDS)
    if (folder / "text_encoder_2").is_dir() or component(folder, "text_encoder") == folder:
        place = component(folder, "text_encoder_2")
        model = loaded(transformers.CLIPTextModelWithProjection, place)
        ours = model(IDS, output_hidden_states=True)
        agree(ours.hidden_states[-2], theirs.penultimate)
        agree(ours.text_embeds, theirs.pooled)
    else:  # SD2 conditions on the layer before the last, and has no projection
        model = loaded(transformers.CLIPTextModel, folder / "text_encoder")
        agree(model(IDS).last_hidden_state, theirs.penultimate_normed)
    _keys_are_equal(model, "encoder.layers.0.self_attn.k_proj.bias", network, "transformer")


@compare.register
@torch.no_grad()
def _(network: t5.T5, folder: Path) -> None:
    several = [path.name for path in folder.glob("text_encoder*") if path.is_dir()]
    name = max(several, default="")  # where a pipeline has several, T5 is the last
    model = loaded(transformers.T5EncoderModel, component(folder, name))
    agree(model(PIECES).last_hidden_state, network(PIECES))


@compare.register
@torch.no_grad()
def _(network: flux.Flux, folder: Path) -> None:
    config, chroma = network.config, network.config.approximator is not None
    cls = diffusers.ChromaTransformer2DModel if chroma else diffusers.FluxTransformer2DModel
    model = loaded(cls, component(folder, "transformer"))
    words, rows, columns = 5, 3, 4
    image = noise(2, rows * columns, config.channels)
    states = noise(2, words, config.text_width, seed=2)
    time = torch.tensor([0.3, 0.9], dtype=torch.float64)
    where = torch.cartesian_prod(
        torch.zeros(1), *(torch.arange(n).float() for n in (rows, columns))
    )
    ids = torch.cat([torch.zeros(words, 3), where])
    inputs: dict[str, Tensor] = {}
    if config.pooled_width:
        inputs["pooled"] = noise(2, config.pooled_width, seed=3)
    if config.guidance:
        inputs["guidance"] = torch.tensor([1.0, 3.5], dtype=torch.float64)
    theirs = {"pooled": "pooled_projections", "guidance": "guidance"}
    ours = model(
        image,
        encoder_hidden_states=states,
        timestep=time,
        txt_ids=ids[:words],
        img_ids=ids[words:],
        **{theirs[name]: value for name, value in inputs.items()},
    ).sample
    agree(ours, network(image, states, time, ids, **inputs))


@compare.register
@torch.no_grad()
def _(network: mmdit.MmDit, folder: Path) -> None:
    config = network.config
    model = loaded(diffusers.SD3Transformer2DModel, component(folder, "transformer"))
    x = noise(2, config.channels, 8, 12)
    words, pooled = noise(2, 5, config.text_width, seed=2), noise(2, config.pooled_width, seed=3)
    ours = model(x, encoder_hidden_states=words, pooled_projections=pooled, timestep=STEPS).sample
    agree(ours, network(x, STEPS, words, pooled))


@compare.register
@torch.no_grad()
def _(network: z_image.ZImage, folder: Path) -> None:
    config = network.config
    model = loaded(diffusers.ZImageTransformer2DModel, component(folder, "transformer"))
    x, words = noise(2, config.channels, 6, 10), noise(2, 5, config.text_width, seed=2)
    time = torch.tensor([0.1, 0.7], dtype=torch.float64)
    ours = model([*x[:, :, None]], time, [*words]).sample
    agree(torch.stack(ours)[:, :, 0], network(x, words, time))


@compare.register
@torch.no_grad()
def _(network: qwen3.Qwen3, folder: Path) -> None:
    model = loaded(transformers.Qwen3Model, component(folder, "text_encoder"))
    ours = model(PIECES, output_hidden_states=True)
    before, last = network(PIECES)
    agree(ours.hidden_states[-2], before)
    agree(ours.last_hidden_state, last)


@compare.register
@torch.no_grad()
def _(network: vision.Embedder, folder: Path) -> None:
    model = loaded(transformers.CLIPVisionModelWithProjection, folder / "image_encoder")
    image = noise(1, 3, 56, 56)
    agree(model(image).image_embeds, network.visual(image))
    _keys_are_equal(model, "encoder.layers.0.self_attn.k_proj.bias", network, "visual.transformer")


def _keys_are_equal(model: Any, ending: str, network: nn.Module, tower: str) -> None:
    joined = network.state_dict()[f"{tower}.resblocks.0.attn.in_proj_bias"]
    (ours,) = (value for key, value in model.state_dict().items() if key.endswith(ending))
    assert torch.equal(ours, joined.chunk(3)[1])


@compare.register
@torch.no_grad()
def _(network: dpt.Dpt, folder: Path) -> None:
    model = loaded(transformers.DPTForDepthEstimation, folder / "depth_estimator")
    image = noise(2, 3, 64, 64)
    agree(model(image).predicted_depth, network(image))
    joined = network.state_dict()["pretrained.model.blocks.0.attn.qkv.bias"]
    attention = model.dpt.encoder.layer[0].attention.attention
    assert torch.equal(attention.key.bias, joined.chunk(3)[1])
