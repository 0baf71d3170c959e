# SPDX-License-Identifier: Apache-2.0
"""Merging a rank-16 LoRA on all linear layers into NF4 and block fp8, 1.24 B shape, beside the merge into bf16 and beside PEFT.

    python benchmarks/quantised_merge.py [--rounds 3] [--pause 5] [--folder DIR] [--peft PYTHON]

Every round runs each contender once, in turn, on warm files, as whole processes. What the merges wrote is compared with numbers
decoded here, by the formats' definitions and not by the package's codecs. PYTHON has transformers, PEFT and bitsandbytes: it loads
the NF4 folder, merges and saves, as PEFT does it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from measure import Sample, median, run, versions
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from shapes import LARGE, LINEAR, SMALL, Shape, write_adapter, write_base

BLOCK = 64
# QLoRA, appendix E (arXiv:2305.14314)
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
PEFT = """
import sys, torch, transformers, peft, safetensors.torch
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu")
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
safetensors.torch.save_model(model, sys.argv[3])
"""  # not save_pretrained: transformers 5.23 cannot save a model that it loaded in 4 bits
BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
Tensors = dict[str, np.ndarray]


def nf4(name: str, values: np.ndarray) -> Tensors:
    blocks = values.reshape(-1, BLOCK)
    absmax = abs(blocks).max(1)
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, blocks / absmax[:, None]).astype(np.uint8).reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(values.shape)}
    return {
        name: (codes[:, :1] << 4) | codes[:, 1:],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4,
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def fp8(name: str, values: np.ndarray) -> Tensors:
    rows, columns = (size // 128 for size in values.shape)
    blocks = values.reshape(rows, 128, columns, 128)
    scales = abs(blocks).max((1, 3)) / np.float32(448)
    codes = (blocks / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn).reshape(values.shape)
    return {name: codes, f"{name}_scale_inv": scales}


def decoded(found: Mapping[str, np.ndarray], name: str, shape: tuple[int, int]) -> np.ndarray:
    """The weight in float64, of any of the three formats."""
    if f"{name}.absmax" in found:
        bytes_ = found[name].ravel()
        codes = np.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1, BLOCK)
        return (NF4[codes] * found[f"{name}.absmax"][:, None]).astype(np.float64).reshape(shape)
    values = found[name].astype(np.float64)
    if f"{name}_scale_inv" in found:
        values *= np.kron(found[f"{name}_scale_inv"].astype(np.float64), np.ones((128, 128)))
    return values


def quantise(
    base: Path, folder: Path, tensors: Callable[[str, np.ndarray], Tensors], method: Mapping[str, object]
) -> None:
    """A bf16 folder with its linear layers in a format."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in sorted(base.glob("*.safetensors")):
        found: Tensors = {}
        for name, values in load_file(shard).items():  # of torch: numpy's reader gives no numbers for bfloat16
            plain = {name: values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)}
            found |= tensors(name, values.float().numpy()) if "_proj" in name else plain
        save_file(found, folder / shard.name, {"format": "pt"})
        weight_map |= dict.fromkeys(found, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(method)}))


def stored(folder: Path, stem: str) -> Tensors:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name in (name for name in index if name.startswith(stem)):
        with safe_open(folder / index[name], "pt") as opened:
            tensor = opened.get_tensor(name)
            found[name] = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
    return found


