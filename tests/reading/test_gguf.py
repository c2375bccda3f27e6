"""The header of GGUF: what the gguf package reads in it, and every refusal."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptconv.dtypes import BLOCKS
from ckptconv.errors import HeaderError
from ckptconv.reading import gguf as module
from ckptconv.reading.source import open_header
from ckptconv.reading.tensor import Header
from tests.support import gguf_files

Edit = Callable[[bytes], bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def described(
    name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def file(
    *infos: bytes,
    entries: tuple[bytes, ...] = (),
    data: int = 128,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of 128 bytes of data unless the arguments say otherwise."""
    found = counts or (len(infos), len(entries))
    beginning = b"GGUF" + struct.pack("<IQQ", version, *found) + b"".join([*entries, *infos])
    return beginning + bytes(-len(beginning) % 32) + bytes(data)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def shaped(*shape: int) -> bytes:
    return entry(f"{module.SHAPE_OF}a", 9, struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *shape))


ONE = described()
ATTACKS: dict[str, tuple[bytes, str]] = {
    "magic alone": (b"GGUF", "the file is truncated"),
    "version 1": (file(ONE, version=1), "it has version 1, expected version 2 or 3"),
    "version 4": (file(ONE, version=4), "it has version 4"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(64), "its numbers are big-endian"),
    "tensors without end": (file(ONE, counts=(2**64 - 1, 0)), "has 18,446,744,073,709,551,615 t"),
    "metadata without end": (file(ONE, counts=(1, 2**63)), "entries, more than 100,000"),
    "more tensors than there are": (file(ONE, counts=(99, 0)), "the file is truncated"),
    "a name without end": (file(struct.pack("<Q", 2**62)), "the file is truncated: its header"),
    "a name that is not text": (file(struct.pack("<Q", 1) + b"\xff" + ONE[9:]), "utf-8"),
    "a reserved name": (file(described("__metadata__")), "the name is taken"),
    "a repeated name": (file(ONE, described(offset=128), data=256), "'a': the name is taken"),
    "a repeated entry": (
        file(ONE, entries=(entry("k", 4, bytes(4)),) * 2),
        "the metadata repeat the key 'k'",
    ),
    "five axes": (file(described(shape=(1,) * 5)), "tensor 'a' has 5 axes, the format allows 4"),
    "2**32 - 1 axes": (file(text("a") + b"\xff" * 16), "4,294,967,295 axes"),
    "a size that overflows": (file(described(shape=(2**62, 2**62))), "overflows: 2**63 bits"),
    "a size of 2**64 - 1": (file(described(shape=(2**64 - 1,))), "not a list of integers"),
    "type 4": (file(described(kind=4)), "tensor 'a': its type 4 is unknown"),
    "type 2**32 - 1": (file(described(kind=2**32 - 1)), "its type 4294967295 is unknown"),
    "half a block": (file(described(shape=(16,), kind=8)), "whole blocks of 32"),
    "rows of no blocks": (file(described(shape=(32, 3), kind=8)), "rows of Q8_0 are whole blocks"),
    "a quantized scalar": (file(described(shape=(), kind=8)), "not whole blocks of 32"),
    "an odd offset": (file(described(offset=7)), "its offset 7 is not a multiple of 32"),
    "an offset of 2**64 - 32": (file(described(offset=2**64 - 32)), "offset"),
    "an overlap": (file(ONE, described("b", offset=32)), "it overlaps the one before it by 96 b"),
    "a hole": (file(described(offset=64), data=192), "a hole of 64 bytes precedes it"),
    "data that are cut": (file(ONE, data=127), "1 are missing"),
    "bytes at the end": (file(ONE, data=160), "32 bytes follow the last tensor"),
    "an alignment of 0": (file(ONE, entries=(entry("general.alignment", 4, bytes(4)),)), "is 0"),
    "an alignment of 24": (
        file(ONE, entries=(entry("general.alignment", 4, struct.pack("<I", 24)),)),
        "its alignment is 24, expected a power of two",
    ),
    "an alignment of 2**31": (
        file(ONE, entries=(entry("general.alignment", 4, struct.pack("<I", 2**31)),)),
        "its alignment is 2147483648",
    ),
    "an alignment of text": (
        file(ONE, entries=(entry("general.alignment", 8, text("x")),)),
        "its alignment is 'x'",
    ),
    "an unknown type of metadata": (file(ONE, entries=(entry("k", 13, b""),)), "unknown type 13"),
    "arrays in arrays": (
        file(ONE, entries=(entry("k", 9, struct.pack("<IQ", 9, 1)),)),
        "an array of the unknown type 9",
    ),
    "an array without end": (
        file(ONE, entries=(entry("k", 9, struct.pack("<IQ", 12, 2**60)),)),
        "the file is truncated",
    ),
    "another number of elements": (
        file(ONE, entries=(shaped(3, 11),)),
        "its metadata give [32] the shape [3, 11]",
    ),
    "a negative size": (file(ONE, entries=(shaped(-4, -8),)), "give it the shape (-4, -8)"),
    "a shape of many axes": (file(ONE, entries=(shaped(*[1] * 9),)), "give it the shape (1, 1,"),
    "a shape of text": (
        file(ONE, entries=(entry(f"{module.SHAPE_OF}a", 8, text("32")),)),
        "give it the shape '32'",
    ),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def read(scratch: Path, content: bytes) -> Header:
    scratch.write_bytes(content)
    return open_header(scratch)


@pytest.mark.parametrize("name", ATTACKS)
def test_refusals_say_what_is_wrong(name: str, scratch: Path) -> None:
    content, fragment = ATTACKS[name]
    with pytest.raises(HeaderError) as caught:
        read(scratch, content)
    assert fragment in str(caught.value)


def test_a_header_may_not_take_memory_without_end(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_HEADER", 100)
    long = entry("k", 9, struct.pack("<IQ", 8, 9) + text("x" * 20) * 9)
    with pytest.raises(HeaderError, match="its header has more than 100 bytes"):
        read(scratch, file(ONE, entries=(long,)))


def test_every_beginning_of_a_file_is_refused(scratch: Path) -> None:
    whole = file(ONE, entries=(shaped(4, 8), entry("general.name", 8, text("x"))))
    assert read(scratch, whole).tensors["a"].shape == (4, 8)
    for size in range(9, len(whole)):
        with pytest.raises(HeaderError):
            read(scratch, whole[:size])


@settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
@given(changes=st.lists(st.tuples(st.integers(4, 199), st.integers(0, 255)), max_size=4))
def test_other_bytes_are_refused_or_stay_within_the_file(
    changes: list[tuple[int, int]], scratch: Path
) -> None:
    content = bytearray(
        file(ONE, described("b", (2, 64), 8, 128), entries=(shaped(4, 8),), data=288)
    )
    for at, byte in changes:
        content[at] = byte
    try:
        header = read(scratch, bytes(content))
    except HeaderError:
        return
    for tensor in header.tensors.values():
        assert header.data_start <= tensor.start <= tensor.end <= header.size


def test_it_reads_what_the_package_wrote(tmp_path: Path) -> None:
    def more(writer: Any) -> None:
        writer.add_name("a name")
        writer.add_array("tokenizer.ggml.tokens", ["<pad>", "é"] * 500)
        writer.add_array("tokenizer.ggml.scores", [0.5] * 999)
        writer.add_bool("a.flag", True)
        writer.add_float64("a.number", 1e300)
        writer.add_custom_alignment(64)

    kinds = {d: gguf_files.random(d, (3, 512)) for d in BLOCKS}
    floats = {d: gguf_files.written(np.ones((3, 5)), d) for d in ("F32", "F16", "BF16")}
    shapes = {f"axes {n}": gguf_files.written(np.ones((2, 3, 4, 5)[:n]), "F32") for n in (1, 3, 4)}
    stored = kinds | floats | shapes
    path = gguf_files.write(tmp_path / "model.gguf", stored, more=more)
    header, reader = open_header(path), gguf.GGUFReader(path)
    assert header.metadata == {"general.architecture": "flux", "general.name": "a name"}
    assert list(header.tensors) == list(stored)
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert ours.dtype == theirs.tensor_type.name
        assert ours.shape == tuple(theirs.shape[::-1].tolist())
        assert (ours.start, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)


def test_the_tables_are_those_of_the_package() -> None:
    sizes = {k.name: size for k, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: sizes[name] for name in BLOCKS} == BLOCKS
    numbers = {k.value: k.name for k in gguf.GGMLQuantizationType}
    assert {n: numbers[n] for n in module.TYPES} == module.TYPES


def test_a_reshaped_tensor_has_its_own_shape(tmp_path: Path) -> None:
    _, _, rows = gguf_files.random("Q4_K", (9, 256))
    stored = {"a": ("Q4_K", (64, 4, 3, 3), rows)}
    path = gguf_files.write(tmp_path / "model.gguf", stored)
    tensor = open_header(path).tensors["a"]
    assert (tensor.shape, tensor.nbytes) == ((64, 4, 3, 3), 9 * 144)
