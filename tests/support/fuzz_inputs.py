"""Makes the damaged checkpoints of `tests.fuzz`: by structure, so that many get far, and by bytes.

Data are zeros, and holes where a file system has them, so that a file of 2**40 bytes costs nothing.
"""

from __future__ import annotations

import functools
import json
import math
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptconv.dtypes import BITS, BLOCKS, nbytes
from ckptconv.maps.architecture import bundled
from ckptconv.reading.gguf import SHAPE_OF, TYPES
from ckptconv.reading.header import header_from_json
from ckptconv.sample import layout_of
from tests.support.attacks import ATTACKS, entry, pack
from tests.support.pickle_attacks import FIELDS, PICKLES, ZIPS
from tests.support.pickles import STOP, checkpoint, name, numbers, pushed, tensor, text, zipped

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""
Files = dict[str, tuple[bytes, int]]
"""Beginning and size of files by name; the first is opened."""
Pairs = list[tuple[str, Any]]
"""A JSON object whose keys may occur twice."""

LARGEST, STORAGE = 1 << 40, 1 << 24
"""Bytes of a file and of a storage, at most."""
PREFIXES: list[str] = """
model.diffusion_model. model_ema. first_stage_model. control_model. cond_stage_model.
cond_stage_model.transformer. cond_stage_model.model. conditioner.embedders.0. text_model. unet.
conditioner.embedders.1.model. vae. module. state_dict. lora_unet_ depth_model. noise_augmentor.
""".split()  # noqa: SIM905  (three lines, not twenty)
WORDS: list[str] = """
. .. / ../x 0 00 -1 7 99999 1e9 ² ٣ [bold] [/] %s{0}{} é 😀 * weight bias in_proj_weight v_pred
edm_mean ztsnr scale_weight epsilon v v_prediction stable-diffusion-xl-v1-base sdxl_base_v1-0 sd_v1
""".split()  # noqa: SIM905
WORDS += ["", "\0", "\x1b[2J", "\n", "\u202e", "\ud800", "9" * 5000]
ENTRIES = ["modelspec.architecture", "modelspec.prediction_type", "ss_base_model_version", "ss_v2"]
SIZES = (0, 1, 2, 3, 4, 9, 64, 320, 768, 1024, 1280, 2**20, 2**31, 2**62, 2**63, 2**64)
OBJECTS = [name("argparse.Namespace") + b")\x81}" + text("x") + b"Nsb", name("a.B") + b")R"]
OBJECTS += [name("a.b") + b")R", name("a.b"), name("os.system") + text("true") + b"\x85R"]
STORAGES = {"F32": "Float", "F16": "Half", "BF16": "BFloat16", "I64": "Long", "I32": "Int"}
STORAGES |= {"F64": "Double", "U8": "Byte", "BOOL": "Bool", "I8": "Char", "I16": "Short"}


@dataclass(frozen=True)
class Trial:
    """An input."""

    kind: str
    files: Files

    def write(self, folder: Path) -> Path:
        """Writes the files, and returns the path of the first."""
        folder.mkdir(parents=True)
        for file, (content, size) in self.files.items():
            with (folder / file).open("wb") as out:
                out.write(content)
                out.truncate(size)
        return folder / next(iter(self.files))


@functools.cache
def layouts() -> tuple[Tensors, ...]:
    """Returns the layouts to damage: published ones, and small ones that convert at once."""
    found = []
    for path in sorted((Path(__file__).parents[1] / "headers").glob("*.json")):
        infos = header_from_json(path).tensors
        found.append({key: (info.dtype, info.shape) for key, info in infos.items()})
    return (*found, *small_layouts(), *small_layouts())


@functools.cache
def small_layouts() -> tuple[Tensors, ...]:
    """Returns samples with a short vocabulary, with and without a copy of the UNet."""
    return tuple(
        {key: (dtype, tuple(64 if n == 49408 else n for n in s)) for key, dtype, s in tensors}
        for architecture in bundled().architectures.values()
        for tensors in (layout_of(architecture), layout_of(architecture, ema=True))
    )


