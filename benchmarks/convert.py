"""Times conversions against what a user would use instead, in one run.

    python benchmarks/convert.py --work /a/folder/on/a/real/disk [--runs 5] [--case NAME ...]

Every case runs our command and the other in turn, as whole processes, after one warm-up each that
brings the source into the page cache. `sync` runs between them, untimed, so that neither pays for
the other's dirty pages. Times are medians; the ratio is the median of the ratios pair by pair.
Memory is the peak resident set of the process, as the kernel reports it. About 80 GB of disk for
all cases.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
FROM_SINGLE_FILE = """
import sys, torch, diffusers
pipeline = getattr(diffusers, sys.argv[1]).from_single_file(
    sys.argv[2], config=sys.argv[3], torch_dtype=getattr(torch, sys.argv[5]), local_files_only=True)
pipeline.save_pretrained(sys.argv[4])
"""
FUSE = """
import sys, torch, diffusers
from pathlib import Path
pipeline = diffusers.StableDiffusionPipeline.from_single_file(
    sys.argv[1], config=sys.argv[2], torch_dtype=torch.float16, local_files_only=True)
lora = Path(sys.argv[4])
pipeline.load_lora_weights(lora.parent, weight_name=lora.name, local_files_only=True)
pipeline.fuse_lora()
pipeline.unload_lora_weights()
pipeline.save_pretrained(sys.argv[3])
"""


@dataclass(frozen=True)
class Run:
    """Seconds and peak memory in bytes of one process."""

    seconds: float
    memory: int


@dataclass(frozen=True)
class Case:
    """Two commands to compare, and the ratio that we promise (ours / theirs)."""

    name: str
    ours: list[str]
    theirs: list[str]
    their_name: str
    promise: str


def main() -> None:
    """Runs the cases that were asked for and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a real disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--case", nargs="*", help="names of cases; all by default")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| case | ours | theirs | ratio | our memory | their memory | promised |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, make in CASES.items():
        if not options.case or name in options.case:
            compare(make(options.work), options.work, options.runs)


def compare(case: Case, work: Path, runs: int) -> None:
    """Runs both commands of a case in turn and prints its row."""
    pairs = []
    for n in range(runs + 1):
        pair = run(case.ours, work), run(case.theirs, work)
        if n:  # the first pair warms up
            pairs.append(pair)
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
    memory = [statistics.median(r.memory for r in side) / 1e6 for side in (ours, theirs)]
    print(
        f"| {case.name} | {spread(ours)} | {spread(theirs)} ({case.their_name}) | {ratio:.2f} "
        f"| {memory[0]:,.0f} MB | {memory[1]:,.0f} MB | {case.promise} |",
        flush=True,
    )


def run(command: list[str], work: Path) -> Run:
    """Runs a command that may write `work/out`, from a clean start, and cleans up."""
    clean(work)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603  (our own commands)
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None  # noqa: S101
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors}")
    clean(work)
    return Run(seconds, usage.ru_maxrss * 1024)


def clean(work: Path) -> None:
    """Removes what a run wrote."""
    out = work / "out"
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)


def spread(runs: tuple[Run, ...]) -> str:
    """Returns the median, and the range if there are several."""
    seconds = [run.seconds for run in runs]
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def ckptconv(*arguments: str | Path) -> list[str]:
    """Returns a command line of ours."""
    return [PYTHON, "-m", "ckptconv", *map(str, arguments)]


