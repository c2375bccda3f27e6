"""Reads a pickle as data: nothing that it names is imported, called or executed.

A pickle is a program for a stack machine. The machine here knows only the instructions that make
data. A global is its name, and a call is looked up in a table of names, whose entries turn the
arguments into data. A name outside the table is recorded and refused at the end, with all others:
being refused is the worst that a hostile pickle can achieve.

Nor can it use memory or time out of proportion. The number of instructions is limited, each one
takes at most a few hundred bytes beside its text, keys of a dict are text, and no other object is
compared, hashed or printed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .strict_json import show

MAX_STEPS = 1_000_000
"""Instructions; a checkpoint has about 30 for each tensor, and seldom 10,000 tensors."""
MAX_TEXT = 512
"""Characters in the name of a global or the key of a dict: joined, long ones would fill memory."""

Call = Callable[[tuple[Any, ...]], object]
"""Turns the arguments of a call into data; ValueError if they are not what they should be."""


class Forbidden(ValueError):
    """The pickle names globals that data do not need: all of them, in `names`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(", ".join(names))


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, of which only the name is known."""

    name: str


class Inert:
    """An object whose content is dropped."""


class Table(dict[str, Any]):
    """A dict that keeps the entries whose key is text, and counts the others in `dropped`."""

    __slots__ = ("dropped",)

    def __init__(self) -> None:
        self.dropped = 0


INERT: Final = Inert()

_CONSTANTS = {
    **{"NONE": None, "NEWTRUE": True, "NEWFALSE": False},
    **{"EMPTY_TUPLE": (), "EMPTY_SET": INERT},
}
_LITERALS = frozenset(
    (
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
        *("BINBYTES8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    )
)


def load(raw: bytes, calls: Mapping[str, Call], persistent: Call) -> object:
    """Returns the object that a pickle describes, as data.

    Args:
        raw: the whole pickle.
        calls: what a call to a global returns, by its name. No other global may occur.
        persistent: what a persistent id, which is a tuple, stands for.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, `Table`, `Global`, `Inert`, or what `calls`
        and `persistent` return.

    Raises:
        Forbidden: the pickle names other globals; all of them are listed.
        ValueError: it is damaged, or has instructions that data do not need.
    """
    machine = _Machine(calls, persistent)
    fault = ""
    position = 0
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
        raise ValueError(fault)
    return machine.result


class _Machine:
    """The stack, the marks on it, and the memo of objects that are used again."""

    def __init__(self, calls: Mapping[str, Call], persistent: Call) -> None:
        self.calls, self.persistent = calls, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.forbidden: dict[str, None] = {}  # a set that keeps the order
        self.result: object = None

    def step(self, name: str, argument: Any) -> None:
        """Runs one instruction; ValueError if it cannot be run."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _LITERALS:
                self.push(argument)
            case _ if name in _CONSTANTS:
                self.push(_CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"nothing was stored as number {argument:,}")
                self.push(self.memo[argument])
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.push(tuple(self.take(int(name[-1]))))
            case "TUPLE":
                self.push(tuple(self.take_marked()))
            case "EMPTY_LIST":
                self.push([])
            case "APPEND":
                self.extend(self.take(1))
            case "APPENDS":
                self.extend(self.take_marked())
            case "EMPTY_DICT":
                self.push(Table())
            case "SETITEM":
                self.update(self.take(2))
            case "SETITEMS":
                self.update(self.take_marked())
            case "ADDITEMS":
                self.take_marked()
                self.top(Inert)
            case "FROZENSET":
                self.take_marked()
                self.push(INERT)
            case "GLOBAL":
                self.push(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                words = self.take(2)
                if not all(isinstance(word, str) for word in words):
                    raise ValueError("the name of a global is not text")
                self.push(self.find(*words))
            case "REDUCE" | "NEWOBJ":
                self.call(*self.take(2))
            case "NEWOBJ_EX":
                self.call(*self.take(3)[:2])
            case "BUILD":  # sets attributes, which neither a dict nor a dropped object needs
                self.take(1)
                self.top(Table, Inert)
            case "BINPERSID":
                (identity,) = self.take(1)
                if not isinstance(identity, tuple):
                    raise ValueError("a persistent id is not a tuple")
                self.push(self.persistent(identity))
            case "STOP":
                (self.result,) = self.take(1)
                if self.stack or self.below:
                    raise ValueError("it ends with objects left on the stack")
            case _:
                raise ValueError(f"{name} is not an instruction that data need")

    def find(self, module: str, name: str) -> Global:
        """Returns a global, and records its name if it may not occur."""
        if module == "__builtin__":  # the name in Python 2
            module = "builtins"
        full_name = f"{module}.{name}"
        if len(full_name) > MAX_TEXT:
            raise ValueError(f"the name of a global has {len(full_name):,} characters")
        if full_name not in self.calls:
            self.forbidden[full_name] = None
        return Global(full_name)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def top(self, *types: type) -> Any:
        """Returns the object on top of the stack, which must be of one of the types, if any."""
        if not self.stack:
            raise ValueError("it needs an object on an empty stack")
        if types and not isinstance(self.stack[-1], types):
            raise ValueError(f"it fills an object of type {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def take(self, count: int) -> list[Any]:
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

    def extend(self, items: list[Any]) -> None:
        """Adds items to the list on top of the stack."""
        target = self.top(list, Inert)
        if isinstance(target, list):
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

    def call(self, function: object, arguments: object) -> None:
        """Pushes what a call stands for, without calling anything."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a global, or without a tuple")
        inert = function.name in self.forbidden
        self.push(INERT if inert else self.calls[function.name](arguments))
