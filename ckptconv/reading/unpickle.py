"""Reads a pickle as data: nothing that it names is imported, called or executed.

A pickle is a program for a stack machine. The machine here knows only the instructions that make
data. A global (a class or function) is no more than its name, and a call of one is looked up in a
table of names, whose entries turn the arguments into data. For a name outside the table:

1. If it belongs to a module in `DENIED`, directly (`os.system`) or through what another module
   imports (`torch.serialization` and `os.system`), the file is refused, called or not.
2. If it is called (REDUCE, INST, OBJ) and does not look like a class, the file is refused: the
   function could do anything. A class has a name that begins with a capital letter.
3. Otherwise it is harmless: it is only mentioned, it is a class that is called, or its instance is
   made without a call (NEWOBJ, and BUILD for the attributes). The object becomes `Inert`, without
   content, and the name is reported.

All refused names are collected and reported together. A refusal is the worst that a hostile pickle
can achieve, and an object of an unknown class never becomes a tensor or part of one.

Nor can a pickle use memory or time out of proportion. The number of instructions is limited, each
one takes at most a few hundred bytes beside its text, keys of a dict are text, and no other object
is compared, hashed or printed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .strict_json import show

MAX_STEPS = 1_000_000
"""Instructions; a checkpoint has about 30 for each tensor, and seldom 10,000 tensors."""
MAX_TEXT = 512
"""Characters in the name of a global or the key of a dict: joined, long ones would fill memory."""

DENIED: Final = frozenset(
    """
    builtins sys importlib imp runpy pkgutil pkg_resources zipimport six future past types inspect
    gc code codeop operator functools timeit trace profile cProfile pdb bdb doctest rlcompleter
    idlelib pickle cPickle dill cloudpickle marshal shelve pip ensurepip venv setuptools distutils

    os posix nt subprocess posixsubprocess popen2 commands pty platform signal shutil io tempfile
    fileinput ctypes cffi mmap multiprocessing concurrent threading thread asyncio atexit winreg
    winapi msvcrt

    socket socketserver ssl http httplib urllib urllib2 requests httpx aiohttp ftplib smtplib poplib
    imaplib telnetlib xmlrpc webbrowser antigravity
    """.split()  # noqa: SIM905  (ten lines, not seventy)
)
"""Modules that run code, reach the system, or reach the network; `_io` counts as `io`."""

Call = Callable[[tuple[Any, ...]], object]
"""Turns the arguments of a call into data; ValueError if they are not what it expects."""


class Forbidden(ValueError):
    """The pickle names globals that could run code; `names` lists all of them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(", ".join(names))


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, of which only the name is known."""

    name: str


@dataclass(frozen=True, slots=True)
class Inert:
    """An object whose content is dropped; `name` is that of its class, if it is unknown."""

    name: str = ""


class Loaded(NamedTuple):
    """What a pickle describes, and the names of unknown globals in it."""

    content: object
    unknown: tuple[str, ...]


class Table(dict[str, Any]):
    """A dict that keeps the entries whose key is text, and counts the others in `dropped`."""

    __slots__ = ("dropped",)

    def __init__(self) -> None:
        self.dropped = 0


INERT: Final = Inert()


def load(raw: bytes, calls: Mapping[str, Call], persistent: Call) -> Loaded:
    """Returns the object that a pickle describes, as data.

    The content consists of None, bool, int, float, str, bytes, list, tuple, `Table`, `Global`,
    `Inert`, and of whatever `calls` returns for the call of a global and `persistent` for a
    persistent id.

    Raises:
        Forbidden: the pickle names globals that could run code.
        ValueError: it is damaged, or has instructions that data do not need.
    """
    machine = _Machine(calls, persistent)
    fault, position = "", 0
    try:
        for steps, (instruction, argument, at) in enumerate(pickletools.genops(raw)):
            position = at or 0
            if steps == MAX_STEPS:
                fault = fault or f"it has more than {MAX_STEPS:,} instructions"
                break
            try:
                if instruction.name in ("GLOBAL", "INST"):  # after a fault, too
                    machine.find(*str(argument).split(" ", 1))
                if not fault:
                    machine.step(instruction.name, argument)
            except ValueError as error:
                fault = fault or f"byte {position:,}: {error}"
        if position + 1 != len(raw):
            fault = fault or f"{len(raw) - position - 1:,} bytes follow its end"
    except ValueError as error:  # from pickletools: these bytes are no instruction
        fault = fault or str(error)
    if machine.forbidden:
        raise Forbidden(tuple(machine.forbidden))
    if fault:
        raise ValueError(f"its pickle is malformed: {fault}")
    return Loaded(machine.result, tuple(machine.unknown))


class _Machine:
    """The stack, the marks on it, and the memo of objects that are used again.

    Its methods raise ValueError if an instruction cannot be run.
    """

    def __init__(self, calls: Mapping[str, Call], persistent: Call) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.forbidden: dict[str, None] = {}  # sets that keep the order
        self.unknown: dict[str, None] = {}
        self.result: object = None

    def step(self, name: str, argument: Any) -> None:
        if name not in _INSTRUCTIONS:
            raise ValueError(f"{name} is not an instruction that data need")
        _INSTRUCTIONS[name](self, argument)

    def find(self, module: object, name: object) -> Global:
        """Returns a global, and records its name if it is unknown."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a global is not text")
        if module == "__builtin__":  # the name in Python 2
            module = "builtins"
        full_name = f"{module}.{name}"
        if len(full_name) > MAX_TEXT:
            raise ValueError(f"the name of a global has {len(full_name):,} characters")
        if full_name not in self.calls:
            owners = [module.partition(".")[0], *name.split(".")[:-1]]
            denied = any(owner.lstrip("_") in DENIED for owner in owners)
            (self.forbidden if denied else self.unknown)[full_name] = None
        return Global(full_name)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def top(self, *types: type) -> Any:
        """Returns the object on top of the stack, which must be of one of the types, if any."""
        if not self.stack:
            raise ValueError("it needs an object on an empty stack")
        if types and not isinstance(self.stack[-1], types):
            raise ValueError(f"it fills an object of type {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def take(self, count: int = 1) -> list[Any]:
        """Removes objects from the top of the stack, and returns them, the topmost one last."""
        if len(self.stack) < count:
            raise ValueError("it takes an object from an empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def take_marked(self) -> list[Any]:
        """Removes the objects above the last mark, and returns them."""
        if not self.below:
            raise ValueError("it needs a mark on a stack without one")
        items, self.stack = self.stack, self.below.pop()
        return items

    def store(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.top()

    def fetch(self, number: int) -> None:
        if number not in self.memo:
            raise ValueError(f"nothing was stored as number {number:,}")
        self.push(self.memo[number])

    def extend(self, items: list[Any]) -> None:
        if isinstance(target := self.top(list, Inert), list):
            target += items

    def update(self, items: list[Any]) -> None:
        """Adds alternating keys and values to the dict on top of the stack."""
        target = self.top(Table, Inert)
        if len(items) % 2:
            raise ValueError("a dict gets a key without a value")
        if isinstance(target, Inert):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                target.dropped += 1
            elif len(key) > MAX_TEXT:
                raise ValueError(f"a dict gets a key of {len(key):,} characters")
            elif key in target:
                raise ValueError(f"a dict gets the key {show(key)} twice")
            else:
                target[key] = value

    def push_inert(self, _items: list[Any]) -> None:
        self.push(INERT)

    def drop(self, _items: list[Any], *types: type) -> None:
        """Leaves items out of the object on top of the stack, which is of one of the types."""
        self.top(*types)

    def make(self, function: object, arguments: object, *_: object) -> None:
        """Pushes what a new object stands for, without making it."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a global, or without a tuple")
        known = self.calls.get(function.name)
        self.push(known(arguments) if known else Inert(function.name))

    def call(self, function: Any, arguments: object) -> None:
        """Pushes what a call stands for, without calling anything."""
        self.make(function, arguments)
        last = function.name.rpartition(".")[2]
        if function.name in self.unknown and not last.lstrip("_")[:1].isupper():
            self.forbidden[function.name] = None

    def call_marked(self, items: list[Any]) -> None:
        if not items:
            raise ValueError("it calls nothing")
        self.call(items[0], tuple(items[1:]))

    def load_persistent(self, identity: object) -> None:
        if not isinstance(identity, tuple):
            raise ValueError("a persistent id is not a tuple")
        self.push(self.persistent(identity))

    def stop(self) -> None:
        (self.result,) = self.take()
        if self.stack or self.below:
            raise ValueError("it ends with objects left on the stack")


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push(Table()),
    "EMPTY_SET": lambda m, _: m.push(INERT),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.store),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.fetch),
    "MARK": lambda m, _: m.mark(),
    "TUPLE1": lambda m, _: m.push(tuple(m.take(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.take(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.take(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.take_marked())),
    "APPEND": lambda m, _: m.extend(m.take()),
    "APPENDS": lambda m, _: m.extend(m.take_marked()),
    "SETITEM": lambda m, _: m.update(m.take(2)),
    "SETITEMS": lambda m, _: m.update(m.take_marked()),
    "ADDITEMS": lambda m, _: m.drop(m.take_marked(), Inert),
    "FROZENSET": lambda m, _: m.push_inert(m.take_marked()),
    "BUILD": lambda m, _: m.drop(m.take(), Table, Inert),  # attributes, which neither needs
    "GLOBAL": lambda m, names: m.push(m.find(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(m.find(*m.take(2))),
    "REDUCE": lambda m, _: m.call(*m.take(2)),
    "OBJ": lambda m, _: m.call_marked(m.take_marked()),
    "INST": lambda m, names: m.call(m.find(*names.split(" ", 1)), tuple(m.take_marked())),
    "NEWOBJ": lambda m, _: m.make(*m.take(2)),
    "NEWOBJ_EX": lambda m, _: m.make(*m.take(3)),
    "BINPERSID": lambda m, _: m.load_persistent(*m.take()),
    "STOP": lambda m, _: m.stop(),
}
"""What the machine does for each instruction, by the name that `pickletools` gives it."""
