"""The transformers of Stable Diffusion 3 (MMDiT) and 3.5 (MMDiT-X) in their original layout.

``MmDit(config).state_dict()`` has exactly the keys that stand behind ``model.diffusion_model.`` in
the published files. Text and image have their own weights in each block and attend to the joined
sequence. The last block gives no text any more. In MMDiT-X, the image also attends to itself alone
in the first blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.flux import normed
from tests.support.reference.text import attention
from tests.support.reference.unet import timestep_embedding

HEAD = 64
"""Width of an attention head."""


@dataclass(frozen=True)
class MmDitConfig:
    """Hyper-parameters; the defaults are those of Stable Diffusion 3 medium.

    Attributes:
        depth: Number of blocks, and of attention heads.
        edge: Patches along each side of the largest image.
        channels: Of the latents.
        text_width: Width of the text states.
        pooled_width: Width of the pooled text.
        normed: Whether queries and keys are normed.
        alone: In how many blocks the image attends to itself once more.
    """

    depth: int = 24
    edge: int = 192
    channels: int = 16
    text_width: int = 4096
    pooled_width: int = 2048
    normed: bool = False
    alone: int = 0

    @property
    def width(self) -> int:
        """Of a token inside the network."""
        return HEAD * self.depth


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEAD))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Queries, keys and values of a sequence, and the way back unless nothing is to come back."""

    def __init__(self, config: MmDitConfig, *, comes_back: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if config.normed:
            self.ln_q, self.ln_k = RmsNorm(), RmsNorm()
        if comes_back:
            self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if hasattr(self, "ln_q"):
            q, k = (
                norm(each.reshape(*each.shape[:-1], -1, HEAD)).flatten(-2)
                for norm, each in ((self.ln_q, q), (self.ln_k, k))
            )
        return [q, k, v]


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class Stream(nn.Module):
    """The half of a block that one sequence has."""

    def __init__(self, config: MmDitConfig, *, alone: bool = False, last: bool = False) -> None:
        super().__init__()
        width, self.last = config.width, last
        self.parts = 2 if last else 9 if alone else 6
        self.attn = Attention(config, comes_back=not last)
        if alone:
            self.attn2 = Attention(config)
        if not last:
            self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.parts * width))

    def forward(self, x: Tensor, mods: tuple[Tensor, ...], mixed: Tensor, heads: int) -> Tensor:
        """Return the sequence after attention gave ``mixed`` for it."""
        after = x + mods[2][:, None] * self.attn.proj(mixed)
        if self.parts == 9:
            q, k, v = self.attn2(normed(x, *mods[6:8]))
            own = attention(q, k, v, heads)
            after = after + mods[8][:, None] * self.attn2.proj(own)
        out: Tensor = after + mods[5][:, None] * self.mlp(normed(after, *mods[3:5]))
        return out


class Block(nn.Module):
    def __init__(self, config: MmDitConfig, number: int) -> None:
        super().__init__()
        self.heads = config.depth
        self.context_block = Stream(config, last=number == config.depth - 1)
        self.x_block = Stream(config, alone=number < config.alone)

    def forward(self, x: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        streams, given = (self.context_block, self.x_block), (text, x)
        mods = [s.adaLN_modulation(vector).chunk(s.parts, dim=-1) for s in streams]
        each = [s.attn(normed(h, *m[:2])) for s, h, m in zip(streams, given, mods, strict=True)]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*each, strict=True))
        mixed = attention(q, k, v, self.heads)
        words = text.shape[1]
        x = self.x_block(x, mods[1], mixed[:, words:], self.heads)
        if not self.context_block.last:
            text = self.context_block(text, mods[0], mixed[:, :words], self.heads)
        return x, text


class Embedder(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


class PatchEmbedder(nn.Module):
    def __init__(self, config: MmDitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, 2, stride=2)


class LastLayer(nn.Module):
    def __init__(self, config: MmDitConfig) -> None:
        super().__init__()
        width = config.width
        self.linear = nn.Linear(width, 4 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector).chunk(2, dim=-1)
        out: Tensor = self.linear(normed(x, shift, scale))
        return out


class MmDit(nn.Module):
    """The transformer of Stable Diffusion 3 or 3.5.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: MmDitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(config.pooled_width, width)
        self.context_embedder = nn.Linear(config.text_width, width)
        self.pos_embed = nn.Parameter(torch.randn(1, config.edge**2, width))
        self.joint_blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final_layer = LastLayer(config)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: Latents, shape [B, channels, H, W] with even H and W.
            time: 0 to 1000, shape [B].
            text: States of the text, shape [B, S, text_width].
            pooled: Pooled text, shape [B, pooled_width].

        Returns:
            Tensor of the shape of ``x``.
        """
        vector = self.t_embedder(timestep_embedding(time, 256).to(x)) + self.y_embedder(pooled)
        patches = self.x_embedder.proj(x)
        rows, columns = patches.shape[-2:]
        top, left = (self.config.edge - rows) // 2, (self.config.edge - columns) // 2
        where = self.pos_embed.reshape(1, self.config.edge, self.config.edge, -1)
        where = where[:, top : top + rows, left : left + columns].flatten(1, 2)
        tokens = patches.flatten(2).transpose(1, 2) + where
        text = self.context_embedder(text)
        for block in self.joint_blocks:
            tokens, text = block(tokens, text, vector)
        out: Tensor = self.final_layer(tokens, vector)
        out = out.reshape(len(x), rows, columns, 2, 2, self.config.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


SD3_MEDIUM = MmDitConfig()
SD35_MEDIUM = replace(SD3_MEDIUM, edge=384, normed=True, alone=13)
# Text states as wide as a small T5, pooled text as wide as both small CLIPs together.
TINY_SD3 = MmDitConfig(depth=3, edge=8, text_width=96, pooled_width=128 + 192)
TINY_SD35 = replace(TINY_SD3, edge=12, normed=True, alone=2)
TINY_LARGE = replace(TINY_SD3, depth=4, normed=True)
