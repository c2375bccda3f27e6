"""PyTorch checkpoints (`.ckpt`, `.pt`): the tensors in them, as byte ranges of the file.

Since release 1.6, `torch.save` writes a zip file. Its member `data.pkl` is a pickle of the saved
object, in which a tensor refers to a storage and has a dtype, a shape and strides. The elements of
each storage are a member of their own, uncompressed. So a tensor is a byte range of the file, as in
a safetensors file, and reading it takes neither PyTorch nor memory. Strides may put the axes in
another order (`channels_last`, a transposed matrix), but may not leave gaps. The pickle is read as
data by `unpickle.py`: nothing in it is executed.
Source: https://github.com/pytorch/pytorch, `torch/serialization.py` (`_save`, `_load`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import SHOWN, HeaderError, NotACheckpoint, UnsafePickle
from ..files import open_regular
from .header import nbytes_of
from .strict_json import is_unicode, show
from .tensor import Header, Tensor, in_file_order
from .torch_globals import GLOBALS, StridedTensor, storage_of
from .unpickle import Forbidden, Global, Inert, Loaded, Table, load
from .zip_directory import Member, Truncated, read_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


MAX_PICKLE = 32 << 20
"""Bytes of `data.pkl`, which holds no elements; a checkpoint of 3,000 tensors needs about 1 MB."""

NESTED = ["state_dict", "model", "module", "params_ema", "params", "model_state_dict", "weights"]
"""Keys under which a checkpoint may keep its model; of dicts with as many tensors, the first."""

_RESAVE = (
    "load it with PyTorch, which runs none of its code with `torch.load(FILE, map_location='cpu', "
    "weights_only=True)`, make every tensor `.contiguous()`, and save them with safetensors"
)
_SAVE_STATE = "save the state_dict() of the model, with safetensors"
_DAMAGED = (
    "the file is damaged or its download incomplete: compare its size and SHA-256 with those at "
    "its source, then download it again"
)
_TYPES = {StridedTensor: "a lone tensor", list: "a list", tuple: "a tuple", Global: "a class"}


def read_pickled(path: str | Path) -> Header:
    """Reads what a file of `torch.save` holds. Executes nothing, and does not read the elements.

    The tensors have their offsets in the zip file and may share bytes; the notes list what the file
    holds beside them, and the classes whose objects are left out.

    Raises:
        HeaderError: the file cannot be read, is damaged, or holds tensors that are not byte ranges,
            such as every other row of a matrix; all of them are named.
        UnsafePickle: it names code that could do harm (the rule is in `unpickle.py`); all of it is
            named.
        NotACheckpoint: it holds no tensors by name, or is a program (TorchScript).
    """
    path = Path(path)
    with open_regular(path) as (file, size):
        members: Mapping[str, Member] = {}
        try:
            members = read_directory(file, size)
            members = _within_root(path, members)
            content, unknown = _content(file, members)
        except Forbidden as error:
            raise UnsafePickle(
                f"{path}: the file names code that weights do not need; none of it was run",
                problems=[show(name) for name in error.names],
                hint="delete the file unless you know why it names this code; if you trust its "
                "source, load it there, and save its state_dict with safetensors",
            ) from error
        except ValueError as error:
            compressed = any(member.is_compressed for member in members.values())
            repacked = f"the file was repacked with compression: {_RESAVE}"
            cut = isinstance(error, Truncated)
            raise HeaderError(
                f"{path}: this is not an intact PyTorch checkpoint: {error}",
                hint=repacked if compressed else _DAMAGED,
                code="truncated" if cut else "",
            ) from error
        tensors, rest = _state_dict(path, content)
        if unknown and not tensors:
            raise NotACheckpoint(
                f"{path}: the file holds no tensors by name, only objects of unknown classes",
                problems=[show(name) for name in unknown],
                hint=_SAVE_STATE,
            )
        located = _locate(path, file, members, tensors)
    start = min((info.start for info in located.values()), default=size)
    return Header(path, located, {}, start, size, tuple(_notes(rest, unknown)))


def _within_root(path: Path, members: Mapping[str, Member]) -> dict[str, Member]:
    """Returns the members by their names within the one folder that holds all of them."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise NotACheckpoint(
            f"{path}: this is a TorchScript program, not a checkpoint: its weights come with code",
            hint="if you trust its source, load it there with torch.jit.load, and save its "
            "state_dict() with safetensors",
        )
    folders = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    roots = [folder for folder in folders if "/" not in folder]
    if len(roots) != 1:
        first = ", ".join(show(name) for name in list(members)[:3]) or "nothing"
        found = f"expected one folder with data.pkl, found {len(roots)}"
        raise NotACheckpoint(
            f"{path}: this is a zip file, but not a PyTorch checkpoint",
            problems=[found, f"the first members are {first}"],
            hint="if it is an archive that contains a model, unpack it and give the model",
        )
    root = f"{roots[0]}/"
    return {name.removeprefix(root): m for name, m in members.items() if name.startswith(root)}


def _content(file: BinaryIO, members: Mapping[str, Member]) -> Loaded:
    """Returns the saved object, as data, and the names of unknown classes in it."""
    if member := members.get("byteorder"):
        order = member.read(file, 16)
        if order != b"little":
            raise ValueError(f"its byte order is {show(order)}, expected b'little'")
    return load(members["data.pkl"].read(file, MAX_PICKLE), GLOBALS, storage_of)


