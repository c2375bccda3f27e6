"""The KL autoencoder in its original layout, in plain torch.

``Vae(config).state_dict()`` has exactly the keys that follow ``first_stage_model.`` in published
files.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.text import attention


@dataclass(frozen=True)
class VaeConfig:
    """Hyper-parameters of the autoencoder; the defaults are those of SD 1, SD 2 and SDXL.

    Attributes:
        in_channels: Channels of an image.
        channels: Width of the highest resolution. At 32 a norm's group is one channel, which
            hides every bias in front of a norm.
        channel_mult: Width of each level, highest resolution first.
        num_res_blocks: Resnets per encoder level; a decoder level has one more.
        z_channels: Channels of a latent.
        linear_attention: Whether the attention is stored 2-D (linear) and not 4-D (1x1 conv).
        quantised: Whether a 1x1 convolution stands on either side of the latents.
    """

    in_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    linear_attention: bool = False
    quantised: bool = True


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        out: Tensor = shortcut + h
        return out


class AttnBlock(nn.Module):
    """Attention over all pixels with one head as wide as the feature map."""

    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
            for _ in range(4)
        )

    def _mix(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a layer of either storage to a feature map [B, C, H, W]."""
        out: Tensor = layer(x.movedim(1, -1)).movedim(-1, 1) if self.linear else layer(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            self._mix(layer, h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        h = attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape)
        return x + self._mix(self.proj_out, h)


class Downsample(nn.Module):
    """Stride-2 convolution that pads right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Middle(nn.Module):
    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels, linear)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """The resnets of one resolution, then a step to the next where there is one."""

    def __init__(self, channels: int, out_channels: int, blocks: int, step: str | None) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(widths[i], out_channels) for i in range(blocks))
        self.step = step
        if step == "downsample":
            self.downsample = Downsample(out_channels)
        elif step == "upsample":
            self.upsample = Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.step is not None:
            x = getattr(self, self.step)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            out = config.channels * mult
            step = "downsample" if level < len(config.channel_mult) - 1 else None
            self.down.append(Level(channels, out, config.num_res_blocks, step))
            channels = out
        self.mid = Middle(channels, config.linear_attention)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config.linear_attention)
        levels = []
        for level in reversed(range(len(config.channel_mult))):
            out = config.channels * config.channel_mult[level]
            step = "upsample" if level > 0 else None
            levels.append(Level(channels, out, config.num_res_blocks + 1, step))
            channels = out
        # Numbered by resolution as in the encoder: the decoder runs them from the last to 0.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            h = level(h)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(h)))
        return out


class Vae(nn.Module):
    """The original KL autoencoder.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.quantised:
            self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
            self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latent, without scaling, clamping or sampling.

        Args:
            x: Images, shape [B, in_channels, H, W]; H and W divisible by 2 per downsample.

        Returns:
            Two tensors of shape [B, z_channels, h, w]; h = H / 8 with four levels,
            H / 4 with three.
        """
        moments = self.encoder(x)
        if self.config.quantised:
            moments = self.quant_conv(moments)
        mean, logvar = torch.chunk(moments, 2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Return the image of a latent.

        Args:
            z: Latents before scaling, shape [B, z_channels, h, w].

        Returns:
            Tensor of shape [B, in_channels, H, W].
        """
        out: Tensor = self.decoder(self.post_quant_conv(z) if self.config.quantised else z)
        return out


VAE = VaeConfig()
X4_VAE = replace(VAE, channel_mult=(1, 2, 4))  # of the x4 upscaler: a latent is a quarter as wide
VAE_16 = replace(VAE, z_channels=16, quantised=False)  # of FLUX.1 and SD 3
TINY_VAE = replace(VAE, channels=64)
TINY_VAE_16 = replace(VAE_16, channels=64)
TINY_X4_VAE = replace(X4_VAE, channels=64)
TINY_VAE_LINEAR = replace(TINY_VAE, linear_attention=True)