def updates(shape: Shape, adapter: Path) -> Iterator[tuple[str, np.ndarray]]:
    with safe_open(adapter / "adapter_model.safetensors", "np") as factors:
        for layer, module in ((0, LINEAR[0]), (shape.layers // 2, LINEAR[4]), (shape.layers - 1, LINEAR[6])):
            stem = f"model.layers.{layer}.{module}"
            a, b = (factors.get_tensor(f"base_model.model.{stem}.lora_{k}.weight").astype(np.float64) for k in "AB")
            yield f"{stem}.weight", 2.0 * (b @ a)


def check(shape: Shape, base: Path, adapter: Path, out: Path, way: str) -> float:
    """Three weights against float64; the least share of the update that codes hold."""
    least = 1.0
    for name, update in updates(shape, adapter):
        before = decoded(stored(base, name), name, update.shape)
        found = stored(out, name)
        after = decoded(found, name, update.shape)
        if way == "requantize":
            least = min(least, float(((after - before) * update).sum() / (update * update).sum()))
            assert sorted(found) == sorted(stored(base, name)), name
            continue
        ulp = np.exp2(np.frexp(np.maximum(abs(before + update), abs(before)))[1] - 8.0)
        sums = 2e-9  # what float32 loses of the sixteen products: more than a unit where the update is nearly 0 and its weight is 0
        assert float((abs(after - before - update) - 0.51 * ulp).max()) <= sums, name
        assert list(found) == [name]
    assert least >= 0.5, least
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--folder", type=Path, help="where to work; needs 20 GB")
    parser.add_argument("--peft", help="a python with transformers, peft and bitsandbytes; runs once")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    try:
        bench(work, options)
    finally:
        shutil.rmtree(work)


def bench(work: Path, options: argparse.Namespace) -> None:
    for size, shape in (("large", LARGE), ("small", SMALL)):
        write_base(shape, work / size / "bf16")
        write_adapter(shape, work / size / "adapter")
        quantise(work / size / "bf16", work / size / "nf4", nf4, BNB)
        quantise(work / size / "bf16", work / size / "fp8", fp8, FP8)
    contenders = {
        "bf16": ("large", "bf16", "dequantize"),
        "NF4 to bf16": ("large", "nf4", "dequantize"),
        "NF4 to NF4": ("large", "nf4", "requantize"),
        "NF4 to NF4, nearest": ("large", "nf4", "requantize"),
        "NF4 and a residual LoRA": ("large", "nf4", "residual"),
        "fp8 to bf16": ("large", "fp8", "dequantize"),
        "fp8 to fp8": ("large", "fp8", "requantize"),
        "NF4 to NF4, a quarter the size": ("small", "nf4", "requantize"),
    }
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    kept: dict[str, float] = {}
    out = work / "out"
    for number in range(options.rounds + 1):  # the first warms files and memory, is checked, and is not counted
        for name, (size, base, way) in contenders.items():
            time.sleep(options.pause)
            command = [sys.executable, "-P", "-m", "surgery_cli", "-q", "merge", str(work / size / base)]
            command += [str(work / size / "adapter"), "-o", str(out)]
            command += ["--quantized", way] if base != "bf16" else []
            command += ["--rounding", "nearest", "--accept-loss"] if name.endswith("nearest") else []
            sample = run(command, work / "log")
            print(f"{name}: {sample.wall:.2f} s, {sample.peak / 1e6:.0f} MB", file=sys.stderr, flush=True)
            if number:
                samples[name].append(sample)
            elif way != "residual":
                shape = LARGE if size == "large" else SMALL
                check_way = "dequantize" if name.endswith("bf16") else way
                kept[name] = check(shape, work / size / base, work / size / "adapter", out, check_way)
            shutil.rmtree(out)
    peft = None
    if options.peft:
        command = [options.peft, "-c", PEFT, *(str(work / "large" / part) for part in ("nf4", "adapter")), str(out)]
        peft = run(command, work / "log", {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
        out.unlink()
    report(samples, kept, peft)


def report(samples: dict[str, list[Sample]], kept: Mapping[str, float], peft: Sample | None) -> None:
    walls = {name: median([sample.wall for sample in found]) for name, found in samples.items()}
    print(f"{LARGE.parameters / 1e9:.2f} B parameters, 3 shards, rank 16 on all linear layers\n")
    print("| merge | wall, s (median, min-max) | against bf16 | processor, s | peak memory, MB | least share kept |")
    print("|---|---|---|---|---|---|")
    for name, found in samples.items():
        span = f"{walls[name]:.2f} ({min(s.wall for s in found):.2f}-{max(s.wall for s in found):.2f})"
        peak = max(sample.peak for sample in found) / 1e6
        cpu = median([sample.cpu for sample in found])
        share = f"{kept[name]:.3f}" if name in kept else ""
        print(f"| {name} | {span} | {walls[name] / walls['bf16']:.2f}x | {cpu:.1f} | {peak:.0f} | {share} |")
    if peft is not None:
        against = f"{peft.wall / walls['bf16']:.1f}x | {peft.cpu:.1f} | {peft.peak / 1e6:.0f}"
        print(f"| PEFT into bitsandbytes' layers | {peft.wall:.1f} | {against} | |")
        print(f"\nPEFT takes {peft.wall / walls['NF4 to NF4']:.1f} times as long as the merge of NF4 to NF4.")
    print(f"\n{versions('numpy', 'safetensors')}")


if __name__ == "__main__":
    main()
