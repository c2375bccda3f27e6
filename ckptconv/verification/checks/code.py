"""Does a folder ask whoever loads it to run code?"""

from __future__ import annotations

from collections.abc import Iterator

from ...configs.allowed import code_asked_for
from ...folder.names import INDEX
from ...folder.read import ModelFolder
from ...libraries import LIBRARIES, find_class
from ..result import Check, Problem

ELSEWHERE = "asks for code from elsewhere: ckptconv never reads it, another program may"


def check_code(model: ModelFolder) -> Iterator[Check]:
    """Yields a check if anything in the configurations, or beside them, leads to code."""
    if findings := list(_findings(model)):
        yield Check.of("model", "code", findings)


def _findings(model: ModelFolder) -> Iterator[Problem]:
    configs = {name: part.config for name, part in model.parts.items()} | {INDEX: model.index}
    for name, values in configs.items():
        for entry in code_asked_for(values):
            yield Problem(f"{entry} of {name}", ELSEWHERE)
    for name, value in (model.index or {}).items():
        if isinstance(value, list) and not _is_known(value):
            what = f"is {str(value)[:80]}, no class of diffusers or transformers"
            yield Problem(name, f"{what}: another program may run a file of that name")
    for path in sorted([*model.path.glob("*.py"), *model.path.glob("*/*.py")]):
        what = "is a program: ckptconv never runs it, another program may"
        yield Problem(str(path.relative_to(model.path)), what)


def _is_known(value: list[object]) -> bool:
    """Whether an entry of the index leads to a library, or to nothing."""
    if len(value) != 2 or not all(isinstance(word, str) for word in value):
        return value == [None, None]
    library, name = map(str, value)
    return library in LIBRARIES or find_class(library, name) is not None
