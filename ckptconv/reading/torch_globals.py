"""What the globals in a PyTorch pickle stand for: storages, tensors and what else it may name.

`torch._utils._rebuild_tensor_v2(...)` is not called: it becomes a `StridedTensor`, which says where
its elements are.
Source: https://github.com/pytorch/pytorch, `torch/_utils.py` (`_rebuild_*`) and
`torch/serialization.py` (`persistent_id` in `_save`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..dtypes import LIBRARY_NAMES
from .strict_json import show
from .tensor import Order, Shape, are_sizes
from .unpickle import INERT, Call, Global, Table

MAX_AXES = 64
"""Axes of a tensor; PyTorch allows no more."""
MAX_KEY = 64
"""Characters of the name of a storage, which is a number."""

DTYPES = {
    **{f"torch.{name}": dtype for dtype, name in LIBRARY_NAMES.items()},
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
}
"""The safetensors dtype of each dtype and storage class of PyTorch."""

_IGNORED_BY_PACKAGE = {
    # Python: plain values (also as Python 2 calls them), the bytes of protocol 2, objects.
    "builtins": "set frozenset list dict tuple str int float bool bytes bytearray complex slice "
    "range object long unicode xrange",
    "_codecs": "encode",
    **dict.fromkeys(("copyreg", "copy_reg"), "_reconstructor __newobj__ __newobj_ex__"),
    "collections": "deque",
    "datetime": "datetime date time timedelta timezone",
    "logging": "getLogger",
    "re": "_compile",
    "types": "SimpleNamespace",
    # PyTorch: what a tensor has beside its elements, and a textual inversion.
    "torch": "device Size complex128 ComplexDoubleStorage nn.modules.container.ParameterDict",
    # NumPy: scores, states of random generators.
    "numpy": "dtype ndarray core.numeric._frombuffer _core.numeric._frombuffer",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar _reconstruct"),
    "numpy.random": "_pickle.__randomstate_ctor _pickle.__generator_ctor "
    "_pickle.__bit_generator_ctor bit_generator.__pyx_unpickle_SeedSequence",
}

IGNORED = tuple(f"{package}.{n}" for package, ns in _IGNORED_BY_PACKAGE.items() for n in ns.split())
"""Globals without which few training checkpoints are; what they make is dropped.

Functions, classes in lower case, and what `unpickle.DENIED` would refuse: the rule of `unpickle`
lets other classes pass.
"""


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements that one or more tensors share, in the zip member `data/KEY`."""

    torch_type: str  # the class of the storage, which implies a dtype
    key: str
    numel: int

    @property
    def dtype(self) -> str:
        """The safetensors dtype; ValueError if there is none."""
        return _dtype(self.torch_type)


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """What the pickle says of a tensor; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: Shape
    stride: Shape
    torch_dtype: str = ""  # where it is not that of the storage
    is_lazy: bool = False  # whether a conjugation or negation is still to be applied

    @property
    def dtype(self) -> str:
        """The safetensors dtype; ValueError if there is none."""
        return _dtype(self.torch_dtype or self.storage.torch_type)

    @property
    def order(self) -> Order | None:
        """How the elements follow each other in the storage; ValueError if there are gaps."""
        if 0 in self.shape:
            return None
        wide = [axis for axis, size in enumerate(self.shape) if size > 1]  # any stride fits others
        by_stride = sorted(wide, key=lambda axis: -self.stride[axis])
        needed = 1
        for axis in reversed(by_stride):
            if self.stride[axis] != needed:
                raise ValueError(
                    f"a view with strides {show(self.stride)} of shape {show(self.shape)}, whose "
                    "elements do not lie together"
                )
            needed *= self.shape[axis]
        return None if by_stride == wide else Order.of(self.shape, by_stride)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"safetensors has no dtype for {name}")
    return DTYPES[name]


def storage_of(persistent_id: tuple[Any, ...]) -> Storage:
    """Reads a persistent id, ("storage", class, key, device, number of elements)."""
    match persistent_id:
        case ("storage", Global(torch_type), str(key), _, numel, *_):
            if len(key) <= MAX_KEY and are_sizes(numel):
                return Storage(torch_type, key, numel)
    raise ValueError("a persistent id is not that of a storage")


def _tensor(arguments: tuple[Any, ...]) -> StridedTensor:
    """Reads the arguments of `_rebuild_tensor` and `_rebuild_tensor_v2`."""
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(stride), *more):
            if len(shape) == len(stride) <= MAX_AXES and are_sizes(offset, *shape, *stride):
                is_lazy = bool(more[2:] and more[2])  # the metadata
                return StridedTensor(storage, offset, shape, stride, is_lazy=is_lazy)
    raise ValueError("a tensor has no storage, or its offset, shape or strides are not sizes")


def _tensor_with_dtype(arguments: tuple[Any, ...]) -> StridedTensor:
    """Reads the arguments of `_rebuild_tensor_v3`: version 2, with a dtype before the metadata."""
    tensor = _tensor((*arguments[:6], *arguments[7:]))
    match arguments[6:7]:
        case (Global(name),):
            return replace(tensor, torch_dtype=name)
    raise ValueError("a tensor has no dtype")


def _parameter(arguments: tuple[Any, ...]) -> object:
    if not arguments:
        raise ValueError("a parameter has no tensor")
    return arguments[0]


def _empty_table(arguments: tuple[Any, ...]) -> Table:
    # The argument of a `defaultdict` is the class of its values.
    if not all(isinstance(argument, Global) for argument in arguments):
        raise ValueError("a dict is made of a list")
    return Table()


GLOBALS: dict[str, Call] = {
    **dict.fromkeys((*DTYPES, *IGNORED), lambda _: INERT),
    "collections.OrderedDict": _empty_table,
    "collections.defaultdict": _empty_table,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
"""The globals that a checkpoint may name, and what a call to each of them stands for."""
