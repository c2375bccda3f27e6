"""What names and shapes cannot tell: every witness, and which one decides."""

from __future__ import annotations

import math
import struct
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv import inspect
from ckptconv.detection.detect import option_fact
from ckptconv.detection.facts import FEW, Fact, find_fact, values_of
from ckptconv.dtypes import numpy_dtype
from ckptconv.errors import MapError, UsageError
from ckptconv.maps.architecture import UNET_ROOT, KeyMaps, bundled
from ckptconv.maps.evidence import Marker, Witness
from ckptconv.maps.schema import Fault, read
from ckptconv.options import Options
from ckptconv.reading.header import encode_header, read_header
from ckptconv.reading.tensor import Header
from ckptconv.sample import layout_of, write_sample
from tests.conftest import Sample, made
from tests.support.checkpoints import save
from tests.support.markers import floats

SPREAD = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
PREFIXED = f"model.diffusion_model.{SPREAD}"
LETTERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q"}
F8 = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]

Values = Mapping[str, Sequence[float]]


def encoded(values: Sequence[float], dtype: str) -> bytes:
    if dtype == "BF16":  # the upper half of a float32
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    if dtype in F8:
        return bytes(np.array(values, dtype=numpy_dtype(dtype)).tobytes())
    return struct.pack(f"<{len(values)}{LETTERS[dtype]}", *values)


def saved(
    path: Path, tensors: Values, metadata: Mapping[str, str] | None = None, dtype: str = "F32"
) -> Header:
    """Writes a real file of one-dimensional tensors and reads its header."""
    shapes = [(key, dtype, (len(values),)) for key, values in tensors.items()]
    beginning, _ = encode_header(shapes, metadata or {})
    path.write_bytes(beginning + b"".join(encoded(v, dtype) for v in tensors.values()))
    return read_header(path)


