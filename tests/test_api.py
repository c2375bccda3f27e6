"""The Python API cannot be held wrong: keywords, dtypes, reprs, hints, and what is exported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptconv
from ckptconv import errors
from ckptconv.detection import detect as detecting
from ckptconv.options import Choices, Options, adapter_file
from ckptconv.reading import header as reading
from tests.conftest import Folder, Sample
from tests.support.shell import run

CALLS: dict[str, Callable[..., Any]] = {
    "plan": lambda file, out, **words: ckptconv.plan(file, **words),
    "convert": lambda file, out, **words: ckptconv.convert(file, out, **words),
    "verify": lambda file, out, **words: ckptconv.verify(file, out, **words),
    "load_pipeline": lambda file, out, **words: ckptconv.load_pipeline(file, **words),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("word", "nearest"),
    [("predicton_type", "prediction_type"), ("loras", "lora"), ("text_encoder2", "text_encoder_2")],
)
def test_a_keyword_that_does_not_exist_names_the_nearest(
    name: str, word: str, nearest: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError) as caught:
        CALLS[name](small, tmp_path / "out", **{word: "x"})
    message = f"{name}() got an unexpected keyword argument '{word}'; did you mean '{nearest}'?"
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["use_safetensors", "config", "safety_checker"])
def test_keywords_of_diffusers_that_mean_nothing_here_are_not_swallowed(
    word: str, small: Path
) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'"):
        CALLS["load_pipeline"](small, None, **{word: None})


@pytest.mark.parametrize(
    "dtype", ["fp16", "FP16", "float16", "half", "F16", "torch.float16", torch.float16]
)
def test_a_dtype_is_understood_however_it_is_written(dtype: Any, small: Path) -> None:
    assert ckptconv.plan(small, dtype=dtype) == ckptconv.plan(small, dtype="fp16")
    assert ckptconv.plan(small, torch_dtype=dtype) == ckptconv.plan(small, dtype="fp16")


def test_dtype_and_torch_dtype_must_agree(small: Path) -> None:
    assert ckptconv.plan(small, dtype="half", torch_dtype=torch.float16)
    with pytest.raises(TypeError, match="one option, and differ"):
        ckptconv.plan(small, dtype="bf16", torch_dtype=torch.float16)


@pytest.mark.parametrize("dtype", ["int8", "fp64", torch.int64, 16])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype: Any, small: Path) -> None:
    with pytest.raises(ckptconv.UsageError) as caught:
        ckptconv.plan(small, dtype=dtype)
    assert (
        str(caught.value) == f"dtype '{dtype}' is unknown\nhint: it is one of fp16, bf16, fp32, fp8"
    )


def test_a_text_is_one_item() -> None:
    assert Options.of({"only": "unet"}).only == frozenset({"unet"})
    assert Options.of({"only": ["unet", "vae"]}).only == frozenset({"unet", "vae"})
    assert Options.of({"lora": "a.safetensors:0.5"}).lora == (adapter_file("a.safetensors:0.5"),)
    assert [f.scale for f in Options.of({"lora": ["a:0.5", Path("b")]}).lora] == [0.5, 1.0]


def test_none_is_the_default() -> None:
    words = dict.fromkeys(Choices.__annotations__)
    assert Options.of(words) == Options()


def test_type_checkers_know_every_option() -> None:
    names = set(Options.__dataclass_fields__) | {"torch_dtype"}
    assert set(Choices.__annotations__) == names


@pytest.mark.parametrize("name", CALLS)
def test_help_shows_every_keyword(name: str) -> None:
    function = getattr(ckptconv, name)
    keywords = set(inspect.signature(function).parameters)
    text = inspect.getdoc(function) or ""
    assert set(Options.__dataclass_fields__) <= keywords
    described = text.partition("Args:")[2].partition("\n\n")[0]
    assert all(f"    {word}: " in described for word in keywords), described
    assert "**choices" not in text


@pytest.mark.slow
def test_reprs_are_short(small: Path, folder: Folder, tmp_path: Path) -> None:
    found = ckptconv.inspect(small)
    plan = ckptconv.plan(small)
    report = ckptconv.convert(small, tmp_path / "out")
    verified = ckptconv.verify(small, folder("small"))
    exported = ckptconv.export(folder("small"), tmp_path / "out.safetensors")
    for value in (found, found.header, plan, report, verified, exported):
        assert len(repr(value)) < 200 + len(str(tmp_path)), repr(value)
        assert type(value).__name__ in repr(value)


def test_every_exception_and_public_type_is_exported() -> None:
    exceptions = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert len(exceptions) > 10
    assert exceptions <= set(ckptconv.__all__)
    assert list(ckptconv.__all__) == sorted(ckptconv.__all__)
    functions = [getattr(ckptconv, name) for name in ckptconv.__all__]
    returned = {
        inspect.signature(function).return_annotation
        for function in functions
        if inspect.isfunction(function)
    }
    assert returned - {"Any"} <= set(ckptconv.__all__)


def test_no_module_hides_behind_a_function() -> None:
    modules = {info.name for info in pkgutil.iter_modules(ckptconv.__path__)}
    assert not modules & set(ckptconv.__all__)
    for name in modules - {"__main__"}:
        assert inspect.ismodule(importlib.import_module(f"ckptconv.{name}"))


def test_hints_speak_the_language_of_the_caller(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckptconv.convert(small, out)
    with pytest.raises(ckptconv.OutputError) as caught:
        ckptconv.convert(small, out)
    assert "overwrite=True replaces it" in str(caught.value)
    assert "--" not in str(caught.value)
    assert "--overwrite replaces it" in run("convert", small, out, code=3).stderr
    ema = "to take the weights that it has"
    with pytest.raises(ckptconv.Incomplete, match=f"leave out ema {ema}"):
        ckptconv.plan(small, ema=True)
    assert f"leave out --ema {ema}" in run("plan", small, "--ema", code=3).stderr


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often headers are read, by file, and how often a header is judged."""
    counts: dict[str, int] = {}

    def count(module: Any, name: str, key: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **words: Any) -> Any:
            counts[key(*args)] = counts.get(key(*args), 0) + 1
            return real(*args, **words)

        for other in [*_modules(), module]:
            if getattr(other, name, None) is real:
                monkeypatch.setattr(other, name, call)

    count(reading, "_read_raw", str)
    count(detecting, "detect", lambda *_: "judged")
    return counts


