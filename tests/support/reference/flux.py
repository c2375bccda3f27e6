"""The transformers of FLUX.1 and Chroma in their original layout, in plain torch.

``Flux(config).state_dict()`` has exactly the keys of the published files, which have no prefix.
Image and text are sequences. In double blocks each has its own weights, and both attend to the
joined sequence; in single blocks they are one sequence. Chroma replaces the modulation that every
FLUX block computes for itself by one small network that computes it for all blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.text import attention
from tests.support.reference.unet import timestep_embedding

AXES = (16, 56, 56)
"""Channels of a head that turn with each of the three coordinates of a token; 128 in all."""


@dataclass(frozen=True)
class FluxConfig:
    """Hyper-parameters; the defaults are those of FLUX.1 dev.

    Attributes:
        channels: What an image token holds: a patch of 2 x 2 latents, and for some tasks an image
            to follow.
        out_channels: What a predicted token holds.
        width: Of a token inside the network; a head is 128 wide.
        double: Number of double blocks.
        single: Number of single blocks.
        text_width: Width of T5's states.
        pooled_width: Width of CLIP's pooled text; None for Chroma, which takes none.
        guidance: Whether it is distilled with the guidance as an input.
        approximator: Width of the network that computes Chroma's modulation; None for FLUX.
        approximator_layers: Number of its layers.
    """

    channels: int = 64
    out_channels: int = 64
    width: int = 3072
    double: int = 19
    single: int = 38
    text_width: int = 4096
    pooled_width: int | None = 768
    guidance: bool = True
    approximator: int | None = None
    approximator_layers: int = 5

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // sum(AXES)

    @property
    def modulations(self) -> int:
        """Number of vectors that modulate the whole network."""
        return 3 * self.single + 12 * self.double + 2


class RmsNorm(nn.Module):
    """Divides by the root of the mean square, and scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class QueryKeyNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = RmsNorm(width)
        self.key_norm = RmsNorm(width)


class Embedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, out)
        self.out_layer = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return out


class Modulation(nn.Module):
    """Computes shift, scale and gate, once or twice, from the conditioning vector."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, 3 * times * width)

    def forward(self, vector: Tensor) -> Tensor:
        out: Tensor = self.lin(functional.silu(vector))
        return out


def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``x`` normed without weights, then scaled and shifted: [B, T, C] by [B, C]."""
    plain = functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return plain * (1 + scale[:, None]) + shift[:, None]


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate neighbouring channels of each head by angles that the coordinates set (RoPE).

    Args:
        x: Queries or keys, shape [B, T, heads, 128].
        positions: Three coordinates of each token, shape [T, 3].
    """
    angles = torch.cat(
        [
            positions[:, axis, None].double()
            / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
            for axis, width in enumerate(AXES)
        ],
        dim=-1,
    )[None, :, None]
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1).flatten(-2)


class Stream(nn.Module):
    """What turns a sequence into queries, keys and values, and back."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = QueryKeyNorm(sum(AXES))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.qkv(x), self.heads, self.norm)