def spread_by(deviation: float, count: int = 320) -> list[float]:
    """Values with this population standard deviation, around one half."""
    return [0.5 + deviation, 0.5 - deviation] * (count // 2)


def ask(architecture: str, fact: str, header: Header, task: str = "text-to-image") -> Fact:
    return find_fact(fact, bundled().architectures[architecture].facts[fact], header, task)


# Every witness of a fact in the order of the key maps: what it finds (metadata, tensors, task), the
# value, the source and a part of the sentence. A rung is tried with all the rungs below it present,
# and where it can, it says the opposite of the next one.

Rung = tuple[dict[str, str], dict[str, Sequence[float]], str, Any, str, str]
PLAIN = "text-to-image"
ZERO_SNR: dict[str, Sequence[float]] = {"alphas_cumprod": [0.999, 0.5, 0.0]}

SHARED: list[Rung] = [
    ({}, {"edm_vpred.sigma_max": [120.0]}, PLAIN, "v_prediction", "marker", "edm_vpred.sigma_max"),
    ({}, {"edm_mean": [0.0] * 4}, PLAIN, "epsilon", "marker", "the file holds the key edm_mean"),
    ({"modelspec.prediction_type": "epsilon"}, {}, PLAIN, "epsilon", "metadata", "modelspec.predi"),
    ({"ss_zero_terminal_snr": "True"}, {}, PLAIN, "v_prediction", "metadata", "ss_zero_terminal"),
    ({}, {"v_pred": []}, PLAIN, "v_prediction", "marker", "the file holds the key v_pred"),
    ({}, {"ztsnr": []}, PLAIN, "v_prediction", "marker", "the file holds the key ztsnr"),
    ({}, ZERO_SNR, PLAIN, "v_prediction", "values", "alphas_cumprod ends with 0"),
    ({}, {}, PLAIN, "epsilon", "assumed", "nothing in the file says otherwise"),
]
SD2: list[Rung] = [
    ({"modelspec.prediction_type": "v"}, {}, PLAIN, "v_prediction", "metadata", "prediction_type"),
    (
        {"modelspec.architecture": "stable-diffusion-v2-768-v"},
        {},
        PLAIN,
        "v_prediction",
        "metadata",
        "modelspec.architecture = stable-diffusion-v2-768-v",
    ),
    ({"ss_base_model_version": "sd_v2"}, {}, PLAIN, "epsilon", "metadata", "ss_base_model_versio"),
    ({}, {"v_pred": []}, PLAIN, "v_prediction", "marker", "the file holds the key v_pred"),
    ({}, {"ztsnr": []}, PLAIN, "v_prediction", "marker", "the file holds the key ztsnr"),
    ({}, ZERO_SNR, PLAIN, "v_prediction", "values", "alphas_cumprod ends with 0"),
    ({}, {}, "inpainting", "epsilon", "task", "inpainting: the published models of this task"),
    ({}, {PREFIXED: spread_by(0.2)}, PLAIN, "v_prediction", "values", f"{PREFIXED} spread by 0.2,"),
    ({}, {SPREAD: spread_by(0.05)}, PLAIN, "epsilon", "values", f"{SPREAD} spread by 0.05, not ab"),
    ({}, {}, PLAIN, "v_prediction", "assumed", "Stable Diffusion 2.1 is the 768-v model"),
]
TERMINAL: list[Rung] = [
    ({}, {"edm_vpred.sigma_max": [120.0]}, PLAIN, False, "marker", "edm_vpred.sigma_max"),
    ({}, {"edm_mean": [0.0] * 4}, PLAIN, False, "marker", "the file holds the key edm_mean"),
    ({"ss_zero_terminal_snr": "False"}, {}, PLAIN, False, "metadata", "ss_zero_terminal_snr = F"),
    ({}, {"ztsnr": []}, PLAIN, True, "marker", "the file holds the key ztsnr"),
    ({}, {"alphas_cumprod": [0.9, 0.0047]}, PLAIN, False, "values", "ends with 0.0047"),
    ({}, {}, PLAIN, False, "assumed", "nothing in the file says otherwise"),
]
LADDERS = [
    pytest.param(architecture, fact, rungs[i:], id=f"{architecture}-{fact}-{i}")
    for architecture, fact, rungs in [
        ("sd1", "prediction_type", SHARED),
        ("sdxl", "prediction_type", SHARED),
        ("sdxl-refiner", "prediction_type", SHARED),
        ("sd2", "prediction_type", SD2),
        ("sd1", "zero_terminal_snr", TERMINAL),
        ("sd2", "zero_terminal_snr", TERMINAL),
        ("sdxl", "zero_terminal_snr", TERMINAL),
    ]
    for i in range(len(rungs))
]


@pytest.mark.parametrize(("architecture", "fact", "rungs"), LADDERS)
def test_the_first_witness_with_an_answer_decides(
    tmp_path: Path, architecture: str, fact: str, rungs: list[Rung]
) -> None:
    tensors = dict(ChainMap(*(rung[1] for rung in rungs)))
    metadata = dict(ChainMap(*(rung[0] for rung in rungs)))
    _, _, _, value, source, detail = rungs[0]
    tasks = [task for _, _, task, *_ in rungs if task != PLAIN]
    header = saved(tmp_path / "f.safetensors", tensors, metadata)
    found = ask(architecture, fact, header, tasks[0] if tasks else PLAIN)
    assert (found.name, found.value, found.source) == (fact, value, source)
    assert detail in found.detail


@pytest.mark.parametrize(
    ("architecture", "fact", "rungs"),
    [
        ("sd1", "prediction_type", SHARED),
        ("sd2", "prediction_type", SD2),
        ("sd1", "zero_terminal_snr", TERMINAL),
    ],
)
def test_the_ladders_above_have_a_rung_for_every_witness(
    architecture: str, fact: str, rungs: list[Rung]
) -> None:
    assert len(bundled().architectures[architecture].facts[fact]) == len(rungs)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("prediction_type", text, "epsilon") for text in ("epsilon", "eps")),
        *(("prediction_type", t, "v_prediction") for t in ("v", "v_prediction", "v-prediction")),
        ("predict_key", "epsilon", "epsilon"),
        ("predict_key", "v", "v_prediction"),
        ("ss_v_parameterization", "True", "v_prediction"),
        ("ss_v_parameterization", "False", "epsilon"),
    ],
)
def test_prediction_types_of_the_metadata(name: str, text: str, value: str) -> None:
    header = made({}, {name if name.startswith("ss_") else f"modelspec.{name}": text})
    for architecture in bundled().architectures.values():
        if architecture.root == UNET_ROOT and not architecture.single:
            assert ask(architecture.name, "prediction_type", header).value == value


def test_metadata_that_says_something_else_is_no_answer() -> None:
    found = ask("sd1", "prediction_type", made({}, {"modelspec.prediction_type": "sample"}))
    assert found.source == "assumed"


