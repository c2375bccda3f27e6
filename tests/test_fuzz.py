"""The fuzzer for a few seconds, and that it does find what it looks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fuzz
from tests.support.fuzz_inputs import Trial

pytestmark = pytest.mark.slow


def test_damaged_files_are_taken_or_refused_in_words(tmp_path: Path) -> None:
    tally = fuzz.fuzz(3 / 60, 0, tmp_path / "findings", converting=0)
    assert tally.kinds.total() > 1
    assert not tally.findings, tally


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: 1 // 0, "ZeroDivisionError: integer division or modulo by zero"),
        (lambda: os._exit(9), "the process ended with 9"),
        (lambda: bytearray(2 * fuzz.ROOM), "MemoryError"),
        (lambda: (b"x" * (400 * fuzz.MiB))[:0], "it takes more than 33,554,432 bytes of memory"),
    ],
)
def test_it_finds_and_keeps_an_input_that_does_harm(
    fault: Callable[[], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "GROWTH", 32 * fuzz.MiB)
    monkeypatch.setattr(fuzz, "trial", lambda *_: Trial("junk", {"model": (b"junk", 4)}))
    monkeypatch.setattr("ckptconv.reading.header.other_format", lambda _: fault())
    tally = fuzz.fuzz(0, 7, tmp_path, converting=0)
    assert tally.kinds.total() == 1
    assert said in next(iter(tally.findings))
    assert said in (tmp_path / "7-0" / "why.txt").read_text()
    assert (tmp_path / "7-0" / "model").read_bytes() == b"junk"
