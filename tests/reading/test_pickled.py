"""PyTorch checkpoints: the same tensors as torch reads, and the same conversion as safetensors."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckptconv
from ckptconv.dtypes import LIBRARY_NAMES
from ckptconv.errors import HeaderError, NotACheckpoint
from ckptconv.files import Files, read_json
from ckptconv.reading.source import open_header
from ckptconv.reading.tensor import Header
from ckptconv.reports.report import hashes
from tests.conftest import Sample
from tests.support.checkpoints import raw, rewritten
from tests.support.pickles import check_laws, torch_file, zipped

DTYPES = {name: getattr(torch, own) for name, own in LIBRARY_NAMES.items()}
"""Torch's dtypes by the name that safetensors uses."""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that a test may write, again and again."""
    return tmp_path_factory.mktemp("pickled") / "model.ckpt"


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Returns a tensor of random bits."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    one = torch.empty(1, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*(shape or (1,)), one), dtype=torch.uint8)
    return raw.flatten().view(dtype).view(shape)


def read(content: object, path: Path, **options: Any) -> Header:
    """Reads what torch saves."""
    path.write_bytes(torch_file(content, **options))
    header = open_header(path)
    check_laws(header, path)
    return header


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(header: Header, tensors: dict[str, torch.Tensor]) -> None:
    """Checks that a header has these tensors, and that their bytes are where it says."""
    assert header.tensors.keys() == tensors.keys()
    with Files() as files:
        for name, info in header.tensors.items():
            assert DTYPES[info.dtype] == tensors[name].dtype
            assert info.shape == tuple(tensors[name].shape)
            assert bytes(info.read(files)) == bits(tensors[name])


def test_every_dtype_of_torch_that_safetensors_has_is_read(scratch: Path) -> None:
    tensors = {name: random(dtype, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(0.5), "none": torch.empty(0, 7), "flat": torch.ones(1)}
    header = read(tensors, scratch)
    same(header, tensors)
    assert {name: info.dtype for name, info in header.tensors.items() if name in DTYPES} == {
        name: name for name in DTYPES
    }
    assert header.notes == ()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_that_torch_takes_is_read(protocol: int, scratch: Path) -> None:
    tensors = {f"{n}.weight": random(torch.float16, n, 2) for n in range(300)}
    same(read({"state_dict": tensors, "epoch": 2}, scratch, pickle_protocol=protocol), tensors)


LINEAR = torch.nn.Linear(3, 2)
OPTIMIZER = torch.optim.AdamW(LINEAR.parameters())
LINEAR(torch.ones(3)).sum().backward()
OPTIMIZER.step()
MODEL = {name: tensor.detach() for name, tensor in LINEAR.state_dict().items()}
OTHERS = {
    "epoch": 3,
    "global_step": np.float64(12).astype(np.int64),
    "optimizer_states": [OPTIMIZER.state_dict()],
    "best": np.arange(3.0),
    "flags": {"a", None, True, 1.5, b"bytes", 2**100},
}


@pytest.mark.parametrize(
    "nest", ["state_dict", "model", "module", "params_ema", "model.state_dict"]
)
def test_a_nested_state_dict_is_found_and_the_rest_is_noted(nest: str, scratch: Path) -> None:
    content: dict[str, Any] = {"weight": 0, **OTHERS}
    inner = content
    for key in nest.split("."):
        inner[key] = inner = {}
    inner |= LINEAR.state_dict() | {"version": "1"}
    header = read(content, scratch)
    same(header, MODEL)
    left = f"weight, epoch, global_step, optimizer_states, best, flags, {nest}.version"
    assert header.notes == (
        f"the file holds more than the tensors of a model, which is left out: {left}",
    )


def test_a_tensor_beside_the_state_dict_does_not_hide_it(scratch: Path) -> None:
    header = read({"global_step": torch.tensor(3), "state_dict": MODEL, "params": {}}, scratch)
    same(header, MODEL)
    assert header.notes[0].endswith("left out: global_step, params")
    alike = {"params": LINEAR.state_dict(), "params_ema": MODEL}
    header = read(alike, scratch)
    same(header, MODEL)
    assert header.notes[0].endswith("left out: params")


def test_many_things_beside_the_model_are_counted(scratch: Path) -> None:
    header = read({**MODEL, **{f"n{n}": n for n in range(30)}}, scratch)
    same(header, MODEL)
    assert header.notes[0].endswith("n18, n19 and 10 more")


def test_parameters_and_the_attributes_of_a_state_dict_are_read(scratch: Path) -> None:
    state: Any = LINEAR.state_dict()
    assert state._metadata
    same(read(state, scratch), MODEL)
    same(read(dict(LINEAR.named_parameters()), scratch), MODEL)
    same(read(OrderedDict(model=OrderedDict(LINEAR.named_parameters())), scratch), MODEL)


def test_tensors_that_share_a_storage_are_ranges_of_it(scratch: Path) -> None:
    whole = random(torch.float32, 6, 4)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[2:5],
        "row": whole[3],
        "one": whole[2, 1],
        "flat": whole.view(-1),
        "column": whole[3:4].t(),  # [4, 1]: the axis of one element may have any stride
    }
    header = read(tensors, scratch)
    same(header, tensors)
    assert header.tensors["whole"] == replace(header.tensors["tied"], name="whole")
    assert header.tensors["rows"].start == header.tensors["whole"].start + 2 * 4 * 4
    assert scratch.stat().st_size < 4000  # stored once