@pytest.mark.parametrize("task", ["inpainting", "depth-to-image", "instruct-pix2pix"])
def test_sd2_models_of_other_tasks_predict_the_noise(task: str) -> None:
    found = ask("sd2", "prediction_type", made({PREFIXED: (320,)}), task)
    assert (found.value, found.source) == ("epsilon", "task")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("deviation", "value"), [(0.05, "epsilon"), (0.15, "v_prediction")])
def test_sd2_base_and_768_v_are_told_apart_by_the_spread_of_one_bias(
    tmp_path: Path, dtype: str, deviation: float, value: str
) -> None:
    (tmp_path / "sd2").mkdir()
    (tmp_path / "sd2" / "sample.yaml").write_text(
        f"divides: {{}}\nspread: {{{PREFIXED}: {deviation}}}"
    )
    sd2 = bundled().architectures["sd2"]
    spread = replace(sd2, maps=KeyMaps([tmp_path, *bundled().folders]))
    path = tmp_path / "sd2.safetensors"
    tensors = layout_of(sd2, dtype=dtype)
    write_sample(spread, path, [t for t in tensors if t[0].startswith("model.diffusion_model.")])
    found = inspect(path).facts["prediction_type"]
    assert (found.value, found.source) == (value, "values")
    assert f"the values of {PREFIXED} spread by 0." in found.detail


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize(("deviation", "value"), [(0.0875, "epsilon"), (0.0938, "v_prediction")])
def test_the_spread_is_the_population_deviation_in_every_float_dtype(
    tmp_path: Path, dtype: str, deviation: float, value: str
) -> None:
    header = saved(tmp_path / "f.safetensors", {PREFIXED: spread_by(deviation)}, dtype=dtype)
    found = ask("sd2", "prediction_type", header)
    assert (found.value, found.source) == (value, "values")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([math.nan] * 320, "F32"),
        ([*spread_by(0.2, 318), 0.5, math.inf], "F16"),
        ([math.nan] * 320, "BF16"),
        ([1, -1] * 160, "I64"),
        (spread_by(0.2, FEW + 2), "F32"),
        ([], "F32"),
    ],
    ids=["nan", "infinity", "nan in bf16", "integers", "too many", "none"],
)
def test_values_that_say_nothing_are_no_answer(
    tmp_path: Path, values: list[float], dtype: str
) -> None:
    header = saved(tmp_path / "f.safetensors", {PREFIXED: values}, dtype=dtype)
    assert ask("sd2", "prediction_type", header).source == "assumed"


@pytest.mark.parametrize("dtype", F8)
def test_an_fp8_base_is_no_768_v(tmp_path: Path, dtype: str) -> None:
    for deviation, value in ((0.0625, "epsilon"), (0.125, "v_prediction")):
        header = saved(tmp_path / "f.safetensors", {PREFIXED: spread_by(deviation)}, dtype=dtype)
        found = ask("sd2", "prediction_type", header)
        assert (found.value, found.source) == (value, "values")


@pytest.mark.parametrize("dtype", F8)
def test_every_byte_of_an_fp8_tensor_is_read_as_numpy_reads_it(tmp_path: Path, dtype: str) -> None:
    for byte in range(256):
        (want,) = np.array([byte], dtype=np.uint8).view(numpy_dtype(dtype)).astype(float)
        beginning, _ = encode_header([("a", dtype, (1,))], {})
        (tmp_path / "f.safetensors").write_bytes(beginning + bytes([byte]))
        assert values_of(read_header(tmp_path / "f.safetensors"), "a") == (
            [want] if math.isfinite(want) else []
        )


def test_large_values_do_not_overflow(tmp_path: Path) -> None:
    header = saved(tmp_path / "f.safetensors", {PREFIXED: [1e308, -1e308]}, dtype="F64")
    assert ask("sd2", "prediction_type", header).value == "v_prediction"


def test_values_keep_every_bit(tmp_path: Path) -> None:
    means = [-1.6574, 1.886, -1.383, 2.5155]
    header = read_header(
        save(
            {
                "half": floats(*means, letter="e"),
                "single": floats(0.1, 1 / 3, 3.4028234663852886e38, 1e-45, -0.0, 122.878044),
            },
            tmp_path / "f.safetensors",
        )
    )
    assert values_of(header, "half") == [-1.6572265625, 1.8857421875, -1.3828125, 2.515625]
    assert values_of(header, "single")[:2] == [0.1, 0.33333334]
    again = struct.pack("<6f", *values_of(header, "single"))
    assert again == floats(0.1, 1 / 3, 3.4028234663852886e38, 1e-45, -0.0, 122.878044)[2]
    assert values_of(header, "missing") == []


