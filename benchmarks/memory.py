# SPDX-License-Identifier: Apache-2.0
"""Peak memory of every command at several sizes of the model, as the kernel saw it.

    python benchmarks/memory.py [--sizes 0.2,1,4] [--folder DIR] [--only merge,verify] [--limit 100MB]

Models are random Llama shapes in bf16 that differ in their number of layers alone, with a rank-16 LoRA on every linear layer: what a
command takes beyond the largest matrix must not grow. The figure is VmHWM of a process of its own (`measure.run`). A size needs about
three times its bytes on the disk. With ``--limit``, merges run under ``--memory-limit`` and must stay within it and the fixed cost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measure import run, versions
from shapes import Shape, write_adapter, write_base

SHAPE = Shape(1024, 1, 16, 4, 4096, 32000)
FLAT = 1.10
"""How much more the largest model may take than the smallest."""
FIXED = 64 << 20
"""Bytes that a process takes before it does anything: Python and numpy."""

COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "base"],
    "report": ["report", "lora", "--base", "base"],
    "merge": ["merge", "base", "lora", "-o", "merged"],
    "verify": ["verify", "merged"],
    "verify --against": ["verify", "merged", "--against", "base"],
    "fingerprint": ["fingerprint", "merged"],
    "diff": ["diff", "base", "merged"],
    "unmerge": ["unmerge", "merged", "lora", "-o", "out"],
    "extract-lora": ["extract-lora", "base", "merged", "-o", "out", "--rank", "16"],
    "merge --verify full": ["merge", "base", "lora", "-o", "out", "--verify", "full"],
    "merge --dtype fp16": ["merge", "base", "lora", "-o", "out", "--dtype", "fp16"],
    "layers": ["layers", "base", "--drop", "1", "-o", "out"],
    "export-onnx": ["export-onnx", "base", "-o", "out"],
    "export-onnx --swap": ["export-onnx", "base", "--swap", "lora", "-o", "out"],
    "convert": ["convert", "lora", "--to", "mlx", "-o", "out"],
    "convert --to compact": ["convert", "lora", "--to", "compact", "-o", "out"],
    "combine": ["combine", "lora=0.5", "lora=0.25", "-o", "out"],
    "resize": ["resize", "lora", "--rank", "8", "-o", "out"],
}
"""In order; ``merged`` is kept for those that follow."""


def layers_of(size: float) -> int:
    """Layers of a model of so many GB."""
    one, two = SHAPE.parameters, replace(SHAPE, layers=2).parameters
    return max(2, round((size * 1e9 / 2 - one) / (two - one)) + 1)


def measured(work: Path, size: float, chosen: dict[str, list[str]]) -> dict[str, int]:
    """Peak bytes by command."""
    shape = replace(SHAPE, layers=layers_of(size))
    write_base(shape, work / "base", shards=max(2, round(size)))
    write_adapter(shape, work / "lora")
    found = {}
    for name, words in chosen.items():
        places = [str(work / word) if word in ("base", "merged", "out") else word for word in words]
        places = [word.replace("lora", str(work / "lora")) if word.startswith("lora") else word for word in places]
        found[name] = run([sys.executable, "-P", "-m", "surgery_cli", "-q", *places], work / "log").peak
        shutil.rmtree(work / "out", ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.2,1", help="in GB")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--only", help="commands, by comma; merge is run in any case")
    parser.add_argument("--limit", type=int, help="MB: merges alone, under this memory limit")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(COMMANDS)
    chosen = {name: words for name, words in COMMANDS.items() if name in wanted or name == "merge"}
    if options.limit:
        limit = ["--memory-limit", f"{options.limit}MB"]
        chosen = {f"{name} {' '.join(limit)}": [*words, *limit] for name, words in chosen.items() if name == "merge"}
    sizes = [float(size) for size in options.sizes.split(",")]
    table: list[dict[str, int]] = []
    for size in sizes:
        work = Path(tempfile.mkdtemp(prefix="surgery-memory-", dir=options.folder))
        try:
            table.append(measured(work, size, chosen))
        finally:
            shutil.rmtree(work)
    print(versions("numpy"))
    print(f"| command | {' | '.join(f'{size:g} GB' for size in sizes)} | growth |")
    print(f"| --- |{' ---: |' * (len(sizes) + 1)}")
    for name in chosen:
        peaks = [row[name] for row in table]
        growth = peaks[-1] / peaks[0]
        mark = "" if growth <= FLAT else " *"
        print(f"| `{name}` | {' | '.join(f'{peak / 1e6:.0f} MB' for peak in peaks)} | {growth:.2f}{mark} |")
        if options.limit:
            assert max(peaks) <= options.limit * 1e6 + FIXED, (name, peaks)


if __name__ == "__main__":
    main()
