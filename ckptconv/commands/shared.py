"""What several commands share: options, JSON, sizes and the progress bar."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..dtypes import CASTS
from ..errors import UsageError
from ..maps.architecture import KeyMaps, bundled
from ..options import FACTS, HELP, Options

if TYPE_CHECKING:
    from rich.console import Console


FILE = click.Path(path_type=Path)
"""Not checked by click: a missing file is refused with exit code 1 and our own sentence."""


def _names(_ctx: click.Context, _option: click.Parameter, value: str | None) -> list[str] | None:
    """Splits names at commas."""
    if value is None:
        return None
    if not (names := [name.strip() for name in value.split(",") if name.strip()]):
        raise click.BadParameter("names no component")
    return names


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")

_KINDS: dict[str, dict[str, Any]] = {
    "dtype": {"type": click.Choice(list(CASTS), case_sensitive=False)},
    "ema": {"is_flag": True},
    "only": {"callback": _names, "metavar": "NAMES"},
    "lora": {"multiple": True, "metavar": "FILE[:SCALE]"},
    "zero_terminal_snr": {"default": None},
    **{name: {"type": click.Choice(FACTS[name])} for name in ("prediction_type", "family")},
}
"""By option, what click needs to know; whatever is not here takes a path."""


def _option(name: str) -> Callable[..., Any]:
    """Returns the option that sets a field of `Options`."""
    words = f"--{name.replace('_', '-')}"
    if _KINDS.get(name) == {"default": None}:
        words += f"/--no{words[1:]}"
    text = HELP[name].replace("`", "")
    return click.option(words, help=text[0].upper() + text[1:], **_KINDS.get(name, {"type": FILE}))


_PLAN_OPTIONS = [_option(name) for name in HELP if name != "maps"]


def plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that decide what becomes of a file; `options_of` collects them."""
    return functools.reduce(lambda f, option: option(f), reversed(_PLAN_OPTIONS), function)


def options_of(words: dict[str, Any]) -> Options:
    """Returns the record of a command's options."""
    return Options.of({k: v for k, v in words.items() if k in HELP} | {"maps": key_maps()})


def key_maps(folder: Path | None = None) -> KeyMaps:
    """Returns the key maps to use: a folder before those that come with ckptconv.

    Args:
        folder: given to the command; the one that `ckptconv --key-maps` names by default.

    Raises:
        UsageError: it is no folder, or holds no YAML file.
    """
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


def echo_json(data: Any) -> None:
    """Prints JSON on stdout."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def console() -> Console:
    """Returns a console on stdout; where that is not a terminal, wide enough for our tables."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(width=width, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Shows a progress bar on stderr, or nothing where that is not a terminal.

    The bar takes the bytes done, the bytes in all and, if it changed, the description.
    """
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what=what: bar.update(
            task, description=what, completed=done, total=total
        )
