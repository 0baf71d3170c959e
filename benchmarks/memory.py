# SPDX-License-Identifier: Apache-2.0
"""Peak memory of every command at several sizes of the model, as the kernel saw it.

    python benchmarks/memory.py [--sizes 0.2,1,4] [--folder DIR] [--only merge,verify] [--limits | --tiny]

Models are random Llama shapes in bf16 that differ in their number of layers alone, with a rank-16 LoRA on every linear layer: what a
command takes beyond the largest matrix must not grow. The figure is VmHWM of a process of its own (`measure.run`). A size needs about
six times its bytes on the disk; commands that run the model, and ``--rank auto``, are left out from 1 GB on. With ``--limits``,
merges for eight workers, of two sizes of matrices, run under ``--memory-limit``, and all their processes together must stay within
it and the fixed cost. With ``--tiny``, tensors have at most 1 MB, and 5 and 125 layers tell what one tensor more takes, whatever its
bytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import run, versions
from shapes import Shape, write_adapter, write_base

SHAPE = Shape(2048, 1, 32, 4, 5632, 16000)
"""TinyLlama's layers, 88 MB each, and half its vocabulary: 2 layers are 0.24 GB, 45 are 4."""
SMALLER = Shape(1024, 1, 16, 4, 4096, 32000)
"""Matrices of which small limits leave room for several."""
TINY, FEW, MANY = Shape(256, 1, 4, 2, 512, 2000), 5, 125
PER_LAYER = 9  # tensors
HELD = 1.0
HOLDS = {"verify GRAPH", "run", "bench", "prompt bake --as kv", "eval", "extract-lora --rank auto"}
"""Commands that run the model, or take all singular values, and are not run with models of so many GB."""
FLAT = 1.10
"""How much more the largest model may take than the smallest."""
FIXED = 64 << 20
"""Bytes that a process takes before it does anything: Python and numpy."""

COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "base"],
    "inspect --html": ["inspect", "base", "--html", "page.html"],
    "report": ["report", "lora", "--base", "base"],
    "report --other-base": ["report", "lora", "--base", "base", "--other-base", "nf4"],
    "merge": ["merge", "base", "lora", "-o", "merged"],
    "merge --html": ["merge", "base", "lora", "-o", "out", "--html", "page.html"],
    "merge of two": ["merge", "base", "lora=0.5", "other=0.5", "-o", "out"],
    "merge --reversible": ["merge", "base", "lora", "-o", "out", "--reversible"],
    "verify": ["verify", "merged"],
    "verify --against": ["verify", "merged", "--against", "base"],
    "fingerprint": ["fingerprint", "merged"],
    "diff": ["diff", "base", "merged"],
    "diff --html": ["diff", "base", "merged", "--html", "page.html"],
    "diff of adapters": ["diff", "lora", "other"],
    "unmerge": ["unmerge", "merged", "lora", "-o", "out"],
    "extract-lora": ["extract-lora", "base", "merged", "-o", "out", "--rank", "16"],
    "extract-lora --rank auto": ["extract-lora", "base", "merged", "-o", "out", "--rank", "auto"],
    "merge --verify full": ["merge", "base", "lora", "-o", "out", "--verify", "full"],
    "merge --dtype fp16": ["merge", "base", "lora", "-o", "out", "--dtype", "fp16"],
    "layers": ["layers", "base", "--drop", "1", "-o", "out"],
    "export-onnx": ["export-onnx", "base", "-o", "plain"],
    "inspect GRAPH": ["inspect", "plain/model.onnx"],
    "convert GRAPH": ["convert", "plain/model.onnx", "--to", "safetensors", "-o", "out"],
    "merge into a graph": ["merge", "plain/model.onnx", "lora", "--base", "base", "-o", "out"],
    "insert into a graph": ["insert", "plain/model.onnx", "lora", "--base", "base", "-o", "out"],
    "insert --gated": ["insert", "plain/model.onnx", "lora", "--base", "base", "--gated", "-o", "out"],
    "export-onnx --swap": ["export-onnx", "base", "--swap", "lora", "-o", "slots"],
    "fold": ["fold", "slots/model.onnx", "slots/adapters/lora.onnx_adapter", "-o", "out"],
    "export-onnx BASE ADAPTER": ["export-onnx", "base", "lora", "-o", "graph"],
    "diff of graphs": ["diff", "plain/model.onnx", "graph/model.onnx"],
    "locate": ["locate", "graph/model.onnx", "--base", "base", "--adapter", "lora"],
    "verify GRAPH": ["verify", "graph", "--against", "base", "--adapter", "lora"],
    "run": ["run", "graph", "--ids", "1,2,3", "--max-new", "2"],
    "bench": ["bench", "graph", "--prompt-length", "8", "--new-tokens", "4"],
    "export-onnx --weights-type int4": ["export-onnx", "base", "-o", "out", "--weights-type", "int4"],
    "export-onnx --weights-type int8": ["export-onnx", "base", "-o", "out", "--weights-type", "int8"],
    "merge into NF4 as numbers": ["merge", "nf4", "lora", "-o", "out"],
    "merge into NF4": ["merge", "nf4", "lora", "-o", "out", "--quantized", "requantize"],
    "merge --quantized residual": ["merge", "nf4", "lora", "-o", "out", "--quantized", "residual"],
    "merge into fp8": ["merge", "fp8", "lora", "-o", "out", "--quantized", "requantize"],
    "insert --new prompt": ["insert", "base", "--new", "prompt", "--rank", "20", "-o", "tokens"],
    "prompt show": ["prompt", "show", "tokens", "--base", "base"],
    "prompt nearest": ["prompt", "nearest", "tokens", "base"],
    "prompt bake --as kv": ["prompt", "bake", "tokens", "base", "--as", "kv", "-o", "out"],
    "prompt bake": ["prompt", "bake", "tokens", "base", "-o", "out"],
    "insert --unmerged": ["insert", "base", "lora", "--unmerged", "-o", "out"],
    "check": ["check", "base", "lora"],
    "eval": ["eval", "base", "--ids", "ids.npy"],
    "apply": ["apply", "recipe.yaml", "-o", "out"],
    "convert": ["convert", "lora", "--to", "mlx", "-o", "out"],
    "convert --to compact": ["convert", "lora", "--to", "compact", "-o", "out"],
    "combine": ["combine", "lora=0.5", "lora=0.25", "-o", "out"],
    "combine of two": ["combine", "lora=0.5", "other=0.25", "-o", "out"],
    "resize": ["resize", "lora", "--rank", "8", "-o", "out"],
}
"""In order; ``merged``, ``plain``, ``slots``, ``graph`` and ``tokens`` are kept for those that follow."""
PLACES = {"base", "lora", "other", "merged", "out", "plain", "slots", "graph", "tokens", "nf4", "fp8"}
PLACES |= {"recipe.yaml", "page.html", "ids.npy"}
RECIPE = """\
steps:
  - {verb: combine, adapters: {LORA: 0.5}, as: half}
  - {verb: merge, base: BASE, adapters: {half: 1.0}, output: merged}
"""


LIMITED = {
    "merge": (25, 50, 100),
    "merge into NF4 as numbers": (25, 50, 100),
    "merge into NF4": (100, 200, 400),
    "merge into fp8": (100, 200, 400),
}
"""Merges alone have ``--memory-limit``; in MB, from little more than one weight takes."""


def under(limit: int, name: str) -> list[str]:
    """The words of a merge that may take so many MB, for more workers than these allow."""
    words = ["out" if word == "merged" else word for word in COMMANDS[name]]
    return [*words, "--workers", "8", "--memory-limit", f"{limit}MB"]


def layers_of(size: float, shape: Shape = SHAPE) -> int:
    """Layers of a model of so many GB."""
    one, two = shape.parameters, replace(shape, layers=2).parameters
    return max(2, round((size * 1e9 / 2 - one) / (two - one)) + 1)


