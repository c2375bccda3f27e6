"""PyTorch checkpoints (`.ckpt`, `.pt`), read as what they hold: tensors at places in a file.

Since release 1.6, `torch.save` writes a zip file. Its member `data.pkl` is a pickle of the saved
object, in which a tensor is a reference to a storage, with dtype, shape and strides; the elements
of each storage are a member of their own, stored as they are. So a tensor that is contiguous is a
range of bytes of the file, as in a safetensors file, and needs neither PyTorch nor memory. The
pickle is read as data (see `ckptconv.reading.unpickle`): nothing in it is executed.
Source: https://github.com/pytorch/pytorch, `torch/serialization.py` (`_save`, `_load`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import SHOWN, HeaderError, NotACheckpoint, UnsafePickle
from ..files import opened
from .header import nbytes_of
from .rebuild import CALLS, Tensor, storage_of
from .strict_json import is_unicode, show
from .tensor import Header
from .tensor import Tensor as Located
from .unpickle import Forbidden, Global, Table, load
from .zipped import Member, data_start, read_directory, read_member

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["read_pickled"]

MAX_PICKLE = 32 << 20
"""Bytes of `data.pkl`, which holds no elements: a checkpoint of 3,000 tensors has about 1 MB."""

NESTED = (
    "state_dict",
    "model",
    "module",
    "params_ema",
    "params",
    "model_state_dict",
    "weights",
)
"""Where a checkpoint may keep the tensors of its model, in this order where several are alike."""

_AGAIN = (
    "PyTorch reads it without running its code (`torch.load(FILE, map_location='cpu', "
    "weights_only=True)`): make every tensor `.contiguous()` and save them with safetensors"
)
_DAMAGED = (
    "the file is damaged, or no whole download: compare its size and SHA-256 with those at its "
    "source, then download it again"
)


def read_pickled(path: str | Path) -> Header:
    """Reads what a PyTorch checkpoint holds, without executing anything and without its data.

    Args:
        path: a file that `torch.save` of release 1.6 or later wrote.

    Returns:
        The header that the file would have, with the offsets of the data in the zip file. Tensors
        may share data. There is no metadata; what the file holds beside tensors is in the notes.

    Raises:
        HeaderError: the file cannot be read, is damaged, or holds tensors that are no range of
            bytes, such as a transposed view; all of them are named.
        UnsafePickle: it names code that weights do not need; every global is named.
        NotACheckpoint: it holds no tensors by name, or is a program (TorchScript).
    """
    path = Path(path)
    with opened(path) as (file, size):
        members: dict[str, Member] = {}
        try:
            members = read_directory(file, size)
            root = _root(path, members)
            content = _content(file, root, members)
        except Forbidden as error:
            raise UnsafePickle(
                f"{path}: the file names code that weights do not need; none of it was run",
                problems=[show(name) for name in error.names],
                hint="delete the file if you do not know why it names that; if you trust its "
                "source, load it there, and save its state_dict alone with safetensors",
            ) from error
        except ValueError as error:
            packed = any(member.packed == "compressed" for member in members.values())
            raise HeaderError(
                f"{path}: this is not a whole PyTorch checkpoint: {error}",
                hint=f"somebody packed it anew: {_AGAIN}" if packed else _DAMAGED,
            ) from error
        named, left = _named_tensors(path, content)
        data = f"{root}/data/"
        storages = {n.removeprefix(data): m for n, m in members.items() if n.startswith(data)}
        tensors = _located(path, file, storages, named)
    start = min((info.start for info in tensors.values()), default=size)
    return Header(path, tensors, {}, start, size, _notes(left))


def _root(path: Path, members: Mapping[str, Member]) -> str:
    """Returns the folder inside the zip file that holds everything."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise NotACheckpoint(
            f"{path}: this is a TorchScript program, not a checkpoint: its weights come with code",
            hint="if you trust its source, load it there with torch.jit.load, and save its "
            "state_dict() with safetensors",
        )
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        some = ", ".join(show(name) for name in list(members)[:3]) or "nothing"
        raise NotACheckpoint(
            f"{path}: this is a zip file, but not a PyTorch checkpoint",
            problems=[f"needed one folder with data.pkl, found {len(roots)}", f"it holds {some}"],
            hint="if a model is in it, unpack it, and give that file",
        )
    return roots[0]


def _content(file: BinaryIO, root: str, members: Mapping[str, Member]) -> object:
    """Returns the saved object, made of data."""
    if order := members.get(f"{root}/byteorder"):
        said = read_member(file, order, 16)
        if said != b"little":
            raise ValueError(f"its byte order is {show(said)}, needed b'little'")
    raw = read_member(file, members[f"{root}/data.pkl"], MAX_PICKLE)
    try:
        return load(raw, CALLS, storage_of)
    except Forbidden:
        raise
    except ValueError as error:
        raise ValueError(f"its pickle is malformed: {error}") from error


