"""The converted modules compute the same functions as the original networks.

The reference networks in `tests/support/reference` are written from the papers, in plain torch, and
share nothing with the key maps. Both sides run in float64, where rounding is far below the
tolerance and a swapped or misread tensor is far above it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import ckptconv
from tests.support.reference import text, unet, vae

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 1e-5
"""Relative, as promised; what is found is about 1e-14."""

IDS = torch.tensor([[49406, 320, 2368, 539, 49407, *[0] * 11], [49406, 49407, *[49407] * 14]])
"""Two token sequences with an end of text in the middle, padded as the two tokenizers do."""

CLIP = text.TINY_CLIP
OPENCLIP = text.TINY_OPENCLIP

CLIP_AT = "cond_stage_model.transformer."
ARCHITECTURES: dict[str, tuple[unet.UNetConfig, dict[str, str]]] = {
    "sd1": (unet.TINY_SD1, {"clip": CLIP_AT}),
    "sd2": (unet.TINY_SD2, {"openclip": "cond_stage_model.model."}),
    "sdxl": (
        unet.TINY_SDXL,
        {
            "clip": "conditioner.embedders.0.transformer.",
            "openclip": "conditioner.embedders.1.model.",
        },
    ),
    "sdxl-refiner": (unet.TINY_REFINER, {"openclip": "conditioner.embedders.0.model."}),
}
UNETS = {
    "sd1-inpainting": unet.TINY_SD1_INPAINT,
    "sd1-lcm": unet.TINY_LCM,
    "ssd-1b": unet.TINY_SSD1B,
    "vega": replace(
        unet.TINY_SSD1B,
        input_depth=((0, 0), (1, 1), (2, 2)),
        output_depth=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
    ),
    "koala-700m": unet.TINY_KOALA,
    "koala-1b": replace(
        unet.TINY_KOALA, has_middle=True, middle_depth=unet.TINY_KOALA.input_depth[-1][0]
    ),
}
"""Files that hold a UNet and nothing else."""


class Pair:
    """The reference networks of an architecture, and the folder converted from their weights."""

    def __init__(self, name: str, folder: Path, *, linear_vae: bool = False) -> None:
        self.config, encoders = ARCHITECTURES.get(name) or (UNETS[name], {})
        self.unet = unet.randomise(unet.UNet(self.config), 1).double()
        self.vae = unet.randomise(
            vae.Vae(vae.TINY_VAE_LINEAR if linear_vae else vae.TINY_VAE), 2
        ).double()
        self.encoders: dict[str, Any] = {}
        tensors = {f"model.diffusion_model.{k}": v for k, v in self.unet.state_dict().items()}
        if name in ARCHITECTURES:
            tensors |= {f"first_stage_model.{k}": v for k, v in self.vae.state_dict().items()}
        for kind, prefix in encoders.items():
            made = text.ClipText(CLIP) if kind == "clip" else text.OpenClipText(OPENCLIP)
            self.encoders[kind] = unet.randomise(made, 3 + len(self.encoders)).double()
            tensors |= {prefix + k: v for k, v in self.encoders[kind].state_dict().items()}
        source = folder / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, source)
        self.out = folder / name
        ckptconv.convert(source, self.out)

    def load(self, component: str) -> Any:
        """Loads a component as a user would, and checks that nothing is missing or left over."""
        import diffusers
        import transformers

        library = transformers if component.startswith("text") else diffusers
        name = {
            "unet": "UNet2DConditionModel",
            "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "CLIPTextModelWithProjection",
        }[component]
        module, info = getattr(library, name).from_pretrained(
            self.out / component, torch_dtype=torch.float64, output_loading_info=True
        )
        assert not any(info.values()), info
        return module.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("oracle"))


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3, "the reference gives nothing to compare"
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < TOLERANCE


def test_the_unet_computes_the_same(pair: Pair) -> None:
    compare_unets(pair)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_alone_computes_the_same(name: str, tmp_path: Path) -> None:
    compare_unets(Pair(name, tmp_path))


@torch.no_grad()
def compare_unets(pair: Pair) -> None:
    torch.manual_seed(0)
    config = pair.config
    x = torch.randn(2, config.in_channels, 16, 16, dtype=torch.float64)
    context = torch.randn(2, 5, config.context_dim, dtype=torch.float64)
    steps = torch.tensor([7.0, 801.0], dtype=torch.float64)
    added: dict[str, Any] = {}
    y = guidance = None
    model = pair.load("unet")
    if config.adm_channels:
        # Original networks take pooled text and embedded sizes as one vector; diffusers embeds the
        # sizes itself, 256 wide each, as it does the timestep.
        ids = torch.randint(0, 1024, (2, (config.adm_channels - OPENCLIP.projection) // 256))
        pooled = torch.randn(2, OPENCLIP.projection, dtype=torch.float64)
        sizes = unet.timestep_embedding(ids.flatten().double(), 256).reshape(2, -1).double()
        y = torch.cat([pooled, sizes], dim=1)
        added = {"text_embeds": pooled, "time_ids": ids}
    extra = {}
    if config.cond_proj_dim:
        guidance = torch.randn(2, config.cond_proj_dim, dtype=torch.float64)
        extra["timestep_cond"] = guidance
    theirs = pair.unet(x, steps, context, y, guidance)
    agree(model(x, steps, context, added_cond_kwargs=added, **extra).sample, theirs)


@torch.no_grad()
def test_the_vae_encodes_and_decodes_the_same(pair: Pair) -> None:
    torch.manual_seed(0)
    model = pair.load("vae")
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    mean, logvar = pair.vae.encode(image)
    latents = model.encode(image).latent_dist
    agree(latents.mean, mean)
    agree(latents.logvar, logvar.clamp(-30, 20))
    agree(model.decode(mean).sample, pair.vae.decode(mean))


@torch.no_grad()
def test_the_text_encoders_compute_the_same(pair: Pair) -> None:
    ids = IDS
    name = pair.out.name
    if "clip" in pair.encoders:
        theirs = pair.encoders["clip"](ids)
        ours = pair.load("text_encoder")(ids, output_hidden_states=True)
        agree(ours.last_hidden_state, theirs.last)
        agree(ours.hidden_states[-2], theirs.hidden_states[-2])
    if "openclip" in pair.encoders:
        theirs = pair.encoders["openclip"](ids)
        if name == "sd2":
            agree(pair.load("text_encoder")(ids).last_hidden_state, theirs.penultimate_normed)
        else:
            ours = pair.load("text_encoder_2")(ids, output_hidden_states=True)
            agree(ours.hidden_states[-2], theirs.penultimate)
            agree(ours.text_embeds, theirs.pooled)


@torch.no_grad()
def test_a_vae_with_linear_attention_computes_the_same(tmp_path: Path) -> None:
    pair = Pair("sd1", tmp_path, linear_vae=True)
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    agree(pair.load("vae").encode(image).latent_dist.mean, pair.vae.encode(image)[0])


@torch.no_grad()
def test_the_oracle_notices_a_swap_that_shapes_cannot(tmp_path: Path) -> None:
    pair = Pair("sd1", tmp_path)
    model = pair.load("vae")
    attention = model.encoder.mid_block.attentions[0]
    attention.to_q, attention.to_v = attention.to_v, attention.to_q
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(AssertionError):
        agree(model.encode(image).latent_dist.mean, pair.vae.encode(image)[0])


# Softmax cancels the bias of the keys, so no output shows a wrong one: it is compared directly.
def test_the_key_biases_are_the_originals(pair: Pair) -> None:
    mid = pair.load("vae").encoder.mid_block.attentions[0]
    assert torch.equal(mid.to_k.bias, pair.vae.state_dict()["encoder.mid.attn_1.k.bias"])
    if "openclip" in pair.encoders:
        component = "text_encoder" if pair.out.name == "sd2" else "text_encoder_2"
        ours = pair.load(component).state_dict()
        joined = pair.encoders["openclip"].state_dict()["transformer.resblocks.0.attn.in_proj_bias"]
        key = next(k for k in ours if k.endswith("encoder.layers.0.self_attn.k_proj.bias"))
        assert torch.equal(ours[key], joined.chunk(3)[1])


def test_depths_are_measured_not_looked_up(tmp_path: Path) -> None:
    deep = replace(
        unet.TINY_SDXL,
        input_depth=((0, 0), (1, 1), (3, 3)),
        output_depth=((3, 3, 3), (1, 1, 1), (0, 0, 0)),
        middle_depth=3,
    )
    made = unet.randomise(unet.UNet(deep), 0)
    source = tmp_path / "deep.safetensors"
    save_file(
        {f"model.diffusion_model.{k}": v.contiguous() for k, v in made.state_dict().items()}, source
    )
    report = ckptconv.convert(source, tmp_path / "deep")
    assert report.configs["unet"].values["transformer_layers_per_block"] == [1, 1, 3]
