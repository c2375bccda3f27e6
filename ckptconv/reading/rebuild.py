"""What the globals in a PyTorch pickle stand for: storages, tensors and what else checkpoints hold.

A call of a global is data here: `torch._utils._rebuild_tensor_v2(...)` gives a `Tensor` that says
where its elements are.
Source: https://github.com/pytorch/pytorch, `torch/_utils.py` (`_rebuild_*`) and
`torch/serialization.py` (`persistent_id` in `_save`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .unpickle import INERT, Call, Global, Table

__all__ = ["CALLS", "Storage", "Tensor", "storage_of"]

MAX_AXES = 64
"""Axes of a tensor: PyTorch has no more."""
MAX_KEY = 64
"""Characters of a storage's name, which is a number."""

DTYPES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
}
"""Classes of storages and dtypes, and what safetensors calls the dtype."""

UNUSED = (
    # Python: sets, what protocol 2 makes of bytes, the state of a scheduler, types.
    *(f"builtins.{name}" for name in ("set", "list", "dict", "str", "int", "float", "bool")),
    "_codecs.encode",
    "collections.Counter",
    "typing.Any",
    # PyTorch: what tensors have beside their elements, and a textual inversion.
    "torch.device",
    "torch.Size",
    "torch.complex128",
    "torch.ComplexDoubleStorage",
    "torch.nn.modules.container.ParameterDict",
    # NumPy: scores, states of random generators.
    *(
        f"numpy.{module}.multiarray.{name}"
        for module in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    "numpy.dtype",
    "numpy.ndarray",
    # PyTorch Lightning: the states of callbacks, by class, and hyper-parameters.
    *(
        f"{package}.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "callbacks.model_checkpoint.ModelCheckpoint",
            "callbacks.early_stopping.EarlyStopping",
            "utilities.parsing.AttributeDict",
        )
    ),
    # OmegaConf: hyper-parameters of the LDM code.
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
)
"""Other globals that checkpoints of well-known programs hold. What they make is not looked at."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where elements are.

    Attributes:
        kind: class of the storage, which tells the dtype.
        key: name of the member that holds them.
        numel: how many there are.
    """

    kind: str
    key: str
    numel: int

    @property
    def dtype(self) -> str:
        """What safetensors calls the dtype."""
        return _dtype(self.kind)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the pickle says of a tensor.

    Attributes:
        storage: that holds its elements.
        offset: of its first element, in elements.
        shape: number of elements along each axis.
        stride: elements between neighbours along each axis.
        kind: what tells the dtype, if the class of the storage does not.
        lazy: it is to be conjugated or negated.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kind: str = ""
    lazy: bool = False

    @property
    def dtype(self) -> str:
        """What safetensors calls the dtype."""
        return _dtype(self.kind or self.storage.kind)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the order of the axes."""
        needed = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != needed:
                return 0 in self.shape
            needed *= size
        return True


def _dtype(kind: str) -> str:
    """Returns what safetensors calls a dtype; ValueError if it has none."""
    if kind not in DTYPES:
        raise ValueError(f"safetensors has no dtype for {kind}")
    return DTYPES[kind]


def _are_sizes(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def storage_of(identity: tuple[Any, ...]) -> Storage:
    """Returns what a persistent id says: ("storage", class, key, device, number of elements).

    Raises:
        ValueError: it is none of a storage.
    """
    match identity:
        case ("storage", Global(kind), str(key), _, numel, *_):
            if len(key) <= MAX_KEY and _are_sizes(numel):
                return Storage(kind, key, numel)
    raise ValueError("a persistent id is not that of a storage")


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    """Returns what `_rebuild_tensor` and `_rebuild_tensor_v2` say."""
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(stride), *more):
            sizes = (offset, *shape, *stride)
            if len(shape) == len(stride) <= MAX_AXES and _are_sizes(*sizes):
                return Tensor(storage, offset, shape, stride, lazy=bool(more[2:] and more[2]))
    raise ValueError("a tensor has no storage, or its offset, shape or strides are not sizes")


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> Tensor:
    """Returns what `_rebuild_tensor_v3` says: as version 2, with a dtype before the metadata."""
    made = _tensor((*arguments[:6], *arguments[7:]))
    match arguments[6:7]:
        case (Global(dtype),):
            return replace(made, kind=dtype)
    raise ValueError("a tensor has no dtype")


def _parameter(arguments: tuple[Any, ...]) -> object:
    """Returns the tensor that is a parameter."""
    if not arguments:
        raise ValueError("a parameter has no tensor")
    return arguments[0]


def _table(arguments: tuple[Any, ...]) -> Table:
    """Returns an empty dict; the argument of a `defaultdict` is the class of its values."""
    if not all(isinstance(argument, Global) for argument in arguments):
        raise ValueError("a dict is made of a list")
    return Table()


CALLS: dict[str, Call] = {
    **dict.fromkeys((*DTYPES, *UNUSED), lambda _: INERT),
    "collections.OrderedDict": _table,
    "collections.defaultdict": _table,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
"""The globals that a checkpoint may name, and what a call to each of them gives."""
