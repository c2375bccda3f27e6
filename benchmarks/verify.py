"""Times `verify` against `cmp` of the same bytes, and `export` against `cp`, in one run.

    python benchmarks/verify.py --work /a/folder/on/a/real/disk [--runs 5] [--cold] [--case ...]

The runs are made and compared as in `benchmarks/convert.py`, with full-size files. `cmp` reads the
file and a copy of it: as many bytes as the file and its folder. The page cache should hold three
times the file: 13 GB for SD1.5 in fp32, 21 GB for SDXL. With `--cold`, no run finds a file in the
page cache, as after a download or in a new machine. Where everything is cached, `verify` waits for
the import of diffusers, which the last row times.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

from convert import PYTHON, Case, ckptconv, compare, run, sample, spread


def main() -> None:
    """Runs the cases that were asked for and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a real disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache")
    parser.add_argument("--case", nargs="*", help="names of cases; all by default")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| case | ours | theirs | ratio | our memory | their memory | promised |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name, make in CASES.items():
        if not options.case or name in options.case:
            case = make(options.work)
            if options.cold:
                compare_cold(case, options.work, options.runs)
            else:
                compare(case, options.work, options.runs)


def compare_cold(case: Case, work: Path, runs: int) -> None:
    """Runs both commands of a case in turn, from the disk, and prints its row."""
    pairs = []
    for _ in range(runs):
        pair = []
        for command in (case.ours, case.theirs):
            evict(work)
            pair.append(run(command, work))
        pairs.append(pair)
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
    memory = [statistics.median(r.memory for r in side) / 1e6 for side in (ours, theirs)]
    print(
        f"| {case.name}, cold | {spread(ours)} | {spread(theirs)} ({case.their_name}) "
        f"| {ratio:.2f} | {memory[0]:,.0f} MB | {memory[1]:,.0f} MB | {case.promise} |",
        flush=True,
    )


def evict(work: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folder(work: Path, source: Path) -> Path:
    """Converts a file once."""
    out = source.with_suffix("")
    if not out.exists():
        subprocess.run(ckptconv("convert", source, out), check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return out


def verifying(architecture: str, name: str, *options: str) -> Callable[[Path], Case]:
    """`verify` of a folder against its file, against `cmp` of the file and a copy."""

    def make(work: Path) -> Case:
        source = sample(work, architecture, *options)
        copy = source.with_suffix(".copy")
        if not copy.exists():
            shutil.copy(source, copy)
        return Case(
            f"verify {name}",
            ckptconv("verify", source, folder(work, source)),
            ["cmp", str(source), str(copy)],
            "cmp",
            "at most 1.3",
        )

    return make


def exporting(architecture: str, name: str, *options: str) -> Callable[[Path], Case]:
    """`export` of a folder, against `cp` of the file that it gives."""

    def make(work: Path) -> Case:
        source = sample(work, architecture, *options)
        return Case(
            f"export {name}",
            ckptconv("export", folder(work, source), work / "out"),
            ["cp", str(source), str(work / "out")],
            "cp",
            "none",
        )

    return make


def importing(_work: Path) -> Case:
    """What `verify` cannot do without: asking the real classes."""
    classes = "from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
    theirs = [PYTHON, "-c", "import torch"]
    return Case("import of the classes", [PYTHON, "-c", classes], theirs, "import torch", "none")


SD1 = ("sd1", "SD1.5 fp32", "--dtype", "fp32")
CASES: dict[str, Callable[[Path], Case]] = {
    "verify-sd1": verifying(*SD1),
    "verify-sdxl": verifying("sdxl", "SDXL fp16"),
    "export-sd1": exporting(*SD1),
    "export-sdxl": exporting("sdxl", "SDXL fp16"),
    "import": importing,
}

if __name__ == "__main__":
    main()
