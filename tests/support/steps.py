"""Random steps with their files, and what a naive implementation makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from ckptconv.dtypes import BITS
from ckptconv.maps.ops import OPS
from ckptconv.planning.step import Step, Target
from ckptconv.reading.header import encode_header, read_header
from ckptconv.reading.tensor import Header, Order, Tensor
from ckptconv.streaming.stream import lay_out, write
from ckptconv.streaming.transfers import Transfer, transfers

NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1"}
Values = npt.NDArray[Any]


def _decoded(data: bytes, dtype: str) -> Values:
    """Returns elements as numpy numbers; those of 16 or 8 bits that numpy lacks as float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        codes = torch.frombuffer(bytearray(data), dtype=torch.float8_e4m3fn) if data else None
        return codes.float().numpy() if codes is not None else np.zeros(0, np.float32)
    return np.frombuffer(data, NUMPY[dtype])


def _encoded(values: Values, dtype: str) -> bytes:
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(NUMPY[dtype]).tobytes()
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _random_bytes(dtype: str, count: int, seed: int) -> bytes:
    random = np.random.default_rng(seed)
    if dtype == "F8_E4M3":
        return random.integers(0, 0x7F, count, dtype=np.uint8).tobytes()  # all but NaN
    if dtype in ("I64", "U8"):
        return random.integers(0, 256, count * BITS[dtype] // 8, dtype=np.uint8).tobytes()
    return _encoded(random.standard_normal(count) * 10.0 ** random.integers(-8, 4, count), dtype)


def source(
    file: str, name: str, dtype: str, shape: tuple[int, ...], order: Order | None = None
) -> Tensor:
    """Returns a tensor of a file that `Run` will write."""
    return Tensor(Path(file), name, dtype, shape, 0, 0, order)


def _file(path: Path, tensors: list[Tensor], contents: dict[str, bytes]) -> Header:
    """Writes a source file by hand, and returns its header."""
    beginning, _ = encode_header([(t.name, t.dtype, t.shape) for t in tensors], {})
    path.write_bytes(beginning + b"".join(contents[t.name] for t in tensors))
    return read_header(path)


def naive(step: Step, contents: dict[str, bytes]) -> dict[str, bytes]:
    """Runs a step on whole arrays: every source read, cast, put in a row and cut."""
    row = []
    for each in step.sources:
        data = contents[each.name]
        if each.dtype != step.targets[0].dtype:
            data = _encoded(_decoded(data, each.dtype), step.targets[0].dtype)
        if each.order:
            width = BITS[step.targets[0].dtype] // 8
            stored = np.frombuffer(data, f"V{width}").reshape(each.order.stored)
            data = stored.transpose(each.order.axes).tobytes()
        row.append(data)
    whole = b"".join(row)
    if step.op.name == "transpose":
        (matrix,) = step.sources
        width = BITS[step.targets[0].dtype] // 8
        elements = np.frombuffer(whole, f"V{width}").reshape(matrix.shape)
        return {step.targets[0].key: b"".join(e.tobytes() for e in elements.T.flatten())}
    cut, start = {}, 0
    for target in step.targets:
        size = math.prod(target.shape) * BITS[target.dtype] // 8
        cut[target.key] = whole[start : start + size]
        start += size
    assert start == len(whole)
    return cut


DIM = st.integers(0, 5)
FLOATS = st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"])
CASTS = st.sampled_from(["F16", "BF16", "F32", None, None])


@st.composite
def orders(draw: st.DrawFn, shape: tuple[int, ...]) -> Order | None:
    """Draws an order of the elements of a tensor, which is often that of its axes."""
    axes = draw(st.permutations(range(len(shape))))
    if 0 in shape or list(axes) == sorted(axes):
        return None
    return Order(tuple(shape[axes.index(n)] for n in range(len(shape))), tuple(axes))


@st.composite
def steps_of_all_kinds(draw: st.DrawFn) -> list[Step]:
    """Draws steps of every operation, in both directions, over two source and target files."""
    steps = []
    for n in range(draw(st.integers(1, 7))):
        op = OPS[draw(st.sampled_from(["rename", "squeeze", "split_rows", "transpose"]))]
        parts = draw(st.integers(2, 4)) if op.name == "split_rows" else 1
        shape: tuple[int, ...] = {
            "rename": tuple(draw(st.lists(DIM, max_size=3))),
            "squeeze": (draw(DIM), draw(DIM), *draw(st.sampled_from([(), (1, 1)]))),
            "split_rows": (draw(DIM) * parts, *draw(st.lists(DIM, max_size=2))),
            "transpose": (draw(DIM), draw(DIM)),
        }[op.name]
        dtype = draw(st.one_of(FLOATS, st.sampled_from(["I64", "U8"])))
        shapes = op.forward(shape, parts)
        before, after = ([shape], shapes) if draw(st.booleans()) else (shapes, [shape])
        step = Step(
            op,
            tuple(
                source(
                    draw(st.sampled_from(["a", "b"])),
                    f"s{n}.{i}",
                    dtype,
                    s,
                    draw(orders(s)) if len(before) == 1 else None,
                )
                for i, s in enumerate(before)
            ),
            tuple(
                Target(draw(st.sampled_from(["unet", "vae"])), f"t{n}.{i}", dtype, s)
                for i, s in enumerate(after)
            ),
        )
        if dtype not in ("I64", "U8") and (to := draw(CASTS)):
            step = Step(
                op,
                tuple(replace(s, dtype=draw(FLOATS)) for s in step.sources),
                tuple(replace(s, dtype=to) for s in step.targets),
            )
        steps.append(step)
    return steps


@dataclass
class Run:
    """Everything that `write` needs for some steps, with random sources on the disk."""

    folder: Path
    steps: list[Step]

    def __post_init__(self) -> None:
        sources = [tensor for step in self.steps for tensor in step.sources]
        self.contents = {
            s.name: _random_bytes(s.dtype, math.prod(s.shape), n) for n, s in enumerate(sources)
        }
        self.headers = {
            file.name: _file(
                self.folder / f"{file}.safetensors",
                [s for s in sources if s.file == file],
                self.contents,
            )
            for file in {s.file for s in sources}
        }
        self.steps = [
            replace(
                step,
                sources=tuple(
                    replace(self.headers[s.file.name].tensors[s.name], order=s.order)
                    for s in step.sources
                ),
            )
            for step in self.steps
        ]
        written: dict[str, list[Target]] = {}
        for step in self.steps:
            for target in step.targets:
                written.setdefault(target.component, []).append(target)
        self.files = []
        self.places: dict[tuple[str, str], Tensor] = {}
        for name, members in written.items():
            (self.folder / name).mkdir()
            file = lay_out(self.folder / name / "w.safetensors", members, {"format": "pt"})
            self.files.append(file)
            self.places |= {(name, key): tensor for key, tensor in file.tensors.items()}

    def transfers(self) -> list[Transfer]:
        return list(transfers(self.steps, self.places))

    def write(self) -> tuple[list[str], int]:
        """Returns the warnings, and the sum of the progress."""
        done: list[int] = []
        warnings = write(self.files, self.transfers(), done.append)
        return warnings, sum(done)


def copies(count: int, *, dtype: str = "F32", size: int = 1000) -> list[Step]:
    """Returns steps that rename neighbours to neighbours."""
    sources = [source("a", f"s{n}", dtype, (size,)) for n in range(count)]
    return [Step(OPS["rename"], (s,), (Target("unet", s.name, dtype, s.shape),)) for s in sources]


def in_turns(steps: list[Step]) -> list[Step]:
    """Sends every other tensor to another file."""
    names = ("unet", "vae")
    return [
        Step(s.op, s.sources, tuple(replace(t, component=names[n % 2]) for t in s.targets))
        for n, s in enumerate(steps)
    ]


def cast_to(dtype: str, steps: list[Step]) -> list[Step]:
    return [Step(s.op, s.sources, tuple(replace(t, dtype=dtype) for t in s.targets)) for s in steps]
