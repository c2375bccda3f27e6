"""The command line: each command is a module in `ckptconv/commands/`, imported when it is used.

Data go to stdout, everything else to stderr. The help of `main` lists the exit codes.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from .commands.shared import JSON, echo_json, quiet_option
from .errors import CkptconvError, on_the_command_line, printable, reason
from .libraries import is_out_of_memory, quieten
from .version import __version__

COMMANDS = (
    *("inspect", "plan", "convert", "verify", "export", "generate"),
    *("architectures", "maps", "sample", "demo"),
)
"""The commands, in the order of the help; each is the `command` of a module of its name."""


class _Group(click.Group):
    """Imports a command when it is used, and turns our errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".commands.{name}", __package__).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word in COMMANDS or word.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        if near := difflib.get_close_matches(word, COMMANDS, 1):
            hint = f"did you mean `ckptconv {near[0]}`?"
        elif Path(word).suffix or Path(word).exists():
            hint = f"did you mean `ckptconv inspect {word}`?"
        else:
            hint = f"it is one of {', '.join(COMMANDS)}"
        raise click.UsageError(f"there is no command {word!r}; {hint}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        quieten()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
            # a pipe of Windows has the code page of its country, which lacks most characters
            encoding = "utf-8" if sys.platform == "win32" else None
            sys.stdout.reconfigure(encoding=encoding, errors="surrogateescape")
        with on_the_command_line():
            try:
                return super().invoke(ctx)
            except CkptconvError as error:
                if ctx.meta.get(JSON):
                    echo_json({}, error)
                click.echo(f"error: {error}", err=True)
                ctx.exit(error.exit_code)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Says what no command foresaw in one line: a full disk behind stdout, too little memory.

        With the environment variable CKPTCONV_DEBUG it raises it instead.
        """
        sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  (it was closed)
        try:
            try:
                return super().main(*args, **extra)
            finally:
                sys.stdout.flush()  # not at exit, where it is too late to say so
        except Exception as error:
            if os.environ.get("CKPTCONV_DEBUG"):
                raise
            if sys.stdout is sys.__stdout__:  # what it still holds would be written at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if not isinstance(error, BrokenPipeError):  # whoever reads has seen enough
                click.echo(f"error: {printable(_unforeseen(error))}", err=True)
            known = isinstance(error, OSError) or is_out_of_memory(error)
            sys.exit(CkptconvError.exit_code if known else 70)


def _unforeseen(error: Exception) -> str:
    if is_out_of_memory(error):
        return "there is not enough memory"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {reason(error)}"
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (
        f"{what}: this is a bug of ckptconv: please report it, with what CKPTCONV_DEBUG=1 in the "
        "environment adds"
    )


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptconv")
@click.option(
    "--key-maps",
    type=click.Path(path_type=Path),
    envvar="CKPTCONV_KEY_MAPS",
    show_envvar=True,
    help="A folder of your own architectures and key maps, searched before the built-in ones.",
)
@quiet_option
@click.pass_context
def main(ctx: click.Context, /, key_maps: Path | None) -> None:
    """Turn a lone Stable Diffusion or FLUX.1 checkpoint into a diffusers folder, offline.

    Exit codes: 0 done, 1 a check failed, 2 wrong usage, 3 refused (an input, the place to write to,
    or the device), 130 stopped by Ctrl-C.
    """
    ctx.obj = key_maps
