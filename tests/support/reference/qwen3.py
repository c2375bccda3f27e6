"""Qwen3 in its original layout, in plain torch.

``Qwen3(config).state_dict()`` has exactly the keys that follow
``text_encoders.qwen3_4b.transformer.``, the names that transformers uses. Several heads of queries
share one of keys and values.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.reference.text import attention, table


@dataclass(frozen=True)
class Qwen3Config:
    """Hyper-parameters; the defaults are those of Qwen3-4B.

    Attributes:
        width: Of the hidden states.
        inner: Width of the feed-forward.
        heads: Number of heads of queries, each 128 wide whatever the width is.
        shared: Number of heads of keys and values.
        layers: Number of layers.
        vocabulary: Number of token ids.
    """

    width: int = 2560
    inner: int = 9728
    heads: int = 32
    shared: int = 8
    layers: int = 36
    vocabulary: int = 151936


HEAD = 128


class RmsNorm(nn.Module):
    """Divides by the root of the mean square, and scales."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def turned(x: Tensor) -> Tensor:
    """Rotate channel i of a head with channel i + 64, by angles that grow with the position.

    Args:
        x: Queries or keys, shape [B, T, heads, 128].
    """
    rates = 1e6 ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = (torch.arange(x.shape[1])[:, None] * rates)[None, :, None]
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([cos * first - sin * second, cos * second + sin * first], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.heads, self.shared = config.heads, config.shared
        self.q_proj = nn.Linear(config.width, config.heads * HEAD, bias=False)
        self.k_proj = nn.Linear(config.width, config.shared * HEAD, bias=False)
        self.v_proj = nn.Linear(config.width, config.shared * HEAD, bias=False)
        self.o_proj = nn.Linear(config.heads * HEAD, config.width, bias=False)
        self.q_norm, self.k_norm = RmsNorm(HEAD), RmsNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q = turned(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, HEAD))))
        k = turned(self.k_norm(self.k_proj(x).unflatten(-1, (self.shared, HEAD))))
        v = self.v_proj(x).unflatten(-1, (self.shared, HEAD))
        k, v = (each.repeat_interleave(self.heads // self.shared, dim=2) for each in (k, v))
        mixed = attention(q.flatten(2), k.flatten(2), v.flatten(2), self.heads, causal=True)
        out: Tensor = self.o_proj(mixed)
        return out


class FeedForward(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), FeedForward(config)
        self.input_layernorm = RmsNorm(config.width)
        self.post_attention_layernorm = RmsNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = table(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width)


class Qwen3(nn.Module):
    """The language model Qwen3 without its head.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids of shape [B, T].

        Returns:
            The states before the last layer, which Z-Image reads, and the last ones, normed; each
            [B, T, width].
        """
        x = before = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            before, x = x, layer(x)
        return before, self.model.norm(x)


QWEN3_4B = Qwen3Config()
# Widths of the states, of all queries and of all keys differ, as in the published model.
TINY_QWEN3 = replace(QWEN3_4B, width=32, inner=80, heads=4, shared=2, layers=3)
