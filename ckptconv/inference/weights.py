"""Builds the modules of a plan and puts the tensors of the file into them.

A module is made on the meta device, where parameters have shapes and no memory. Then each tensor
goes from the file to its place, by the same pieces that `ckptconv.streaming.stream` copies for
`convert`. On the CPU a tensor whose bytes stay as they are becomes a view of the mapped file: it
takes no memory beside the page cache, and a write to it is private. Everything else passes through
small buffers, one a thread, that for CUDA are page-locked.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.config import Config, class_of, find_class
from ..dtypes import BITS, torch_dtype
from ..errors import FileRefused, MapError
from ..files import ByteCounter, Files
from ..planning.plan import Plan
from ..planning.step import Target
from ..reading.tensor import Tensor
from ..streaming.stream import converted, in_threads
from ..streaming.transfers import Transfer, transfers

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Devices", "component_class", "empty_module", "fill"]

Devices = Mapping[str, "torch.device"]
"""The device of each submodule of one module; the longest name that a key begins with counts, and
`""` stands for the whole."""

THREADS = 4
CHUNK = 16 << 20
"""Bytes that one thread moves at a time."""


def component_class(config: Config) -> Any:
    """Returns the class of the library that a configuration names.

    Raises:
        FileRefused: the library has no such class.
    """
    name, library = class_of(config), config.component.library
    found = find_class(config.component.home, name)
    if found is None:
        raise FileRefused(
            f"{config.component.name}: the configuration names the class {name}, which {library} "
            f"{importlib.import_module(library).__version__} does not have",
            hint=f"upgrade {library}, or check the configuration",
        )
    return found


def empty_module(config: Config) -> nn.Module:
    """Returns a module whose parameters are on the meta device and whose buffers are real."""
    import torch

    cls = component_class(config)

    def build() -> nn.Module:
        values = dict(config.values)
        made = (
            cls.from_config(values)
            if config.component.library == "diffusers"
            else cls(cls.config_class.from_dict(values))
        )
        assert isinstance(made, torch.nn.Module)  # noqa: S101  (both libraries' models are)
        return made

    with torch.device("meta"):
        module = build()
    if next(module.buffers(), None) is None:
        return module
    # Buffers hold numbers that the constructor computes, such as position ids: a module that has
    # any is built once more, slower, with only its parameters on the meta device.
    from accelerate import init_empty_weights  # type: ignore[import-untyped]  # it has none

    with init_empty_weights(include_buffers=False):
        return build()


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: the parameter of a component's module, and its device."""

    component: str
    parameter: str
    slot: Target
    device: torch.device


