# SPDX-License-Identifier: Apache-2.0
"""Processor seconds and memory of commands for models of many tiny tensors in many shards: per tensor neither may grow.

    python benchmarks/linear.py [--tensors 1000,10000,100000] [--shards 10] [--folder DIR] [--only merge,diff]

Models are Llama shapes of random bf16 that differ in their number of layers alone, nine tensors in each, with a rank-1 LoRA on every
linear layer. ``--shards`` says how many tensors lie in a file. ``+ms`` is what one tensor more takes from a size to the next, since a
start takes as long for any model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from measure import Sample, run, versions
from shapes import Shape, write_adapter, write_base

SHAPE = Shape(16, 1, 2, 1, 32, 64)
PER_LAYER = 9
_PLACES = {"base", "lora", "wide", "merged", "out", "out.safetensors"}

COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "base"],
    "report": ["report", "lora", "--base", "base"],
    "check": ["check", "base", "lora"],
    "merge --dry-run": ["merge", "base", "lora", "--dry-run"],
    "merge": ["merge", "base", "lora", "-o", "merged"],
    "verify": ["verify", "merged"],
    "verify --against": ["verify", "merged", "--against", "base"],
    "fingerprint": ["fingerprint", "merged"],
    "diff": ["diff", "base", "merged"],
    "unmerge": ["unmerge", "merged", "lora", "-o", "out"],
    "extract-lora": ["extract-lora", "base", "merged", "-o", "out", "--rank", "1"],
    "layers": ["layers", "base", "--drop", "1", "-o", "out"],
    "export-onnx": ["export-onnx", "base", "-o", "out"],
    "convert": ["convert", "lora", "--to", "mlx", "-o", "out"],
    "convert --base": ["convert", "lora", "--to", "torchtune", "--base", "base", "-o", "out"],
    "convert --to compact": ["convert", "lora", "--to", "compact", "-o", "out"],
    "combine": ["combine", "lora=0.5", "lora=0.25", "-o", "out"],
    "resize": ["resize", "wide", "--rank", "1", "-o", "out"],
    "diff of adapters": ["diff", "lora", "wide"],
}
"""In order; ``merged`` is kept for those that follow."""


def measured(work: Path, tensors: int, per_shard: int, chosen: dict[str, list[str]]) -> dict[str, Sample]:
    """Every command, by name."""
    shape = replace(SHAPE, layers=max(2, tensors // PER_LAYER))
    write_base(shape, work / "base", shards=max(1, tensors // per_shard))
    write_adapter(shape, work / "lora", rank=1)
    write_adapter(shape, work / "wide", rank=2)
    found = {}
    for name, words in chosen.items():
        paths = [words[0], *(str(work / word) if word.split("=")[0] in _PLACES else word for word in words[1:])]
        found[name] = run([sys.executable, "-P", "-m", "surgery_cli", "-q", *paths], work / "log")
        print(
            f"{tensors} {name}: {found[name].cpu:.1f} s, {found[name].peak / 1e6:.0f} MB", file=sys.stderr, flush=True
        )
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "out.safetensors").unlink(missing_ok=True)
    return found


def cells(samples: list[Sample], sizes: list[int]) -> list[str]:
    """Seconds and MB of each size, and the time of one tensor more from each to the next."""
    found = [f"{sample.cpu:.1f} s, {sample.peak / 1e6:.0f} MB" for sample in samples]
    steps = zip(samples, samples[1:], sizes, sizes[1:], strict=False)
    more = [(after.cpu - before.cpu) * 1e3 / (large - small) for before, after, small, large in steps]
    return [*found, *(f"{one:.2f}" for one in more)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", default="1000,10000,100000")
    parser.add_argument("--shards", type=int, default=10, help="tensors in a file")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--only", help="commands, by comma; merge is run in any case")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(COMMANDS)
    chosen = {name: words for name, words in COMMANDS.items() if name in wanted or name == "merge"}
    sizes = [int(size) for size in options.tensors.split(",")]
    table: list[dict[str, Sample]] = []
    for size in sizes:
        work = Path(tempfile.mkdtemp(prefix="surgery-linear-", dir=options.folder))
        try:
            table.append(measured(work, size, options.shards, chosen))
        finally:
            shutil.rmtree(work)
    print(versions("numpy"))
    steps = [f"+ms to {size:,}" for size in sizes[1:]]
    print(f"| command | {' | '.join([*(f'{size:,}' for size in sizes), *steps])} |")
    print(f"| --- |{' ---: |' * (2 * len(sizes) - 1)}")
    for name in chosen:
        print(f"| `{name}` | {' | '.join(cells([row[name] for row in table], sizes))} |")


if __name__ == "__main__":
    main()
