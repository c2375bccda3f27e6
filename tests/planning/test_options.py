"""What may be chosen of a plan: EMA, components, donors and the dtype."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import FileRefused, UsageError
from ckptconv.planning.components import Donor
from ckptconv.planning.plan import Plan
from ckptconv.reading.tensor import Header, Tensor
from tests.conftest import made, published, shapes
from tests.planning.test_plan import (
    CLIP,
    OPENCLIP,
    REFINER,
    SD1,
    SD1_EMA,
    SD2,
    SDXL,
    UNET,
    VAE,
    Shapes,
    incomplete,
    plan_of,
    renamed,
    steps_of,
    without,
)


def ema_of(key: str) -> str:
    return "model_ema.diffusion_model" + key.removeprefix(UNET).replace(".", "")


def test_ema_takes_the_copy_in_the_place_of_the_weights() -> None:
    header = published(SD1_EMA)
    plain, ema = plan_of(header), plan_of(header, ema=True)
    ema.require_complete()
    assert ema.tensors("unet").keys() == plain.tensors("unet").keys()
    before, after = steps_of(plain), steps_of(ema)
    for key in (key for key in header.tensors if key.startswith(UNET)):
        copy, own = after[ema_of(key)], after[key]
        assert [t.key for t in copy.targets] == [t.key for t in before[key].targets]
        assert (own.op.name, own.targets, own.reason) == ("drop", (), "replaced")
        assert before[ema_of(key)].reason == "training"
    keys = Counter(t.name for step in ema.steps for t in step.sources)
    assert keys == Counter(list(header.tensors))
    assert after["model_ema.decay"].reason == "training"
    assert not ema.lossless


def test_ema_copies_may_be_named_without_diffusion_model() -> None:
    tensors = renamed(SD1_EMA, "model_ema.diffusion_model", "model_ema.")
    plan = plan_of(tensors, ema=True)
    assert plan.tensors("unet").keys() == plan_of(published(SD1)).tensors("unet").keys()


def test_ema_has_the_dtype_of_the_copy() -> None:
    header = published(SD1_EMA)
    tensors = dict(header.tensors)
    copy = ema_of(f"{UNET}out.2.weight")
    tensors[copy] = replace(tensors[copy], dtype="F16")
    plan = plan_of(replace(header, tensors=tensors), ema=True)
    assert plan.tensors("unet")["conv_out.weight"].dtype == "F16"
    assert plan.tensors("unet")["conv_out.bias"].dtype == "F32"


def test_ema_that_is_not_complete_is_refused() -> None:
    tensors = shapes(published(SD1_EMA))
    bias, weight = ema_of(f"{UNET}out.2.bias"), ema_of(f"{UNET}out.2.weight")
    del tensors[bias]
    tensors[weight] = (4, 320)
    message = incomplete(tensors, ema=True)
    assert "the file has no complete EMA copy of the UNet\n" in message
    assert f"  - {bias} is missing, the EMA copy of {UNET}out.2.bias" in message
    assert f"  - {weight} has shape [4, 320], unlike {UNET}out.2.weight" in message
    assert message.endswith("hint: leave out ema to take the weights that it has")


def test_ema_of_a_file_without_any_names_the_copies() -> None:
    message = incomplete(shapes(published(SD1)), ema=True)
    assert "no complete EMA copy of the UNet" in message
    assert "model_ema.diffusion_modelinput_blocks00bias is missing" in message
    assert "... and 666 more" in message


def test_ema_without_the_unet_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="the UNet is not to be written"):
        plan_of(published(SD1_EMA), ema=True, only=["vae"])


def test_only_leaves_the_others_out() -> None:
    header = published(SD1)
    plan = plan_of(header, only=["unet", "scheduler"])
    plan.require_complete()
    assert {t.component for step in plan.steps for t in step.targets} == {"unet"}
    assert steps_of(plan)[f"{VAE}quant_conv.weight"].reason == "left out"
    assert steps_of(plan)["betas"].reason == "derived"
    keys = Counter(t.name for step in plan.steps for t in step.sources)
    assert keys == Counter(list(header.tensors))
    assert not plan.lossless


def test_what_is_left_out_need_not_be_whole() -> None:
    plan_of(without(SD1, f"{VAE}quant_conv"), only=["unet"]).require_complete()


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"only": ["unet", "text_encoder_2", "vea"]},
            "sd1 has no component text_encoder_2, vea\nhint: its components are unet, vae, text_en",
        ),
        ({"dtype": "fp64"}, "dtype 'fp64' is unknown\nhint: it is one of fp16, bf16, fp32, fp8"),
        (
            {"donors": {"text_encoder_2": Donor((published(SDXL),))}},
            "text_encoder_2 is given, but it is not a component to write\nhint: the components of",
        ),
        (
            {"donors": {"vae": Donor((published(SDXL),))}, "only": ["unet"]},
            "vae is given, but it is not a component to write",
        ),
    ],
)
def test_choices_that_do_not_fit_the_architecture_are_wrong_usage(
    choices: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(published(SD1), **choices)
    assert str(caught.value).startswith(said)


def test_a_dtype_is_a_choice_of_the_run_for_float_tensors() -> None:
    header = published(SD1)
    half, ids = f"{UNET}out.0.bias", f"{VAE}quant_conv.bias"
    tensors = dict(header.tensors)
    tensors[half] = Tensor(header.path, half, "F16", (320,), 0, 0)
    tensors[ids] = Tensor(header.path, ids, "I64", (77,), 0, 0)
    plan = plan_of(replace(header, tensors=tensors), dtype="fp16")
    dtypes = {t.key: t.dtype for c in ("unet", "vae") for t in plan.tensors(c).values()}
    assert dtypes.pop("quant_conv.bias") == "I64"
    assert set(dtypes.values()) == {"F16"}
    assert steps_of(plan)[f"{UNET}out.2.bias"].casts
    assert not steps_of(plan)[f"{UNET}out.0.bias"].casts
    assert not plan.lossless
    assert steps_of(plan)["betas"].targets[0].dtype == "F32", "what is kept aside is kept as it is"


def test_the_dtype_that_is_stored_is_no_cast() -> None:
    plan = plan_of(published(SD1), dtype="fp32")
    assert plan.lossless
    assert not any(step.casts for step in plan.steps)


def given(name: str, component: str, donor: Shapes | str) -> Plan:
    """The plan of a published file whose component comes from another one."""
    header = published(donor) if isinstance(donor, str) else made(donor)
    return plan_of(published(name), donors={component: Donor((header,))})


def alone(name: str, prefix: str) -> Shapes:
    """A component of a published file, as a file of its own."""
    tensors = shapes(published(name))
    return {k.removeprefix(prefix): s for k, s in tensors.items() if k.startswith(prefix)}


def in_diffusers(name: str, component: str) -> Shapes:
    """A component in the layout of diffusers, as a file of its own."""
    return {k: t.shape for k, t in plan_of(published(name)).tensors(component).items()}


IDS: Shapes = {"text_model.embeddings.position_ids": (1, 77)}


@pytest.mark.parametrize(
    ("name", "component", "donor"),
    [
        (SD1, "vae", SDXL),
        (SDXL, "vae", SD2),
        (SDXL, "text_encoder", SD1),
        (SD1, "text_encoder", SDXL),
        (SD2, "text_encoder", shapes(published(SD2))),
        (SDXL, "text_encoder_2", REFINER),
        (REFINER, "text_encoder_2", SDXL),
        (SD1, "vae", alone(SD1, VAE)),
        (SD1, "vae", alone(SD1, VAE) | {"loss.logvar": (), "model_ema.decay": ()}),
        (SD1, "text_encoder", alone(SD1, CLIP)),
        (SD1, "text_encoder", alone(SD1, f"{CLIP}text_model.")),
        (SD2, "text_encoder", alone(SD2, OPENCLIP)),
        (SDXL, "text_encoder_2", alone(SDXL, "conditioner.embedders.1.model.")),
        (SD1, "vae", in_diffusers(SD1, "vae")),
        (SD1, "text_encoder", in_diffusers(SD1, "text_encoder") | IDS),
        (SD2, "text_encoder", in_diffusers(SD2, "text_encoder") | IDS),
        (SDXL, "text_encoder_2", in_diffusers(SDXL, "text_encoder_2") | IDS),
    ],
)
def test_a_component_comes_from_another_checkpoint_or_a_file_of_its_own(
    name: str, component: str, donor: Shapes | str
) -> None:
    plan = given(name, component, donor)
    plan.require_complete()
    header, elsewhere = published(name), plan.donors[component].headers[0]
    assert plan.absent == ()
    assert plan.tensors(component).keys() == plan_of(header).tensors(component).keys()
    assert plan.files == (header.path, elsewhere.path)
    for step in plan.steps:
        (source,) = step.sources
        for target in step.targets:
            from_elsewhere = source.file == elsewhere.path
            assert from_elsewhere == (target.component == component)
    sources = [step.sources[0] for step in plan.steps]
    keys = Counter(source.name for source in sources if source.file == header.path)
    assert keys == Counter(list(header.tensors))
    assert not plan.lossless


def test_a_donor_fills_what_the_file_lacks() -> None:
    tensors = without(SD1, VAE)
    plan = plan_of(tensors, donors={"vae": Donor((published(SDXL),))})
    plan.require_complete()
    assert plan.absent == ()
    assert len(plan.tensors("vae")) == 248


def test_a_folder_of_diffusers_is_taken_as_it_is(tmp_path: Path) -> None:
    headers = tuple(
        Header(path, {key: Tensor(path, key, "F16", shape, 8, 8)}, {}, 8, 8)
        for path, key, shape in (
            (tmp_path / "1-of-2", "a.weight", (1, 2)),
            (tmp_path / "2-of-2", "b.weight", (3,)),
        )
    )
    plan = plan_of(published(SD1), donors={"vae": Donor(headers, tmp_path / "config.json")})
    plan.require_complete()
    assert {k: t.shape for k, t in plan.tensors("vae").items()} == {
        "a.weight": (1, 2),
        "b.weight": (3,),
    }
    assert {header.path for header in headers} < set(plan.files)


@pytest.mark.parametrize(
    ("name", "component", "donor", "said"),
    [
        (SD1, "vae", {"fc.weight": (1, 1)}, "vae: the file holds none that Stable Diffusion 1.x"),
        (SD1, "text_encoder", shapes(published(SD2)), "text_encoder: the file holds none that"),
        (SDXL, "text_encoder_2", shapes(published(SD1)), "text_encoder_2: the file holds none"),
        (SD1, "vae", without(SDXL, f"{VAE}quant_conv."), "vae: quant_conv.weight is missing"),
    ],
)
def test_a_donor_that_does_not_fit_is_refused(
    name: str, component: str, donor: Shapes, said: str
) -> None:
    with pytest.raises(FileRefused, match="cannot give what it is to give") as caught:
        plan_of(shapes(published(name)), donors={component: Donor((made(donor),))})
    assert any(problem.startswith(said) for problem in caught.value.problems)
