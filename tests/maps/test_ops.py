"""The shape rules of the tensor operations."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptconv.maps.ops import DROP, OPS, RENAME, Op, Shape

SQUEEZED = "needs shape [out, in, 1, 1], [out, in], [out, 1, 1] or [out]"


@pytest.mark.parametrize(
    ("name", "shape", "count", "expected"),
    [
        ("rename", (), 1, ((),)),
        ("rename", (3, 4, 5), 1, ((3, 4, 5),)),
        ("squeeze", (8, 4, 1, 1), 1, ((8, 4),)),
        ("squeeze", (8, 4), 1, ((8, 4),)),
        ("squeeze", (8, 1, 1), 1, ((8,),)),
        ("squeeze", (8,), 1, ((8,),)),
        ("squeeze", (1, 1, 1, 1), 1, ((1, 1),)),
        ("row", (8,), 1, ((1, 8),)),
        ("row", (1, 8), 1, ((1, 8),)),
        ("split_rows", (9, 4), 3, ((3, 4), (3, 4), (3, 4))),
        ("split_rows", (6,), 2, ((3,), (3,))),
        ("split_rows", (0, 4), 3, ((0, 4), (0, 4), (0, 4))),
        ("transpose", (3, 5), 1, ((5, 3),)),
        ("drop", (3, 5), 0, ()),
    ],
)
def test_an_operation_gives_the_shapes(
    name: str, shape: Shape, count: int, expected: tuple[Shape, ...]
) -> None:
    assert OPS[name].forward(shape, count) == expected


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("squeeze", (8, 4, 3, 3), f"{SQUEEZED}, found [8, 4, 3, 3]"),
        ("squeeze", (8, 4, 1), f"{SQUEEZED}, found [8, 4, 1]"),
        ("squeeze", (8, 1, 1, 1, 1), f"{SQUEEZED}, found [8, 1, 1, 1, 1]"),
        ("row", (2, 8), "needs shape [n] or [1, n], found [2, 8]"),
        ("row", (), "needs shape [n] or [1, n], found []"),
        ("squeeze", (), f"{SQUEEZED}, found []"),
        ("split_rows", (10, 4), "needs rows that divide by 3, found [10, 4]"),
        ("split_rows", (), "needs rows that divide by 3, found []"),
        ("transpose", (3,), "needs a matrix, found [3]"),
        ("transpose", (3, 3, 1, 1), "needs a matrix, found [3, 3, 1, 1]"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_what_was_needed(
    name: str, shape: Shape, said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        OPS[name].forward(shape, 3)


def test_the_set_is_closed_and_only_a_transpose_moves_elements() -> None:
    assert set(OPS) == {
        *("rename", "squeeze", "split_rows", "row", "transpose", "swap_halves", "drop"),
    }
    assert all(OPS[op.name] is op for op in (RENAME, DROP))
    moving = [op.name for op in OPS.values() if not op.keeps_order]
    assert moving == ["transpose", "swap_halves"]


DIM = st.integers(0, 6)
SHAPES = st.one_of(
    st.lists(DIM, max_size=4).map(tuple),
    st.tuples(DIM, DIM).map(lambda s: (*s, 1, 1)),
    st.tuples(st.just(1), DIM),
)


@given(st.sampled_from([op for op in OPS.values() if op is not DROP]), SHAPES, st.integers(2, 4))
def test_what_goes_forward_comes_back(op: Op, shape: Shape, parts: int) -> None:
    try:
        targets = op.forward(shape, parts if op.name == "split_rows" else 1)
    except ValueError:
        return
    assert op.backward(targets, shape) == shape
    # Without a note, the source is that of the published files, which gives the same targets.
    assert op.forward(op.backward(targets, None), len(targets)) == targets
    assert math.prod(shape) == sum(map(math.prod, targets))


@pytest.mark.parametrize(
    ("name", "shapes", "said"),
    [
        ("squeeze", [(3, 4, 1, 1)], "needs shape [out, in] or [out], found [3, 4, 1, 1]"),
        ("split_rows", [(3, 4), (3, 5)], "needs parts of one shape, found [3, 4], [3, 5]"),
        ("split_rows", [(), ()], "needs parts of one shape, found [], []"),
        ("row", [(2, 8)], "needs shape [1, n], found [2, 8]"),
        ("transpose", [(3,)], "needs a matrix, found [3]"),
    ],
)
def test_what_did_not_come_from_the_operation_has_no_way_back(
    name: str, shapes: list[Shape], said: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        OPS[name].backward(shapes, None)