def fill(
    modules: Mapping[str, nn.Module],
    plan: Plan,
    devices: Mapping[str, Devices],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[str]:
    """Gives every parameter its tensor, and leaves the modules ready for inference.

    Args:
        modules: from `empty_module`, by component.
        plan: complete; its tensors have the dtypes that the parameters get.
        devices: by component.
        progress: is called with bytes done and bytes in all, from one thread at a time.

    Returns:
        Sentences on values that a cast could not hold.

    Raises:
        MapError: the tensors are not those of the modules.
        FileRefused: a file became shorter meanwhile.
    """
    places = _places(modules, plan, devices)
    parts: dict[Path, list[Transfer]] = defaultdict(list)
    targets = {
        (place.component, place.slot.key): _packed(path, place.slot)
        for path, place in places.items()
    }
    steps = [s for s in plan.steps if any((t.component, t.key) in targets for t in s.targets)]
    for piece in transfers(steps, targets):
        parts[piece.target[0]].append(piece)
    total = sum(info.nbytes for info in targets.values())
    done = ByteCounter(total, progress)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in modules}
    with Files() as files:
        moves = []
        for path, place in places.items():
            tensor = _view(place, parts[path], files)
            if tensor is None:
                tensor = _room(place)
                for piece in parts[path]:
                    cut = piece.cut(CHUNK * 8 // BITS[piece.dtypes[0]])
                    moves += [_Move(tensor, part) for part in cut]
            else:
                done.add(tensor.nbytes)
            states[place.component][place.parameter] = tensor
        warnings = _run(moves, files, done)
    for name, module in modules.items():
        module.load_state_dict(states[name], strict=True, assign=True)
        if list(devices[name]) == [""]:
            module.to(devices[name][""])  # the buffers; a parameter is there already
        module.eval()
        on_meta = [key for key, tensor in _tensors(module) if tensor.is_meta]
        if on_meta:
            raise MapError(f"{name}: nothing gave {', '.join(on_meta)} a value")
    return warnings


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _places(
    modules: Mapping[str, nn.Module], plan: Plan, devices: Mapping[str, Devices]
) -> dict[Path, _Place]:
    """Matches the plan's tensors with the modules' parameters, by a path that names the tensor.

    A key is the name of its parameter. The exception is one rule: where the module has no child of
    the key's first segment, that segment is left out. Folders hold `text_model.` in every CLIP text
    encoder, but since release 5 `CLIPTextModel` of transformers has no such wrapper in memory.
    """
    places: dict[Path, _Place] = {}
    problems = []
    for component, module in modules.items():
        own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        roots = {name.partition(".")[0] for name in own}
        for key, slot in plan.tensors(component).items():
            root, _, rest = key.partition(".")
            name = key if root in roots else rest
            if name not in own:
                problems.append(f"{component}.{key}: the module has no such parameter")
            elif own[name] != slot.shape:
                needed = list(own[name])
                problems.append(f"{component}.{key}: has shape {list(slot.shape)}, needed {needed}")
            else:
                device = _device_of(name, devices[component])
                places[Path(component, key)] = _Place(component, name, slot, device)
        given = {place.parameter for place in places.values() if place.component == component}
        problems += [f"{component}: {name} is missing" for name in own if name not in given]
    if problems:
        raise MapError(
            "the configurations and the weights do not agree",
            problems=problems,
            hint="this is a fault of the key maps: please report it, with the output of "
            "`ckptconv inspect FILE`",
        )
    return places


def _device_of(name: str, devices: Devices) -> torch.device:
    """Returns the device of the longest module name that a parameter's name begins with."""
    segments = name.split(".")
    prefixes = (".".join(segments[:n]) for n in range(len(segments), -1, -1))
    return next(devices[prefix] for prefix in prefixes if prefix in devices)


def _packed(path: Path, slot: Target) -> Tensor:
    """Returns a tensor as if it were alone in a file."""
    size = math.prod(slot.shape) * BITS[slot.dtype] // 8
    return Tensor(path, slot.key, slot.dtype, slot.shape, 0, size)


def _view(place: _Place, parts: list[Transfer], files: Files) -> torch.Tensor | None:
    """Returns the tensor as a view of the mapped file, or None where its bytes must be moved."""
    import torch

    if place.device.type != "cpu" or len(parts) != 1 or not parts[0].is_copy:
        return None
    (piece,), dtype = parts, torch_dtype(place.slot.dtype)
    path, offset = piece.source
    if offset % dtype.itemsize:  # not every kernel reads across the borders of elements
        return None
    mapped = files.mapped(path, offset, piece.nbytes)
    return torch.frombuffer(mapped, dtype=dtype).view(place.slot.shape)


def _room(place: _Place) -> torch.Tensor:
    import torch

    return torch.empty(place.slot.shape, dtype=torch_dtype(place.slot.dtype), device=place.device)


@dataclass(frozen=True, slots=True)
class _Move:
    """Elements to read, and the tensor they belong to."""

    target: torch.Tensor
    piece: Transfer

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.piece.count * BITS[self.piece.dtypes[0]] // 8


def _run(moves: list[_Move], files: Files, done: ByteCounter) -> list[str]:
    """Reads everything that is no view, in several threads, each with its own buffer."""
    warnings: list[str] = []
    if not moves:
        return warnings
    sizes = (move.nbytes for move in moves if not move.piece.changes)
    mover = _Mover(files, max(sizes, default=0), warnings)
    in_threads(lambda move: done.add(mover.move(move)), moves, THREADS)
    return warnings


class _Mover(threading.local):
    """Carries elements from a file to a tensor; every thread has its own buffer and streams."""

    def __init__(self, files: Files, size: int, warnings: list[str]) -> None:
        self.files, self.size, self.warnings = files, size, warnings
        self.buffer: torch.Tensor | None = None
        self.streams: dict[torch.device, Any] = {}

    def move(self, move: _Move) -> int:
        """Fills its part of the target, and returns how many bytes that are."""
        import torch

        piece, device = move.piece, move.target.device
        if piece.changes:  # on the CPU, so that the bits are those of a conversion
            data, lost = converted(piece, self.files)
            values = torch.frombuffer(data, dtype=move.target.dtype)
            move.target.copy_(values.view(move.target.shape))
            self._warn(piece, lost)
            return piece.nbytes
        if self.buffer is None:
            self.buffer = torch.empty(
                self.size, dtype=torch.uint8, pin_memory=device.type == "cuda"
            )
        raw = self.buffer[: move.nbytes]
        self.files.read_into(*piece.source, raw.numpy().data)
        with self._stream(device):
            self._put(raw.view(torch_dtype(piece.dtypes[0])), move)
        return piece.nbytes

    def _put(self, values: torch.Tensor, move: _Move) -> None:
        piece, part, wait = move.piece, move.target, move.target.device.type != "cuda"
        if piece.transposed is None:
            first = piece.target[1] * 8 // BITS[piece.dtypes[1]]
            part = part.view(-1)[first : first + piece.count]
        if not piece.is_copy:  # the device casts and transposes
            values = values.to(part.device, non_blocking=not wait)
        if piece.transposed is not None:
            values = values.view(piece.transposed).T
        part.copy_(values, non_blocking=not wait)
        if piece.dtypes[0] != piece.dtypes[1] and part.isinf().any():
            self._warn(piece, int((part.isinf() & values.isfinite()).sum()))

    def _warn(self, piece: Transfer, lost: int) -> None:
        if lost:
            name, dtype = piece.target[0], piece.dtypes[1]
            self.warnings.append(f"{name}: {lost:,} values are too large for {dtype}")

    @contextlib.contextmanager
    def _stream(self, device: torch.device) -> Iterator[None]:
        """Lets copies to a GPU run while other threads read, and ends when they are done."""
        import torch

        if device.type != "cuda":
            yield
            return
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory of a target may still be in use by work that was queued before.
            self.streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.streams[device]):
            yield
        self.streams[device].synchronize()
