"""What the README shows is run as it stands."""

from __future__ import annotations

import doctest
import functools
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptconv.cli import main
from ckptconv.maps.architecture import bundled
from ckptconv.reading.header import header_from_json, read_header
from ckptconv.sample import layout_of, write_sample
from tests.conftest import Sample
from tests.support.checkpoints import rewritten
from tests.support.qwen import write_tokenizer
from tests.support.reference.files import FLUX_FILES, Z_IMAGE_FILES

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


def below(prefix: str, key: str) -> str | None:
    """Returns what stands behind a prefix; None for other keys."""
    return key.removeprefix(prefix) if key.startswith(prefix) else None


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_every_command_runs(sample: Sample) -> None:
    for name, prefix in FLUX_FILES.items():
        rewritten(sample("flux"), Path(f"{name}.safetensors"), functools.partial(below, prefix))
    Path("z-image-files").mkdir()
    for name, prefix in Z_IMAGE_FILES.items():
        file = Path("z-image-files", f"{name}.safetensors")
        rewritten(sample("z-image"), file, functools.partial(below, prefix))
    write_tokenizer(Path("Z-Image-Turbo", "tokenizer"))
    assert len(COMMANDS) >= 8
    for line in COMMANDS:
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 0, (line, result.output)
        if "flux1-dev" in line:  # T5 alone is no model, and `convert *.safetensors` is to pass
            Path("flux-files").mkdir()
            for name in FLUX_FILES:
                Path(f"{name}.safetensors").rename(f"flux-files/{name}.safetensors")


@pytest.mark.usefixtures("workplace")
def test_the_python_session_is_true() -> None:
    failures, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert (failures, tried > 5) == (0, True)


def test_ci_runs_the_command_that_the_readme_promises() -> None:
    promised = re.search(r"^(pip install -e .*pytest)\b", README, flags=re.MULTILINE)
    assert promised
    assert promised[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_contributing_shows_the_architecture_as_it_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert shown
    assert shown[1] == (ROOT / "key_maps" / "ssd-1b" / "arch.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_the_commands_of_contributing_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ ckptconv (.*)$", text, flags=re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 0, (line, result.output)


def test_a_header_becomes_a_layout(workplace: Path) -> None:
    result = CliRunner().invoke(main, ["maps", "header", "model.safetensors"])
    layout = workplace / "layout.json"
    layout.write_text(result.output, encoding="utf-8")
    assert {k: (i.dtype, i.shape) for k, i in header_from_json(layout).tensors.items()} == {
        k: (i.dtype, i.shape) for k, i in read_header("model.safetensors").tensors.items()
    }
