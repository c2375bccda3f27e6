"""Reads a pickle as data: nothing that it names is imported, called or executed.

A pickle is a program for a machine with a stack. The machine here knows the instructions that make
data, and no object of Python beyond them: a global is its name, and a call is looked up in a table
of names, whose entries make data of the arguments. A name that is not in the table is remembered
and refused at the end, with all others, so the worst that a hostile pickle can do is to be refused.

Nor can it take memory or time out of proportion: there is a limit to the instructions, each of them
takes at most a few hundred bytes beside the text that it holds, keys of a dict are text, and no
other object is compared, hashed or printed.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .strict_json import show

__all__ = ["INERT", "Call", "Forbidden", "Global", "Inert", "Table", "load"]

MAX_STEPS = 1_000_000
"""Instructions: a checkpoint has about 30 for each tensor, and seldom 10,000 tensors."""
MAX_TEXT = 512
"""Characters of the name of a global, and of a key: long ones that are joined fill the memory."""

Call = Callable[[tuple[Any, ...]], object]
"""Makes data of the arguments of a call; ValueError if they are not what they should be."""


class Forbidden(ValueError):
    """The pickle names globals that data do not need."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(", ".join(names))


@dataclass(frozen=True, slots=True)
class Global:
    """Stands for a class or a function: its name is all that is known of it."""

    name: str


class Inert:
    """Stands for an object that is not looked at; whatever is put into it is gone."""


class Table(dict[str, Any]):
    """A dict. Only entries whose key is text are kept; the others are counted.

    Attributes:
        others: how many entries have another key.
    """

    __slots__ = ("others",)

    def __init__(self) -> None:
        self.others = 0


INERT: Final = Inert()


def load(raw: bytes, calls: Mapping[str, Call], persistent: Call) -> object:
    """Returns the object that a pickle describes, made of data.

    Args:
        raw: the whole pickle.
        calls: by name of a global, what a call to it gives. No other global may occur.
        persistent: what a persistent id, which is a tuple, gives.

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
            if instruction.name == "INST" or (fault and instruction.name == "GLOBAL"):
                machine.named(str(argument).replace(" ", ".", 1))
            if not fault:
                try:
                    machine.step(instruction.name, argument)
                except ValueError as error:
                    fault = f"byte {position:,}: {error}"
        if not fault and position + 1 != len(raw):
            fault = f"{len(raw) - position - 1:,} bytes follow its end"
    except ValueError as error:  # from pickletools: what is there is no instruction
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

    def named(self, name: str) -> Global:
        """Returns a global, and remembers its name if it may not occur."""
        if len(name) > MAX_TEXT:
            raise ValueError(f"the name of a global has {len(name):,} characters")
        if name.startswith("__builtin__."):  # as Python 2 calls them
            name = name.replace("__builtin__", "builtins", 1)
        if name not in self.calls:
            self.forbidden[name] = None
        return Global(name)

    def step(self, name: str, argument: Any) -> None:
        """Runs one instruction.

        Raises:
            ValueError: it cannot be run.
        """
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"nothing was stored as number {argument:,}")
                self.stack.append(self.memo[argument])
            case (
                "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BININT" | "BININT1" | "BININT2"
                | "LONG1" | "BINFLOAT" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                self.stack.append(argument)
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(name[-1]))]
                self.stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self.marked()
                self.stack.append(tuple(items))
            case "EMPTY_LIST":
                self.stack.append([])
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS":
                self.extend(self.marked())
            case "EMPTY_DICT":
                self.stack.append(Table())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.update([key, value])
            case "SETITEMS":
                self.update(self.marked())
            case "EMPTY_SET":
                self.stack.append(INERT)
            case "ADDITEMS":
                self.marked()
                self.top(Inert)
            case "FROZENSET":
                self.marked()
                self.stack.append(INERT)
            case "GLOBAL":
                self.stack.append(self.named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                words = self.pop(), self.pop()
                if not all(isinstance(word, str) for word in words):
                    raise ValueError("the name of a global is not text")
                self.stack.append(self.named(f"{words[1]}.{words[0]}"))
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                self.stack.append(self.called(self.pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = self.pop(), self.pop()
                self.stack.append(self.called(self.pop(), arguments))
            case "BUILD":  # attributes of an object: of a dict, of one that is not looked at
                self.pop()
                self.top(Table, Inert)
            case "BINPERSID":
                identity = self.pop()
                if not isinstance(identity, tuple):
                    raise ValueError("a persistent id is not a tuple")
                self.stack.append(self.persistent(identity))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                self.result = self.pop()
                if self.stack or self.below:
                    raise ValueError("it ends with objects on the stack")
            case _:
                raise ValueError(f"{name} is no instruction that data need")

    def pop(self) -> Any:
        """Takes the object on the top of the stack."""
        if not self.stack:
            raise ValueError("it takes an object from an empty stack")
        return self.stack.pop()

    def top(self, *kinds: type) -> Any:
        """Returns the object on the top of the stack, which must be of one of the kinds, if any."""
        if not self.stack:
            raise ValueError("it needs an object on an empty stack")
        if kinds and not isinstance(self.stack[-1], kinds):
            raise ValueError(f"it fills an object of type {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        """Takes the objects above the last mark."""
        if not self.below:
            raise ValueError("it needs a mark on a stack without one")
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        """Adds to the list on the top of the stack."""
        target = self.top(list, Inert)
        if isinstance(target, list):
            target += items

    def update(self, items: list[Any]) -> None:
        """Adds keys and values, in turn, to the dict on the top of the stack."""
        target = self.top(Table, Inert)
        if len(items) % 2:
            raise ValueError("a dict gets a key without a value")
        if isinstance(target, Inert):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                target.others += 1
            elif len(key) > MAX_TEXT:
                raise ValueError(f"a dict gets a key of {len(key):,} characters")
            elif key in target:
                raise ValueError(f"a dict gets the key {show(key)} twice")
            else:
                target[key] = value

    def called(self, function: object, arguments: object) -> object:
        """Returns what a call gives, without calling it."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no global, or without a tuple of arguments")
        if function.name in self.forbidden:
            return INERT
        return self.calls[function.name](arguments)
