"""What is made of a GGUF file is what is made of its values, as the gguf package computes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import ckptconv
from ckptconv.dtypes import BLOCKS
from ckptconv.errors import NotACheckpoint
from ckptconv.files import read_json
from ckptconv.maps.architecture import bundled
from ckptconv.maps.ops import OPS, split_rows
from ckptconv.planning.step import Step, Target
from ckptconv.reading.source import open_header
from ckptconv.reading.tensor import Tensor
from ckptconv.streaming.cast import cast
from ckptconv.streaming.stream import lay_out, write
from ckptconv.streaming.transfers import transfers
from tests.support import gguf_files
from tests.support.checkpoints import raw, raw_folder
from tests.support.gguf_files import WRITTEN, Array, Stored, cycled, dequantized
from tests.support.reference import flux, mmdit, t5, unet
from tests.support.reference.unet import randomise
from tests.support.relatives import run, verified

MODELS: dict[str, tuple[str, Any, str]] = {
    "flux": ("flux", partial(flux.Flux, flux.TINY_DEV), "flux"),
    "chroma": ("chroma", partial(flux.Flux, flux.TINY_CHROMA), "flux"),
    "sd3": ("sd3", partial(mmdit.MmDit, mmdit.TINY_SD3), "sd3"),
    "sd35": ("sd3", partial(mmdit.MmDit, mmdit.TINY_SD35), "sd3"),
    "sdxl": ("sdxl", partial(unet.UNet, unet.TINY_SDXL), "sdxl"),
    "sd1": ("sd1", partial(unet.UNet, unet.TINY_SD1), "sd1"),
}
"""By name: the architecture, the network, and what `general.architecture` says of it."""
RESHAPED = ("sdxl", "sd1")
Q8: dict[str, Any] = {"dtypes": ["Q8_0"]}


def values(network: nn.Module) -> dict[str, Array]:
    state = randomise(network, 1).state_dict()
    return {key: value.float().numpy() for key, value in state.items()}


def files(name: str, folder: Path, dtypes: Any = (*WRITTEN, *BLOCKS)) -> tuple[Path, Path, Stored]:
    """Writes a model in several dtypes as GGUF, and its values in float32 as safetensors."""
    _, build, arch = MODELS[name]
    stored = cycled(values(build()), dtypes, reshaped=name in RESHAPED)
    path = gguf_files.write(folder / "model.gguf", stored, arch)
    save_file(dequantized(stored), folder / "values.safetensors")
    return path, folder / "values.safetensors", stored


def weights(folder: Path) -> Mapping[str, Any]:
    return {k: v for k, v in raw_folder(folder).items() if not k.startswith("ckptconv/")}


@pytest.mark.parametrize(
    "name",
    ["chroma", *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "chroma")],
)
def test_a_folder_has_the_values_that_the_package_computes(name: str, tmp_path: Path) -> None:
    file, same, stored = files(name, tmp_path)
    assert len({dtype for dtype, _, _ in stored.values()}) > 7
    detection = ckptconv.inspect(file)
    assert detection.require()[0].name == MODELS[name][0]
    assert not [note for note in detection.notes if "metadata" in note]
    for dtype in ("fp32", "bf16"):
        ours, theirs = tmp_path / f"ours {dtype}", tmp_path / f"theirs {dtype}"
        ckptconv.convert(file, ours, dtype=dtype)
        ckptconv.convert(same, theirs, dtype=dtype)
        assert weights(ours) == weights(theirs)
        for config in theirs.glob("*/*.json"):
            if config.parent.name != "ckptconv":
                assert read_json(ours / config.relative_to(theirs)) == read_json(config)
        verified(file, ours)


@pytest.mark.parametrize("dtype", BLOCKS)
def test_blocks_are_dequantized_bit_for_bit(dtype: str) -> None:
    _, shape, rows = gguf_files.random(dtype, (5, 512))
    wanted = dequantized({"": (dtype, shape, rows)})[""]
    found, lost = cast(bytearray(rows.tobytes()), dtype, "F32")
    assert (bytes(found), lost) == (wanted.tobytes(), 0)
    found, _ = cast(bytearray(rows.tobytes()), dtype, "BF16")
    assert bytes(found) == wanted.astype(ml_dtypes.bfloat16).tobytes()


def test_values_that_are_no_numbers_make_no_noise(recwarn: pytest.WarningsRecorder) -> None:
    rows = np.full((1, 34), 0xFF, np.uint8)
    rows[:, :2] = 0x00, 0x7C  # an infinite scale
    found, lost = cast(bytearray(rows.tobytes()), "Q8_0", "F16")
    assert np.isinf(np.frombuffer(found, np.float16)).all()
    assert (lost, len(recwarn)) == (0, 0)


@pytest.mark.parametrize("op", ["split_rows", "swap_halves", "transpose"])
def test_targets_may_end_within_a_block(op: str, tmp_path: Path) -> None:
    shape = (12, 64)  # of three rows of a file that had no shape of its own
    stored = {"a": ("Q4_K", shape, gguf_files.random("Q4_K", (3, 256))[2])}
    wanted = dequantized(stored)["a"]
    expected = {
        "split_rows": [*np.split(wanted, 3)],
        "swap_halves": [np.roll(wanted, 6, axis=0)],
        "transpose": [wanted.T],
    }[op]
    tensor = open_header(gguf_files.write(tmp_path / "model.gguf", stored)).tensors["a"]
    targets = tuple(Target("", f"{n}", "F32", part.shape) for n, part in enumerate(expected))
    step = Step(split_rows() if op == "split_rows" else OPS[op], (tensor,), targets)
    out = lay_out(tmp_path / "out.safetensors", targets, {})
    places: dict[tuple[str, str], Tensor] = {("", key): t for key, t in out.tensors.items()}
    write([out], transfers([step], places), lambda _: None)
    found = raw(out.path)
    for n, part in enumerate(expected):
        assert found[f"{n}"][2] == np.ascontiguousarray(part).tobytes()


def test_without_a_dtype_it_is_bf16_and_a_note_says_so(tmp_path: Path) -> None:
    file, _, _ = files("flux", tmp_path, **Q8)
    report = ckptconv.convert(file, tmp_path / "out")
    assert "the transformer is quantized (Q8_0): it is written" in report.warnings[0]
    assert "in bf16; dtype decides otherwise" in report.warnings[0]
    assert {dtype for dtype, _, _ in weights(tmp_path / "out").values()} == {"BF16"}
    assert not report.plan.lossless
    asked = ckptconv.plan(file, dtype="fp16")
    assert asked.notes == ()
    assert {t.dtype for t in asked.tensors("transformer").values()} == {"F16"}


def test_a_file_of_plain_floats_stays_as_it_is(tmp_path: Path) -> None:
    file, same, _ = files("flux", tmp_path, dtypes=["F32"])
    ckptconv.convert(file, tmp_path / "ours")
    ckptconv.convert(same, tmp_path / "theirs")
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")


def test_commands_name_the_quantizations(tmp_path: Path) -> None:
    file, _, stored = files("flux", tmp_path, dtypes=["Q4_0", "Q8_0"])
    said = run("inspect", file).output
    assert all(word in said for word in ("Q4_0 x", "Q8_0 x", "general.architecture: flux"))
    assert "Q8_0 to BF16" in run("plan", file).output
    run("plan", file, "--json")
    assert '"sha256"' in (said := run("inspect", file, "--json", "--hash").output)
    assert "sshs_model_hash" not in said
    assert f'"tensors": {len(stored)}' in said


@pytest.mark.parametrize(("name", "said"), [("flux", "sd3"), ("sd1", "sdxl")])
def test_the_metadata_are_a_witness_and_no_judge(name: str, said: str, tmp_path: Path) -> None:
    architecture, build, _ = MODELS[name]
    stored = cycled(values(build()), ["Q8_0"])
    detection = ckptconv.inspect(gguf_files.write(tmp_path / "model.gguf", stored, said))
    assert detection.require()[0].name == architecture
    assert f"general.architecture = {said}, the keys are those of {name}" in str(detection.notes)


def test_verify_finds_a_changed_value(tmp_path: Path) -> None:
    file, _, _ = files("flux", tmp_path, **Q8)
    ckptconv.convert(file, tmp_path / "out", dtype="fp16")
    verified(file, tmp_path / "out")
    weight = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weight.read_bytes())
    content[-1] ^= 1
    weight.write_bytes(content)
    found = ckptconv.verify(file, tmp_path / "out")
    assert [check.kind for check in found.checks if check.problems] == ["data"]


def test_what_no_map_knows_is_kept_aside_dequantized(tmp_path: Path) -> None:
    _, build, arch = MODELS["flux"]
    stored = cycled(values(build()) | {"odd.weight": np.ones((2, 32))}, ["Q8_0"])
    file = gguf_files.write(tmp_path / "model.gguf", stored, arch)
    ckptconv.convert(file, tmp_path / "out")
    aside = raw(tmp_path / "out" / "ckptconv" / "dropped.safetensors")
    assert aside["odd.weight"][:2] == ("BF16", (2, 32))
    verified(file, tmp_path / "out")


def test_an_export_holds_the_values_and_says_that_it_is_not_quantized(tmp_path: Path) -> None:
    file, same, stored = files("flux", tmp_path)
    ckptconv.convert(file, tmp_path / "out", dtype="fp32")
    exported = ckptconv.export(tmp_path / "out", tmp_path / "back.safetensors")
    assert raw(exported.out) == raw(same)
    (note,) = [note for note in exported.notes if "quantized" in note]
    assert "Q8_0" in note
    assert not exported.as_source
    assert exported.tensors == len(stored)


def t5_stored(seed: int = 2) -> Stored:
    """Quantizes T5 under the names of llama.cpp, by the table of the gguf package."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    state = randomise(t5.T5(t5.TINY_T5), seed).state_dict()
    own = {names.get_name(key, (".weight",)): value.float().numpy() for key, value in state.items()}
    assert None not in own
    return cycled({str(key): value for key, value in own.items()}, ["Q5_0", "Q8_0"])


