"""The encoder of T5 v1.1 in its original layout, in plain torch.

``T5(config).state_dict()`` has exactly the keys that follow ``text_encoders.t5xxl.transformer.``,
the names that transformers uses. Files hold the embedding under one name or under both.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class T5Config:
    """Hyper-parameters; the defaults are those of T5 v1.1 XXL.

    Attributes:
        width: Of the hidden states.
        inner: Width of the feed-forward.
        heads: Number of heads, each 64 wide whatever the width is.
        layers: Number of layers.
        vocabulary: Number of token ids.
        buckets: Number of classes of distances between tokens, half of them for each direction.
        twice: Whether the file holds its embedding under both names.
    """

    width: int = 4096
    inner: int = 10240
    heads: int = 64
    layers: int = 24
    vocabulary: int = 32128
    buckets: int = 32
    twice: bool = False


BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
"""What the first layer alone has: the bias of each class of distances, for each head."""

HEAD = 64
FARTHEST = 128
"""From this distance on, all distances are one class."""


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def bucket(distance: int, buckets: int) -> int:
    """Return the class of a distance: near ones have their own, far ones share theirs by powers.

    Args:
        distance: Position of the key minus that of the query.
        buckets: Number of classes.
    """
    half = buckets // 2
    start = half if distance > 0 else 0
    distance, exact = abs(distance), half // 2
    if distance < exact:
        return start + distance
    share = math.log(distance / exact) / math.log(FARTHEST / exact)
    return start + min(exact + int(share * (half - exact)), half - 1)


class SelfAttention(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        inner = config.heads * HEAD
        self.heads = config.heads
        self.q = nn.Linear(config.width, inner, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.o = nn.Linear(inner, config.width, bias=False)
        if biased:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, HEAD).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(-1, -2) + bias  # T5 does not divide by the root of the width
        out: Tensor = self.o((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return out


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, biased)
        self.layer_norm = RmsNorm(config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class GatedGelu(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.width, config.inner, bias=False)
        self.wi_1 = nn.Linear(config.width, config.inner, bias=False)
        self.wo = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(functional.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return out


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config)
        self.layer_norm = RmsNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class Block(nn.Module):
    def __init__(self, config: T5Config, biased: bool) -> None:
        super().__init__()
        attention, feed_forward = AttentionLayer(config, biased), FeedForwardLayer(config)
        self.layer = nn.ModuleList([attention, feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.layer[1](self.layer[0](x, bias))
        return out


class Encoder(nn.Module):
    def __init__(self, config: T5Config, embedding: nn.Embedding) -> None:
        super().__init__()
        if config.twice:
            self.embed_tokens = embedding
        self.block = nn.ModuleList(Block(config, i == 0) for i in range(config.layers))
        self.final_layer_norm = RmsNorm(config.width)


class T5(nn.Module):
    """The encoder of T5 v1.1.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Encoder(config, self.shared)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids of shape [B, T]; returns [B, T, width]."""
        length = range(ids.shape[1])
        classes = [[bucket(key - query, self.config.buckets) for key in length] for query in length]
        table = self.get_parameter(BIAS)
        bias = table[torch.tensor(classes)].permute(2, 0, 1)
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        out: Tensor = self.encoder.final_layer_norm(x)
        return out


XXL = T5Config()
# The published width is that of all heads together; a small one that differs tells axes apart.
TINY_T5 = replace(XXL, width=96, inner=160, heads=2, layers=2)
TINY_T5_TWICE = replace(TINY_T5, twice=True)