def test_tensors_that_are_not_byte_ranges_are_refused_by_name(scratch: Path) -> None:
    content = {
        "good": torch.zeros(2, 3),
        "spread": torch.zeros(1).expand(4),
        "steps": torch.zeros(8)[::2],
        "wide": torch.zeros(4, 8)[:, 2:5],
        "turned": torch.zeros(4, 8)[:, 2:5].t(),
        "twice": torch.zeros(2, 1, 3).expand(2, 2, 3),
    }
    with pytest.raises(HeaderError) as caught:
        read(content, scratch)
    assert "cannot be read from the file as they are" in caught.value.message
    names = [problem.split("'")[1] for problem in caught.value.problems]
    assert names == ["spread", "steps", "wide", "turned", "twice"]
    assert "strides (0,) of shape (4,)" in caught.value.problems[0]
    assert "`.contiguous()`" in caught.value.hint
    same(read({k: v.contiguous() for k, v in content.items()}, scratch), content)


def test_what_safetensors_cannot_hold_is_refused_by_name(scratch: Path) -> None:
    content = {
        "wide": torch.zeros(2, dtype=torch.complex128),
        "conjugated": torch.zeros(2, dtype=torch.complex64).conj(),
        "__metadata__": torch.zeros(2),
        "\ud800": torch.zeros(2),
    }
    with pytest.raises(HeaderError) as caught:
        read(content, scratch)
    problems = "\n".join(caught.value.problems)
    for line in (
        "tensor 'wide': safetensors has no dtype for torch.ComplexDoubleStorage",
        "tensor 'conjugated': a conjugation or negation is still to be applied",
        "tensor '__metadata__': no tensor of a safetensors file can have this name",
        r"tensor '\ud800': no tensor",
    ):
        assert line in problems


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.zeros(1)], "the file holds a list"),
        (torch.zeros(1), "the file holds a lone tensor"),
        (3, "the file holds a single value"),
        ((1, 2), "the file holds a tuple"),
    ],
)
def test_what_is_not_a_dict_is_not_a_checkpoint(content: object, what: str, scratch: Path) -> None:
    with pytest.raises(NotACheckpoint, match=what) as caught:
        read(content, scratch)
    assert "state_dict()" in caught.value.hint


def test_keys_that_are_not_text_are_refused_among_tensors(scratch: Path) -> None:
    with pytest.raises(HeaderError, match="2 keys beside those of tensors are not text"):
        read({"state_dict": {1: torch.zeros(1), None: 3, "a": torch.zeros(1)}}, scratch)


def test_a_textual_inversion_gives_its_tensors_under_their_dicts(scratch: Path) -> None:
    word = torch.ones(2, 4)
    content = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(word)}),
        "vectors": {"*": word},
        "again": {},
        "step": 500,
    }
    header = read(content, scratch)
    same(header, {"string_to_token.*": torch.tensor(265), "vectors.*": word})
    assert header.notes[0].endswith("left out: string_to_param, step")


def test_names_that_become_one_are_refused(scratch: Path) -> None:
    with pytest.raises(HeaderError, match="1 names of tensors are repeated"):
        read({"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.zeros(1)}}, scratch)


Stored = tuple[list[int], list[int]]
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def _with_axes(shape: list[int]) -> st.SearchStrategy[Stored]:
    return st.tuples(st.just(shape), st.permutations(range(len(shape))))


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES.flatmap(_with_axes)),
        max_size=6,
    ),
    st.integers(2, 5),
    st.booleans(),
)
def test_any_dict_of_tensors_comes_back(
    scratch: Path, drawn: dict[str, tuple[str, Stored]], protocol: int, nested: bool
) -> None:
    tensors = {
        name: random(DTYPES[dtype], *shape).permute(axes)
        for name, (dtype, (shape, axes)) in drawn.items()
    }
    content = {"state_dict": tensors} if nested else tensors
    same(read(content, scratch, pickle_protocol=protocol), tensors)


