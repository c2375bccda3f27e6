"""The safetensors header: round trips and fuzzing, beside the library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.dtypes import BITS
from ckptconv.reading.header import encode_header, read_header
from ckptconv.reading.tensor import Tensor
from tests.support.attacks import NUMPY_DTYPES, check_laws, check_like_library, entry, pack

FUZZ = settings(max_examples=250, deadline=None, database=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that a test may write, again and again, to read it back."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


NAMES = st.text(max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
METADATA = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3)


@st.composite
def files(draw: st.DrawFn, dtypes: Sequence[str]) -> tuple[bytes, dict[str, Tensor], Any]:
    """A file that `encode_header` begins, what it says of the tensors, and the metadata."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    tensors = [(name, draw(st.sampled_from(dtypes)), draw(SHAPES)) for name in names]
    metadata = draw(METADATA)
    beginning, infos = encode_header(tensors, metadata)
    size = sum(info.nbytes for info in infos.values())
    return beginning + draw(st.binary(min_size=size, max_size=size)), infos, metadata


@FUZZ
@given(files(list(NUMPY_DTYPES)))
def test_round_trip(scratch: Path, file: tuple[bytes, dict[str, Tensor], Any]) -> None:
    content, infos, metadata = file
    scratch.write_bytes(content)
    header = read_header(scratch)
    check_laws(header, scratch)
    assert header.tensors == {k: replace(info, file=scratch) for k, info in infos.items()}
    assert list(header.tensors) == list(infos)
    assert header.metadata == metadata
    assert header.data_start % 8 == 0
    with safetensors.safe_open(scratch, framework="np") as opened:
        assert (opened.metadata() or {}) == metadata
    for arrays in (safetensors.numpy.load(content), safetensors.numpy.load_file(scratch)):
        assert arrays.keys() == infos.keys()
        for name, array in arrays.items():
            info = infos[name]
            assert array.dtype == NUMPY_DTYPES[info.dtype]
            assert array.shape == info.shape
            assert array.tobytes() == content[info.start : info.end]


@FUZZ
@given(
    files([dtype for dtype, bits in BITS.items() if bits >= 8]),
    st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=3),
    st.integers(-20, 20),
)
def test_flipped_and_cut_bytes(
    scratch: Path,
    file: tuple[bytes, dict[str, Tensor], Any],
    flips: list[tuple[int, int]],
    growth: int,
) -> None:
    content = bytearray(file[0])
    for position, mask in flips:
        content[position % len(content)] ^= mask
    if growth < 0:
        del content[growth:]
    else:
        content += bytes(growth)
    check_like_library(bytes(content), scratch)


@FUZZ
@given(st.data())
def test_changed_tokens(scratch: Path, data: st.DataObject) -> None:
    """Swaps one part of a good header for another, so that most files stay valid JSON."""
    tokens = ["0", "1", "4", "-1", "1.0", "true", "null", '"F32"', '"I64"', '"a"', '"shape"']
    tokens += ["[]", "{}", "[0,4]", '"dtype":"F32",', '"__metadata__"', " ", ",", "]", "}"]
    text = '{"__metadata__":{"a":"b"},"a":%s,"b":%s}'
    first, second = json.dumps(entry(shape=[4, 0], data_offsets=[0, 0])), json.dumps(entry())
    header = text % (first.replace(" ", ""), second.replace(" ", ""))
    for _ in range(data.draw(st.integers(1, 3))):
        old, new = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        parts = header.split(old)
        if len(parts) > 1:
            cut = data.draw(st.integers(1, len(parts) - 1))
            header = old.join(parts[:cut]) + new + old.join(parts[cut:])
    check_like_library(pack(header, bytes(4)), scratch)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, object]:
    """The entries of tensors that seldom overlap, leave a hole, or have a false size or shape."""
    found: dict[str, object] = {}
    end = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F4", "F6_E3M2"]))
        shape = draw(st.lists(st.integers(0, 8), max_size=3))
        start = end + draw(RARELY_WRONG)
        end = start + int(np.prod(shape)) * BITS[dtype] // 8 + draw(RARELY_WRONG)
        found[name] = entry(dtype, shape, [start, end])
    order = draw(st.permutations(list(found)))
    return {name: found[name] for name in order}


RARELY_WRONG = st.sampled_from([0] * 20 + [1, -1])


@FUZZ
@given(entries(), RARELY_WRONG)
def test_random_layouts(scratch: Path, document: dict[str, Any], growth: int) -> None:
    size = max((item["data_offsets"][1] for item in document.values()), default=0)
    check_like_library(pack(document, bytes(max(size + growth, 0))), scratch)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["a", "__metadata__", ""])
FIELDS = st.fixed_dictionaries(dict.fromkeys(["dtype", "shape", "data_offsets"], JSON_VALUES))


@settings(FUZZ, max_examples=100)
@given(st.dictionaries(KEYS, FIELDS | JSON_VALUES, max_size=2) | JSON_VALUES)
def test_random_json(scratch: Path, document: object) -> None:
    check_like_library(pack(document, bytes(4)), scratch)


@FUZZ
@given(st.binary(max_size=100))
def test_random_bytes(scratch: Path, content: bytes) -> None:
    check_like_library(content, scratch)
    check_like_library(pack(b"{" + content), scratch)