def _state_dict(path: Path, content: object) -> tuple[Mapping[str, StridedTensor], list[str]]:
    """Returns the tensors of the model, and the keys of everything else in the file.

    The model is the saved dict, or the dict with most tensors under one of the usual keys. If that
    has no tensors, every dict in the saved one gives its own, with its key before their names. A
    saved tuple of tensors gives them by number.
    """
    if isinstance(content, tuple) and content:
        tensors = _tensors({str(n): item for n, item in enumerate(content)})
        if len(tensors) == len(content):
            return tensors, []
    if not isinstance(content, Table):
        what = _TYPES.get(type(content), "a single value")
        if isinstance(content, Inert) and content.name:
            what = f"an object of the class {show(content.name)}"
        raise NotACheckpoint(
            f"{path}: the file holds {what}, but a checkpoint is a dict of tensors",
            hint=_SAVE_STATE,
        )
    keys, model = _largest(content)
    if tensors := _tensors(model):
        parts = [("", model)]
        rest = [key for key in content if keys and key != keys[0]]
        rest += [".".join([*keys, key]) for key in model if key not in tensors]
    else:
        nested = {id(v): (f"{k}.", v) for k, v in content.items() if isinstance(v, Table)}
        parts = [(prefix, part) for prefix, part in nested.values() if _tensors(part)]
        rest = [key for key, value in content.items() if id(value) not in nested]
    if dropped := sum(part.dropped for _, part in parts):
        message = f"{path}: {dropped:,} keys beside those of tensors are not text"
        raise HeaderError(message, hint=_RESAVE)
    named = [(prefix + name, t) for prefix, part in parts for name, t in _tensors(part).items()]
    result = dict(named)
    if repeated := len(named) - len(result):
        raise HeaderError(f"{path}: {repeated:,} names of tensors are repeated", hint=_RESAVE)
    return result, rest


def _largest(content: Table) -> tuple[tuple[str, ...], Table]:
    """Returns the outermost of the dicts with most tensors, after the keys that lead to it."""
    level: list[tuple[tuple[str, ...], Table]] = [((), content)]
    found = [*level]
    for _ in range(2):
        nested = [((*keys, key), table.get(key)) for keys, table in level for key in NESTED]
        level = [(keys, table) for keys, table in nested if isinstance(table, Table)]
        found += level
    return max(found, key=lambda each: len(_tensors(each[1])))


def _tensors(table: Mapping[str, object]) -> dict[str, StridedTensor]:
    return {key: value for key, value in table.items() if isinstance(value, StridedTensor)}


def _notes(rest: Sequence[str], unknown: Sequence[str]) -> Iterator[str]:
    """Yields sentences on what is left out, if anything is."""
    for names, what in (
        (rest, "the file holds more than the tensors of a model, which is left out"),
        (unknown, "objects of unknown classes are left out, and none of their code was run"),
    ):
        listed = ", ".join(show(name)[1:-1] for name in names[:SHOWN])
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        if names:
            yield f"{what}: {listed}{more}"


def _locate(
    path: Path,
    file: BinaryIO,
    members: Mapping[str, Member],
    tensors: Mapping[str, StridedTensor],
) -> dict[str, Tensor]:
    """Returns the tensors as byte ranges; HeaderError names all that are missing or are none."""
    data_start = functools.cache(lambda key: members[f"data/{key}"].data_start(file))
    located: dict[str, Tensor] = {}
    damaged, strided = [], []
    for name, tensor in tensors.items():
        try:
            order = tensor.order
        except ValueError as error:
            strided.append(f"tensor {show(name)}: {error}")
            continue
        try:
            offset, nbytes = _range_in_storage(name, tensor, members)
            start = data_start(tensor.storage.key) + offset
        except ValueError as error:
            damaged.append(f"tensor {show(name)}: {error}")
        else:
            end = start + nbytes
            located[name] = Tensor(path, name, tensor.dtype, tensor.shape, start, end, order)
    if damaged or strided:
        raise HeaderError(
            f"{path}: some tensors cannot be read from the file as they are",
            problems=[*damaged, *strided],
            hint=_DAMAGED if damaged else _RESAVE,
        )
    return in_file_order(located)


def _range_in_storage(
    name: str, tensor: StridedTensor, members: Mapping[str, Member]
) -> tuple[int, int]:
    """Returns the offset in the storage and the size of a tensor, in bytes; ValueError if none."""
    if not is_unicode(name) or name == "__metadata__":
        raise ValueError("no tensor of a safetensors file can have this name")
    if tensor.is_lazy:
        raise ValueError("a conjugation or negation is still to be applied to its bytes")
    storage, dtype = tensor.storage, tensor.dtype
    nbytes, offset = nbytes_of(dtype, tensor.shape), nbytes_of(dtype, (tensor.offset,))
    available, end = nbytes_of(storage.dtype, (storage.numel,)), offset + nbytes
    if end > available:
        raise ValueError(f"it ends at byte {end:,} of its storage, which has {available:,}")
    member = f"data/{storage.key}"
    if member not in members:
        raise ValueError(f"its storage, the member {show(member)}, is missing")
    if (size := members[member].size) < available:
        raise ValueError(f"its storage has {size:,} bytes, expected {available:,}")
    return offset, nbytes
