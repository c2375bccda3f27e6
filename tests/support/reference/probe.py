"""How tests look into a network: seeded inputs, and which parameters its output depends on."""

import torch
from torch import Tensor, nn


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return seeded standard normal float64 values.

    Args:
        shape: Shape of the result.
        seed: Seed; the same seed gives the same values.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Return the size of every parameter's gradient, under random weights on the output.

    Args:
        module: The network, whose parameters have no gradients yet.
        out: What it computed, any shape.

    Returns:
        Absolute gradients by name, each of its parameter's shape; 0 where nothing depends on it.
    """
    (out * noise(*out.shape, seed=99)).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        for name, parameter in module.named_parameters()
    }


def assert_every_entry_matters(grads: dict[str, Tensor], idle: tuple[str, ...] = ()) -> None:
    """Assert a gradient in every entry of every parameter, save those that are idle.

    Args:
        grads: From ``gradients``.
        idle: Endings of the names of parameters of which some entries must have none.

    Raises:
        AssertionError: If one has none and is not named, or is named and has one everywhere.
    """
    blind = [name for name, grad in grads.items() if not (grad > 1e-13).all()]
    assert blind == [name for name in grads if name.endswith(idle)]