def sample(work: Path, architecture: str, *options: str) -> Path:
    """Makes a full-size file once."""
    path = work / f"{architecture}{''.join(options).replace('--', '-')}.safetensors"
    if not path.exists():
        subprocess.run(  # noqa: S603  (our own command)
            ckptconv("sample", architecture, path, "--full", *options),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return path


def copying(architecture: str, name: str, *options: str) -> Callable[[Path], Case]:
    """A conversion bit for bit, against `cp` of the source."""

    def make(work: Path) -> Case:
        source = sample(work, architecture, *options)
        return Case(
            name,
            ckptconv("convert", source, work / "out"),
            ["cp", str(source), str(work / "out")],
            "cp",
            "at most 1.05, under 150 MB",
        )

    return make


def hollow(work: Path) -> Case:
    """A conversion of FLUX.1's transformer alone, of which only the header is true.

    The data are a hole, which `cp` is told to copy as bytes.
    """
    import json

    from ckptconv.maps.architecture import bundled

    prefix, source = "model.diffusion_model.", work / "flux-transformer.safetensors"
    end, header = 0, {}
    for key, tensor in bundled().architectures["flux"].layout().tensors.items():
        if key.startswith(prefix):
            offsets = [end, end := end + tensor.nbytes]
            info = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            header[key.removeprefix(prefix)] = info
    text = json.dumps(header).encode()
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return Case(
        "FLUX.1 transformer bf16, bit for bit",
        ckptconv("convert", source, work / "out", "--ignore-zeros"),
        ["cp", "--sparse=never", str(source), str(work / "out")],
        "cp",
        "at most 1.05, under 150 MB",
    )


def casting(work: Path) -> Case:
    """A conversion to half precision, against `cp` of the source."""
    source = sample(work, "sd1", "--dtype", "fp32")
    return Case(
        "SD1.5 fp32 to fp16",
        ckptconv("convert", source, work / "out", "--dtype", "fp16"),
        ["cp", str(source), str(work / "out")],
        "cp",
        "at most 1.5, under 500 MB",
    )


def against_diffusers(
    architecture: str, pipeline: str, dtype: str, name: str
) -> Callable[[Path], Case]:
    """A conversion, against diffusers with a local configuration."""

    def make(work: Path) -> Case:
        source = sample(work, architecture, "--dtype", dtype)
        configs = configurations(work, architecture, source)
        kind = {"fp16": "float16", "fp32": "float32"}[dtype]
        theirs = [PYTHON, "-c", FROM_SINGLE_FILE, pipeline, source, configs, work / "out", kind]
        return Case(
            name,
            ckptconv("convert", source, work / "out"),
            list(map(str, theirs)),
            "diffusers",
            "at most 0.33, 1/20 of the memory",
        )

    return make


def configurations(work: Path, architecture: str, source: Path) -> Path:
    """Makes the configurations that diffusers is given, once."""
    configs = work / f"{architecture}-configs"
    if not configs.exists():
        command = ckptconv("convert", source, configs, "--configs-only")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return configs


def adapter(work: Path, source: Path) -> Path:
    """Makes a LoRA of rank 16 for all attention layers of a UNet, once."""
    from ckptconv import plan

    path = work / "lora.safetensors"
    if not path.exists():
        import numpy as np
        from safetensors.numpy import save_file

        tensors = {}
        random = np.random.default_rng(0)
        for key, target in plan(source).tensors("unet").items():
            if any(part in key for part in (".to_q.", ".to_k.", ".to_v.", ".to_out.0.weight")):
                name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
                for part, shape in (("down", (16, target.shape[1])), ("up", (target.shape[0], 16))):
                    values = random.standard_normal(shape) / 100
                    tensors[f"{name}.lora_{part}.weight"] = values.astype(np.float16)
                tensors[f"{name}.alpha"] = np.array(8, np.float16)
        save_file(tensors, path)
    return path


def merging(against: str) -> Callable[[Path], Case]:
    """A conversion with a LoRA, against one without, or against diffusers."""

    def make(work: Path) -> Case:
        source = sample(work, "sd1", "--dtype", "fp16")
        lora, out = adapter(work, source), work / "out"
        theirs = ckptconv("convert", source, out)
        if against == "diffusers":
            configs = configurations(work, "sd1", source)
            theirs = [PYTHON, "-c", FUSE, *map(str, (source, configs, out, lora))]
        ours = ckptconv("convert", source, out, "--lora", lora)
        return Case("SD1.5 fp16 with a LoRA of rank 16", ours, theirs, against, "none")

    return make


def inspecting(work: Path) -> Case:
    """`inspect` of a full-size file, against importing torch."""
    source = sample(work, "sdxl")
    return Case(
        "inspect SDXL",
        ckptconv("inspect", source),
        [PYTHON, "-c", "import torch"],
        "import torch",
        "at most 0.25",
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "inspect": inspecting,
    "sdxl": copying("sdxl", "SDXL fp16, bit for bit"),
    "sd1": copying("sd1", "SD1.5 fp16, bit for bit", "--dtype", "fp16"),
    "cast": casting,
    "diffusers-sd1": against_diffusers(
        "sd1", "StableDiffusionPipeline", "fp16", "SD1.5 fp16, bit for bit"
    ),
    "diffusers-sdxl": against_diffusers(
        "sdxl", "StableDiffusionXLPipeline", "fp16", "SDXL fp16, bit for bit"
    ),
    "sd3": copying("sd3", "SD3 medium with T5 fp16, bit for bit", "--dtype", "fp16"),
    "flux": hollow,
    "lora": merging("without"),
    "lora-diffusers": merging("diffusers"),
}

if __name__ == "__main__":
    main()
