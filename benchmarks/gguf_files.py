"""Times conversions of a GGUF file of FLUX.1 against the gguf package's plain dequantization.

    python benchmarks/gguf_files.py --work /a/folder/on/a/real/disk [--runs 3] [--blocks 6 12]

The file has the header of FLUX.1 dev, with as many double and single blocks as asked for, all by
default, and matrices of random blocks. With `--sparse` it is a hole, and only the header is true.
Theirs maps the file, dequantizes one tensor after the other to float32, and writes nothing. The
folder of the whole model has 24 GB.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import PYTHON, Case, ckptconv, compare

PLAIN = """
import sys, gguf
for tensor in gguf.GGUFReader(sys.argv[1]).tensors:
    gguf.quants.dequantize(tensor.data, tensor.tensor_type)
"""
PREFIX = "model.diffusion_model."
PIECE = 1 << 20


def main() -> None:
    """Makes a file for each dtype, and prints a row of a Markdown table for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a real disk")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single")
    parser.add_argument("--dtype", nargs="*", default=["Q4_K", "Q8_0"])
    parser.add_argument("--sparse", action="store_true", help="write no data")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| case | ours | theirs | ratio | our memory | their memory | promised |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for dtype in options.dtype:
        file, out = options.work / f"flux-{dtype}.gguf", options.work / "out"
        size = make(file, dtype, options.blocks, sparse=options.sparse)
        ours = ckptconv("convert", file, out, "--dtype", "bf16", "--ignore-zeros")
        name = f"FLUX.1 dev {dtype}, {size / 1e9:.1f} GB, to bf16"
        theirs = [PYTHON, "-c", PLAIN, str(file)]
        case = Case(name, ours, theirs, "gguf, nothing written", "under 300 MB")
        compare(case, options.work, options.runs)
        file.unlink()


def make(path: Path, dtype: str, blocks: tuple[int, int], *, sparse: bool) -> int:
    """Writes a file and returns its size."""
    import gguf
    import numpy as np

    writer: Any = gguf.GGUFWriter(path, "flux")
    sizes = []
    for key, shape in tensors(blocks):
        kind = gguf.GGMLQuantizationType[dtype if len(shape) > 1 else "F32"]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % values:
            kind, values, size = gguf.GGMLQuantizationType.F32, 1, 4
        nbytes = math.prod(shape) // values * size
        rows = (*shape[:-1], shape[-1] // values * size) if values > 1 else shape
        stored = np.uint8 if values > 1 else np.float32
        writer.add_tensor_info(key, rows, np.dtype(stored), nbytes, kind)
        sizes.append(nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.default_rng(0)
    with path.open("r+b") as file:
        end = -(-file.seek(0, 2) // 32) * 32
        for nbytes in sizes:
            file.seek(end)
            for done in range(0, 0 if sparse else nbytes, PIECE):
                # Small bytes: whatever is read in them as a float is finite.
                data = rng.integers(0, 0x30, min(PIECE, nbytes - done), dtype=np.uint8)
                file.write(data.tobytes())
            end += -(-nbytes // 32) * 32
        file.truncate(end)
    return end


def tensors(blocks: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of FLUX.1 dev's transformer, with the first of its blocks."""
    from ckptconv.maps.architecture import bundled

    most = dict(zip(("double_blocks", "single_blocks"), blocks, strict=True))
    for name, info in bundled().architectures["flux"].layout().tensors.items():
        key = name.removeprefix(PREFIX)
        kind, _, rest = key.partition(".")
        if key != name and int(rest.partition(".")[0] if kind in most else 0) < most.get(kind, 1):
            yield key, info.shape


if __name__ == "__main__":
    main()