@pytest.mark.parametrize(
    ("name", "place"),
    [("flux", "text_encoder_2"), ("sd3", "text_encoder_3"), ("chroma", "text_encoder")],
)
def test_t5_comes_from_gguf(name: str, place: str, tmp_path: Path) -> None:
    file, _, _ = files(name, tmp_path, **Q8)
    stored = t5_stored()
    donor = gguf_files.write(tmp_path / "t5.gguf", stored, "t5encoder")
    choices: dict[str, Any] = {place: donor, "dtype": "fp32"}
    ckptconv.convert(file, tmp_path / "out", **choices)
    verified(file, tmp_path / "out", **choices)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    found = {
        names.get_name(key, (".weight",)): np.frombuffer(data, np.float32).reshape(shape)
        for key, (_, shape, data) in raw(tmp_path / "out" / place / "model.safetensors").items()
    }
    wanted = dequantized(stored)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


def test_each_component_that_is_quantized_becomes_bf16_and_no_other(tmp_path: Path) -> None:
    _, build, _ = MODELS["flux"]
    state = {
        key: value.half().contiguous() for key, value in randomise(build(), 1).state_dict().items()
    }
    file = tmp_path / "model.safetensors"
    save_file({key: value.numpy() for key, value in state.items()}, file)
    donor = gguf_files.write(tmp_path / "t5.gguf", t5_stored(), "t5encoder")
    made = ckptconv.plan(file, text_encoder_2=donor)
    assert {t.dtype for t in made.tensors("transformer").values()} == {"F16"}
    assert {t.dtype for t in made.tensors("text_encoder_2").values()} == {"BF16"}