def measured(work: Path, shape: Shape, chosen: dict[str, list[str]]) -> dict[str, int]:
    """Peak bytes by command."""
    size = 2 * shape.parameters / 1e9
    write_base(shape, work / "base", shards=max(2, round(size)))
    write_adapter(shape, work / "lora")
    write_adapter(shape, work / "other", seed=2)
    np.save(work / "ids.npy", np.arange(600) % shape.vocabulary)
    (work / "recipe.yaml").write_text(RECIPE.replace("BASE", f"{work}/base").replace("LORA", f"{work}/lora"))
    if any(format in words for words in chosen.values() for format in ("nf4", "fp8")):
        write_quantised(work)
    found = {}
    for name, words in chosen.items():
        if name in HOLDS and size >= HELD:
            continue
        places = [str(work / word) if re.split("[/=]", word)[0] in PLACES else word for word in words]
        command = [sys.executable, "-P", "-m", "surgery_cli", "-q", *places]
        found[name] = run(command, work / "log", children="--memory-limit" in words).peak
        print(f"{size:.2f} GB {name}: {found[name] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        shutil.rmtree(work / "out", ignore_errors=True)
        (work / "page.html").unlink(missing_ok=True)
    return found


def write_quantised(work: Path) -> None:
    """The base in two formats of codes, every layer with those of the first."""
    from quantised_merge import BNB, FP8, fp8, nf4, quantise

    quantise(work / "base", work / "nf4", _repeated(nf4), BNB)
    quantise(work / "base", work / "fp8", _repeated(fp8), FP8)


def _repeated(codes: Callable[[str, np.ndarray], dict[str, np.ndarray]]) -> Callable[..., dict[str, np.ndarray]]:
    """The same codes for a module of every layer: choosing them for 4 GB takes longer than all merges."""
    known: dict[str, dict[str, np.ndarray]] = {}

    def of_first(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        first = re.sub(r"layers\.\d+", "layers.0", name)
        if first not in known:
            known[first] = codes(first, values)
        return {name + key.removeprefix(first): array for key, array in known[first].items()}

    return of_first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.2,1", help="in GB")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--only", help="commands, by comma; merge is run in any case")
    parser.add_argument("--tiny", action="store_true", help="what a tensor more takes")
    parser.add_argument("--limits", action="store_true", help="merges alone, under memory limits")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(COMMANDS)
    chosen = {name: words for name, words in COMMANDS.items() if name in wanted or name == "merge"}
    if options.limits:
        chosen = {f"{name} within {mb} MB": under(mb, name) for name, limits in LIMITED.items() for mb in limits}
    sizes = [float(size) for size in options.sizes.split(",")]
    shapes = [replace(SHAPE, layers=layers_of(size)) for size in sizes]
    if options.limits:
        shapes = [replace(shape, layers=layers_of(size, shape)) for shape in (SMALLER, SHAPE) for size in sizes]
    if options.tiny:
        shapes = [replace(TINY, layers=layers) for layers in (FEW, MANY)]
    table: list[dict[str, int]] = []
    for shape in shapes:
        work = Path(tempfile.mkdtemp(prefix="surgery-memory-", dir=options.folder))
        try:
            table.append(measured(work, shape, chosen))
        finally:
            shutil.rmtree(work)
    print(versions("numpy"))
    heads = [f"{shape.layers} layers of {shape.hidden}, {2 * shape.parameters / 1e9:.2f} GB" for shape in shapes]
    print(f"| command | {' | '.join(heads)} | {'a tensor more' if options.tiny else 'growth'} |")
    print(f"| --- |{' ---: |' * (len(shapes) + 1)}")
    for name in chosen:
        peaks = [row[name] for row in table if name in row]
        growth = peaks[-1] / peaks[0] if peaks else 0.0
        told = f"{growth:.2f}{'' if growth <= FLAT else ' *'}"
        if options.tiny:
            told = f"{(peaks[-1] - peaks[0]) / 1e3 / PER_LAYER / (MANY - FEW):.1f} kB"
        cells = [f"{row[name] / 1e6:.0f} MB" if name in row else "" for row in table]
        print(f"| `{name}` | {' | '.join(cells)} | {told} |")
        if options.limits:
            assert max(peaks) <= int(name.split()[-2]) * 1e6 + FIXED, (name, peaks)


if __name__ == "__main__":
    main()