def good() -> Trial:
    """Returns an input that nothing is wrong with."""
    tensors = next(t for t in small_layouts() if "first_stage_model.quant_conv.bias" in t)
    return Trial("good", {"model.safetensors": file_of(*document(random.Random(0), tensors))})  # noqa: S311


def trial(seed: int, number: int) -> Trial:
    """Returns an input: always the same one of a number."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311
    kind = rng.choice([*["tensors"] * 4, *(kind for kind in _KINDS if kind != "tensors")])
    return Trial(kind, _KINDS[kind](rng))


def changed(rng: random.Random, among: tuple[Tensors, ...], most: int = 10**6) -> Tensors:
    """Returns a layout after a few changes that leave a header well-formed."""
    tensors = dict(rng.choice(among))
    if len(tensors) > most:
        at = rng.randrange(len(tensors) - most)
        tensors = dict(list(tensors.items())[at : at + most])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        chosen = some(rng, tensors)
        match rng.randrange(7):
            case 0:
                for key in chosen:
                    del tensors[key]
            case 1 | 2 as copies:
                new = renaming(rng, rng.choice(chosen), tensors) if chosen else str
                for key in chosen:
                    tensors[new(key)] = tensors[key] if copies == 1 else tensors.pop(key)
            case 3:
                shape = reshaping(rng)
                tensors |= {key: (tensors[key][0], shape(tensors[key][1])) for key in chosen}
            case 4:
                dtype = rng.choice(sorted(BITS))
                tensors |= {key: (dtype, tensors[key][1]) for key in chosen}
            case 5:
                for key in chosen:
                    to = rng.choice(list(tensors))
                    tensors[key], tensors[to] = tensors[to], tensors[key]
            case _:
                other = rng.choice(among)
                tensors |= {key: other[key] for key in some(rng, other)}
    return tensors


def some(rng: random.Random, tensors: Tensors) -> list[str]:
    """Returns a key, or all that begin or end as it does."""
    if not tensors:
        return []
    key = rng.choice(list(tensors))
    parts = key.split(".")
    count = rng.randrange(1, len(parts) + 1)
    match rng.randrange(3):
        case 0:
            return [key]
        case 1:
            return [k for k in tensors if k.startswith(".".join(parts[:count]))]
        case _:
            return [k for k in tensors if k.endswith(".".join(parts[-count:]))]


def renaming(rng: random.Random, like: str, tensors: Tensors) -> Callable[[str], str]:
    """Returns another prefix or another segment, for keys that are like one."""
    old = next((p for p in sorted(PREFIXES, key=len, reverse=True) if like.startswith(p)), "")
    prefix = rng.choice([*PREFIXES, ""])
    if rng.random() < 0.4:
        return lambda key: prefix + key.removeprefix(old)
    segment = rng.choice(like.split("."))
    word = rng.choice([*WORDS, *rng.choice(list(tensors)).split("."), str(rng.randrange(20))])
    return lambda key: ".".join(word if part == segment else part for part in key.split("."))


def reshaping(rng: random.Random) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """Returns another size of one axis, or another number of axes."""
    at, to = rng.randrange(4), rng.choice([*SIZES, -1, -2, -3])
    ways: list[Callable[[tuple[int, ...]], tuple[int, ...]]] = [
        lambda s: tuple(_resized(n, to) if axis == at else n for axis, n in enumerate(s)),
        lambda s: tuple(_resized(n, to) if axis == at else n for axis, n in enumerate(s)),
        lambda s: s[:at] + s[at + 1 :],
        lambda s: (*s[:at], 1, *s[at:]),
        lambda s: s[::-1],
        lambda _: (to,) * rng.choice([0, 1, 2, 64]) if to >= 0 else (),
    ]
    return rng.choice(ways)


def _resized(size: int, to: int) -> int:
    return to if to >= 0 else {-1: max(size - 1, 0), -2: size + 1, -3: size * 2}[to]


def document(rng: random.Random, tensors: Tensors) -> tuple[Pairs, int]:
    """Returns the header of tensors back to back, with some metadata, and their size."""
    metadata = {rng.choice(ENTRIES + WORDS): rng.choice(WORDS) for _ in range(rng.randrange(3))}
    pairs: Pairs = [("__metadata__", metadata)] if metadata else []
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BITS[dtype] // 8
        pairs.append((key, entry(dtype, shape, (start, end))))
    return pairs, end


def file_of(pairs: Iterable[tuple[str, Any]], size: int) -> tuple[bytes, int]:
    """Returns beginning and size of a safetensors file."""
    inner = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs)
    beginning = pack(f"{{{inner}}}")
    return beginning, min(len(beginning) + size, LARGEST)


def _raw(content: bytes) -> tuple[bytes, int]:
    return content, len(content)


def _tensors(rng: random.Random) -> Files:
    return {"model.safetensors": file_of(*document(rng, changed(rng, layouts())))}


def value(rng: random.Random, depth: int = 0) -> Any:
    """Returns a JSON value."""
    inner: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False, 0.5, -0.0, math.nan, math.inf, -1, 10**30]),
        lambda: rng.choice(SIZES),
        lambda: rng.choice(WORDS),
        lambda: rng.choice(sorted(BITS)),
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))},
        lambda: json.loads("[" * 300 + "]" * 300),
    ]
    return rng.choice(inner[: 4 if depth > 3 else None])()


def _header(rng: random.Random) -> Files:
    pairs, size = document(rng, changed(rng, layouts(), rng.choice([1, 3, 20, 10**6])))
    for _ in range(rng.choice([1, 1, 2, 5]) if pairs else 0):
        at = rng.randrange(len(pairs))
        key, item = pairs[at]
        fields = item if isinstance(item, dict) else {}
        pairs[at] = rng.choice(
            [
                (key, fields | {rng.choice([*fields, "dtype", "extra"]): value(rng)}),
                (key, fields | {rng.choice([*fields, "dtype", "extra"]): value(rng)}),
                (key, value(rng)),
                (rng.choice(pairs)[0], item),
                (rng.choice(["__metadata__", *WORDS]), item),
                (key, {k: v for k, v in fields.items() if k != rng.choice([*fields, ""])}),
            ]
        )
    content, whole = file_of(pairs, max(size + rng.choice([0, 0, 0, -1, 1, -size, 2**30]), 0))
    if rng.random() < 0.1:  # deeper than any object of Python can be written
        inner = rng.choice(["[", '{"a":', "[[[],"]) * rng.choice([500, 5_000, 100_000])
        content = pack(content[8:-1] + b',"deep":' + inner.encode())
    return {"model.safetensors": (content, max(whole, len(content)))}


def _index(rng: random.Random) -> Files:
    tensors = changed(rng, layouts())
    parts: list[Tensors] = [{}, {}]
    for key, info in tensors.items():
        parts[rng.random() < 0.5][key] = info
    names = ("a.safetensors", rng.choice(["b.safetensors", "b.safetensors", "é.safetensors"]))
    table: Any = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    for key in some(rng, tensors) if rng.random() < 0.5 else ():
        table[rng.choice([key, *WORDS])] = rng.choice([*names, value(rng), *WORDS])
    index: Any = {"metadata": {"total_size": 0}, "weight_map": table}
    if rng.random() < 0.2:
        index[rng.choice([*index])] = value(rng)
    files = {"model.safetensors.index.json": _raw(json.dumps(index).encode())}
    for file, part in zip(names, parts, strict=True):
        files[file] = file_of(*document(rng, part))
    return _flipped(rng, files) if rng.random() < 0.2 else files


def _pickle(rng: random.Random) -> Files:
    code, storages = pickled(rng, changed(rng, small_layouts()))
    return {"model.ckpt": _raw(checkpoint(code, **storages))}


def pickled(rng: random.Random, tensors: Tensors) -> tuple[bytes, dict[str, bytes]]:
    """Returns the pickle of a checkpoint, where tensors of one dtype share a storage, and those."""
    counts = dict.fromkeys(STORAGES, 4)
    for kind, shape in tensors.values():
        if (numel := math.prod(shape)) * 8 < STORAGE and kind in counts:
            counts[kind] = max(counts[kind], numel)
    entries, reversed_at = {}, rng.choice([*tensors, *[None] * 9 * len(tensors), None])
    for key, (kind, shape) in tensors.items():
        kind = kind if kind in counts else "F32"
        strides = [min(math.prod(shape[axis + 1 :]), 2**70) for axis in range(len(shape))]
        entries[key] = tensor(
            kind=f"torch.{STORAGES[kind]}Storage",
            key=text(kind),
            numel=counts[kind],
            shape=numbers(*shape),
            stride=numbers(*_other_strides(shape) if key == reversed_at else strides),
        )
    if rng.random() < 0.3:
        entries[rng.choice([*entries, "args"])] = rng.choice(OBJECTS)
    body = pushed(**entries)
    if rng.random() < 0.7:
        body = pushed(**{rng.choice(["state_dict"] * 9 + WORDS): body, "epoch": b"K\2"})
    data = {f"_{kind}": bytes(n * BITS[kind] // 8) for kind, n in counts.items()}
    return b"\x80\x02" + body + STOP, data


def _other_strides(shape: tuple[int, ...]) -> list[int]:
    """Returns the strides of `channels_last`, or of a transposed matrix."""
    axes = [0, *range(2, len(shape)), 1] if len(shape) > 2 else [*reversed(range(len(shape)))]
    strides, step = [1] * len(shape), 1
    for axis in reversed(axes):
        strides[axis], step = min(step, 2**70), step * shape[axis]
    return strides


def _opcodes(rng: random.Random) -> Files:
    code, storages = pickled(rng, changed(rng, small_layouts(), rng.choice([1, 5, 50])))
    starts = [at or 0 for _, _, at in pickletools.genops(code)]
    steps = [code[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, to = (rng.randrange(len(steps)) for _ in range(2))
        match rng.randrange(4):
            case 0:
                steps[at : at + rng.choice([1, 1, 5])] = []
            case 1:
                steps[at], steps[to] = steps[to], steps[at]
            case 2:
                steps[to:to] = steps[at : at + rng.randrange(20)]
            case _:
                steps[at:at] = [instruction(rng)] * rng.choice([1, 1, 1, 2, 1000])
        steps = steps or [STOP]
    return {"model.ckpt": _raw(checkpoint(b"".join(steps), **storages))}


def instruction(rng: random.Random) -> bytes:
    """Returns any instruction of the machine, with an argument that is often small."""
    opcode = rng.choice(pickletools.opcodes)
    count = opcode.arg.n if opcode.arg else 0
    if count >= 0:  # a number of bytes
        small = rng.randrange(4).to_bytes(max(count, 1), "little")[:count]
        return opcode.code.encode("latin-1") + rng.choice([small, rng.randbytes(count)])
    if count == pickletools.UP_TO_NEWLINE:
        return opcode.code.encode("latin-1") + rng.choice(
            [b"torch\nSize\n", b"1\n", b"os\nx\n", b"a\nB\n", b"a\nb\n"]
        )
    width = {"1": 1, "4": 4, "8": 8}.get(opcode.arg.name[-1], 4) if opcode.arg else 4
    content = rng.choice(WORDS).encode(errors="surrogatepass")
    return (
        opcode.code.encode("latin-1") + len(content).to_bytes(width + 4, "little")[:width] + content
    )


def _zip(rng: random.Random) -> Files:
    code, storages = pickled(rng, changed(rng, small_layouts(), rng.choice([3, 10**6])))
    packing = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    members = {f"x/data/{key[1:]}": content for key, content in storages.items()}
    members = {"x/data.pkl": code, "x/byteorder": rng.choice([b"little", b"big"]), **members}
    for key in rng.sample([*members], rng.randrange(2)):
        members[rng.choice([*members, "x/version", "y/data.pkl", "data.pkl", "x/é"])] = members.pop(
            key
        )
    content = bytearray(zipped(members, packing))
    for _ in range(rng.randrange(4)):
        signature = rng.choice([*FIELDS])
        places = [found.start() for found in re.finditer(signature, content)]
        start, width = rng.choice([*FIELDS[signature].values(), (rng.randrange(40), 4)])
        at = rng.choice(places or [0]) + start
        near = int.from_bytes(content[at : at + width], "little") + rng.choice([-1, 1, 64])
        number = rng.choice([0, 1, 8, near, 2**16 - 1, 2**31, 2**32 - 1, len(content)])
        content[at : at + width] = (number % 256**width).to_bytes(width, "little")
    files = {"model.ckpt": _raw(bytes(content))}
    return _flipped(rng, files) if rng.random() < 0.2 else files


def _gguf(rng: random.Random) -> Files:
    files = {"model.gguf": gguf_of(rng, changed(rng, layouts()))}
    return _flipped(rng, files) if rng.random() < 0.2 else files


def gguf_of(rng: random.Random, tensors: Tensors) -> tuple[bytes, int]:
    """Returns beginning and size of a GGUF file; some of its tensors are quantized."""
    infos, entries, end = b"", [_gguf_entry("general.architecture", 8, _gguf_text("flux"))], 0
    kinds, odd = rng.sample([0, 1, 8, 12, 14, 30], 3), rng.choice([0.0, 0.0, 0.01])
    for key, (_, shape) in tensors.items():
        kind = rng.choice(kinds)
        if not shape or shape[-1] % BLOCKS.get(TYPES[kind], (1, 0))[0]:
            kind = 0
        axes = [min(n, 2**64 - 1) for n in shape[::-1]]
        infos += _gguf_text(key) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        named = rng.randrange(50) if rng.random() < odd else kind
        infos += struct.pack("<IQ", named, end % 2**64)
        size = nbytes(math.prod(shape), TYPES[kind])
        end += -(-size // 32) * 32 if rng.random() >= odd else rng.choice([1, 32, 2**62])
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        key = rng.choice([f"{SHAPE_OF}{rng.choice([*tensors, 'x'])}", *ENTRIES, *WORDS])
        count = rng.choice([0, 1, 4, 5, 2**31, 2**63])
        numbers = struct.pack("<4i", *(rng.choice([-1, 1, 4, 320]) for _ in range(4)))
        value = struct.pack("<IQ", rng.choice([5, 8, 9, 4]), count) + numbers
        entries.append(_gguf_entry(key, rng.choice([9, 9, 4, 8, 10, 77]), value))
    counts = [len(tensors), len(entries)]
    if rng.random() < 0.2:
        counts[rng.randrange(2)] = rng.choice([0, 1, 10**6, 2**32, 2**64 - 1])
    version = rng.choice([3] * 40 + [0, 1, 2, 4, 3 << 24])
    beginning = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + infos
    beginning += bytes(-len(beginning) % 32)
    return beginning, min(len(beginning) + end, LARGEST)


def _gguf_text(text: str) -> bytes:
    content = text.encode(errors="surrogatepass")
    return struct.pack("<Q", len(content)) + content


def _gguf_entry(key: str, kind: int, value: bytes) -> bytes:
    return _gguf_text(key) + struct.pack("<I", kind) + value


def _bytes(rng: random.Random) -> Files:
    attack: dict[str, tuple[bytes, Any]] = rng.choice([ATTACKS, ZIPS, PICKLES])
    content, _ = attack[rng.choice([*attack])]
    content = checkpoint(content, _0=bytes(16)) if attack is PICKLES else content
    if rng.random() < 0.5:
        return _flipped(rng, {"model": _raw(content)})
    makers = [_tensors, _header, _pickle, _opcodes, _zip, _index, _gguf]
    return _flipped(rng, rng.choice(makers)(rng))


def _flipped(rng: random.Random, files: Files) -> Files:
    """Returns files, the first of which has other bytes, or an end elsewhere."""
    first = next(iter(files))
    content, size = bytearray(files[first][0]), files[first][1]
    for _ in range(rng.randrange(4) if content else 0):
        at = rng.randrange(rng.choice([len(content), min(len(content), 16)]))
        content[at] = rng.choice([rng.randrange(256), content[at] ^ 1 << rng.randrange(8)])
    if rng.random() < 0.3:
        size = rng.choice([max(size + rng.randrange(-40, 40), 0), rng.randrange(size + 1)])
    return files | {first: (bytes(content[:size]), size)}


_KINDS: dict[str, Callable[[random.Random], Files]] = {
    "tensors": _tensors,
    "header": _header,
    "index": _index,
    "pickle": _pickle,
    "opcodes": _opcodes,
    "zip": _zip,
    "gguf": _gguf,
    "bytes": _bytes,
}
"""`tensors` and `pickle` are well-formed files of changed layouts; the others are damaged."""
