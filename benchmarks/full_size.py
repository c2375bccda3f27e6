"""Converts files in the published sizes and loads them with stock diffusers.

    python benchmarks/full_size.py --work /a/folder/on/a/real/disk [--steps 2]

One file at a time is made (random weights), converted and removed. Every model component is loaded
with `from_pretrained` and must report no missing, unexpected or mismatched key. Stable Diffusion
1.5 also draws an image. Needs 16 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FILES = {
    "sd1-fp32-ema": ("sd1", ["--dtype", "fp32", "--ema"]),
    "sd1-fp16": ("sd1", ["--dtype", "fp16"]),
    "sd1-inpainting-fp16": ("sd1", ["--dtype", "fp16", "--task", "inpainting"]),
    "sd2-fp32": ("sd2", []),
    "sdxl-refiner-fp16": ("sdxl-refiner", []),
    "sdxl-fp16": ("sdxl", []),
}


def main() -> None:
    """Walks the files and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a real disk")
    parser.add_argument("--steps", type=int, default=2, help="of the image")
    parser.add_argument("--file", nargs="*", help="names of files; all by default")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| file | size | convert | components loaded, no key missing or left over | image |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name, (architecture, arguments) in FILES.items():
        if options.file and name not in options.file:
            continue
        source, out = options.work / f"{name}.safetensors", options.work / name
        ckptconv("sample", architecture, source, "--full", "--overwrite", *arguments)
        size = source.stat().st_size / 1e9
        started = time.perf_counter()
        ckptconv("convert", source, out, "--overwrite")
        seconds = time.perf_counter() - started
        source.unlink()
        loaded = load(out, "float16" if "fp16" in name else "float32")
        image = draw(out, options.steps) if name == "sd1-fp16" else "-"
        shutil.rmtree(out)
        print(f"| {name} | {size:.2f} GB | {seconds:.1f} s | {loaded} | {image} |", flush=True)


def ckptconv(*arguments: str | Path) -> None:
    """Runs a command of ours."""
    command = [sys.executable, "-m", "ckptconv", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603


def load(folder: Path, dtype: str) -> str:
    """Loads every model of a folder, one at a time; stops at a key that does not fit."""
    import diffusers
    import torch
    import transformers

    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    loaded = []
    for component, entry in index.items():
        if not isinstance(entry, list) or not (folder / component / "config.json").exists():
            continue
        library = {"diffusers": diffusers, "transformers": transformers}[entry[0]]
        module, info = getattr(library, entry[1]).from_pretrained(
            folder / component, torch_dtype=getattr(torch, dtype), output_loading_info=True
        )
        if any(info.values()):
            sys.exit(f"{folder / component}: {info}")
        loaded.append(component)
        del module
    return ", ".join(loaded)


def draw(folder: Path, steps: int) -> str:
    """Draws an image of 512 x 512 with the whole pipeline on the CPU, in float32."""
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        str(folder), torch_dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    image = pipeline("a test", num_inference_steps=steps, output_type="np").images[0]
    if not np.isfinite(image).all():
        sys.exit(f"{folder}: the image is not finite")
    return (
        f"{image.shape[0]} x {image.shape[1]}, {steps} steps, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