def test_t5_alone_is_refused_as_what_it_is(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "t5.gguf", t5_stored(), "t5encoder")
    with pytest.raises(NotACheckpoint, match="a T5 text encoder"):
        ckptconv.inspect(path).require()


@pytest.mark.slow
def test_a_lora_is_added_to_the_dequantized_weights(tmp_path: Path) -> None:
    file, same, _ = files("sdxl", tmp_path)
    target = next(
        t for k, t in ckptconv.plan(file).tensors("unet").items() if k.endswith("attn1.to_q.weight")
    )
    key = "lora_unet_" + target.key.removesuffix(".weight").replace(".", "_")
    lora = {
        f"{key}.lora_down.weight": np.ones((1, target.shape[1]), np.float32),
        f"{key}.lora_up.weight": np.ones((target.shape[0], 1), np.float32),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    for path, out in ((file, "ours"), (same, "theirs")):
        adapter = tmp_path / "lora.safetensors"
        ckptconv.convert(path, tmp_path / out, dtype="fp32", lora=adapter, only="unet")
    assert weights(tmp_path / "ours") == weights(tmp_path / "theirs")


def test_the_architectures_that_have_t5_read_it_from_gguf() -> None:
    for architecture in bundled().architectures.values():
        for component in architecture.models:
            maps = [source.keymap for source in component.sources]
            assert ("shared/maps/t5" in maps) == ("shared/maps/t5-gguf" in maps), component


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    file, _, stored = files("flux", tmp_path, **Q8)
    ckptconv.convert(file, tmp_path / "out")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    rows = dequantized(stored)["img_in.weight"]
    assert torch.equal(found["x_embedder.weight"], torch.from_numpy(rows).bfloat16())