def split_heads(qkv: Tensor, heads: int, norm: QueryKeyNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, normed per head, and values: [B, T, heads, 128] each."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).unbind(2)
    return norm.query_norm(q), norm.key_norm(k), v


def attended(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Return attention with rotated queries and keys, [B, T, C]."""
    heads = q.shape[2]
    q, k = turned(q, positions), turned(k, positions)
    return attention(q.flatten(2), k.flatten(2), v.flatten(2), heads)


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, own = config.width, config.approximator is None
        if own:
            self.img_mod, self.txt_mod = Modulation(width, 2), Modulation(width, 2)
        self.img_attn, self.txt_attn = Stream(config), Stream(config)
        self.img_mlp, self.txt_mlp = feed_forward(width), feed_forward(width)

    def forward(
        self, img: Tensor, txt: Tensor, img_mod: Tensor, txt_mod: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both sequences; the modulations are [B, 6, C]."""
        mods = {"img": img_mod.unbind(1), "txt": txt_mod.unbind(1)}
        image = self.img_attn(normed(img, *mods["img"][:2]))
        text = self.txt_attn(normed(txt, *mods["txt"][:2]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        mixed = attended(q, k, v, positions)
        of_text, of_image = mixed[:, : txt.shape[1]], mixed[:, txt.shape[1] :]
        img = img + mods["img"][2][:, None] * self.img_attn.proj(of_image)
        txt = txt + mods["txt"][2][:, None] * self.txt_attn.proj(of_text)
        img = img + mods["img"][5][:, None] * self.img_mlp(normed(img, *mods["img"][3:5]))
        txt = txt + mods["txt"][5][:, None] * self.txt_mlp(normed(txt, *mods["txt"][3:5]))
        return img, txt


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, each a part of the same two layers."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.width, self.heads = config.width, config.heads
        self.linear1 = nn.Linear(config.width, (3 + 4) * config.width)
        self.linear2 = nn.Linear((1 + 4) * config.width, config.width)
        self.norm = QueryKeyNorm(sum(AXES))
        if config.approximator is None:
            self.modulation = Modulation(config.width, 1)

    def forward(self, x: Tensor, mod: Tensor, positions: Tensor) -> Tensor:
        """Return the sequence; the modulation is [B, 3, C]."""
        shift, scale, gate = mod.unbind(1)
        h = self.linear1(normed(x, shift, scale))
        qkv, inner = h.split([3 * self.width, 4 * self.width], dim=-1)
        mixed = attended(*split_heads(qkv, self.heads, self.norm), positions)
        inner = functional.gelu(inner, approximate="tanh")
        out: Tensor = x + gate[:, None] * self.linear2(torch.cat([mixed, inner], dim=-1))
        return out


class LastLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.out_channels)
        if config.approximator is None:
            # The SiLU is number 0, the layer number 1.
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(config.width, 2 * config.width)
            )

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        """Return the prediction; the modulation, shift and then scale, is [B, 2, C]."""
        out: Tensor = self.linear(normed(x, *mod.unbind(1)))
        return out


class Approximator(nn.Module):
    """Computes Chroma's modulations from the time and the number of each."""

    def __init__(self, config: FluxConfig, inner: int) -> None:
        super().__init__()
        self.count = config.modulations
        self.in_proj = nn.Linear(64, inner)
        layers = range(config.approximator_layers)
        self.layers = nn.ModuleList(Embedder(inner, inner) for _ in layers)
        self.norms = nn.ModuleList(RmsNorm(inner) for _ in layers)
        self.out_proj = nn.Linear(inner, config.width)

    def forward(self, time: Tensor) -> Tensor:
        """Return [B, number of modulations, width] for times of shape [B], 0 to 1."""
        # It was trained with guidance as an input, which is always 0.
        each = torch.cat(
            [timestep_embedding(1000 * time, 16), timestep_embedding(0 * time, 16)], dim=-1
        )
        numbers = timestep_embedding(1000 * torch.arange(self.count), 32)
        joined = [each[:, None].expand(-1, self.count, -1), numbers.expand(len(time), -1, -1)]
        x = self.in_proj(torch.cat(joined, dim=-1).to(self.in_proj.weight))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        out: Tensor = self.out_proj(x)
        return out


class Flux(nn.Module):
    """The transformer of FLUX.1, or with an ``approximator`` that of Chroma.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.img_in = nn.Linear(config.channels, width)
        self.txt_in = nn.Linear(config.text_width, width)
        if config.approximator is None:
            self.time_in = Embedder(256, width)
        else:
            self.distilled_guidance_layer = Approximator(config, config.approximator)
        if config.pooled_width:
            self.vector_in = Embedder(config.pooled_width, width)
        if config.guidance:
            self.guidance_in = Embedder(256, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single))
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        time: Tensor,
        positions: Tensor,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            img: Image tokens, shape [B, T, channels].
            txt: States of T5, shape [B, S, text_width].
            time: 0 for the image to 1 for noise, shape [B].
            positions: Coordinates of text tokens and then image tokens, shape [S + T, 3].
            pooled: CLIP's pooled text, shape [B, pooled_width]; None for Chroma.
            guidance: Strength, shape [B], where the network takes it.

        Returns:
            Tensor of shape [B, T, out_channels].
        """
        mods = self.modulations(time, pooled, guidance)
        img, txt = self.img_in(img), self.txt_in(txt)
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, mods["img", i], mods["txt", i], positions)
        x = torch.cat([txt, img], dim=1)
        for i, block in enumerate(self.single_blocks):
            x = block(x, mods["single", i], positions)
        out: Tensor = self.final_layer(x[:, txt.shape[1] :], mods["last", 0])
        return out

    def modulations(
        self, time: Tensor, pooled: Tensor | None, guidance: Tensor | None
    ) -> dict[tuple[str, int], Tensor]:
        """Return what modulates each part, [B, 2, 3 or 6, C], by kind and number."""
        sizes = {("single", i): 3 for i in range(self.config.single)}
        sizes |= {(kind, i): 6 for kind in ("img", "txt") for i in range(self.config.double)}
        sizes |= {("last", 0): 2}
        if self.config.approximator is not None:  # one after the other
            every = self.distilled_guidance_layer(time).split([*sizes.values()], dim=1)
            return dict(zip(sizes, every, strict=True))
        dtype = self.img_in.weight.dtype
        vector = self.time_in(timestep_embedding(1000 * time, 256).to(dtype))
        if guidance is not None:
            vector = vector + self.guidance_in(timestep_embedding(1000 * guidance, 256).to(dtype))
        vector = vector + self.vector_in(pooled)
        names = {
            "single": "single_blocks.{}.modulation",
            "img": "double_blocks.{}.img_mod",
            "txt": "double_blocks.{}.txt_mod",
            "last": "final_layer.adaLN_modulation",
        }
        found = {}
        for (kind, i), size in sizes.items():
            row: Tensor = self.get_submodule(names[kind].format(i))(vector)
            found[kind, i] = row.reshape(len(row), size, -1)
        return found


DEV = FluxConfig()
CHROMA = FluxConfig(pooled_width=None, guidance=False, approximator=5120)

# Two heads: with one, an exchange of heads and channels would not show. Text widths are those of
# text.TINY_CLIP and t5.TINY_T5.
TINY_DEV = replace(DEV, width=256, double=2, single=2, text_width=96, pooled_width=128)
TINY_SCHNELL = replace(TINY_DEV, guidance=False)
TINY_WIDE = replace(TINY_DEV, width=384, double=1, single=3)
TINY_FILL = replace(TINY_DEV, channels=384)
TINY_CONTROL = replace(TINY_DEV, channels=128)
TINY_CHROMA = replace(TINY_SCHNELL, pooled_width=None, approximator=160, approximator_layers=2)
