"""The command line: each command is a module in `ckptconv/commands/`, imported when it is used.

Data go to stdout, everything else to stderr. The help of `main` lists the exit codes.
"""

from __future__ import annotations

import difflib
import importlib
import io
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from .commands.shared import JSON, echo_json, quiet_option
from .errors import CkptconvError, on_the_command_line
from .libraries import quieten
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
        signal.signal(signal.SIGTERM, _terminated)
        quieten()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
            sys.stdout.reconfigure(errors="surrogateescape")
        with on_the_command_line():
            try:
                return super().invoke(ctx)
            except CkptconvError as error:
                if ctx.meta.get(JSON):
                    echo_json({}, error)
                click.echo(f"error: {error}", err=True)
                ctx.exit(error.exit_code)


def _terminated(_number: int, _frame: object) -> NoReturn:
    """Ends as Ctrl-C does, so that nothing half-written stays behind."""
    sys.exit(128 + signal.SIGTERM)


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
