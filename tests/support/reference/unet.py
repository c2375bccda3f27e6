"""The latent-diffusion UNet in its original layout, in plain torch.

``UNet(config).state_dict()`` has exactly the keys that follow ``model.diffusion_model.`` in
published files. Written apart from the converter and from diffusers, so that equal outputs mean
something.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.layers import ResBlock, SpatialTransformer, downsample, upsample
from tests.support.reference.text import table

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class UNetConfig:
    """Hyper-parameters of a UNet; the defaults are those of SD 1.5.

    Attributes:
        in_channels: Channels of the noisy input (9 for in-painting, 8 for instruct-pix2pix, 5 with
            a depth map, 7 with the small image of the upscaler).
        out_channels: Channels of the prediction.
        model_channels: Width of the first level. GroupNorm has 32 groups; at width 32 a group is
            one channel, which hides the time embedding and every bias in front of a norm.
        channel_mult: Width of each level, in units of ``model_channels``.
        input_depth: Transformer depth of each resnet block, per level, shallowest level first;
            0 is a block without a transformer. Its shape also gives the resnets per level.
        output_depth: The same for the output side in running order, deepest level first; each
            level has one block more than on the input side.
        middle_depth: Depth in the middle. 0: two resnets alone. None: one resnet (SSD-1B, Vega).
        has_middle: False where there is no ``middle_block`` at all (KOALA-700M).
        context_dim: Width of the text embedding.
        num_heads: Heads at every level, or None where ``head_dim`` rules.
        head_dim: Width of a head where ``num_heads`` is None.
        linear_proj: Whether ``proj_in`` and ``proj_out`` are linear; 1x1 convolutions otherwise.
        cross_only: Levels, 0 the shallowest, without self-attention: both attentions of a block
            look at the text. The middle always has self-attention.
        adm_channels: Width of the vector behind ``label_emb``, or None.
        noise_levels: Number of noise levels where ``label_emb`` is a table of them, or None.
        cond_proj_dim: Width of the guidance embedding (LCM), or None.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    input_depth: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    output_depth: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    middle_depth: int | None = 1
    has_middle: bool = True
    context_dim: int = 768
    num_heads: int | None = 8
    head_dim: int = 64
    linear_proj: bool = False
    cross_only: tuple[int, ...] = ()
    adm_channels: int | None = None
    noise_levels: int | None = None
    cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        blocks = [len(level) + 1 for level in self.input_depth]
        if [len(level) for level in reversed(self.output_depth)] != blocks:
            raise ValueError("an output level has one block more than its input level")
        if self.adm_channels is not None and self.noise_levels is not None:
            raise ValueError("label_emb takes a vector or a noise level, not both")


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding, cosines first.

    Args:
        timesteps: Steps, shape [B].
        dim: Width of the result, even.

    Returns:
        Float32 tensor of shape [B, dim].
    """
    # In float32 whatever the model's dtype: so it was trained, and at t = 999 the dtype shows.
    steps = torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * steps / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def run(block: nn.Module, h: Tensor, emb: Tensor, context: Tensor) -> Tensor:
    """Apply the layers of a block, each to what it takes.

    Args:
        block: One of ``input_blocks``, ``output_blocks`` or the middle: a Sequential.
        h: Feature map, shape [B, C, H, W].
        emb: Time embedding, shape [B, 4 * model_channels].
        context: Text embedding, shape [B, T, context_dim].

    Returns:
        Feature map, shape [B, C', H', W'].
    """
    for layer in block.children():
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context)
        else:
            h = layer(h)
    return h


class Trunk(nn.Module):
    """What UNet and ControlNet have in common: the embedding, the input side and the middle.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, time_dim = config.model_channels, 4 * config.model_channels
        # A dict, not a Sequential: some files hold `cond_proj` beside the numbered layers.
        self.time_embed = nn.ModuleDict(
            {"0": nn.Linear(width, time_dim), "2": nn.Linear(time_dim, time_dim)}
        )
        if config.cond_proj_dim is not None:
            self.time_embed["cond_proj"] = nn.Linear(config.cond_proj_dim, width, bias=False)
        if config.adm_channels is not None:
            linears = nn.Linear(config.adm_channels, time_dim), nn.Linear(time_dim, time_dim)
            self.label_emb: nn.Module = nn.Sequential(
                nn.Sequential(linears[0], nn.SiLU(), linears[1])
            )
        elif config.noise_levels is not None:
            self.label_emb = table(config.noise_levels, time_dim)

        channels, self.skips = width, [width]
        first = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.Sequential(first)])
        for level, depths in enumerate(config.input_depth):
            for depth in depths:
                out = width * config.channel_mult[level]
                self.input_blocks.append(nn.Sequential(*self._block(channels, out, depth, level)))
                channels = out
                self.skips.append(channels)
            if level < len(config.input_depth) - 1:
                self.input_blocks.append(nn.Sequential(downsample(channels)))
                self.skips.append(channels)

        self.channels = channels
        self.middle_block = self._middle(channels) if config.has_middle else None

    def _block(self, channels: int, out: int, depth: int, level: int | None) -> list[nn.Module]:
        config = self.config
        layers: list[nn.Module] = [ResBlock(channels, out, 4 * config.model_channels)]
        if depth:
            heads = config.num_heads or out // config.head_dim
            cross_only = level in config.cross_only
            layers.append(
                SpatialTransformer(
                    out, depth, config.context_dim, heads, config.linear_proj, cross_only
                )
            )
        return layers

    def _middle(self, channels: int) -> nn.Sequential:
        layers = self._block(channels, channels, self.config.middle_depth or 0, None)
        if self.config.middle_depth is not None:
            layers.append(ResBlock(channels, channels, 4 * self.config.model_channels))
        return nn.Sequential(*layers)

    def embed(self, timesteps: Tensor, y: Tensor | None, guidance: Tensor | None = None) -> Tensor:
        """Return the embedding that every resnet adds.

        Args:
            timesteps: Shape [B].
            y: Input of ``label_emb`` as it is: a vector, shape [B, adm_channels], or integer noise
                levels, shape [B]; only where it exists.
            guidance: Guidance embedding, shape [B, cond_proj_dim]; only where ``cond_proj`` exists.

        Returns:
            Tensor of shape [B, 4 * model_channels].
        """
        emb = timestep_embedding(timesteps, self.config.model_channels)
        emb = emb.to(next(self.parameters()).dtype)
        if guidance is not None:
            emb = emb + self.time_embed["cond_proj"](guidance)
        emb = self.time_embed["2"](functional.silu(self.time_embed["0"](emb)))
        if (y is None) == hasattr(self, "label_emb"):
            raise ValueError("y goes with label_emb")
        out: Tensor = emb if y is None else emb + self.label_emb(y)
        return out


