"""The building blocks that the UNet and the ControlNet share, in plain torch."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.text import attention


class Attention(nn.Module):
    """Attention of ``x`` over ``source``; no bias in q, k, v."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        out: Tensor = self.to_out(attention(q, k, v, self.heads))
        return out


class GEGLU(nn.Module):
    """Linear layer whose second half gates the first through an exact GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * functional.gelu(gate)
        return out


def feed_forward(dim: int) -> nn.Sequential:
    # The Identity stands where dropout stood, so that the last layer is number 2.
    net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
    return nn.Sequential(OrderedDict(net=net))


class TransformerBlock(nn.Module):
    """Two attentions and a feed-forward, each normed before and residual.

    Args:
        dim: Width of the pixels' vectors.
        context_dim: Width of the text embedding.
        heads: Number of attention heads.
        cross_only: Whether the first attention, too, looks at the text and not at the pixels.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = Attention(dim, context_dim if cross_only else dim, heads)
        self.ff = feed_forward(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.cross_only else h)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    Args:
        channels: Channels of the feature map, and width of the blocks.
        depth: Number of blocks.
        context_dim: Width of the text embedding.
        heads: Number of attention heads.
        linear: Whether the projections are stored 2-D (linear) and not 4-D (1x1 convolution).
        cross_only: Whether the blocks have no self-attention.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        context_dim: int,
        heads: int,
        linear: bool,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def _project(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply a layer of either storage to a feature map [B, C, H, W]."""
        out: Tensor = layer(x.movedim(1, -1)).movedim(-1, 1) if self.linear else layer(x)
        return out

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self._project(self.proj_in, self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self._project(self.proj_out, h.transpose(1, 2).reshape(x.shape))


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels, eps=1e-5),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # dropout's place
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


def downsample(channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def upsample(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))
