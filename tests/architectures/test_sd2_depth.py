"""SD2's depth-to-image: the depth estimator in the file, its image processor, and who lacks one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from safetensors.torch import save_file

import ckptconv
from ckptconv import load_pipeline
from ckptconv.configs.allowed import Unbuildable
from ckptconv.configs.config import configs, model_index
from ckptconv.detection.detect import detect
from ckptconv.errors import Incomplete
from ckptconv.folder.read import ComponentFolder
from ckptconv.maps.architecture import bundled
from ckptconv.planning.plan import build_plan
from ckptconv.verification.checks.config import check_config
from ckptconv.verification.classes import expected
from tests.conftest import made, shapes
from tests.support.properties import Convert, PipelineProperties
from tests.support.reference import dpt, unet
from tests.support.reference.dpt import Dpt
from tests.support.reference.files import TINY_FILES, unet_alone
from tests.support.relatives import Relative

if TYPE_CHECKING:
    from ckptconv.planning.plan import Plan

AT = "depth_model.model."
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"

# As published beside SD2's depth-to-image weights, without what no module or processor reads.
BACKBONE: dict[str, Any] = {
    "depths": [3, 4, 9],
    "drop_path_rate": 0.0,
    "embedding_dynamic_padding": True,
    "embedding_size": 64,
    "global_padding": "SAME",
    "hidden_act": "relu",
    "hidden_sizes": [256, 512, 1024, 2048],
    "layer_type": "bottleneck",
    "model_type": "bit",
    "num_channels": 3,
    "num_groups": 32,
    "out_features": ["stage1", "stage2", "stage3"],
    "output_stride": 32,
    "width_factor": 1,
}
ESTIMATOR: dict[str, Any] = {
    "backbone_config": BACKBONE,
    "backbone_featmap_shape": [1, 1024, 24, 24],
    "backbone_out_indices": [2, 5, 8, 11],
    "fusion_hidden_size": 256,
    "head_in_index": -1,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "image_size": 384,
    "intermediate_size": 3072,
    "is_hybrid": True,
    "layer_norm_eps": 1e-12,
    "neck_hidden_sizes": [256, 512, 768, 768],
    "neck_ignore_stages": [0, 1],
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "readout_type": "project",
    "reassemble_factors": [1, 1, 1, 0.5],
    "use_batch_norm_in_fusion_residual": False,
}
PROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ensure_multiple_of": 1,
    "feature_extractor_type": "DPTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "DPTFeatureExtractor",
    "image_std": [0.5, 0.5, 0.5],
    "keep_aspect_ratio": False,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 384, "width": 384},
}


# The depths are the published ones, which no shape would tell.
DEPTH = {AT: partial(Dpt, dpt.TINY_DPT)}
NARROW = Relative(
    "SD2 depth-to-image",
    DEPTH | unet_alone(replace(unet.TINY_SD2_DEPTH, channel_mult=(1, 2, 1, 1))),
    variant="depth estimator and a narrow UNet",
)


class TestProperties(PipelineProperties):
    relatives = (Relative("SD2 depth-to-image", TINY_FILES["sd2-depth"], slow=True), NARROW)


def published() -> Plan:
    """The plan of the published file, but for its dtype."""
    layout = bundled().architectures["sd2"].layout("depth-to-image")
    return build_plan(detect(made(shapes(layout) | {CONV_IN: (320, 5, 3, 3)})))


def test_the_configurations_are_the_published_ones() -> None:
    plan = published()
    built = configs(plan)
    index = model_index(plan, built)
    assert index["depth_estimator"] == ["transformers", "DPTForDepthEstimation"]
    assert index["feature_extractor"] == ["transformers", "DPTImageProcessor"]
    assert "safety_checker" not in index
    # As the class understands them: what one says and the other leaves to the defaults is equal.
    read = transformers.DPTConfig
    ours = read(**{**built["depth_estimator"].values, "layer_norm_eps": 1e-12}).to_dict()
    theirs = read(**ESTIMATOR).to_dict()
    loose = {"architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in ours.items() if k not in loose} == {
        k: v for k, v in theirs.items() if k not in loose
    }
    written = dict(built["feature_extractor"].values)
    assert written.pop("image_processor_type") == "DPTImageProcessor"
    assert written == {k: v for k, v in PROCESSOR.items() if not k.endswith("_type")}


def test_other_tasks_of_sd2_know_no_depth_estimator() -> None:
    plan = build_plan(detect(bundled().architectures["sd2"].layout()))
    assert plan.absent == ()
    assert "depth_estimator" not in model_index(plan, configs(plan))


@pytest.mark.parametrize(
    ("component", "values", "problem"),
    [
        ("feature_extractor", {**PROCESSOR, "do_pad": False}, ""),
        ("feature_extractor", {"image_mean": [0.4, 0.5, 0.5]}, "is [0.4, 0.5, 0.5], expected [0.5"),
        ("feature_extractor", {"do_reduce_labels": True}, "is True, expected None"),
        ("feature_extractor", {"size": {"height": 224, "width": 224}}, "is {'height': 224, 'width"),
        (
            "feature_extractor",
            {"image_processor_type": "CLIPImageProcessor"},
            "expected DPTImagePr",
        ),
        ("depth_estimator", ESTIMATOR, ""),
        (
            "depth_estimator",
            {"backbone_config": {**BACKBONE, "layer_type": "preactivation"}},
            "is {",
        ),
        ("depth_estimator", {"backbone_out_indices": [2, 5, 7, 11]}, "is [2, 5, 7, 11], expected"),
    ],
)
def test_a_folder_is_held_against_the_published_one(
    component: str, values: dict[str, Any], problem: str
) -> None:
    config = configs(published())[component]
    part = ComponentFolder(Path(component), {**config.values, **values})
    found = check_config(config, part, ours=False).problems
    assert [problem in p.what for p in found] == ([True] if problem else [])


def test_a_model_inside_that_would_come_from_a_hub_is_not_built() -> None:
    inside = {
        "model_type": "timm_backbone",
        "backbone": "resnet50",
        "use_pretrained_backbone": True,
    }
    with pytest.raises(Unbuildable, match="is one of 'timm_backbone', expected 'bit'"):
        expected("transformers", "DPTForDepthEstimation", {**ESTIMATOR, "backbone_config": inside})
    inside = {**BACKBONE, "depths": [3, 4, 1 << 19]}
    with pytest.raises(Unbuildable, match=r"depths of backbone_config of .* is out of all reason"):
        expected("transformers", "DPTForDepthEstimation", {**ESTIMATOR, "backbone_config": inside})


@pytest.fixture(scope="module")
def without(converted: Convert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file without its depth estimator."""
    path = tmp_path_factory.mktemp("without") / "without.safetensors"
    tensors = converted(NARROW).tensors
    save_file({k: v for k, v in tensors.items() if not k.startswith(AT)}, path)
    return path


