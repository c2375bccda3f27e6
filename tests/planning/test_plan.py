"""A plan accounts for every key of a file, and says what is wrong with one that is not whole."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from ckptconv.detection.detect import detect
from ckptconv.errors import Incomplete, NotACheckpoint
from ckptconv.options import Options
from ckptconv.planning.components import Donor
from ckptconv.planning.plan import Plan, build_plan
from ckptconv.planning.step import ASIDE, Step
from tests.conftest import PUBLISHED, made, published, shapes

if TYPE_CHECKING:
    from ckptconv.reading.tensor import Header

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPENCLIP = "cond_stage_model.model."
SD1, SD1_EMA, SD2 = "sd15-emaonly-fp32", "sd15-full-ema-fp32", "sd21-768-fp32"
SDXL, REFINER = "sdxl-base-fp16", "sdxl-refiner-fp16"

# Tensors that diffusers and transformers need: UNets and VAE as published; 16 a layer and 4 around
# them in a CLIP tower, plus the projection.
COUNTS = {
    SD1: {"unet": 686, "vae": 248, "text_encoder": 16 * 12 + 4},
    SD1_EMA: {"unet": 686, "vae": 248, "text_encoder": 16 * 12 + 4},
    "sd15-inpainting-fp16": {"unet": 686, "vae": 248, "text_encoder": 16 * 12 + 4},
    SD2: {"unet": 686, "vae": 248, "text_encoder": 16 * 23 + 4},
    SDXL: {"unet": 1680, "vae": 248, "text_encoder": 16 * 12 + 4, "text_encoder_2": 16 * 32 + 5},
    REFINER: {"unet": 1220, "vae": 248, "text_encoder_2": 16 * 32 + 5},
}

Shapes = dict[str, tuple[int, ...]]


def plan_of(
    tensors: Header | Shapes, *, donors: Mapping[str, Donor] | None = None, **choices: Any
) -> Plan:
    detection = detect(made(tensors) if isinstance(tensors, dict) else tensors)
    return build_plan(detection, Options.of(choices), donors=donors)


def incomplete(tensors: Shapes, **choices: Any) -> str:
    """The message with which a plan is refused as not complete."""
    with pytest.raises(Incomplete) as caught:
        plan_of(tensors, **choices).require_complete()
    assert caught.value.hint
    return str(caught.value)


def steps_of(plan: Plan) -> dict[str, Step]:
    return {source.name: step for step in plan.steps for source in step.sources}


def without(name: str, *starts: str) -> Shapes:
    return {k: s for k, s in shapes(published(name)).items() if not k.startswith(starts)}


def renamed(name: str, old: str, new: str) -> Shapes:
    return {
        new + k.removeprefix(old) if k.startswith(old) else k: s
        for k, s in shapes(published(name)).items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_published_file_is_accounted_for_once(name: str) -> None:
    header = published(name)
    plan = plan_of(header)
    plan.require_complete()
    keys = Counter(t.name for step in plan.steps for t in step.sources)
    assert keys + Counter(plan.unclaimed) == Counter(list(header.tensors))
    assert plan.unclaimed == plan.problems == plan.absent == ()
    targets = Counter((slot.component, slot.key) for step in plan.steps for slot in step.targets)
    assert max(targets.values()) == 1
    assert {place for place, _ in targets} - {ASIDE} == set(COUNTS[name])
    assert {c: len(plan.tensors(c)) for c in COUNTS[name]} == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_keep_dtypes_and_every_element(name: str) -> None:
    header = published(name)
    for step in plan_of(header).steps:
        (source,) = step.sources
        assert source == header.tensors[source.name]
        assert source.file == header.path
        assert {target.dtype for target in step.targets} <= {source.dtype}
        assert not step.casts
        if step.targets:
            assert sum(math.prod(target.shape) for target in step.targets) == source.numel
        assert bool(step.reason) == (step.op.name == "drop")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_inverse_gives_back_the_file(name: str) -> None:
    header = published(name)
    plan = plan_of(header)
    back = {
        step.sources[0].name: step.op.backward([target.shape for target in step.targets], None)
        for step in plan.steps
        if step.targets
    }
    ema = {key for key in header.tensors if key.startswith("model_ema.")}
    assert back == {k: t.shape for k, t in header.tensors.items() if k not in ema}
    assert plan.lossless == (not ema)


def test_ops_of_a_plan() -> None:
    sdxl = steps_of(plan_of(published(SDXL)))
    block = "conditioner.embedders.1.model.transformer.resblocks.7."
    split = sdxl[f"{block}attn.in_proj_weight"]
    assert split.op.name == "split_rows"
    assert [(t.key, t.shape) for t in split.targets] == [
        (f"text_model.encoder.layers.7.self_attn.{part}_proj.weight", (1280, 1280))
        for part in "qkv"
    ]
    projection = sdxl["conditioner.embedders.1.model.text_projection"]
    assert projection.op.name == "transpose"
    assert [t.key for t in projection.targets] == ["text_projection.weight"]
    squeezed = sdxl[f"{VAE}decoder.mid.attn_1.q.weight"]
    assert squeezed.op.name == "squeeze"
    assert [t.shape for t in squeezed.targets] == [(512, 512)]
    ids = sdxl["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    assert (ids.op.name, ids.reason, [t.component for t in ids.targets]) == (
        "drop",
        "derived",
        [ASIDE],
    )
    assert sdxl["denoiser.sigmas"].reason == "derived"


def test_sd2_conditions_on_the_layer_before_the_last() -> None:
    plan = plan_of(published(SD2))
    steps = steps_of(plan)
    for key, step in steps.items():
        if key.startswith(f"{OPENCLIP}transformer.resblocks.23.") or key in (
            f"{OPENCLIP}text_projection",
            f"{OPENCLIP}logit_scale",
        ):
            assert (step.op.name, step.reason) == ("drop", "unused")
            assert [t.component for t in step.targets] == [ASIDE]
    layers = {k.split(".")[3] for k in plan.tensors("text_encoder") if ".layers." in k}
    assert sorted(map(int, layers)) == list(range(23))


def test_an_sd2_file_of_23_layers_keeps_them_all() -> None:
    last = f"{OPENCLIP}transformer.resblocks.23."
    plan = plan_of(without(SD2, last, f"{OPENCLIP}text_projection", f"{OPENCLIP}logit_scale"))
    plan.require_complete()
    assert set(plan.tensors("text_encoder")) == set(plan_of(published(SD2)).tensors("text_encoder"))


@pytest.mark.parametrize(
    ("name", "prefix"), [(SD1, CLIP), (SDXL, "conditioner.embedders.0.transformer.")]
)
def test_clip_with_and_without_its_text_model_segment_gives_the_same(
    name: str, prefix: str
) -> None:
    plan = plan_of(renamed(name, f"{prefix}text_model.", prefix))
    plan.require_complete()
    assert set(plan.tensors("text_encoder")) == set(
        plan_of(published(name)).tensors("text_encoder")
    )
    assert steps_of(plan)[f"{prefix}embeddings.position_ids"].reason == "derived"


@pytest.mark.parametrize("name", [SD1, SDXL])
def test_attention_of_the_vae_may_be_stored_with_two_axes(name: str) -> None:
    tensors = shapes(published(name))
    attention = [k for k, s in tensors.items() if ".attn_1." in k and len(s) == 4]
    assert len(attention) == 8
    plan = plan_of(tensors | {key: tensors[key][:2] for key in attention})
    plan.require_complete()
    published_plan = plan_of(published(name))
    for key in attention:
        step = steps_of(plan)[key]
        as_published = steps_of(published_plan)[key]
        assert step.targets[0].shape == as_published.targets[0].shape == (512, 512)
        assert step.op.backward([(512, 512)], step.sources[0].shape) == (512, 512)
        assert as_published.op.backward([(512, 512)], None) == (512, 512, 1, 1)


def lcm() -> Shapes:
    return shapes(published(SD1)) | {f"{UNET}time_embed.cond_proj.weight": (320, 256)}


def test_a_distilled_unet_may_have_a_guidance_embedding() -> None:
    plan = plan_of(lcm())
    plan.require_complete()
    assert plan.tensors("unet")["time_embedding.cond_proj.weight"].shape == (320, 256)


LAYER = f"{CLIP}text_model.encoder.layers.5."
IN_PROJ = f"{OPENCLIP}transformer.resblocks.3.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("name", "changes", "problems"),
    [
        (
            SD1,
            {f"{UNET}out.2.bias": None, f"{UNET}out.0.bias": None},
            ["unet: conv_out.bias is missing", "unet: conv_norm_out.bias is missing"],
        ),
        (
            SD1,
            {f"{UNET}output_blocks.3.1.transformer_blocks.0.norm2.weight": None},
            ["unet: up_blocks.1.attentions.0.transformer_blocks.0.norm2.weight is missing"],
        ),
        (
            SD1,
            {f"{UNET}out.2.weight": (4, 320)},
            [f"{UNET}out.2.weight: has shape [4, 320], needed 4 axes"],
        ),
        (
            SD1,
            {f"{VAE}encoder.mid.attn_1.q.weight": (512, 512, 3, 3)},
            [f"{VAE}encoder.mid.attn_1.q.weight: squeeze needs shape [out, in, 1, 1], [out, in"],
        ),
        (
            SD2,
            {IN_PROJ: (3071, 1024)},
            [f"{IN_PROJ}: split_rows needs rows that divide by 3, found [3071, 1024]"],
        ),
        (
            SDXL,
            {"conditioner.embedders.1.model.text_projection": (1280,)},
            ["conditioner.embedders.1.model.text_projection: transpose needs a matrix, found [128"],
        ),
    ],
)
def test_a_file_that_is_not_whole_is_refused_with_every_key(
    name: str, changes: dict[str, tuple[int, ...] | None], problems: list[str]
) -> None:
    tensors = shapes(published(name))
    for key, shape in changes.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = shape
    message = incomplete(tensors)
    assert message.startswith("made.safetensors: the file is not a whole Stable Diffusion ")
    assert all(f"  - {line}" in message for line in problems)
    assert len(message.splitlines()) == 2 + len(problems), message


def left_out(tensors: Shapes) -> tuple[Plan, str]:
    """Returns the plan of a file of which a component is incomplete, and what it says of that."""
    plan = plan_of(tensors)
    plan.require_complete()
    ((name, missing),) = plan.incomplete.items()
    assert plan.absent == (name,)
    assert not plan.tensors(name)
    assert plan.lossless
    with pytest.raises(Incomplete) as caught:
        plan.require_complete(strict=True)
    assert caught.value.problems == missing
    (note,) = plan.notes
    assert note.startswith(f"the {name} is incomplete, so it is left out: {missing[0]}")
    return plan, "\n".join(missing)


@pytest.mark.parametrize(
    ("name", "gone", "said"),
    [
        (SD1, LAYER, "text_encoder: text_model.encoder.layers.* has only the entries 0, 1, 2, 3, "),
        (SD1, f"{VAE}encoder.", "vae: encoder.conv_in.weight is missing"),
        (SD1, f"{VAE}quant_conv.", "vae: quant_conv.weight is missing"),
        (
            SD2,
            IN_PROJ,
            "text_encoder: text_model.encoder.layers.3.self_attn.v_proj.weight is missing",
        ),
        (SDXL, "conditioner.embedders.1.model.ln_final.", "text_encoder_2: text_model.final_layer"),
    ],
)
def test_a_component_that_is_incomplete_is_left_out(name: str, gone: str, said: str) -> None:
    assert said in left_out(without(name, gone))[1]


@pytest.mark.parametrize(
    ("name", "stray", "note"),
    [
        (SD1, f"{VAE}encoder.mid.block_1.norm1.gain", "a Stable Diffusion 1.x vae has no "),
        (SD1, f"{UNET}input_blocks.1.1.transformer_blocks.0.attn3.to_q.weight", "1.x unet has no "),
        (SD1, "cond_stage_model.transformer.vision_model.x", "1.x text_encoder has no "),
        (SD1, "lora_unet_down_blocks_0.alpha", "no key map knows "),
        (
            SDXL,
            "conditioner.embedders.1.model.transformer.text_projection.weight",
            "a Stable Diffusion XL text_encoder_2 has no ",
        ),
    ],
)
def test_a_stray_is_kept_aside_with_a_warning(name: str, stray: str, note: str) -> None:
    plan = plan_of(shapes(published(name)) | {stray: (8, 8)})
    plan.require_complete()
    assert plan.unclaimed == (stray,)
    assert stray in plan.tensors("ckptconv")
    assert plan.lossless
    assert [note in said and f"{stray}: kept aside" in said for said in plan.notes] == [True]


@pytest.mark.parametrize(
    ("name", "leftover", "reason"),
    [
        (SD1, "cond_stage_model.logit_scale", "unused"),
        (SD1, f"{VAE}logvar", "training"),
        (SD1, "embedding_manager.string_to_param_dict.x", "training"),
        (SD1, "global_step", "training"),
        (SD2, "cond_stage_model.transformer.text_model.embeddings.position_ids", "derived"),
        (SDXL, "conditioner.embedders.0.logit_scale", "unused"),
        (SDXL, "conditioner.embedders.0.transformer.text_projection.weight", "unused"),
        (SDXL, "conditioner.embedders.1.model.text_model.embeddings.position_ids", "derived"),
    ],
)
def test_a_known_leftover_has_a_reason_and_no_warning(
    name: str, leftover: str, reason: str
) -> None:
    plan = plan_of(shapes(published(name)) | {leftover: (1,)})
    assert (plan.problems, plan.unclaimed, plan.notes) == ((), (), ())
    assert steps_of(plan)[leftover].reason == reason


def widths(wide: Sequence[int]) -> Shapes:
    """Returns a VAE whose levels have multiples of 32 channels, as LDM would build it."""
    tensors = shapes(published(SD1))
    for half, levels in (("encoder.down", range(4)), ("decoder.up", range(4))):
        for n in levels:
            before = {"encoder.down": n - 1, "decoder.up": n + 1}[half]
            first = 32 * wide[before] if 0 <= before < 4 else 32 * wide[0 if half[0] == "e" else 3]
            for key in [k for k in tensors if k.startswith(f"{VAE}{half}.{n}.")]:
                own = 32 * wide[n]
                into = first if ".block.0." in key else own
                entering = (".conv1.weight", ".nin_shortcut.weight")
                tensors[key] = {
                    1: (into if key.endswith((".norm1.weight", ".norm1.bias")) else own,),
                    4: (own, into if key.endswith(entering) else own, *tensors[key][2:]),
                }[len(tensors[key])]
            shortcut = f"{VAE}{half}.{n}.block.0.nin_shortcut."
            for leaf in ("weight", "bias"):
                tensors.pop(shortcut + leaf, None)
            if first != 32 * wide[n]:
                tensors |= {
                    f"{shortcut}weight": (32 * wide[n], first, 1, 1),
                    f"{shortcut}bias": (32 * wide[n],),
                }
    return tensors


@pytest.mark.parametrize("wide", [(1, 2, 2, 2), (1, 2, 4, 8), (2, 2, 2, 2), (1, 2, 4, 4)])
def test_a_shortcut_is_where_the_width_changes_and_nowhere_else(wide: tuple[int, ...]) -> None:
    tensors = widths(wide)
    plan = plan_of(tensors)
    assert (plan.problems, plan.unclaimed, plan.absent) == ((), (), ())
    first = f"{VAE}encoder.down.0.block.0.nin_shortcut.weight"
    assert plan_of(tensors | {first: (32, 32, 1, 1)}).unclaimed == (first,)
    gone = [k for k in tensors if k.endswith("nin_shortcut.weight")]
    assert len(gone) == 2 * sum(a != b for a, b in itertools.pairwise(wide))
    for key in gone:
        rest = {k: v for k, v in tensors.items() if k != key}
        assert plan_of(rest).incomplete.keys() == {"vae"}


def test_a_tower_may_be_shorter() -> None:
    plan = plan_of(without(SD1, f"{CLIP}text_model.encoder.layers.11."))
    plan.require_complete()
    assert len(plan.tensors("text_encoder")) == 16 * 11 + 4


def test_keys_that_no_map_knows_are_kept_aside_and_refused_on_demand() -> None:
    tensors = shapes(published(SD1)) | {"control_model.x": (1,), "embedder.y": (2,)}
    plan = plan_of(tensors)
    plan.require_complete()
    assert plan.unclaimed == ("control_model.x", "embedder.y")
    assert plan.tensors("ckptconv").keys() >= {"control_model.x", "embedder.y"}
    assert plan.notes == ("no key map knows control_model.x, embedder.y: kept aside",)
    assert plan.lossless
    with pytest.raises(Incomplete) as caught:
        plan.require_complete(strict=True)
    message = str(caught.value)
    assert "made.safetensors: no key map knows 2 of the keys\n" in message
    assert "  - control_model.x: unknown\n  - embedder.y: unknown\n" in message
    assert "hint: without strict=True they are kept aside" in message


def test_no_architecture_means_no_plan() -> None:
    with pytest.raises(NotACheckpoint):
        plan_of({"fc.weight": (1, 1)})


def test_a_missing_component_is_absent_and_the_rest_is_converted() -> None:
    plan = plan_of(without(SDXL, VAE, "conditioner.embedders.1."))
    plan.require_complete()
    assert plan.absent == ("vae", "text_encoder_2")
    assert plan_of(without(SDXL, VAE), only=["unet"]).absent == ()
