"""Times loading a full-size SDXL checkpoint, against diffusers and the bare file, in one run.

    python benchmarks/load.py --work /a/folder/on/a/real/disk [--runs 5] [--device cpu cuda]

Each way to load is a process of its own, all in turn, after a round that brings the file into the
page cache. `ready` is the time from the start of the process to the moment when the pipeline is
there, imports and all; `computed` is what all threads computed until the end of the process, which
other load on the machine changes less. On a GPU a process also tells how long the call took until
all weights were there, once the libraries were imported and the device was awake, and how many
steps a second the pipeline makes at 1024 x 1024. Numbers are medians, with the range. Memory is the
peak resident set, as the kernel reports it: pages of the mapped file count once they are touched.
About 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from convert import ckptconv, sample

OURS = """
import ckptconv
def load(file, configs, device):
    return ckptconv.load_pipeline(file, device=device)
"""
DIFFUSERS = """
import torch
from diffusers import StableDiffusionXLPipeline
def load(file, configs, device):
    pipe = StableDiffusionXLPipeline.from_single_file(
        file, config=configs, torch_dtype=torch.float16, local_files_only=True)
    return pipe.to(device)
"""
BARE = """
import torch
from safetensors.torch import load_file
def load(file, configs, device):
    return load_file(file, device=device)
"""
MEASURE = """
import json, sys, time
file, configs, device = sys.argv[1:]
said = {}
if device != "cpu":
    import torch
    from diffusers import StableDiffusionXLPipeline
    torch.ones(1, device=device)
started = time.perf_counter()
made = load(file, configs, device)
if device != "cpu":
    torch.cuda.synchronize()
    said["load"] = time.perf_counter() - started
print("ready", flush=True)
if device != "cpu" and hasattr(made, "unet"):
    made.set_progress_bar_config(disable=True)
    made("a cat", num_inference_steps=3, output_type="latent")
    torch.cuda.synchronize()
    started = time.perf_counter()
    made("a cat", num_inference_steps=30, output_type="latent")
    torch.cuda.synchronize()
    said["steps"] = 30 / (time.perf_counter() - started)
print(json.dumps(said))
"""
WAYS = {
    "ckptconv": OURS,
    "diffusers, from_single_file": DIFFUSERS,
    "safetensors, the bare file": BARE,
}


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        ready: seconds from its start to the pipeline.
        computed: seconds that its threads computed, which other load on the machine changes less.
        memory: peak resident set in bytes.
        load: seconds from the call to weights on the GPU.
        steps: denoising steps a second.
    """

    ready: float
    computed: float
    memory: int
    load: float | None
    steps: float | None


def main() -> None:
    """Runs every way to load on the devices that were asked for, and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a real disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", nargs="*", default=["cpu"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file = sample(options.work, "sdxl", "--dtype", "fp16")
    configs = options.work / "sdxl-configs"
    if not configs.exists():
        command = ckptconv("convert", file, configs, "--configs-only")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    print("| device | loaded by | ready | computed | memory | load | steps a second |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for device in options.device:
        runs: dict[str, list[Run]] = {name: [] for name in WAYS}
        for n in range(options.runs + 1):
            for name, way in WAYS.items():
                made = run(way, file, configs, device)
                if n:  # the first round warms up
                    runs[name].append(made)
        for name, made_of in runs.items():
            print(row(device, name, made_of), flush=True)


def run(way: str, file: Path, configs: Path, device: str) -> Run:
    """Loads the file once, in a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603  (our own script)
        [sys.executable, "-c", way + MEASURE, file, configs, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None  # noqa: S101
    process.stdout.readline()
    ready = time.perf_counter() - started
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"loading failed, with exit code {os.waitstatus_to_exitcode(status)}:\n{way}")
    values = json.loads(said)
    computed = usage.ru_utime + usage.ru_stime
    memory = usage.ru_maxrss * 1024
    return Run(ready, computed, memory, values.get("load"), values.get("steps"))


def row(device: str, name: str, runs: list[Run]) -> str:
    """Returns a line of the table."""
    memory = statistics.median(run.memory for run in runs) / 1e6
    ready = spread([run.ready for run in runs], "s")
    computed = spread([run.computed for run in runs], "s")
    load = spread([run.load for run in runs if run.load], "s")
    steps = spread([run.steps for run in runs if run.steps], "")
    return f"| {device} | {name} | {ready} | {computed} | {memory:,.0f} MB | {load} | {steps} |"


def spread(numbers: list[float], unit: str) -> str:
    """Returns the median and the range; nothing for no numbers."""
    if not numbers:
        return ""
    middle = statistics.median(numbers)
    return f"{middle:.2f} {unit} ({min(numbers):.2f} to {max(numbers):.2f})".replace("  ", " ")


if __name__ == "__main__":
    main()
