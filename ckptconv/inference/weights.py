"""Puts the tensors of files into empty modules.

Each tensor goes from its file to its place, by the same transfers that `ckptconv.streaming.stream`
copies for `convert`. On the CPU a tensor whose bytes stay as they are becomes a view of the mapped
file: it takes no memory beside the page cache, and a write to it is private. Everything else passes
through small buffers, one a thread, that for CUDA are page-locked.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..detection.spellings import current_name
from ..dtypes import BITS, BLOCKS, nbytes, torch_dtype
from ..errors import MapError
from ..files import ByteCounter, Files
from ..libraries import tied
from ..planning.step import Step, Target, targets_of
from ..reading.tensor import Tensor
from ..streaming.stream import CAST_CHUNK, converted, in_threads
from ..streaming.transfers import Transfer, transfers

if TYPE_CHECKING:
    import torch
    from torch import nn

Devices = Mapping[str, "torch.device"]
"""The device of each submodule of a module: the longest name that a key begins with counts, and
`""` stands for the whole."""

THREADS = 4
CHUNK = 16 << 20
"""Bytes that one thread moves at a time."""
NARROW = 1 << 20
"""Elements that one thread rounds to fp8 at a time."""


def matched(module: nn.Module, targets: Mapping[str, Target]) -> tuple[dict[str, str], list[str]]:
    """Matches tensors with the parameters of a module.

    A key, by its present name, is the name of its parameter. The exception is one rule: where the
    module has no child of the key's first segment, that segment is left out. Folders hold
    `text_model.` in every CLIP text encoder, but since release 5 `CLIPTextModel` of transformers
    has no such wrapper in memory.

    Returns:
        The name of the parameter by key, and sentences on what does not fit. A tensor for a buffer
        that is not part of the weights any more is passed over.
    """
    twins = tied(module)
    state = module.state_dict()
    own = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in twins}
    buffers = {name for name, _ in module.named_buffers()} - own.keys()
    roots = {name.partition(".")[0] for name in [*own, *buffers]}
    names, problems = {}, []
    for key, target in targets.items():
        name = current_name(key, targets)
        root, _, rest = name.partition(".")
        name = name if root in roots else rest
        if name not in own and name not in buffers:
            problems.append(f"{key}: the module has no such parameter")
        elif name in own and own[name] != target.shape:
            needed = list(own[name])
            problems.append(f"{key}: has shape {list(target.shape)}, needed {needed}")
        elif name in own:
            names[key] = name
    given = set(names.values())
    problems += [f"{name} is missing" for name in own if name not in given]
    return names, problems


def fill(
    modules: Mapping[str, nn.Module],
    steps: Iterable[Step],
    devices: Mapping[str, Devices],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    identities: Iterable[Target] = (),
) -> list[str]:
    """Gives every parameter its tensor, and leaves the modules ready for inference.

    Args:
        modules: from `empty_module`, by component.
        steps: of a plan; the tensors that they write have the dtypes that the parameters get.
        devices: by component.
        progress: is called with bytes done and bytes in all, from one thread at a time.
        identities: of a plan.

    Returns:
        Sentences on values that a cast could not hold.

    Raises:
        MapError: the tensors are not those of the modules.
        FileRefused: a file became shorter meanwhile.
    """
    import torch

    steps = list(steps)
    targets, problems = targets_of(steps, identities), []
    constant = {(target.component, target.key) for target in identities}
    names: dict[str, dict[str, str]] = {}
    places: dict[tuple[str, str], Tensor] = {}  # as if each tensor were alone in a file
    for component, module in modules.items():
        names[component], wrong = matched(module, targets[component])
        problems += [f"{component}: {problem}" for problem in wrong]
        for key in names[component]:
            target, path = targets[component][key], Path(component, key)
            size = nbytes(math.prod(target.shape), target.dtype)
            places[component, key] = Tensor(path, key, target.dtype, target.shape, 0, size)
    if problems:
        raise MapError(
            "the configurations and the weights do not agree",
            problems=problems,
            hint="this is a fault of the key maps: please report it, with the output of "
            "`ckptconv inspect FILE`",
        )
    parts: dict[Path, list[Transfer]] = defaultdict(list)
    needed = [s for s in steps if any((t.component, t.key) in places for t in s.targets)]
    for transfer in transfers(needed, places):
        parts[transfer.target[0]].append(transfer)
    done = ByteCounter(sum(place.nbytes for place in places.values()), progress)
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in modules}
    with Files() as files:
        moves: list[tuple[Transfer, torch.Tensor]] = []
        for (component, key), place in places.items():
            name, own = names[component][key], parts[place.file]
            device = _device_of(name, devices[component])
            dtype = torch_dtype(place.dtype)
            tensor = _view(place, own, files) if device.type == "cpu" else None
            if (component, key) in constant:
                tensor = torch.eye(place.shape[0], device=device).to(dtype)
                done.add(tensor.nbytes)
            elif tensor is None:
                tensor = torch.empty(place.shape, dtype=dtype, device=device)
                for transfer in own:
                    moves += [(part, tensor) for part in transfer.cut(_portion(transfer))]
            else:
                done.add(tensor.nbytes)
            states[component][name] = tensor
        mover = _Mover(files)
        in_threads(lambda move: done.add(mover.move(*move)), moves, THREADS)
    for name, module in modules.items():
        twins = {twin: states[name][usual] for twin, usual in tied(module).items()}
        module.load_state_dict(states[name] | twins, strict=True, assign=True)
        if twins:  # or they would be two parameters from here on
            tie: Any = module.tie_weights
            tie()
        if list(devices[name]) == [""]:
            module.to(devices[name][""])  # the buffers; a parameter is there already
        module.eval()
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if on_meta := [key for key, tensor in tensors if tensor.is_meta]:
            raise MapError(f"{name}: nothing gave {', '.join(on_meta)} a value")
    return mover.warnings


def _device_of(name: str, devices: Devices) -> torch.device:
    """Returns the device of the longest module name that a parameter's name begins with."""
    segments = name.split(".")
    prefixes = (".".join(segments[:n]) for n in range(len(segments), -1, -1))
    return next(devices[prefix] for prefix in prefixes if prefix in devices)


