"""What the README shows is run as it stands."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptconv.architecture import bundled
from ckptconv.cli import main
from ckptconv.sample import layout_of, write_sample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ ckptconv (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, file in (("sdxl", "sd_xl_base_1.0.safetensors"), ("sd1", "model.safetensors")):
        architecture = bundled().architectures[name]
        write_sample(architecture, tmp_path / file, layout_of(architecture, dtype="fp16"))
    return tmp_path


@pytest.mark.usefixtures("workplace")
def test_every_command_runs() -> None:
    assert len(COMMANDS) >= 7
    for line in COMMANDS:
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 0, (line, result.output)


@pytest.mark.usefixtures("workplace")
def test_the_python_session_is_true() -> None:
    failures, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert (failures, tried > 5) == (0, True)


def test_ci_runs_the_command_that_the_readme_promises() -> None:
    promised = re.search(r"^(pip install -e .*pytest)\b", README, flags=re.MULTILINE)
    assert promised
    assert promised[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
