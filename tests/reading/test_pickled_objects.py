"""Objects beside the tensors: unknown classes are left out, and what could attack is refused."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import logging
import pathlib
import pickle
import re
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
from safetensors.torch import load_file

import ckptconv
from ckptconv.errors import NotACheckpoint, UnsafePickle
from ckptconv.reading.source import open_header
from tests.support.pickles import (
    EMPTY_DICT,
    MARK,
    checkpoint,
    name,
    table,
    tensor,
    text,
    torch_file,
)


class Colour(enum.Enum):
    """An enum, as trainers have for their settings."""

    RED = 1

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Pickles as most releases of Python do; some 3.11 name getattr, which is refused."""
        return Colour, (self.value,)


class Settings(dict[str, Any]):
    """A dict with a class of its own."""


@dataclasses.dataclass
class Callback:
    """An object as trainers keep them: attributes, a cycle and a tensor."""

    best: torch.Tensor
    itself: Any = None


CALLBACK = Callback(torch.ones(2))
CALLBACK.itself = [CALLBACK]
HERE = __name__
HARMLESS: dict[str, tuple[object, str]] = {
    "namespace": (argparse.Namespace(lr=1e-4, device=torch.device("cpu")), "argparse.Namespace"),
    "path": (pathlib.PurePosixPath("/a/b"), "pathlib.PurePosixPath"),
    "enum": (Colour.RED, f"{HERE}.Colour"),
    "callback": ({Callback: CALLBACK}, f"{HERE}.Callback"),
    "settings": (Settings(a=[Settings()]), f"{HERE}.Settings"),
    "omegaconf": (omegaconf.OmegaConf.create({"a": [1]}), "omegaconf.listconfig.ListConfig"),
    "counter": (collections.Counter("ab"), "collections.Counter"),
    "decimal": (decimal.Decimal(1), "decimal.Decimal"),
    "uuid": (uuid.UUID(int=7), "uuid.UUID"),
    "generator": (np.random.default_rng(0), "numpy.random._pcg64.PCG64"),
    "module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "function that is not called": (torch.nn.functional.silu, "torch.nn.functional.silu"),
    "simple namespace": (types.SimpleNamespace(a=1), ""),
    "time": (datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), ""),
    "duration": (datetime.timedelta(3), ""),
    "bytes": (bytearray(b"abc"), ""),
    "values": ([frozenset({1}), 1j, slice(3), range(4), collections.deque([1])], ""),
    "logger": (logging.getLogger("a"), ""),
    "pattern": (re.compile("a"), ""),
    "scalar": (np.float32(2), ""),
    "array": ([np.ones((2, 3)), np.ones((3, 2)).T], ""),
    "state": ([np.random.get_state(), torch.get_rng_state()], ""),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_a_harmless_object_is_left_out_and_its_class_is_named(kind: str, tmp_path: Path) -> None:
    value, unknown = HARMLESS[kind]
    path = tmp_path / "model.ckpt"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        content = {"state_dict": {"a": torch.ones(3), "b": value}, "extra": value}
        path.write_bytes(torch_file(content, pickle_protocol=protocol))
        header = open_header(path)
        assert list(header.tensors) == ["a"]
        assert header.notes[0].endswith("left out: extra, state_dict.b")
        assert len(header.notes) == 1 + bool(unknown)
        assert unknown in header.notes[-1].partition("none of their code was run: ")[2].split(", ")


CALLBACKS = "pytorch_lightning.callbacks.model_checkpoint"
CHECKPOINT = name(f"{CALLBACKS}.ModelCheckpoint")


