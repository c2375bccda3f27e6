"""`verify` judges dtypes, configurations and tokenizers by what they mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.configs.config import configs
from ckptconv.folder.read import ComponentFolder
from ckptconv.reading.tensor import Tensor
from ckptconv.reports.junit import junit
from ckptconv.verification.checks.config import check_config, same
from ckptconv.verification.result import Problem
from tests.conftest import Copy, Folder, Sample
from tests.mutations import replace
from tests.support.altering import alter, kinds, resave
from tests.support.checkpoints import raw, save

LAYER_3 = "text_model.encoder.layers.3.mlp.fc2.bias"


# Dtypes.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_cast_weights_must_be_the_exactly_rounded_ones(
    dtype: str, sample: Sample, tmp_path: Path
) -> None:
    source, folder = sample("sd1"), tmp_path / "out"
    ckptconv.convert(source, folder, dtype=dtype)
    assert ckptconv.verify(source, folder).problems == ()
    assert ckptconv.verify(source, folder, dtype=dtype).problems == ()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    key = "decoder.conv_in.weight"
    kind, shape, data = raw(path)[key]
    bits = np.frombuffer(data, {2: "<u2", 4: "<u4"}[len(data) // int(np.prod(shape))]).copy()
    bits[7] ^= 1  # the last place
    resave(path, lambda name: name, {key: (kind, shape, bits.tobytes())})
    found = kinds(ckptconv.verify(source, folder))
    assert list(found) == [("vae", "data")]
    expected = f"1 of {bits.size:,} values differ, the first at [0, 0, 2, 1]"
    assert found["vae", "data"] == (Problem(key, expected),)


def test_a_dtype_that_was_asked_for_is_the_only_right_one(sample: Sample, folder: Folder) -> None:
    found = ckptconv.verify(sample("sd1"), folder("sd1"), dtype="fp16")
    assert kinds(found)["vae", "data"][0].what == "has dtype F32, expected F16"


@pytest.mark.parametrize("entry", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(
    ("said", "ours", "others"),
    [
        (None, (0, 0), (0, 0)),
        ("float32", (0, 0), (0, 0)),
        ("float16", (0, 0), (0, 0)),  # as stored
        ("bfloat16", (1, 0), (0, 1)),
        ("decimal", (1, 0), (1, 0)),
        (["float16"], (1, 0), (1, 0)),
    ],
)
def test_the_dtype_in_which_transformers_loads_the_weights(
    entry: str, said: Any, ours: tuple[int, int], others: tuple[int, int], small: Path
) -> None:
    config = configs(ckptconv.plan(small))["text_encoder"]
    tensors = {"x": Tensor(Path("x"), "x", "F16", (1,), 0, 0)}
    part = ComponentFolder(Path("x"), {**config.values, entry: said}, tensors)
    for is_ours, expected in ((True, ours), (False, others)):
        check = check_config(config, part, ours=is_ours)
        assert (len(check.problems), len(check.notes)) == expected


@pytest.mark.slow
def test_nan_stays_nan_in_a_cast_and_is_found_on_demand(sample: Sample, tmp_path: Path) -> None:
    tensors = raw(sample("sd1"))
    key = "first_stage_model.decoder.conv_in.bias"
    kind, shape, data = tensors[key]
    values = np.frombuffer(data, "<f4").copy()
    values.view("<u4")[3] = 0x7FC12345
    values[5] = np.inf
    tensors[key] = (kind, shape, values.tobytes())
    source = save(tensors, tmp_path / "nan.safetensors")
    for dtype in (None, "bf16"):
        folder = tmp_path / f"out-{dtype}"
        ckptconv.convert(source, folder, dtype=dtype)
        assert ckptconv.verify(source, folder).problems == ()
        found = ckptconv.verify(source, folder, finite=True)
        what = f"2 of {values.size:,} values are NaN or infinite"
        assert kinds(found) == {("vae", "finite"): (Problem("decoder.conv_in.bias", what),)}


# Configurations that make no sense.


SENSELESS: list[tuple[str, dict[str, Any], str, str]] = [
    ("unet/config.json", {"_class_name": "os.system"}, "_class_name", "UNet2DConditionModel"),
    ("unet/config.json", {"block_out_channels": "many"}, "config.json", "cannot be built"),
    ("unet/config.json", {"norm_num_groups": 0}, "config.json", "cannot be built"),
    ("unet/config.json", {"act_fn": "nothing"}, "config.json", "cannot be built"),
    ("unet/config.json", {"layers_per_block": 10**9}, "config.json", "out of all reason"),
    ("vae/config.json", {"block_out_channels": [10**12] * 4}, "config.json", "out of all"),
    ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv", "expected True"),
    ("text_encoder/config.json", {"num_hidden_layers": 4}, LAYER_3, "the class expects it"),
    ("text_encoder/config.json", {"hidden_act": "no_act"}, "config.json", "cannot be built"),
    ("text_encoder/config.json", {"torch_dtype": "float16"}, "torch_dtype", "float32"),
    ("scheduler/scheduler_config.json", {"_class_name": "Nothing"}, "_class_name", "no class"),
    ("model_index.json", {"vae": ["evil_module", "Evil"]}, "vae", "expected ['diffusers', "),
    ("model_index.json", {"requires_safety_checker": True}, "requires_safety_checker", "False"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10}, "model_max_length", "77"),
    ("tokenizer/special_tokens_map.json", {"pad_token": "!"}, "special_tokens_map.json", "'!'"),
]


@pytest.mark.parametrize("turn", range(5))
def test_configurations_that_make_no_sense_are_problems_and_no_traceback(
    turn: int, sample: Sample, copy: Copy
) -> None:
    """Each turn takes the next senseless values of every file."""
    folder = copy("sd1")
    taken = []
    for file in dict.fromkeys(case[0] for case in SENSELESS):
        of_file = [case for case in SENSELESS if case[0] == file]
        taken += of_file[turn : turn + 1]
    for file, values, _, _ in taken:
        alter(folder / file, **values)
    problems = [p for c in ckptconv.verify(sample("sd1"), folder).checks for p in c.problems]
    for _, _, where, what in taken:
        assert any(p.where == where and what in p.what for p in problems), (where, problems[:9])


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"a": ', b"[" * 10_000])
def test_files_that_are_no_json_are_problems(content: bytes, sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    for name in ("vae/config.json", "tokenizer/vocab.json", "model_index.json"):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    assert set(found) >= {("vae", "config"), ("tokenizer", "tokenizer"), ("model", "index")}


def test_nothing_of_the_folder_is_run(sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    for name in ("unet", "tokenizer", "scheduler"):
        for stem in ("modeling", name, "pipeline"):
            (folder / name / f"{stem}.py").write_text("raise SystemExit('run')")
    auto = {"auto_map": {"AutoTokenizer": "tokenizer.T", "AutoModel": "modeling.M"}}
    alter(folder / "unet" / "config.json", **auto)
    alter(folder / "tokenizer" / "tokenizer_config.json", **auto)
    alter(folder / "model_index.json", _class_name="pipeline", vae=["pipeline", "P"])
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    assert [p.where for p in found["model", "index"]] == ["_class_name", "vae"]


# Tokenizers.


@pytest.mark.slow
def test_the_single_file_of_a_tokenizer_is_checked_by_what_it_does(
    sample: Sample, copy: Copy
) -> None:
    from transformers import CLIPTokenizer

    folder = copy("sd1")
    tokenizer = folder / "tokenizer"
    CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "saved")
    shutil.rmtree(tokenizer)
    (folder / "saved").rename(tokenizer)
    assert (tokenizer / "tokenizer.json").exists()
    assert not (tokenizer / "vocab.json").exists()
    assert ckptconv.verify(sample("sd1"), folder).problems == ()

    data = json.loads((tokenizer / "tokenizer.json").read_text())
    cased = {**data, "normalizer": None}
    replace(tokenizer / "tokenizer.json", json.dumps(cased))
    ((problem,),) = kinds(ckptconv.verify(sample("sd1"), folder)).values()
    assert problem.where == "tokenizer.json"
    assert problem.what.startswith("turns ")

    data["model"]["merges"].pop(100)
    replace(tokenizer / "tokenizer.json", json.dumps(data))
    ((first, second, *_),) = kinds(ckptconv.verify(sample("sd1"), folder)).values()
    assert first.what == "holds 48,893 merges, expected 48,894"
    assert second.what.startswith("merge 101 is ")


def test_a_tokenizer_without_vocabulary_is_named(sample: Sample, copy: Copy) -> None:
    folder = copy("sd1")
    (folder / "tokenizer" / "vocab.json").unlink()
    found = kinds(ckptconv.verify(sample("sd1"), folder))
    what = "is missing, and there is no tokenizer.json"
    assert found == {("tokenizer", "tokenizer"): (Problem("vocab.json", what),)}


def test_the_special_tokens_file_overrules_in_a_published_folder(
    sample: Sample, copy: Copy
) -> None:
    folder = copy("sd2")
    alter(folder / "tokenizer" / "tokenizer_config.json", pad_token="<|endoftext|>")  # noqa: S106
    found = kinds(ckptconv.verify(sample("sd2"), folder))
    assert [p.where for p in found["tokenizer", "tokenizer"]] == ["pad_token"]
    shutil.rmtree(folder / "ckptconv")  # as if it were the published one
    assert ckptconv.verify(sample("sd2"), folder).passed


@pytest.mark.parametrize(
    "cases",
    [
        [
            ("unet/config.json", {"_class_name": ["a", "b"], "block_out_channels": {"a": 1}}),
            ("scheduler/scheduler_config.json", {"_class_name": {}, "trained_betas": {"x": []}}),
            ("tokenizer/tokenizer_config.json", {"pad_token": [], "added_tokens_decoder": [3]}),
            ("model_index.json", {"_class_name": [], "vae": {"a": 1}, "more": [1, 2, 3]}),
            ("ckptconv/source.json", {"dropped": [1], "facts": {"task": []}, "donors": 3}),
        ],
        [
            ("unet/config.json", {"attention_head_dim": [[1], "x", {}], "sample_size": [[[]]]}),
            ("text_encoder/config.json", {"architectures": [{}], "hidden_size": None}),
            ("tokenizer/special_tokens_map.json", {"pad_token": {"content": {}}}),
            ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"x": [], "3": {}}}),
            ("tokenizer/added_tokens.json", {"new": [1]}),
            ("tokenizer/tokenizer.json", {"model": {"vocab": {"a": []}, "merges": [[1, {}], 3]}}),
            ("ckptconv/source.json", {"assumed": {"": []}, "facts": [], "architecture": {}}),
        ],
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_json_of_any_form_is_a_problem_or_ignored_and_never_a_traceback(
    cases: list[tuple[str, dict[str, Any]]], alone: bool, sample: Sample, copy: Copy
) -> None:
    folder = copy("sd1")
    for file, values in cases:
        if not (folder / file).exists():
            (folder / file).write_text("{}")
        alter(folder / file, **values)
    found = ckptconv.verify(None if alone else sample("sd1"), folder)
    said = {check.component for check in found.checks if check.problems}
    assert said >= {Path(file).parent.name or "model" for file, _ in cases} - {"ckptconv"}
    json.dumps(found.as_data())
    junit(found)


@pytest.mark.parametrize(
    ("have", "want", "equal"),
    [
        (8, [8, 8], True), ([8, 8], 8, True), ([8, 9], 8, False), ([], 8, False), (1, 1.0, True),
        (True, 1, False), (None, False, True), (None, 0, False), (None, None, True),
        (None, [1], False), ([1, 2], [1, 2, 3], False), ((1, 2), [1, 2], True), ("a", "b", False),
    ],
)  # fmt: skip
def test_values_that_mean_the_same(have: Any, want: Any, equal: bool) -> None:
    assert same(have, want) is equal
