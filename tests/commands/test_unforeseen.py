"""What no command foresees ends in one line, too."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ckptconv.cli import main
from ckptconv.commands import architectures

CODE = "from ckptconv.cli import main; main(prog_name='ckptconv')"


def run(*arguments: str | Path, **options: Any) -> tuple[int, str]:
    done = subprocess.run(  # noqa: S603  (no shell)
        [sys.executable, "-c", CODE, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["--help"]])
def test_an_output_that_is_full_is_one_line(arguments: list[str], small: Path) -> None:
    files = [small] if "inspect" in arguments else []
    with Path("/dev/full").open("w") as full:
        found = run(*arguments, *files, stdout=full)
    assert found == (3, "error: the output: the disk is full\n")


def test_an_output_that_is_closed_is_no_error(small: Path) -> None:
    assert run("inspect", small, preexec_fn=lambda: os.close(1)) == (0, "")


def test_a_reader_that_has_seen_enough_is_told_nothing(small: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    assert run("inspect", small, stdout=writes) == (1, "")
    os.close(writes)


def test_too_little_memory_is_one_line(folder: Callable[[str], Path]) -> None:
    limit = (400 << 20, 400 << 20)
    code, said = run(
        "verify",
        folder("small"),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit),
    )
    assert (code, said) == (3, "error: there is not enough memory\n")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 3, "error: there is not enough memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "not enough memory"),
        (PermissionError(13, "Permission denied", "/x"), 3, "error: /x: Permission denied\n"),
        (ZeroDivisionError("by\n zero\x1b"), 70, r"ZeroDivisionError: by zero\x1b: this is a bug"),
    ],
)
def test_an_unforeseen_error_is_one_line(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.delenv("CKPTCONV_DEBUG", raising=False)
    monkeypatch.setattr(architectures.command, "callback", fail)
    result = CliRunner().invoke(main, ["architectures"])
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)
    assert said in result.stderr
    monkeypatch.setenv("CKPTCONV_DEBUG", "1")
    assert CliRunner().invoke(main, ["architectures"]).exception is error
