"""Pipelines load in several threads at once, and nothing of the process changes meanwhile."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ckptconv import load_pipeline
from tests.conftest import Folder, Sample
from tests.support.pipelines import assert_same, modules

FILES = ("sd1", "sd2", "sdxl", "x4-upscaler")


@pytest.fixture(autouse=True)
def _hasty() -> Iterator[None]:
    """Lets threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def meanwhile(work: Callable[[], None], see: Callable[[], Any]) -> list[Any]:
    """Does some work, and returns what another thread saw all the while."""
    seen, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(see())

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            work()
        finally:
            done.set()
        looking.result()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_four_threads_load_while_a_fifth_builds_modules(
    kind: str, sample: Sample, folder: Folder
) -> None:
    paths = [sample(name) if kind == "file" else folder(name) for name in FILES]
    alone = [load_pipeline(path, device="cpu") for path in paths]
    together: list[Any] = []

    def load() -> None:
        barrier = threading.Barrier(len(paths))

        def one(path: Path) -> Any:
            barrier.wait()
            return load_pipeline(path, device="cpu")

        with ThreadPoolExecutor(len(paths)) as pool:
            together.extend(pool.map(one, paths))

    built = meanwhile(load, lambda: nn.Linear(3, 5))
    assert len(built) > 100
    assert {parameter.device.type for linear in built for parameter in linear.parameters()} == {
        "cpu"
    }
    assert all(bool(linear.weight.any()) for linear in built), "a weight was not initialized"
    for mine, other in zip(together, alone, strict=True):
        assert_same(mine, other)


def state() -> list[Any]:
    """Returns what a library could change in its process."""
    bars: list[Any] = [diffusers_logging, transformers_logging]
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("diff", "trans"))]
    return [
        gc.isenabled(),
        gc.get_threshold(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        [bar.is_progress_bar_enabled() for bar in bars],
        [(logging.getLogger(name).level, *logging.getLogger(name).filters) for name in names],
        list(warnings.filters),
        warnings.showwarning,
        nn.Module.register_parameter,
        nn.Module.register_buffer,
        [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")],
        transformers.PreTrainedModel.init_weights,
        transformers.PreTrainedModel.tie_weights,
        torch.empty,
        torch.zeros,
        torch.linspace,
        torch.random.get_rng_state().tolist(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_of_the_process_changes(kind: str, sample: Sample, tmp_path: Path) -> None:
    import ckptconv

    for task in ("text-to-image", "depth-to-image"):
        path = sample("sd2", task=task)
        if kind == "folder":
            ckptconv.convert(path, path := tmp_path / task)
        load_pipeline(path, device="cpu")  # what the libraries do once, on their import
        before = state()
        seen = meanwhile(lambda path=path: load_pipeline(path, device="cpu"), state)  # type: ignore[misc]
        assert len(seen) > 20
        assert all(each == before for each in seen)
        assert state() == before


@pytest.mark.slow
def test_the_first_import_may_be_in_several_threads(sample: Sample, folder: Folder) -> None:
    paths = [*(sample(name) for name in FILES[:3]), folder("sdxl")]
    code = (
        "import sys, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import ckptconv\n"
        "barrier = threading.Barrier(4)\n"
        "def load(path):\n"
        "    barrier.wait()\n"
        "    return type(ckptconv.load_pipeline(path, device='cpu')).__name__\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(*pool.map(load, sys.argv[1:]))\n"
    )
    done = subprocess.run(  # noqa: S603  (our own code)
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = "StableDiffusionPipeline " * 2 + "StableDiffusionXLPipeline " * 2
    assert done.stdout.split() == names.split()


BUFFERS = (
    ("sd1", "text-to-image", "text_encoder"),  # position_ids
    ("sd1", "text-to-image", "unet"),
    ("sd1", "text-to-image", "vae"),
    ("sd2", "depth-to-image", "depth_estimator"),  # DPT with BiT
    ("sd2-unclip", "image-variation", "image_encoder"),  # CLIP vision
)


@pytest.mark.parametrize(("architecture", "task", "name"), BUFFERS)
def test_buffers_are_those_of_a_module_built_as_usual(
    architecture: str, task: str, name: str, sample: Sample
) -> None:
    file, absent = sample(architecture, task=task), {"image_normalizer": None}
    given = absent if architecture == "sd2-unclip" else {}
    pipe = load_pipeline(file, device="cpu", components=given)
    module: Any = modules(pipe)[name]
    cls = type(module)
    usual = cls.from_config(module.config) if hasattr(cls, "from_config") else cls(module.config)
    mine, theirs = dict(module.named_buffers()), dict(usual.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(mine[key].dtype == theirs[key].dtype for key in mine)
    if name in ("text_encoder", "image_encoder"):
        assert any(key.endswith("position_ids") for key in mine)