class UNet(Trunk):
    """The original UNet.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, skips = self.channels, list(self.skips)
        self.output_blocks = nn.ModuleList()
        levels = reversed(range(len(config.channel_mult)))
        for level, depths in zip(levels, config.output_depth, strict=True):
            for i, depth in enumerate(depths):
                out = config.model_channels * config.channel_mult[level]
                block = self._block(channels + skips.pop(), out, depth, level)
                channels = out
                if level > 0 and i == len(depths) - 1:
                    block.append(upsample(channels))
                self.output_blocks.append(nn.Sequential(*block))

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, config.out_channels, 3, padding=1),
        )

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict noise (or velocity).

        Args:
            x: Noisy latents, shape [B, in_channels, H, W]; H and W divisible by 2 per downsample.
            timesteps: Shape [B].
            context: Text embedding, shape [B, T, context_dim].
            y: See ``embed``.
            guidance: See ``embed``.

        Returns:
            Tensor of shape [B, out_channels, H, W].
        """
        emb = self.embed(timesteps, y, guidance)
        h, skips = x, []
        for block in self.input_blocks:
            h = run(block, h, emb, context)
            skips.append(h)
        if self.middle_block is not None:
            h = run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = run(block, h, emb, context)
        out: Tensor = self.out(h)
        return out