def test_a_missing_depth_estimator_is_named_with_what_to_do(without: Path, tmp_path: Path) -> None:
    report = ckptconv.convert(without, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["depth_estimator"] == [None, None]
    assert (
        "depth_estimator is not in the file, so model_index.json says null: "
        "supply it with depth_estimator=FILE"
    ) in report.warnings
    with pytest.raises(Incomplete, match=r"has no .*depth_estimator, which its pipeline") as caught:
        load_pipeline(without, device="cpu")
    assert "depth_estimator=FILE" in caught.value.hint


def test_a_depth_estimator_of_any_layout_is_taken(
    converted: Convert, without: Path, tmp_path: Path
) -> None:
    ours = converted(NARROW).folder / "depth_estimator"
    midas = tmp_path / "dpt_hybrid.safetensors"  # as MiDaS has it
    held = converted(NARROW).tensors
    save_file({k[len(AT) :]: v for k, v in held.items() if k.startswith(AT)}, midas)
    for donor in (midas, ours / "model.safetensors", ours):
        out = tmp_path / "out"
        ckptconv.convert(without, out, depth_estimator=donor, overwrite=True)
        for name in ("config.json", "model.safetensors"):
            assert (out / "depth_estimator" / name).read_bytes() == (ours / name).read_bytes()
