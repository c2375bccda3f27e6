"""Settings that keep a pipeline within an amount of memory."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ckptconv.detection.detect import detect
from ckptconv.errors import DeviceError, UsageError
from ckptconv.inference.generation import Settings
from ckptconv.inference.memory import (
    DECODER,
    NETWORK,
    WAYS,
    Job,
    Setting,
    Size,
    choose,
    job_of,
    peak,
    size_of_result,
    tile_vae,
)
from ckptconv.inference.model import open_model
from ckptconv.inference.pipeline import load_pipeline
from ckptconv.maps.architecture import bundled
from ckptconv.options import Options
from ckptconv.planning.plan import build_plan
from tests.conftest import Sample
from tests.support.activations import allocated
from tests.support.pipelines import SMALL, empty, parameters, runner

G = 10**9
MEGAPIXEL = 1024 * 1024


def size(numbers: float, *, width: int = 2, narrow: float = 0.0, largest: float = 0.1) -> Size:
    return Size(int(numbers * width * G), int(numbers * G), int(narrow * G), int(largest * G))


SDXL = Job(
    {"unet": size(2.57, narrow=2.55), "text_encoder_2": size(0.7), "vae": size(0.084)},
    "fp16",
    MEGAPIXEL,
    upcast=True,
)
FLUX = Job(
    {"transformer": size(11.9, narrow=8.7), "text_encoder_2": size(4.76), "vae": size(0.084)},
    "bf16",
    MEGAPIXEL,
)
SD1 = Job(
    {"unet": size(0.86, width=4, narrow=0.85), "text_encoder": size(0.123, width=4)},
    "fp32",
    512 * 512,
)


@pytest.mark.parametrize(
    ("job", "room", "asked", "chosen"),
    [
        (SDXL, 24, "", "fp16"),
        (SDXL, 10, "", "fp16, VAE tiling"),
        (SDXL, 8, "", "fp16, model offload"),
        (SDXL, 6.4, "", "fp16, weights in fp8, VAE tiling"),
        (SDXL, 4.5, "", "fp16, weights in fp8, model offload, VAE tiling"),
        (SDXL, 3, "", "fp16, sequential offload, VAE tiling"),
        (replace(SDXL, pixels=512 * 512), 9, "", "fp16"),
        (FLUX, 40, "", "bf16"),
        (FLUX, 32, "", "bf16, model offload"),
        (FLUX, 24, "", "bf16, weights in fp8, model offload, VAE tiling"),
        (FLUX, 8, "", "bf16, sequential offload, VAE tiling"),
        (FLUX, 40, "model", "bf16, model offload"),
        (SD1, 8, "", "fp32"),
        (SD1, 4, "", "bf16"),
        (SD1, 2.7, "", "bf16, model offload"),
        (replace(SDXL, device="mps"), 6.4, "", "fp16, sequential offload, VAE tiling"),
        (replace(SD1, device="cpu"), 3.3, "", "bf16, weights in fp8, VAE tiling"),
    ],
)
def test_the_fastest_setting_that_fits_is_chosen(
    job: Job, room: float, asked: str, chosen: str
) -> None:
    setting, why = choose(job, int(room * G), Setting("", offload=asked or None))
    assert str(setting) == chosen
    assert peak(setting, job) <= room * G
    assert why.startswith("takes about ")
    assert bool(asked or chosen in ("fp16", "bf16", "fp32")) or "would take" in why


def test_the_setting_that_nearly_fits_is_named() -> None:
    """Tiling changes nothing in an image that is no larger than a tile."""
    _, why = choose(replace(SD1, pixels=64 * 64, device="cpu"), 4 * G)
    assert "; fp32 would take" in why


def test_what_is_asked_for_stays() -> None:
    for asked in (Setting("fp16", "fp8"), Setting("fp32"), Setting("", offload="sequential")):
        setting, _ = choose(SD1, 20 * G, asked)
        for name in ("dtype", "storage", "offload"):
            assert getattr(asked, name) in ("", None, getattr(setting, name))


def test_fp8_goes_with_sequential_offload_where_both_are_asked_for() -> None:
    setting, _ = choose(SDXL, 3 * G, Setting("", "fp8", "sequential"))
    assert str(setting) == "fp16, weights in fp8, sequential offload, VAE tiling"


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cpu", Setting("", offload="model"), "model offload needs a GPU, and the device is cpu"),
        ("cpu", Setting("", "fp8", "sequential"), "sequential offload needs a GPU"),
        ("mps", Setting("", "fp8"), "MPS has no fp8"),
    ],
)
def test_a_setting_that_the_device_lacks_is_refused(
    device: str, asked: Setting, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose(replace(SDXL, device=device), 99 * G, asked)


@pytest.mark.parametrize(("job", "asked"), [(FLUX, ""), (SDXL, "model")])
def test_the_smallest_setting_is_named_and_would_do(job: Job, asked: str) -> None:
    with pytest.raises(DeviceError, match="is too little: the smallest") as error:
        choose(job, G, Setting("", offload=asked or None))
    enough = re.search(r"memory='?([\d.]+)GB'? would do", error.value.hint)
    assert enough
    choose(job, int(float(enough[1]) * G), Setting("", offload=asked or None))


def test_more_memory_never_makes_it_slower() -> None:
    ways = [replace(way, dtype="bf16") for way in WAYS]
    ranks = [ways.index(choose(FLUX, int(g * G / 2))[0]) for g in range(6, 90)]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "chroma", "x4-upscaler"])
@pytest.mark.filterwarnings("ignore")
def test_the_allowance_holds_what_the_networks_allocate(name: str) -> None:
    """At full size, at 1024 x 1024, with guidance where the pipeline computes both at once."""

    def halves(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=torch.float16)

    made = build_plan(detect(bundled().architectures[name].layout()))
    vae: Any = empty(made, "vae").to("meta", torch.float16)
    across = 1024 // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = vae.config.latent_channels, across, across
    decoded = allocated(lambda: vae.decode(halves(1, *latents))) / 2 / MEGAPIXEL
    assert DECODER / 3 < decoded < DECODER
    which = "unet" if "unet" in bundled().architectures[name].components else "transformer"
    network: Any = empty(made, which).to("meta", torch.float16)
    config, tokens, time = network.config, (across // 2) ** 2, torch.empty(2, device="meta")
    if which == "unet":
        words: dict[str, Any] = {
            "sample": halves(2, config.in_channels, across, across),
            "timestep": time[0],
            "encoder_hidden_states": halves(2, 77, config.cross_attention_dim),
            "class_labels": time.long() if config.num_class_embeds else None,
            "added_cond_kwargs": {"text_embeds": halves(2, 1280), "time_ids": halves(2, 6)},
        }
    elif name == "sd3":
        words = {
            "hidden_states": halves(2, *latents),
            "encoder_hidden_states": halves(2, 333, config.joint_attention_dim),
            "pooled_projections": halves(2, config.pooled_projection_dim),
            "timestep": time,
        }
    else:
        words = {
            "hidden_states": halves(1, tokens, config.in_channels),
            "encoder_hidden_states": halves(1, 512, config.joint_attention_dim),
            "timestep": halves(1),
            "img_ids": halves(tokens, 3),
            "txt_ids": halves(512, 3),
        }
        if name == "flux":
            words |= {"pooled_projections": halves(1, 768), "guidance": halves(1)}
    computed = allocated(lambda: network(**words)) / 2 / across**2
    assert NETWORK / 3 < computed < NETWORK


def test_sizes_are_read_off_the_header(sample: Sample) -> None:
    model = open_model(sample("sdxl"), Options(dtype="bf16"))
    job = job_of(model, (512, 256), "cpu")
    targets = [t for step in model.steps for t in step.targets if t.component == "unet"]
    unet = job.sizes["unet"]
    assert unet.loaded == 2 * unet.numbers > 0
    assert unet.numbers / 2 < unet.narrow < unet.numbers
    assert unet.largest == max(torch.Size(t.shape).numel() for t in targets)
    assert (job.pixels, job.scale, job.upcast) == (512 * 256, 8, True)
    assert job.sizes["vae"].narrow == 0


def test_the_size_of_the_result(sample: Sample) -> None:
    image = {"image": Image.new("RGB", (64, 48))}
    for name, images, wanted in (
        ("sd1", {}, (512, 512)),
        ("flux", {}, (1024, 1024)),
        ("sd1", image, (64, 48)),
        ("x4-upscaler", image, (256, 192)),
    ):
        model = open_model(sample(name), Options())
        assert size_of_result(model, Settings("a fox"), images) == wanted
        assert size_of_result(model, Settings("a fox", size=(8, 8)), images) == (8, 8)


def test_generate_refuses_what_does_not_fit(sample: Sample, tmp_path: Path) -> None:
    run = runner(tmp_path)
    result = run(sample("sd1"), *SMALL, "--memory", "500MB", code=3)
    assert "--memory 1.6GB would do" in result.stderr
    words = ["--memory", "1GB", "--device-map", "balanced"]
    result = run(sample("sd1"), *SMALL, *words, code=2)
    assert "--memory is for one device" in result.stderr
    result = run(sample("sd1"), *SMALL, "--memory", "8GB", "--offload", "model", code=2)
    assert "leave out --offload" in result.stderr


@pytest.mark.slow
def test_generate_says_what_it_chose(sample: Sample, tmp_path: Path) -> None:
    result = runner(tmp_path)(sample("sd1"), *SMALL, "--memory", "1.55GB")
    assert "memory: bf16: takes about 1.5 GB of 1.6 GB; fp32 would take 1.6 GB" in result.stderr
    assert parameters(tmp_path / "out.png")["dtype"] == "bfloat16"


def test_the_vae_decodes_in_tiles(sample: Sample) -> None:
    pipe = load_pipeline(sample("sdxl"), device="cpu")
    tile_vae(pipe)
    assert (pipe.vae.use_tiling, pipe.vae.tile_latent_min_size) == (True, 64)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_stays_within_the_estimate(sample: Sample, tmp_path: Path) -> None:
    program = (
        "import sys; from ckptconv.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )  # not `ru_maxrss`, which a process inherits from the one that it was forked from
    words = [sys.executable, "-c", program, "generate", str(sample("sd1")), "a fox"]
    words += ["-o", str(tmp_path / "out.png"), *SMALL, "--memory", "8GB"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)  # noqa: S603
    about = re.search(r"takes about ([\d.]+) GB", done.stderr)
    assert about
    assert int(done.stdout.split()[-1]) * 1024 <= float(about[1]) * G
