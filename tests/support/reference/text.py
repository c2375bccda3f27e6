"""The text encoders in their original layouts, in plain torch.

``ClipText`` is CLIP-L as SD 1 and SDXL hold it; its keys are those that follow
``cond_stage_model.transformer.`` (``text_model.`` included). ``OpenClipText`` is the OpenCLIP text
tower of SD 2, SDXL and the refiner; its keys are those that follow ``cond_stage_model.model.`` or
``conditioner.embedders.N.model.``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class TextConfig:
    """Hyper-parameters of a text encoder; the defaults are those of CLIP-L.

    Attributes:
        width: Width of the hidden states; a head is 64 wide.
        layers: Number of transformer layers.
        activation: Activation of the feed-forward: OpenAI's ``quick_gelu`` or OpenCLIP's ``gelu``.
        projection: Width of the pooled output (OpenCLIP only).
        vocabulary: Number of token ids.
        positions: Longest prompt.
    """

    width: int = 768
    layers: int = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = 768
    vocabulary: int = 49408
    positions: int = 77

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // 64

    @property
    def causal(self) -> bool:
        """Whether a token sees no later one."""
        return True


class ClipOutput(NamedTuple):
    """What ``ClipText`` returns.

    Attributes:
        hidden_states: Embeddings, then the output of each layer: layers + 1 tensors [B, T, width],
            none of them through the final norm.
        last: The last hidden state through the final norm, [B, T, width].
    """

    hidden_states: tuple[Tensor, ...]
    last: Tensor


class OpenClipOutput(NamedTuple):
    """What ``OpenClipText`` returns.

    Attributes:
        penultimate: Output of the last layer but one, [B, T, width]: SDXL conditions on it.
        penultimate_normed: The same through ``ln_final``: SD 2 conditions on it.
        last: Output of the last layer through ``ln_final``, [B, T, width].
        pooled: ``last`` at the end-of-text token, projected, [B, projection].
    """

    penultimate: Tensor
    penultimate_normed: Tensor
    last: Tensor
    pooled: Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """Return the sigmoid approximation of GELU that CLIP-L was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": functional.gelu,
}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention, scaled by 1 / sqrt(width of a head).

    Args:
        q: Queries, shape [B, T, C].
        k: Keys, shape [B, S, C].
        v: Values, shape [B, S, C].
        heads: Number of heads; C is split into this many consecutive slices.
        causal: Whether a token sees no later one.

    Returns:
        Tensor of shape [B, T, C].
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def table(rows: int, width: int) -> nn.Embedding:
    """Return an embedding of zeros: torch's own start is slow, and ``randomise`` replaces it.

    Args:
        rows: Number of ids.
        width: Width of a row.
    """
    return nn.Embedding(rows, width, _weight=torch.zeros(rows, width))


class ClipAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True)
        out: Tensor = self.out_proj(h)
        return out


class ClipMlp(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class ClipLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-5)
        self.mlp = ClipMlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class ClipEmbeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = table(config.vocabulary, config.width)
        self.position_embedding = table(config.positions, config.width)
        self.register_buffer("position_ids", torch.arange(config.positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : ids.shape[1]]
        out: Tensor = self.token_embedding(ids) + self.position_embedding(positions)
        return out


class ClipEncoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class ClipTransformer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.encoder = ClipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, ids: Tensor) -> ClipOutput:
        states = self.encoder(self.embeddings(ids))
        return ClipOutput(states, self.final_layer_norm(states[-1]))


class ClipText(nn.Module):
    """CLIP's text encoder as SD 1 files name it.

    Args:
        config: The hyper-parameters; ``projection`` is unused.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipTransformer(config)

    def forward(self, ids: Tensor) -> ClipOutput:
        """Encode token ids.

        Args:
            ids: Integer tensor of shape [B, T], T at most ``config.positions``.

        Returns:
            All hidden states, and the last one through the final norm.
        """
        out: ClipOutput = self.text_model(ids)
        return out


class ClipTextAsPooled(ClipText):
    """CLIP's text encoder as Stable Diffusion 3 uses it: the state of the end of text is pooled."""


class ClipTextWithProjection(ClipText):
    """CLIP's text encoder with the projection that SD files leave out."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.width, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(()))  # is in the files and never used

    def pooled(self, ids: Tensor) -> Tensor:
        """Return the projected state of the end of text, shape [B, projection].

        Args:
            ids: As ``forward`` takes them; the end of text is the largest.
        """
        last = self(ids).last
        out: Tensor = last[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection.weight.T
        return out


class TowerConfig(Protocol):
    """What the layers of a tower need to know, be it one for text or one for images."""

    @property
    def width(self) -> int:
        """Width of the hidden states."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def heads(self) -> int:
        """Number of attention heads."""

    @property
    def causal(self) -> bool:
        """Whether a token sees no later one."""

    @property
    def activation(self) -> str:
        """A key of ``ACTIVATIONS``."""


class OpenClipAttention(nn.Module):
    """Attention whose q, k and v are one matrix, stacked by rows in this order."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.chunk(3, dim=-1)
        out: Tensor = self.out_proj(attention(q, k, v, self.heads, self.causal))
        return out


class OpenClipMlp(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return out


class OpenClipLayer(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=1e-5)
        self.attn = OpenClipAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=1e-5)
        self.mlp = OpenClipMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class OpenClipTransformer(nn.Module):
    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(OpenClipLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the last layer but one and of the last."""
        before = x
        for block in self.resblocks:
            before, x = x, block(x)
        return before, x


class OpenClipText(nn.Module):
    """The text tower of OpenCLIP and, with ``quick_gelu``, of OpenAI's own CLIP code.

    Args:
        config: The hyper-parameters.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.positional_embedding = nn.Parameter(torch.randn(config.positions, config.width))
        # Used as x @ P, so [width, projection]: the transpose of a linear layer's weight.
        self.text_projection = nn.Parameter(torch.randn(config.width, config.projection))
        self.logit_scale = nn.Parameter(torch.zeros(()))  # only for CLIP's loss
        self.transformer = OpenClipTransformer(config)
        self.token_embedding = table(config.vocabulary, config.width)
        self.ln_final = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, ids: Tensor) -> OpenClipOutput:
        """Encode token ids.

        Args:
            ids: Integer tensor of shape [B, T], T at most ``config.positions``. The end-of-text
                token is the highest id in each row; the first counts where it repeats.

        Returns:
            Penultimate hidden state, plain and normed; last hidden state; pooled output.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        penultimate, x = self.transformer(x)
        last = self.ln_final(x)
        rows = torch.arange(ids.shape[0], device=ids.device)
        pooled = last[rows, ids.argmax(dim=-1)] @ self.text_projection
        return OpenClipOutput(penultimate, self.ln_final(penultimate), last, pooled)


CLIP_L = TextConfig()
OPENCLIP_H = TextConfig(width=1024, layers=24, activation="gelu", projection=1024)
OPENCLIP_BIGG = TextConfig(width=1280, layers=32, activation="gelu", projection=1280)

# Tiny ones keep the vocabulary and the positions, so that a real tokenizer's ids fit. The
# projection stays square: a forgotten transpose must be caught by values, not by shapes.
TINY_CLIP = replace(CLIP_L, width=128, layers=3, projection=128)
TINY_OPENCLIP = replace(OPENCLIP_H, width=192, layers=3, projection=192)
TINY_X4_OPENCLIP = replace(TINY_OPENCLIP, width=256, projection=256)