def randomise(module: ModuleT, seed: int) -> ModuleT:
    """Fill every parameter in place with seeded random values, and return the module.

    Norm weights scatter around 1, biases around 0: no tensor is constant, so that swapping two of
    one shape changes the output. (A bias of attention keys never does: softmax cancels it.)

    Args:
        module: Any reference network, not on the meta device.
        seed: Seed; the same seed gives the same values.

    Returns:
        ``module`` itself.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith(("weight", ".scale")) else 0.0))
    return module


SD15 = UNetConfig()
SD15_INPAINT = replace(SD15, in_channels=9)
SD21 = replace(SD15, context_dim=1024, num_heads=None, linear_proj=True)
SDXL = replace(
    SD21,
    channel_mult=(1, 2, 4),
    input_depth=((0, 0), (2, 2), (10, 10)),
    output_depth=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    middle_depth=10,
    context_dim=2048,
    adm_channels=2816,
)
SD2_DEPTH = replace(SD21, in_channels=5)
# The vector is an image embedding and its embedded noise level, each 768 (CLIP ViT-L) or 1024
# (OpenCLIP ViT-H) wide.
UNCLIP_L = replace(SD21, adm_channels=2 * 768)
UNCLIP_H = replace(SD21, adm_channels=2 * 1024)
X4_UPSCALER = replace(
    SD21,
    in_channels=7,
    model_channels=256,
    channel_mult=(1, 2, 2, 4),
    input_depth=((0, 0), (1, 1), (1, 1), (1, 1)),
    output_depth=((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    num_heads=8,
    cross_only=(0, 1, 2),
    noise_levels=1000,
)
REFINER = replace(
    SD21,
    model_channels=384,
    input_depth=((0, 0), (4, 4), (4, 4), (0, 0)),
    output_depth=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
    middle_depth=4,
    context_dim=1280,
    adm_channels=2560,
)

# Tiny ones keep levels and placement. Context and adm widths fit the tiny encoders in text.py:
# CLIP 128, OpenCLIP 192; adm is the pooled width plus 256 for each of 6 (SDXL) or 5 size numbers.
TINY_SD1 = replace(SD15, model_channels=64, context_dim=128)
TINY_SD2 = replace(SD21, model_channels=64, context_dim=192)
TINY_SDXL = replace(
    SDXL,
    model_channels=64,
    input_depth=((0, 0), (1, 1), (3, 3)),
    output_depth=((3, 3, 3), (1, 1, 1), (0, 0, 0)),
    middle_depth=3,
    context_dim=128 + 192,
    adm_channels=192 + 6 * 256,
)
SHALLOW_SDXL = replace(
    TINY_SDXL,
    input_depth=((0, 0), (1, 1), (2, 2)),
    output_depth=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
    middle_depth=2,
)
TINY_REFINER = replace(
    REFINER,
    model_channels=64,
    input_depth=((0, 0), (2, 2), (2, 2), (0, 0)),
    output_depth=((0, 0, 0), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    middle_depth=2,
    context_dim=192,
    adm_channels=192 + 5 * 256,
)
TINY_SSD1B = replace(
    TINY_SDXL,
    input_depth=((0, 0), (2, 2), (3, 3)),
    output_depth=((3, 3, 4), (2, 1, 1), (0, 0, 0)),
    middle_depth=None,
)
TINY_KOALA = replace(
    TINY_SDXL,
    input_depth=((0,), (1,), (3,)),
    output_depth=((3, 3), (1, 1), (0, 0)),
    has_middle=False,
)
TINY_SD1_INPAINT = replace(TINY_SD1, in_channels=9)
TINY_SD2_DEPTH = replace(TINY_SD2, in_channels=5)
TINY_UNCLIP = replace(TINY_SD2, adm_channels=2 * 96)
# As in the published one, the text is as wide as the deepest level: no shape tells there whether
# attention looks at pixels or at text. Goes with text.TINY_X4_OPENCLIP.
TINY_X4_UPSCALER = replace(X4_UPSCALER, model_channels=64, context_dim=256)
TINY_LCM = replace(TINY_SD1, cond_proj_dim=256)
