"""The forms that a layer of an adapter has: which tensors, of which shapes, and what they make.

LoRA is a product of two matrices, `up` and `down`, in convolutions with a core `mid` between; LoHa
is the product, element by element, of two of these; LoKr is a Kronecker product. All are multiplied
by alpha and divided by their rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..dtypes import FLOATS
from ..reading.tensor import Shape, Tensor
from .step import Change, Target


def _noted_factor(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Returns by what a layer without alpha is multiplied.

    Raises:
        ValueError: the metadata say an alpha that is no number.
    """
    alpha = settings.get("lora_alpha", settings.get("alpha", rank))
    patterns = settings.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if pattern in (name, f"^{name}") or name.endswith(f".{pattern}"):
            alpha = value
            break
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not -1e30 < alpha < 1e30:  # NaN fails it
        raise ValueError(f"the metadata say that its alpha is {alpha!r}, needed a number")
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def change_of(
    name: str, target: Target, parts: dict[str, Tensor], settings: Mapping[str, Any]
) -> Change:
    """Returns what the tensors of one layer do to its weight.

    Args:
        name: of the layer, without prefix.
        target: the weight.
        parts: the tensors, by their role.
        settings: what the metadata note of PEFT's settings.

    Raises:
        ValueError: they are no whole set, or have wrong shapes.
    """
    dtypes = {part.name: part.dtype for role, part in parts.items() if role != "alpha"}
    dtypes = {target.key: target.dtype} | dtypes
    if wrong := [key for key, dtype in dtypes.items() if dtype not in FLOATS]:
        raise ValueError(f"{wrong[0]} is not of floats, and cannot be merged")
    roles = parts.keys() - {"alpha"}
    kind = next((kind for kind, sets in FORMS.items() if roles in sets), None)
    if kind is None:
        held = " and ".join(sorted(parts))
        raise ValueError(f"has {held}; needed down and up, or all factors of a LoHa or LoKr")
    shapes = {role: part.shape for role, part in parts.items()}
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise ValueError(f"alpha has shape {list(shapes['alpha'])}, needed one number")
    try:
        given, rank = SHAPES[kind](shapes)
    except (ValueError, IndexError):
        given, rank = (), None
    if not _fits(given, target.shape, kind):
        found = ", ".join(f"{role} {list(shape)}" for role, shape in sorted(shapes.items()))
        raise ValueError(f"{found} do not make {list(target.shape)}, the shape of {target.key}")
    ordered = tuple(sorted(parts.items()))
    if rank is None:  # two whole matrices have no rank, and LyCORIS ignores their alpha
        return Change(target.key, kind, tuple(part for part in ordered if part[0] != "alpha"))
    if rank == 0:
        raise ValueError("its rank is 0")
    factor = 1 / rank if "alpha" in parts else _noted_factor(name, rank, settings)
    return Change(target.key, kind, ordered, factor)


LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
RIGHT = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
FORMS: Mapping[str, frozenset[frozenset[str]]] = {
    "lora": frozenset({frozenset({"down", "up"}), frozenset({"down", "up", "mid"})}),
    "dora": frozenset({frozenset({"down", "up", "magnitude"})}),
    "loha": frozenset({LOHA, LOHA | {"hada_t1", "hada_t2"}}),
    "lokr": frozenset(frozenset(left | right) for left in LEFT for right in RIGHT),
}
"""By kind, the sets of tensors that a layer can have."""

Shapes = Mapping[str, Shape]


def _fits(given: Shape, wanted: Shape, kind: str) -> bool:
    """Whether what an adapter makes can be added; LoHa and LoKr may make a convolution flat."""
    if kind in ("loha", "lokr") and len(given) == 2 and wanted:
        return given == (wanted[0], math.prod(wanted[1:]))
    return bool(given) and _trimmed(given) == _trimmed(wanted)


def _trimmed(shape: Shape) -> Shape:
    """Leaves the size of a kernel out where it is 1: such a convolution is a linear layer."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def _times(left: Shape, right: Shape) -> Shape:
    """Returns the shape of a product of matrices, of which the second may have a kernel.

    Raises:
        ValueError: there is no such product.
    """
    if len(_trimmed(left)) != 2 or len(right) < 2 or left[1] != right[0]:
        raise ValueError(f"{left} times {right}")
    return (left[0], *right[1:])


def _core(core: Shape, up: Shape, down: Shape) -> Shape:
    """Returns the shape of what a core, [r, s, ...], makes between [out, r] and [s, in].

    Raises:
        ValueError: they do not fit together.
    """
    if len(_trimmed(down)) != 2:
        raise ValueError(f"{down} has a kernel")
    return (_times(up, core)[0], _times(core[:2], down[:2])[1], *core[2:])


def _lora_shape(shapes: Shapes) -> tuple[Shape, int | None]:
    up, down = shapes["up"], shapes["down"]
    given = _core(shapes["mid"], up, down) if "mid" in shapes else _times(up, down)
    if "magnitude" in shapes and math.prod(shapes["magnitude"]) != given[0]:
        raise ValueError("one magnitude for each row")
    return given, down[0]


def _loha_shape(shapes: Shapes) -> tuple[Shape, int | None]:
    made = []
    for n in (1, 2):
        up, down, core = shapes[f"hada_w{n}_a"], shapes[f"hada_w{n}_b"], f"hada_t{n}"
        made.append(_core(shapes[core], up[::-1], down) if core in shapes else _times(up, down))
    if made[0] != made[1]:
        raise ValueError("two factors of one shape")
    return made[0], shapes["hada_w1_b"][0]


def _lokr_shape(shapes: Shapes) -> tuple[Shape, int | None]:
    sides = []
    for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2")):
        if name in shapes:
            sides.append(shapes[name])
            continue
        up, down = shapes[f"{name}_a"], shapes[f"{name}_b"]
        sides.append(_core(shapes[core], up[::-1], down) if core in shapes else _times(up, down))
    (a, c), (b, d, *kernel) = _trimmed(sides[0]), sides[1]
    rank = next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    return (a * b, c * d, *kernel), rank


SHAPES = {"lora": _lora_shape, "dora": _lora_shape, "loha": _loha_shape, "lokr": _lokr_shape}
"""By kind, from the shapes of the tensors to the shape of what they make, and the rank."""