def _named_tensors(path: Path, content: object) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of the model, and the names of what else the file holds.

    They are the entries of the saved dict, or of a dict in it under one of the usual names: of the
    one with most tensors. If none has any, every dict gives its own, with its name before theirs.
    Those of a tuple have their numbers as names.
    """
    if isinstance(content, tuple) and content and all(isinstance(t, Tensor) for t in content):
        return {str(n): tensor for n, tensor in enumerate(content)}, []
    if not isinstance(content, Table):
        raise NotACheckpoint(
            f"{path}: the file holds {_kind(content)}, where a checkpoint is a dict of tensors",
            hint="save the state_dict() of the model, with safetensors",
        )
    way, table = _model(content)
    if any(_tensors(table)):
        read = [table]
        pairs = list(_tensors(table))
        left = [key for key in content if key not in way[:1]] if way else []
        left += [".".join([*way, key]) for key in table if not isinstance(table[key], Tensor)]
    else:
        nested = {id(v): (k, v) for k, v in content.items() if isinstance(v, Table)}
        read = [table for _, table in nested.values()]
        pairs = [
            (f"{k}.{name}", tensor) for k, t in nested.values() for name, tensor in _tensors(t)
        ]
        left = [key for key, value in content.items() if id(value) not in nested]
    if odd := sum(table.others for table in read if any(_tensors(table))):
        raise HeaderError(f"{path}: {odd:,} keys beside those of tensors are no text", hint=_AGAIN)
    named = dict(pairs)
    if len(named) < len(pairs):
        raise HeaderError(f"{path}: {len(pairs) - len(named):,} names are repeated", hint=_AGAIN)
    return named, left


def _model(content: Table) -> tuple[tuple[str, ...], Table]:
    """Returns the keys that lead to the dict with most tensors, the outermost of these, and it."""
    level: list[tuple[tuple[str, ...], Table]] = [((), content)]
    found = list(level)
    for _ in range(2):
        nested = [((*way, key), table.get(key)) for way, table in level for key in NESTED]
        level = [(way, table) for way, table in nested if isinstance(table, Table)]
        found += level
    return max(found, key=lambda each: sum(1 for _ in _tensors(each[1])))


def _tensors(table: Table) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in table.items() if isinstance(value, Tensor))


def _notes(left: list[str]) -> tuple[str, ...]:
    """Says what of a file is left out."""
    if not left:
        return ()
    more = f" and {len(left) - SHOWN:,} more" if len(left) > SHOWN else ""
    names = ", ".join(show(name)[1:-1] for name in left[:SHOWN])
    return (f"the file holds more than the tensors of a model, which is left out: {names}{more}",)


def _located(
    path: Path,
    file: BinaryIO,
    storages: Mapping[str, Member],
    named: Mapping[str, Tensor],
) -> dict[str, Located]:
    """Returns where the tensors are, in the order of the data.

    Raises:
        HeaderError: some are nowhere, or are no range of bytes; all of them are named.
    """
    found: dict[str, Located] = {}
    damaged, strided = [], []
    starts: dict[str, int] = {}
    for name, tensor in named.items():
        if not tensor.is_contiguous:
            strided.append(
                f"tensor {show(name)}: a view with strides {show(tensor.stride)} of shape "
                f"{show(tensor.shape)}, which is no range of bytes"
            )
            continue
        key = tensor.storage.key
        try:
            nbytes, first = _range(name, tensor, storages)
            if key not in starts:
                starts[key] = data_start(file, storages[key])
        except ValueError as error:
            damaged.append(f"tensor {show(name)}: {error}")
            continue
        start = starts[key] + first
        found[name] = Located(path, name, tensor.dtype, tensor.shape, start, start + nbytes)
    if damaged or strided:
        raise HeaderError(
            f"{path}: tensors of the file cannot be read where they lie",
            problems=[*damaged, *strided],
            hint=_DAMAGED if damaged else _AGAIN,
        )
    return dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))


def _range(name: str, tensor: Tensor, storages: Mapping[str, Member]) -> tuple[int, int]:
    """Returns the bytes of a tensor, and how many bytes of its storage are before them.

    Raises:
        ValueError: there can be no such tensor, or not in this file.
    """
    if not is_unicode(name) or name == "__metadata__":
        raise ValueError("no tensor of a safetensors file can have this name")
    if tensor.lazy:
        raise ValueError("it is to be conjugated or negated, which its bytes are not")
    storage, dtype = tensor.storage, tensor.dtype
    nbytes, first = nbytes_of(dtype, tensor.shape), nbytes_of(dtype, (tensor.offset,))
    held = nbytes_of(storage.dtype, (storage.numel,))
    if first + nbytes > held:
        raise ValueError(f"it ends at byte {first + nbytes:,} of its data, which has {held:,}")
    if storage.key not in storages:
        raise ValueError(f"its data, the member {show(f'data/{storage.key}')}, is missing")
    if (size := storages[storage.key].size) < held:
        raise ValueError(f"its data has {size:,} bytes, needed {held:,}")
    return nbytes, first


def _kind(content: object) -> str:
    names = {Tensor: "a lone tensor", list: "a list", tuple: "a tuple", Global: "a class"}
    return names.get(type(content), "a single value")
