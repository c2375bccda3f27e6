"""What several commands share: options, JSON, the exit code and the progress bar."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..dtypes import cast_name
from ..errors import UsageError
from ..maps.architecture import Architecture, KeyMaps, bundled
from ..options import FACTS, HELP, Options

if TYPE_CHECKING:
    from rich.console import Console

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(path_type=Path)
"""Not checked by click: a missing file is refused with exit code 1 and a message of our own."""


def joined(*options: Decorator) -> Decorator:
    """Returns one decorator that adds several options, in their order in the help."""

    def add_all(command: Callable[..., Any]) -> Callable[..., Any]:
        """Adds the options to a command."""
        return functools.reduce(lambda f, add: add(f), reversed(options), command)

    return add_all


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def _names(_ctx: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    """Splits names at commas."""
    names = [name.strip() for name in (value or "").split(",") if name.strip()]
    if value is not None and not names:
        raise click.BadParameter("names no component")
    return names or None


def dtype_name(_ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Returns our name of a dtype, however it is spelled: `float16`, `FP16`, `half`."""
    return cast_name(value) if value else None


_KINDS: dict[str, dict[str, Any]] = {
    "dtype": {"callback": dtype_name, "metavar": "DTYPE"},
    **{name: {"is_flag": True} for name in ("ema", "ignore_zeros")},
    "only": {"callback": _names, "metavar": "NAMES"},
    "lora": {"multiple": True, "metavar": "FILE[:SCALE]"},
    "zero_terminal_snr": {"default": None},
    **{name: {"type": click.Choice(FACTS[name])} for name in ("prediction_type", "family")},
}
"""By field of `Options`, what click needs to know; all others take a path."""


def _option(name: str) -> Decorator:
    words = f"--{name.replace('_', '-')}"
    if name == "zero_terminal_snr":
        words += f"/--no{words[1:]}"
    text = HELP[name].replace("`", "")
    return click.option(words, help=text[0].upper() + text[1:], **_KINDS.get(name, {"type": FILE}))


plan_options = joined(*(_option(name) for name in HELP if name != "maps"))
"""Adds the options that decide what becomes of a file; `options_of` collects them."""


def options_of(words: dict[str, Any]) -> Options:
    """Returns the record of a command's options."""
    return Options.of({k: v for k, v in words.items() if k in HELP} | {"maps": key_maps()})


def key_maps(folder: Path | None = None) -> KeyMaps:
    """Returns the key maps of a folder, or of the one that `--key-maps` names, before our own."""
    context = click.get_current_context(silent=True)
    folder = folder or (context.find_root().obj if context else None)
    if folder is None:
        return bundled()
    if not folder.is_dir() or next(folder.rglob("*.yaml"), None) is None:
        raise UsageError(
            f"{folder}: is no folder of key maps: it holds no YAML file",
            hint="give the folder that holds NAME/arch.yaml; docs/key-maps.md describes it",
        )
    return KeyMaps([folder, *bundled().folders])


def architecture_named(name: str) -> Architecture:
    """Returns an architecture; an unknown name is wrong usage."""
    known = key_maps().architectures
    if name not in known:
        hint = f"it is one of {', '.join(known)}"
        raise UsageError(f"architecture {name!r} is unknown", hint=hint)
    return known[name]


def echo_json(data: Any) -> None:
    """Prints JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def exit_unless(passed: bool) -> None:
    """Ends the command with exit code 1 if something is wrong."""
    if not passed:
        click.get_current_context().exit(1)


def console() -> Console:
    """Returns a console on stdout; where that is not a terminal, wide enough for our tables."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Shows a progress bar on stderr, or nothing where that is not a terminal.

    It is moved by the bytes done, the bytes in all and, if it changed, the description.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what="": None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        *("{task.description}", rich.BarColumn(), rich.DownloadColumn()),
        *(rich.TransferSpeedColumn(), rich.TimeRemainingColumn()),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what=what: bar.update(
            task, description=what, completed=done, total=total
        )