def _view(place: Tensor, parts: list[Transfer], files: Files) -> torch.Tensor | None:
    """Returns a tensor as a view of the mapped file, or None where its bytes must be moved."""
    import torch

    if len(parts) != 1 or not parts[0].is_copy:
        return None
    (path, offset), dtype = parts[0].source, torch_dtype(place.dtype)
    if offset % dtype.itemsize:  # not every kernel reads across the borders of elements
        return None
    mapped = files.mapped(path, offset, place.nbytes)
    return torch.frombuffer(mapped, dtype=dtype).view(place.shape)


class _Mover:
    """Moves elements from files into tensors. Every thread has its own buffer and streams."""

    def __init__(self, files: Files) -> None:
        self.files, self.warnings = files, list[str]()
        self._thread = threading.local()

    def move(self, transfer: Transfer, tensor: torch.Tensor) -> int:
        """Fills the transfer's part of a tensor, and returns how many bytes that are."""
        import torch

        if transfer.changes or transfer.dtypes[0] in BLOCKS or _narrows(transfer):
            # on the CPU, so that the bits are those of a conversion
            data, lost = converted(transfer, self.files)
            at = transfer.target[1] // tensor.itemsize
            values = torch.frombuffer(data, dtype=tensor.dtype)
            tensor.view(-1)[at : at + transfer.count].copy_(values)
        else:
            raw = self._buffer(nbytes(transfer.reads, transfer.dtypes[0]), tensor.device)
            self.files.read_into(*transfer.source, raw.numpy().data)
            with self._stream(tensor.device):
                lost = _put(raw.view(torch_dtype(transfer.dtypes[0])), transfer, tensor)
        if lost:
            name, dtype = transfer.target[0], transfer.dtypes[1]
            self.warnings.append(f"{name}: {lost:,} values are too large for {dtype}")
        return transfer.nbytes

    def _buffer(self, size: int, device: torch.device) -> torch.Tensor:
        import torch

        buffer: torch.Tensor | None = getattr(self._thread, "buffer", None)
        if buffer is None or buffer.numel() < size:
            pinned = device.type == "cuda"
            buffer = torch.empty(max(size, CHUNK), dtype=torch.uint8, pin_memory=pinned)
            self._thread.buffer = buffer
        return buffer[:size]

    @contextlib.contextmanager
    def _stream(self, device: torch.device) -> Iterator[None]:
        """Lets copies to a GPU run while other threads read, and ends when they are done."""
        import torch

        if device.type != "cuda":
            yield
            return
        streams: dict[torch.device, Any] = self._thread.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory of a target may still be in use by work that was queued before.
            streams[device].wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(streams[device]):
            yield
        streams[device].synchronize()


def _portion(transfer: Transfer) -> int:
    """Returns how many elements of a transfer one thread moves at a time."""
    if _narrows(transfer):
        return NARROW
    stored = transfer.dtypes[0]
    return CAST_CHUNK if stored in BLOCKS else CHUNK * 8 // BITS[stored]


def _narrows(transfer: Transfer) -> bool:
    source, target = transfer.dtypes
    return source != target and BITS[target] == 8


def _put(values: torch.Tensor, transfer: Transfer, tensor: torch.Tensor) -> int:
    """Copies, casts and rearranges elements; returns how many finite values became infinite."""
    wait = tensor.device.type != "cuda"
    at = transfer.target[1] * 8 // BITS[transfer.dtypes[1]]
    tensor = tensor.view(-1)[at : at + transfer.count]
    if not transfer.is_copy:  # the device casts and rearranges
        values = values.to(tensor.device, non_blocking=not wait)
    if transfer.order:
        values = values.view(transfer.order.stored).permute(transfer.order.axes).reshape(-1)
        values = values[transfer.first : transfer.first + transfer.count]
    tensor.copy_(values, non_blocking=not wait)
    if transfer.dtypes[0] == transfer.dtypes[1] or not tensor.isinf().any():
        return 0
    return int((tensor.isinf() & values.isfinite()).sum())
