"""Makes adapters as training tools write them, with random values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ckptconv.reading.header import read_header

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of the weight, by the name of its layer."""

RANK = 3


def layers(path: Path, prefix: str, *parts: str) -> dict[str, tuple[int, ...]]:
    """Returns the layers of a file under a prefix whose names hold one of some parts."""
    return {
        key.removeprefix(prefix).removesuffix(".weight"): info.shape
        for key, info in read_header(path).tensors.items()
        if key.startswith(prefix) and key.endswith(".weight") and len(info.shape) > 1
        if any(part in key for part in parts)
    }


class Adapter:
    """The tensors of an adapter, and how to save them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._random = torch.Generator().manual_seed(7)

    def random(self, *shape: int) -> torch.Tensor:
        """Returns values that change a weight about as much as a training does."""
        return torch.randn(shape, generator=self._random) / 4

    def lora(self, name: str, shape: tuple[int, ...], down: str, up: str) -> None:
        """Adds a layer, which in a convolution is the convolution and one of 1 x 1 behind it."""
        out, wide, *kernel = shape
        self.tensors[name + down] = self.random(RANK, wide, *kernel)
        self.tensors[name + up] = self.random(out, RANK, *(1 for _ in kernel))

    def kohya(self, prefix: str, shapes: Shapes, alpha: float | None = 1.5) -> None:
        """Adds layers as the trainer of kohya-ss names them, dots written as underscores."""
        for name, shape in shapes.items():
            flat = prefix + name.replace(".", "_")
            self.lora(flat, shape, ".lora_down.weight", ".lora_up.weight")
            if alpha is not None:
                self.tensors[f"{flat}.alpha"] = torch.tensor(alpha)

    def peft(self, prefix: str, shapes: Shapes, *, magnitudes: bool = False) -> None:
        """Adds layers as PEFT names them."""
        for name, shape in shapes.items():
            self.lora(prefix + name, shape, ".lora_A.weight", ".lora_B.weight")
            if magnitudes:
                ones = (1, shape[0], 1, 1) if len(shape) == 4 else (shape[0],)
                magnitude = self.random(*ones).abs() + 0.5
                self.tensors[f"{prefix}{name}.lora_magnitude_vector"] = magnitude

    def settings(self, **settings: object) -> None:
        """Notes the settings of PEFT, as diffusers does; double underscores stand for dots."""
        noted = {name.replace("__", "."): value for name, value in settings.items()}
        self.metadata["lora_adapter_metadata"] = json.dumps(noted)

    def save(self, path: Path) -> Path:
        """Writes the file."""
        save_file(self.tensors, path, metadata={"format": "pt", **self.metadata})
        return path
