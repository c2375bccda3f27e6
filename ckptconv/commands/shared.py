"""What several commands share: options, output, the exit code and the progress bar."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ..dtypes import cast_name
from ..errors import CkptconvError, UsageError, printable
from ..maps.architecture import Architecture, KeyMaps, bundled
from ..options import FACTS, HELP, Options
from ..reports.table import table, wrap
from ..version import __version__

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(path_type=Path)
"""Not checked by click: a missing file is refused with exit code 3 and a message of our own."""


def joined(*options: Decorator) -> Decorator:
    """Returns one decorator that adds several options, in their order in the help."""

    def add_all(command: Callable[..., Any]) -> Callable[..., Any]:
        """Adds the options to a command."""
        return functools.reduce(lambda f, add: add(f), reversed(options), command)

    return add_all


JSON, QUIET = f"{__package__}.json", f"{__package__}.quiet"
"""Keys of the context: whether a command prints JSON, and whether it is quiet."""


def _note_json(ctx: click.Context, _option: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


def _hush(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[QUIET] = True
        warnings.simplefilter("ignore")  # of the libraries
        logging.disable(logging.WARNING)
        ctx.call_on_close(lambda: logging.disable(logging.NOTSET))


quiet_option = click.option(
    *("-q", "--quiet"),
    is_flag=True,
    expose_value=False,
    callback=_hush,
    help="Print no progress and no notes; errors remain.",
)
output_options = joined(
    click.option(
        *("--json", "as_json"), is_flag=True, callback=_note_json, help="Print JSON on stdout."
    ),
    quiet_option,
)
"""Adds the options that every command has."""


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
    **{name: {"is_flag": True} for name in ("ema", "assemble", "ignore_zeros")},
    "only": {"callback": _names, "metavar": "NAMES"},
    "lora": {"multiple": True, "metavar": "FILE[:SCALE]"},
    "zero_terminal_snr": {"default": None},
    **{name: {"type": click.Choice(of)} for name, of in FACTS.items() if False not in of},
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


def document(data: Mapping[str, Any], error: CkptconvError | None, name: str = "") -> Any:
    """Returns what a command prints with `--json`, as ckptconv/data/schemas/NAME.json describes it.

    Args:
        data: what is special to the command; if there are none, the name is `error`.
        error: why the command fails, or None.
        name: of the schema; by default that of the command, such as `maps-check`.
    """
    if not data:
        name = "error"
    name = name or "-".join(click.get_current_context().command_path.split()[1:])
    said = error and error.as_data()
    return {"schema": f"ckptconv/{name}/1", "version": __version__, **data, "error": said}


def echo_json(data: Mapping[str, Any], error: CkptconvError | None = None, name: str = "") -> None:
    """Prints the JSON of a command on stdout; the arguments are those of `document`."""
    click.echo(json.dumps(document(data, error, name), indent=2, ensure_ascii=False))


def exit_for(error: CkptconvError | None) -> None:
    """Ends the command with the exit code of an error, if there is one."""
    if error:
        click.get_current_context().exit(error.exit_code)


def note(text: str) -> None:
    """Prints on stderr what is good to know, unless the command is quiet."""
    if not is_quiet():
        click.echo(text, err=True)


def is_quiet() -> bool:
    """Whether the user wants to see errors only."""
    return QUIET in click.get_current_context().meta


def columns(*, err: bool = False) -> int:
    """Returns how many characters fit in a line; where it is no terminal, as many as you like."""
    stream = sys.stderr if err else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else 10**6


def echo_lines(lines: Iterable[str]) -> None:
    """Prints lines; on a terminal, they break between words, and go on with an indent."""
    for line in lines:
        click.echo("\n".join(wrap(printable(line), columns(), "    ")))


def echo_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, err: bool = False) -> None:
    """Prints a table that fits the terminal."""
    click.echo(table(titles, rows, columns(err=err)), err=err)


def is_animated() -> bool:
    """Whether stderr is a terminal that may be sent escapes, and the user wants to see progress."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    return sys.stderr.isatty() and not (plain or is_quiet())


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Shows a progress bar on stderr, or nothing where it may not.

    It is moved by the bytes done, the bytes in all and, if it changed, the description.
    """
    if not is_animated():
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