def test_a_default_answers_always_and_needs_a_reason() -> None:
    faults: list[Fault] = []
    data = [{"has": "a", "value": 1}, {"value": 2, "because": "so"}]
    witnesses = read(tuple[Witness, ...], data, (), faults)
    assert find_fact("f", witnesses, made({}), "text-to-image") == Fact("f", 2, "structure", "so")
    assert not faults
    read(tuple[Witness, ...], [{"value": 2}], (), faults)
    assert list(map(str, faults)) == ["[0]: 'because' is missing"]


@pytest.mark.parametrize(
    ("last", "value"), [(0.0, True), (9e-5, True), (1.1e-4, False), (0.0046, False)]
)
def test_the_end_of_alphas_cumprod_tells_a_zero_terminal_snr(
    tmp_path: Path, last: float, value: bool
) -> None:
    header = saved(tmp_path / "f.safetensors", {"alphas_cumprod": [0.999, 0.3, last]})
    found = ask("sd1", "zero_terminal_snr", header)
    assert (found.value, found.source) == (value, "values")
    prediction = ask("sd1", "prediction_type", header)
    assert prediction.source == ("values" if value else "assumed")


def test_a_sample_keeps_the_published_noise_schedule(sample: Sample) -> None:
    found = inspect(sample("sd1")).facts["zero_terminal_snr"]
    assert (found.value, found.source) == (False, "values")
    assert found.detail == "alphas_cumprod ends with 0.00466"


def test_a_header_without_its_file_has_no_values() -> None:
    assert ask("sd2", "prediction_type", made({PREFIXED: (320,)})).source == "assumed"


@pytest.mark.parametrize(
    ("name", "value"),
    [("prediction_type", "v_prediction"), ("prediction_type", "epsilon"), ("zero_terminal_snr", 1)],
)
def test_an_option_makes_a_fact(name: str, value: Any) -> None:
    assert option_fact(name, value) == Fact(name, value, "option", "set by an option")


def test_an_option_with_another_value_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Options.of({"prediction_type": "v"})
    assert str(caught.value) == (
        "prediction_type cannot be 'v': it is one of epsilon, v_prediction"
    )


@pytest.mark.parametrize(
    ("witness", "said"),
    [
        ({"guess": 1}, "[0]: unknown word 'guess', expected one of metadata, has, task, last, "),
        ({"metdata": "m"}, "[0]: unknown word 'metdata'; did you mean 'metadata'?"),
        ({"has": "a", "last": "b"}, "[0]: has 'has' and 'last', which exclude each other"),
        ({"because": "so"}, "[0]: needs one of the words metadata, has, task, last, spread, size"),
        ("assume", "[0]: found 'assume', needed "),
        ({"metadata": "m"}, "[0]: 'values' is missing"),
        ({"has": "a"}, "[0]: 'value' is missing"),
        ({"assume": 1}, "[0]: 'because' is missing"),
        ({"task": 3, "value": 1}, "[0].task[0]: found 3, needed a text: write it in quotes"),
        ({"has": ["a"], "value": 1}, "[0].has: found ['a'], needed a text"),
        ({"last": "a"}, "[0]: 'below' is missing"),
        ({"spread": "a", "above": "x", "value": 1}, "[0].above: found 'x', needed a number"),
        ({"size": "a", "values": {"768": 1}}, "found '768', needed a whole number"),
    ],
)
def test_a_malformed_witness_is_refused(witness: object, said: str) -> None:
    faults: list[Fault] = []
    read(tuple[Witness, ...], [witness], (), faults)
    assert any(said in str(fault) for fault in faults), faults


@pytest.mark.parametrize("witnesses", [(), (Marker("b", 1),)])
def test_a_fact_without_an_answer_is_refused(witnesses: tuple[Witness, ...]) -> None:
    with pytest.raises(MapError) as caught:
        find_fact("f", witnesses, made({}), "text-to-image")
    assert str(caught.value) == (
        "fact 'f': no witness has an answer\nhint: end the list with 'assume'"
    )
