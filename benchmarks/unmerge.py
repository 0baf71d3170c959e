# SPDX-License-Identifier: Apache-2.0
"""What a reversible merge keeps, how long that takes, drift over cycles, and adapters found beyond rounding.

    python benchmarks/unmerge.py sizes                       # by kind and stored type, one matrix of 4096 x 4096
    python benchmarks/unmerge.py model [--rounds 3]          # a rank-16 LoRA in 1.24 B bf16: sizes, seconds, memory
    python benchmarks/unmerge.py cycles [--count 1000]       # merge and take back, again and again
    python benchmarks/unmerge.py found                       # the LoRA of a merge: plain factors and refined ones

Every base that comes back is compared with what it was, byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from measure import ROOT, Sample, median, run, versions
from safetensors.numpy import save_file
from shapes import LARGE, write_adapter, write_base

import surgery
from surgery.verbs.extract_lora import extract_lora
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.updates import LoRA

sys.path.insert(0, str(ROOT / "benchmarks"))
import updates

MODULE = "model.layers.0.self_attn.q_proj"
NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def one_matrix(folder: Path, values: np.ndarray) -> Path:
    """A model of one matrix."""
    folder.mkdir()
    save_file({f"{MODULE}.weight": values}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def size(path: Path) -> int:
    return path.stat().st_size


def same(base: Path, back: Path) -> None:
    for path in base.iterdir():
        assert filecmp.cmp(path, back / path.name, shallow=False), path.name


def sizes(work: Path, options: argparse.Namespace) -> None:
    print("| update | of the weight | bf16 | fp16 | fp32 | adapter, of the bf16 weight |")
    print("|---|---|---|---|---|---|")
    (work / "store").mkdir()
    store = updates.Store(work / "store")
    values = np.random.default_rng(0).normal(0, 0.02, (updates.SIDE, updates.SIDE)).astype(np.float32)
    bases = {name: one_matrix(work / name, values.astype(dtype)) for name, dtype in NUMPY.items()}
    for name, update in updates.made(store):
        site = Site(f"{MODULE}.weight", module_kind="linear")
        path = update.tensors[0].path
        assert path is not None
        adapter = Adapter(path, "bench", update.kind, {site: (update,)}, update.tensors)
        cells, change = [], 0.0
        for stored, base in bases.items():
            result = surgery.merge(base, adapter, output=work / "out", reversible=True)
            if stored == "fp32":
                after = surgery.open(work / "out").main.tensors[f"{MODULE}.weight"].read()
                change = float(np.linalg.norm(after - values) / np.linalg.norm(values))
            surgery.unmerge(work / "out", adapter, output=work / "back")
            same(base, work / "back")
            cells.append(f"{result.rounding_nbytes / size(base / 'model.safetensors'):.2%}")
            shutil.rmtree(work / "out")
            shutil.rmtree(work / "back")
        trained = sum(tensor.nbytes for tensor in update.tensors) / size(bases["bf16"] / "model.safetensors")
        print(f"| {name} | {change:.1%} | {' | '.join(cells)} | {trained:.2%} |", flush=True)


def model(work: Path, options: argparse.Namespace) -> None:
    base, adapter, out, back = (work / name for name in ("base", "adapter", "out", "back"))
    write_base(LARGE, base)
    write_adapter(LARGE, adapter)
    weights = sum(size(file) for file in base.glob("*.safetensors"))
    print(
        f"{LARGE.parameters / 1e9:.2f} B parameters, bf16; adapter {size(adapter / 'adapter_model.safetensors') / 1e6:.0f} MB\n"
    )
    print(
        "| update, of the weights | kept, MB | of the model | merge, s | reversible, s | unmerge, s | processor, s | peak memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    tool = [sys.executable, "-P", "-m", "surgery_cli", "-q"]
    for share in (0.0625, 0.1875, 1.0):
        weighted = f"{adapter}={share}"
        samples: dict[str, list[Sample]] = {"merge": [], "reversible": [], "unmerge": []}
        for _ in range(options.rounds):
            samples["merge"].append(run([*tool, "merge", str(base), weighted, "-o", str(out)], work / "log"))
            shutil.rmtree(out)
            command = [*tool, "merge", str(base), weighted, "-o", str(out), "--reversible"]
            samples["reversible"].append(run(command, work / "log"))
            samples["unmerge"].append(run([*tool, "unmerge", str(out), weighted, "-o", str(back)], work / "log"))
            same(base, back)
            kept = size(out / "base.rounding")
            shutil.rmtree(out)
            shutil.rmtree(back)
        change = share * 2 * 4 * 0.02**2 / 0.02
        walls = " | ".join(f"{median([s.wall for s in found]):.1f}" for found in samples.values())
        cpus = " / ".join(f"{median([s.cpu for s in found]):.1f}" for found in samples.values())
        peaks = " / ".join(f"{max(s.peak for s in found) / 1e6:.0f}" for found in samples.values())
        print(f"| {change:.1%} | {kept / 1e6:.1f} | {kept / weights:.2%} | {walls} | {cpus} | {peaks} |", flush=True)


def cycles(work: Path, options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    base = one_matrix(work / "base", rng.normal(0, 0.02, (256, 256)).astype(ml_dtypes.bfloat16))
    lora = small_lora(work / "lora", rng.normal(0, 0.02, (8, 256)), rng.normal(0, 0.02, (256, 8)))
    delta = np.float32(8 * 0.02**2) * rng.normal(size=(256, 256)).astype(np.float32)
    stored = surgery.open(base).main.tensors[f"{MODULE}.weight"].read()
    usual, now = stored.copy(), base
    for number in range(options.count):
        surgery.merge(now, lora, output=work / "out", reversible=True)
        surgery.unmerge(work / "out", lora, output=work / f"back{number}")
        same(base, work / f"back{number}")
        shutil.rmtree(work / "out")
        if now is not base:
            shutil.rmtree(now)
        now = work / f"back{number}"
        usual = (usual.astype(np.float32) + delta).astype(stored.dtype)
        usual = (usual.astype(np.float32) - delta).astype(stored.dtype)
    drift = abs(usual.astype(np.float32) - stored.astype(np.float32))
    print(f"{options.count} cycles of merge and unmerge: drift 0, every file the same")
    print(
        f"adding and subtracting in bf16: drift {drift.max():.1e}, {(usual != stored).mean():.1%} of the weights changed"
    )


def small_lora(folder: Path, A: np.ndarray, B: np.ndarray) -> Path:
    folder.mkdir()
    key = f"base_model.model.{MODULE}"
    arrays = {f"{key}.lora_A.weight": A.astype(np.float32), f"{key}.lora_B.weight": B.astype(np.float32)}
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": len(A), "lora_alpha": len(A), "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def found(work: Path, options: argparse.Namespace) -> None:
    print("| update, in units of the last place | plain factors | refined | times | reproduced, plain | refined |")
    print("|---|---|---|---|---|---|")
    rng, side, rank = np.random.default_rng(0), 1024, 16
    base = one_matrix(work / "base", rng.normal(0, 0.02, (side, side)).astype(ml_dtypes.bfloat16))
    for steps in (0.1, 0.2, 0.5, 1, 2, 4, 16):
        A, B = rng.normal(size=(rank, side)), rng.normal(size=(side, rank))
        B *= steps * 2.0**-13 / np.sqrt(((B @ A) ** 2).mean())
        lora = small_lora(work / f"lora{steps}", A, B)
        surgery.merge(base, lora, output=work / "merged")
        extract_lora(base, work / "merged", output=work / "plain", rank=rank, dtype="fp32", kind="lora")
        result = surgery.unmerge(base, work / "merged", output=work / "refined", rank=rank)
        true, errors = delta_of(lora), []
        for name in ("plain", "refined"):
            errors.append(float(np.linalg.norm(delta_of(work / name) - true) / np.linalg.norm(true)))
            shutil.rmtree(work / name)
        shutil.rmtree(work / "merged")
        assert isinstance(result, surgery.ExtractResult)
        assert result.reproduced is not None
        print(
            f"| {steps:g} | {errors[0]:.2%} | {errors[1]:.2%} | {errors[0] / errors[1]:.1f} | "
            f"{result.reproduced[0]:.1%} | {result.reproduced[1]:.1%} |",
            flush=True,
        )


def delta_of(adapter: Path) -> np.ndarray:
    (chain,) = read_adapter(adapter).updates.values()
    (update,) = chain
    assert isinstance(update, LoRA)
    return update.delta(DType.F64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = {"sizes": sizes, "model": model, "cycles": cycles, "found": found}
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to work; a model needs 10 GB")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    try:
        jobs[options.what](work, options)
    finally:
        shutil.rmtree(work)
    print(f"\n{versions('numpy', 'ml_dtypes', 'safetensors')}")


if __name__ == "__main__":
    main()