@pytest.mark.parametrize(
    "value",
    [
        CHECKPOINT,
        CHECKPOINT + b")R",
        CHECKPOINT + b")\x81",
        CHECKPOINT + b")}\x92",
        MARK + CHECKPOINT + b"o",
        MARK + f"i{CALLBACKS}\nModelCheckpoint\n".encode(),
        EMPTY_DICT + CHECKPOINT + EMPTY_DICT + b"s",
    ],
)
def test_an_object_never_becomes_a_tensor(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    wrapped = name("torch._utils._rebuild_parameter") + MARK + value + b"tR"
    path.write_bytes(checkpoint(table(a=tensor(), b=value, c=wrapped), _0=bytes(16)))
    header = open_header(path)
    assert list(header.tensors) == ["a"]
    assert header.notes[0].endswith("left out: b, c")
    assert header.notes[1].endswith(f"none of their code was run: {CALLBACKS}.ModelCheckpoint")


DENIED = """
os.system posix.system nt.system os.path.join subprocess.Popen subprocess.check_output sys.exit
_posixsubprocess.fork_exec builtins.eval builtins.exec builtins.getattr builtins.open
builtins.compile builtins.__import__ __builtin__.apply importlib.import_module runpy._run_code
importlib.machinery.SourceFileLoader socket.socket _socket.socket pty.spawn ctypes.CDLL
webbrowser.open shutil.rmtree code.InteractiveInterpreter types.FunctionType types.CodeType
pickle.loads _pickle.Unpickler dill.loads cloudpickle.pickle.loads operator.attrgetter
operator.methodcaller functools.partial multiprocessing.Process http.client.HTTPSConnection
six.moves.builtins.eval io.FileIO _io.FileIO urllib.request.urlopen
""".split()  # noqa: SIM905
CALLED = """
torch.load torch.hub.load torch.storage._load_from_bytes torch.jit.load a.run a._B_.run
numpy.testing._private.utils.runstring pandas.read_pickle _.x a.
""".split()  # noqa: SIM905
MADE = {"": b"", "REDUCE": b")R", "NEWOBJ": b")\x81", "NEWOBJ_EX": b")}\x92"}


@pytest.mark.parametrize("of", DENIED)
def test_what_attacks_use_is_refused_by_name_whether_it_is_called_or_not(
    of: str, tmp_path: Path
) -> None:
    path, found = tmp_path / "model.ckpt", of.replace("__builtin__", "builtins")
    module, _, last = of.rpartition(".")
    ways = [name(of) + made for made in MADE.values()]
    ways += [MARK + name(of) + b"o", MARK + f"i{module}\n{last}\n".encode()]
    ways += [text("torch.serialization") + text(found) + b"\x93)R"]  # os, as a module has it
    for way in ways:
        path.write_bytes(checkpoint(table(a=tensor(), b=way), _0=bytes(16)))
        with pytest.raises(UnsafePickle) as caught:
            open_header(path)
        assert len(caught.value.problems) == 1
        assert f"{found}'" in caught.value.problems[0]


@pytest.mark.parametrize("of", CALLED)
def test_an_unknown_function_is_refused_where_it_is_called(of: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    module, _, last = of.rpartition(".")
    calls = [name(of) + b")R", MARK + name(of) + b"o", MARK + f"i{module}\n{last}\n".encode()]
    for call in calls:
        path.write_bytes(checkpoint(table(a=tensor(), b=call), _0=bytes(16)))
        with pytest.raises(UnsafePickle) as caught:
            open_header(path)
        assert caught.value.problems == (repr(of),)


def test_what_an_object_holds_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    state = name("a.B") + b")\x81}" + text("x") + name("os.system") + text("ls") + b"\x85Rsb"
    path.write_bytes(checkpoint(table(a=tensor(), b=state), _0=bytes(16)))
    with pytest.raises(UnsafePickle) as caught:
        open_header(path)
    assert caught.value.problems == ("'os.system'",)


@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2)}])
def test_a_saved_module_is_called_what_it_is(content: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_file(content))
    with pytest.raises(NotACheckpoint) as caught:
        open_header(path)
    assert "'torch.nn.modules.linear.Linear'" in str(caught.value)
    assert "state_dict()" in caught.value.hint


def test_a_conversion_warns_of_the_classes(small: Path, tmp_path: Path) -> None:
    content = {"state_dict": load_file(small), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "model.ckpt")
    report = ckptconv.convert(tmp_path / "model.ckpt", tmp_path / "out")
    assert "none of their code was run: argparse.Namespace" in report.warnings[1]