def test_a_file_of_a_release_before_byteorder_and_zip_padding_is_read(scratch: Path) -> None:
    scratch.write_bytes(torch_file(MODEL))
    with zipfile.ZipFile(scratch) as file:
        names = [n for n in file.namelist() if "/data" in n]
        scratch.write_bytes(zipped({n.replace("archive", "sd-v1-4"): file.read(n) for n in names}))
    same(open_header(scratch), MODEL)


@pytest.fixture(scope="module")
def pair(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same SD1 checkpoint as a safetensors file and as torch saves it, nested."""
    folder = tmp_path_factory.mktemp("pair")
    plain = rewritten(sample("sd1", dtype="fp16"), folder / "model.safetensors", lambda key: key)
    tensors = load_file(plain)
    content = {"state_dict": {key: tensors[key] for key in open_header(plain).tensors}, "epoch": 1}
    torch.save(content, folder / "model.ckpt")
    return plain, folder / "model.ckpt"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_checkpoint_of_torch_converts_to_the_same_folder(
    dtype: str | None, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, pickled = pair
    expected = ckptconv.convert(plain, tmp_path / "plain", dtype=dtype)
    report = ckptconv.convert(pickled, tmp_path / "pickled", dtype=dtype)
    assert report.warnings == (*report.plan.detection.notes, *expected.warnings)
    assert report.warnings[0].endswith("left out: epoch")
    files, wanted = _files(tmp_path / "pickled"), _files(tmp_path / "plain")
    records = [json.loads(each.pop("ckptconv/source.json")) for each in (files, wanted)]
    assert files == wanted
    sources = [record.pop("source") for record in records]
    assert records[0] == records[1]
    assert sources[0] == {"metadata": {}, "name": "model.ckpt", "size": pickled.stat().st_size}


def test_its_folder_verifies_against_it_and_comes_back_as_safetensors(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, pickled = pair
    ckptconv.convert(pickled, tmp_path / "out")
    ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    assert raw(tmp_path / "back.safetensors") == raw(plain)
    weights = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (problem,) = ckptconv.verify(pickled, tmp_path / "out").problems  # all the rest is right
    assert problem.startswith("vae: ")
    assert ": 1 of " in problem


def test_it_loads_as_the_pipeline_that_its_safetensors_file_gives(
    pair: tuple[Path, Path],
) -> None:
    plain, pickled = (ckptconv.load_pipeline(path, device="cpu") for path in pair)
    for name in ("unet", "vae", "text_encoder"):
        states = [getattr(pipe, name).state_dict() for pipe in (plain, pickled)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_it_gives_a_component(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, pickled = pair
    bare = rewritten(
        plain, tmp_path / "bare.safetensors", lambda k: None if k.startswith("first_") else k
    )
    ckptconv.convert(bare, tmp_path / "out", vae=pickled)
    ckptconv.convert(plain, tmp_path / "whole")
    files = [_files(tmp_path / name / "vae") for name in ("out", "whole")]
    assert files[0] == files[1]
    assert read_json(tmp_path / "out/ckptconv/source.json")["donors"] == {"vae": "model.ckpt"}


def test_it_has_the_hashes_of_the_file_and_none_of_a_header(pair: tuple[Path, Path]) -> None:
    digest = hashlib.sha256(pair[1].read_bytes()).hexdigest()
    assert hashes(open_header(pair[1])) == {"sha256": digest, "short": digest[:10]}


def test_the_name_of_a_file_does_not_matter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path, suffix in zip(pair, (".ckpt", ".safetensors"), strict=True):
        (tmp_path / f"named{suffix}").symlink_to(path)
        found = ckptconv.inspect(tmp_path / f"named{suffix}")
        assert found.require()[0].name == "sd1"


def test_a_safetensors_file_whose_length_looks_like_a_zip_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04\0\0\0\0{}")
    with pytest.raises(HeaderError, match="its header takes 67,324,752 bytes, but"):
        open_header(path)


def test_only_zip_files_load_zipfile(pair: tuple[Path, Path]) -> None:
    code = "import sys, ckptconv; ckptconv.inspect(sys.argv[1]); print('zipfile' in sys.modules)"
    for path, loaded in zip(pair, ("False", "True"), strict=True):
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        assert done.stdout.strip() == loaded


def test_a_word_is_called_what_it_is(scratch: Path) -> None:
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.ones(4)}}
    scratch.write_bytes(torch_file(content))
    refusal = ckptconv.inspect(scratch).refusal
    assert refusal is not None
    assert "this is a textual inversion" in refusal.message
