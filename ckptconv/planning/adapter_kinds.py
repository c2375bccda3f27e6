"""The kinds of adapters: which tensors a layer has, of which shapes, and what they add up to.

LoRA is a product of two matrices, `up` and `down`, in convolutions with a core `mid` between; LoHa
is the elementwise product of two of these; LoKr is a Kronecker product. All are multiplied by alpha
and divided by their rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..dtypes import FLOATS
from ..reading.tensor import Shape, Tensor
from .step import Change, Target

Shapes = Mapping[str, Shape]
"""The shapes of the tensors of a layer, by role."""


def change_of(
    layer: str, target: Target, parts: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Change:
    """Returns what the tensors of one layer, by role, do to its weight.

    Args:
        layer: its name, without prefix.
        target: the weight.
        parts: the tensors.
        settings: of PEFT, as the metadata note them.

    Raises:
        ValueError: a tensor is missing, is not of floats or has a wrong shape.
    """
    dtypes = {part.name: part.dtype for role, part in parts.items() if role != "alpha"}
    for name, dtype in {target.key: target.dtype, **dtypes}.items():
        if dtype not in FLOATS:
            raise ValueError(f"{name} is not of floats, and cannot be merged")
    kind = next((kind for kind, (sets, _) in KINDS.items() if parts.keys() - {"alpha"} in sets), "")
    if not kind:
        held = " and ".join(sorted(parts))
        raise ValueError(f"has {held}; needed down and up, or all factors of a LoHa or LoKr")
    shapes = {role: part.shape for role, part in sorted(parts.items())}
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise ValueError(f"alpha has shape {list(shapes['alpha'])}, needed one number")
    try:
        product, rank = KINDS[kind][1](shapes)
    except (ValueError, IndexError):
        product, rank = (), None
    if not _fits(product, target.shape, kind):
        found = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
        raise ValueError(f"{found} do not make {list(target.shape)}, the shape of {target.key}")
    ordered = tuple(sorted(parts.items()))
    if rank is None:  # two whole matrices have no rank, and LyCORIS ignores their alpha
        return Change(target.key, kind, tuple(part for part in ordered if part[0] != "alpha"))
    if rank == 0:
        raise ValueError("its rank is 0")
    factor = 1 / rank if "alpha" in parts else _noted_factor(layer, rank, settings)
    return Change(target.key, kind, ordered, factor)


def _noted_factor(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Returns the factor of a layer without alpha, from the settings of PEFT."""
    alpha = settings.get("lora_alpha", settings.get("alpha", rank))
    patterns = settings.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if pattern in (layer, f"^{layer}") or layer.endswith(f".{pattern}"):
            alpha = value
            break
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not -1e30 < alpha < 1e30:  # NaN fails it
        raise ValueError(f"the metadata say that its alpha is {alpha!r}, needed a number")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _fits(product: Shape, weight: Shape, kind: str) -> bool:
    """Whether a product can be added to a weight; LoHa and LoKr may make a convolution flat."""
    if kind in ("loha", "lokr") and len(product) == 2 and weight:
        return product == (weight[0], math.prod(weight[1:]))
    return bool(product) and _trimmed(product) == _trimmed(weight)


def _trimmed(shape: Shape) -> Shape:
    """Leaves out the size of a 1 x 1 kernel: such a convolution is a linear layer."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def _times(left: Shape, right: Shape) -> Shape:
    """Returns the shape of a product of matrices, of which the second may have a kernel."""
    if len(_trimmed(left)) != 2 or len(right) < 2 or left[1] != right[0]:
        raise ValueError(f"{left} times {right}")
    return (left[0], *right[1:])


def _with_core(up: Shape, core: Shape, down: Shape) -> Shape:
    """Returns the shape of a product with a core, [r, s, ...], between [out, r] and [s, in]."""
    if len(_trimmed(down)) != 2:
        raise ValueError(f"{down} has a kernel")
    return (_times(up, core)[0], _times(core[:2], down[:2])[1], *core[2:])


def _lora_product(shapes: Shapes) -> tuple[Shape, int]:
    up, down = shapes["up"], shapes["down"]
    product = _with_core(up, shapes["mid"], down) if "mid" in shapes else _times(up, down)
    if "magnitude" in shapes and math.prod(shapes["magnitude"]) != product[0]:
        raise ValueError("one magnitude for each row")
    return product, down[0]


def _loha_product(shapes: Shapes) -> tuple[Shape, int]:
    one, other = _factor(shapes, "hada_w1"), _factor(shapes, "hada_w2")
    if one != other:
        raise ValueError("two factors of one shape")
    return one, shapes["hada_w1_b"][0]


def _lokr_product(shapes: Shapes) -> tuple[Shape, int | None]:
    left, right = _factor(shapes, "lokr_w1"), _factor(shapes, "lokr_w2")
    (a, c), (b, d, *kernel) = _trimmed(left), right
    rank = next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    return (a * b, c * d, *kernel), rank


def _factor(shapes: Shapes, name: str) -> Shape:
    """Returns the shape of a factor of a LoHa or LoKr: whole, or itself a product."""
    if name in shapes:
        return shapes[name]
    up, down, core = shapes[f"{name}_a"], shapes[f"{name}_b"], name.replace("_w", "_t")
    return _with_core(up[::-1], shapes[core], down) if core in shapes else _times(up, down)


LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
RIGHT = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
KINDS: Mapping[str, tuple[Sequence[set[str]], Callable[[Shapes], tuple[Shape, int | None]]]] = {
    "lora": ([{"down", "up"}, {"down", "up", "mid"}], _lora_product),
    "dora": ([{"down", "up", "magnitude"}], _lora_product),
    "loha": ([LOHA, LOHA | {"hada_t1", "hada_t2"}], _loha_product),
    "lokr": ([left | right for left in LEFT for right in RIGHT], _lokr_product),
}
"""The sets of tensors that a layer of a kind can have, and what gives the shape of their product
and its rank, raising ValueError or IndexError where the shapes do not go together."""

LYCORIS_ROLES = sorted(
    role for kind in ("loha", "lokr") for role in set[str]().union(*KINDS[kind][0])
)
