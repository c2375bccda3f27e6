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

from ..conversion.convert import Choices
from ..errors import UsageError
from ..maps.architecture import KeyMaps, bundled

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "choices_of",
    "console",
    "echo_json",
    "json_option",
    "key_maps",
    "plan_options",
    "progress",
]

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

_PLAN_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["fp16", "bf16", "fp32"]),
        help="Cast the weights; as stored by default.",
    ),
    click.option("--ema", is_flag=True, help="Take the EMA copy of the UNet."),
    click.option(
        "--only", callback=_names, metavar="NAMES", help="Components to write, such as unet,vae."
    ),
    click.option("--vae", type=FILE, help="Take the VAE from another file or folder."),
    click.option("--text-encoder", type=FILE, help="Take the text encoder from elsewhere."),
    click.option(
        "--text-encoder-2", type=FILE, help="Take the second text encoder from elsewhere."
    ),
    click.option(
        "--depth-estimator", type=FILE, help="Take the depth estimator from elsewhere (SD2 depth)."
    ),
    click.option(
        "--image-normalizer", type=FILE, help="Take unCLIP's image statistics from elsewhere."
    ),
    click.option(
        "--prediction-type",
        type=click.Choice(["epsilon", "v_prediction"]),
        help="What the UNet predicts; found out by default.",
    ),
    click.option(
        "--zero-terminal-snr/--no-zero-terminal-snr",
        default=None,
        help="Whether the noise schedule ends in pure noise; found out by default.",
    ),
    click.option(
        "--family",
        type=click.Choice(["sd1", "sd2", "sdxl"]),
        help="What a VAE that stands alone is for; found out by default.",
    ),
    click.option("--original-config", type=FILE, help="The LDM or SGM yaml of the model; it wins."),
    click.option(
        "--lora",
        multiple=True,
        metavar="FILE[:SCALE]",
        help="Add a LoRA, LoHa or LoKr to the weights; may be repeated.",
    ),
)


def plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that decide what becomes of a file; `choices_of` collects them."""
    return functools.reduce(lambda f, option: option(f), reversed(_PLAN_OPTIONS), function)


def choices_of(options: dict[str, Any]) -> Choices:
    """Returns the choices among a command's options."""
    chosen: Any = {key: options[key] for key in Choices.__annotations__ if key in options}
    chosen["maps"] = key_maps()
    return chosen  # type: ignore[no-any-return]


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
