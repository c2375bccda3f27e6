"""A part of the attacks of `python -m tests.hostile`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.hostile import attempt
from tests.support.hostility import ATTACKS

EACH = 2
"""Attacks of each kind, spread over all of them, that load no model."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_find_nothing(kind: str) -> None:
    quick = [attack for attack in ATTACKS[kind] if not attack.loads]
    chosen = quick[:: len(quick) // EACH]
    with tempfile.TemporaryDirectory() as scratch:  # not beside the files of other tests
        found = [*attempt({kind: chosen}, Path(scratch))]
    assert len(found) == len(chosen) >= EACH
    assert [(name, fault) for _, name, fault in found if fault] == []
