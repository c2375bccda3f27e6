"""The transformer of Z-Image in its original layout, in plain torch.

``ZImage(config).state_dict()`` has exactly the keys of the published files, which have no prefix.
Image and text are refined apart, and then are one sequence. Each is padded to a multiple of 32 with
a token of its own that is learned and takes part in everything. Source: arXiv:2511.22699.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.qwen3 import RmsNorm
from tests.support.reference.text import attention
from tests.support.reference.unet import timestep_embedding

AXES = (32, 48, 48)
"""Channels of a head that turn with each of the three coordinates of a token; 128 in all."""
THETA = 256.0
MULTIPLE = 32
EPS = 1e-5


@dataclass(frozen=True)
class ZImageConfig:
    """Hyper-parameters; the defaults are those of Z-Image and Z-Image-Turbo.

    Attributes:
        channels: Of the latents.
        width: Of a token inside the network; a head is 128 wide.
        layers: Number of blocks that see image and text.
        refiners: Number of blocks that see only the image, and of those that see only the text.
        text_width: Width of Qwen3's states.
    """

    channels: int = 16
    width: int = 3840
    layers: int = 30
    refiners: int = 2
    text_width: int = 2560


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring channels of each head by angles that the coordinates set (RoPE).

    Args:
        x: Queries or keys, shape [B, T, heads, 128].
        positions: Three coordinates of each token, shape [T, 3].
    """
    angles = torch.cat(
        [
            positions[:, axis, None] / THETA ** (torch.arange(0, width, 2).double() / width)
            for axis, width in enumerate(AXES)
        ],
        dim=-1,
    )[None, :, None]
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // sum(AXES)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RmsNorm(sum(AXES), EPS), RmsNorm(sum(AXES), EPS)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).unbind(2)
        q, k = turned(self.q_norm(q), positions), turned(self.k_norm(k), positions)
        out: Tensor = self.out(attention(q.flatten(2), k.flatten(2), v.flatten(2), self.heads))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * 8 // 3
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, normed before and after; the time may scale and gate both."""

    def __init__(self, width: int, modulated: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width), FeedForward(width)
        self.attention_norm1, self.attention_norm2 = RmsNorm(width, EPS), RmsNorm(width, EPS)
        self.ffn_norm1, self.ffn_norm2 = RmsNorm(width, EPS), RmsNorm(width, EPS)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(width, 256), 4 * width))

    def forward(self, x: Tensor, positions: Tensor, time: Tensor | None = None) -> Tensor:
        scales = gates = (torch.ones(()), torch.ones(()))
        if time is not None:
            scale, gate, scale_2, gate_2 = self.adaLN_modulation(time)[:, None].chunk(4, dim=-1)
            scales, gates = (1 + scale, 1 + scale_2), (gate.tanh(), gate_2.tanh())
        mixed = self.attention(self.attention_norm1(x) * scales[0], positions)
        x = x + gates[0] * self.attention_norm2(mixed)
        out: Tensor = x + gates[1] * self.ffn_norm2(
            self.feed_forward(self.ffn_norm1(x) * scales[1])
        )
        return out


class LastLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        # The SiLU is number 0, the layer number 1.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(width, 256), width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        plain = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        out: Tensor = self.linear(plain * (1 + self.adaLN_modulation(time)[:, None]))
        return out


class TimeEmbedder(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, out))

    def forward(self, time: Tensor) -> Tensor:
        wave = timestep_embedding(1000 * time, 256)
        out: Tensor = self.mlp(wave.to(self.get_parameter("mlp.0.weight")))
        return out


def padded(x: Tensor, token: Tensor) -> Tensor:
    """Return a sequence [B, T, C] whose length is a multiple of 32, filled up with one token."""
    return torch.cat([x, token.expand(len(x), -x.shape[1] % MULTIPLE, -1)], dim=1)


class ZImage(nn.Module):
    """The transformer of Z-Image.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, 4 * config.channels
        self.x_pad_token = nn.Parameter(torch.zeros(1, width))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, width))
        self.x_embedder = nn.Linear(patch, width)
        self.final_layer = LastLayer(width, patch)
        self.noise_refiner = nn.ModuleList(Block(width, True) for _ in range(config.refiners))
        self.context_refiner = nn.ModuleList(Block(width, False) for _ in range(config.refiners))
        self.t_embedder = TimeEmbedder(min(width, 256))
        norm = RmsNorm(config.text_width, EPS)
        self.cap_embedder = nn.Sequential(norm, nn.Linear(config.text_width, width))
        self.layers = nn.ModuleList(Block(width, True) for _ in range(config.layers))

    def forward(self, latents: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            latents: Noisy latents, shape [B, channels, H, W].
            text: States of Qwen3, shape [B, S, text_width].
            time: 0 for noise to 1 for the image, shape [B].

        Returns:
            Tensor of the shape of the latents.
        """
        rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
        # A patch lists its 2 x 2 places, and for each of them the channels.
        patches = latents.reshape(*latents.shape[:2], rows, 2, columns, 2)
        x = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(latents), rows * columns, -1)
        x = padded(self.x_embedder(x), self.x_pad_token)
        words = padded(self.cap_embedder(text), self.cap_pad_token)
        # The first coordinate counts the words from 1 on, and the image comes after the last.
        spoken = torch.zeros(words.shape[1], 3, dtype=torch.float64)
        spoken[:, 0] = torch.arange(words.shape[1]) + 1
        seen = torch.zeros(x.shape[1], 3, dtype=torch.float64)
        seen[: rows * columns] = torch.cartesian_prod(
            torch.tensor([words.shape[1] + 1.0]),
            torch.arange(float(rows)),
            torch.arange(float(columns)),
        )
        vector = self.t_embedder(time)
        for block in self.noise_refiner:
            x = block(x, seen, vector)
        for block in self.context_refiner:
            words = block(words, spoken)
        joined, where = torch.cat([x, words], dim=1), torch.cat([seen, spoken])
        for block in self.layers:
            joined = block(joined, where, vector)
        out: Tensor = self.final_layer(joined[:, : rows * columns], vector)
        out = out.reshape(len(out), rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        return out.flatten(4).flatten(2, 3)


Z_IMAGE = ZImageConfig()
# Two heads: with one, an exchange of heads and channels would not show. The text is that of
# qwen3.TINY_QWEN3.
TINY_Z_IMAGE = replace(Z_IMAGE, width=256, layers=2, refiners=1, text_width=32)
TINY_WIDE = replace(TINY_Z_IMAGE, width=384, layers=3, refiners=2)