def _modules() -> list[Any]:
    names = [info.name for info in pkgutil.walk_packages(ckptconv.__path__, "ckptconv.")]
    return [importlib.import_module(name) for name in names if "__main__" not in name]


def test_a_file_is_read_once_and_judged_once(
    small: Path, sample: Sample, folder: Folder, tmp_path: Path, counted: dict[str, int]
) -> None:
    model = sample("sd1")
    mixed = sample("sdxl")
    converted = folder("small")
    runs: dict[str, Callable[[], object]] = {
        "convert": lambda: ckptconv.convert(small, tmp_path / "a"),
        "convert --verify": lambda: run("convert", model, tmp_path / "b", "--verify"),
        "verify": lambda: ckptconv.verify(small, converted),
        "verify alone": lambda: ckptconv.verify(None, converted),
        "export": lambda: ckptconv.export(converted, tmp_path / "c.safetensors"),
        "load": lambda: ckptconv.load_pipeline(model, device="cpu"),
        "load without a component": lambda: ckptconv.load_pipeline(
            model, device="cpu", components={"vae": None}
        ),
        "generate": lambda: run(
            "generate", model, "a cat", "-o", tmp_path / "d.png", "--steps=1", "--size=64"
        ),
        "load mixed dtypes": lambda: ckptconv.load_pipeline(mixed, device="cpu"),
        "inspect --tree": lambda: run("inspect", small, "--tree"),
    }
    for name, call in runs.items():
        counted.clear()
        call()
        assert set(counted.values()) == {1}, (name, counted)
        assert "judged" in counted, name


@pytest.mark.parametrize("name", sorted({*ckptconv.__all__} - {"__version__"}))
def test_every_public_name_is_ours(name: str) -> None:
    assert getattr(ckptconv, name).__module__.startswith("ckptconv.")
    with pytest.raises(AttributeError, match=f"has no attribute '{name}s'"):
        getattr(ckptconv, f"{name}s")
