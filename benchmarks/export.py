# SPDX-License-Identifier: Apache-2.0
"""Exporting Llama shapes of 150 M and 1.24 B parameters, beside onnxruntime-genai's builder and ``torch.onnx.export(dynamo=True)``.

    python benchmarks/export.py [--rounds 5] [--peers PYTHON] [--peer-rounds 1] [--shapes 150M,1.24B,70B] [--folder DIR]

Whole processes on warm files, in turn; ``call`` is the export alone, in a process that has imported what it needs. PYTHON is the
interpreter of an environment with onnxruntime-genai, torch, transformers and onnxscript; without it only this project's export runs.
Correctness is asserted inside: the graph of the smallest shape is run, and its logits are compared with those of the reference. 70B is a
header without data.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, Sample, add_against, environment, median, run, trees, versions
from shapes import LARGE, Shape, write_base

SHAPES = {"150M": Shape(1024, 8, 16, 4, 2816, 64128), "1.24B": LARGE}
HUGE = "70B"
CALL = """
import sys, time, onnx, numpy
from surgery import export_onnx
began = time.perf_counter()
result = export_onnx(sys.argv[1], output=sys.argv[1], target=sys.argv[2], weights="reference")
print("written", result.nbytes)
print("call", time.perf_counter() - began)
"""
GENAI = """
import runpy, sys, time, torch, transformers, onnx_ir
base, out = sys.argv[1:]
sys.argv[1:] = ["-i", base, "-o", out, "-p", "fp32", "-e", "cpu", "-c", out + "-cache"]
began = time.perf_counter()
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
print("call", time.perf_counter() - began)
"""
DYNAMO = """
import sys, time, os, torch, transformers
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
model.config.use_cache = False
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, ids):
        return self.model(input_ids=ids).logits
os.mkdir(sys.argv[2])
length = torch.export.Dim("length", min=2, max=4096)
torch.onnx.export(
    Logits(), (torch.ones(1, 8, dtype=torch.int64),), sys.argv[2] + "/model.onnx", dynamo=True, opset_version=23,
    external_data=True, dynamic_shapes=({1: length},),
)
print("call", time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="interpreter of an environment with the peers")
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--shapes", default="150M,1.24B,70B")
    parser.add_argument("--folder", type=Path, help="where to work; the peers need 12 GB at 1.24 B")
    add_against(parser)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    print(versions("onnx", "onnxruntime-gpu", "numpy"))
    print(f"{'shape':7} {'exporter':28} {'call s':>8} {'process s':>10} {'CPU s':>7} {'peak MB':>8} {'written MB':>11}")
    try:
        for name in options.shapes.split(","):
            base = work / name
            if name == HUGE:
                sys.path.insert(0, str(ROOT))
                from tests.support.header_only import llama

                llama(base, "70b", tied=False)
            else:
                write_base(SHAPES[name], base, shards=1)
                for file in ("tokenizer.json", "tokenizer_config.json"):  # the builder wants one; any does
                    shutil.copy(ROOT / "examples/base" / file, base)
            ours(name, base, options)
            if name == min(SHAPES, key=lambda one: SHAPES[one].parameters):
                check(base)
            if options.peers and name != HUGE:
                for label, script in (("onnxruntime-genai builder", GENAI), ("torch.onnx.export dynamo", DYNAMO)):
                    peer(
                        name, label, [options.peers, "-c", script, str(base), str(work / "out")], work / "out", options
                    )
            shutil.rmtree(base)
    finally:
        shutil.rmtree(work)


def row(shape: str, label: str, calls: list[float], samples: list, written: float) -> None:
    wall, cpu = (median([getattr(one, key) for one in samples]) for key in ("wall", "cpu"))
    peak = max(one.peak for one in samples) / 1e6
    print(
        f"{shape:7} {label:28} {median(calls):8.3f} {wall:10.2f} {cpu:7.2f} {peak:8.0f} {written / 1e6:11.2f}",
        flush=True,
    )


def ours(shape: str, base: Path, options: argparse.Namespace) -> None:
    """``surgery export-onnx --weights reference``, which only adds files; they are removed before each round."""
    log = base.with_suffix(".log")
    command = [sys.executable, "-P", "-m", "surgery_cli", "-q", "export-onnx", str(base), "-o", str(base)]
    checkouts = trees(options)
    for target in ("cpu", "cuda"):
        calls: dict[str, list[float]] = {name: [] for name in checkouts}
        samples: dict[str, list[Sample]] = {name: [] for name in checkouts}
        written = dict.fromkeys(checkouts, 0)
        for number in range(options.rounds + 1):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                clean(base)
                sample = run([*command, "--weights", "reference", "--target", target], log, tree=checkouts[name])
                clean(base)
                run([sys.executable, "-P", "-c", CALL, str(base), target], log, tree=checkouts[name])
                if number:  # the first one warms files
                    said = dict(line.split() for line in log.read_text().splitlines())
                    calls[name].append(float(said["call"]))
                    written[name] = int(said["written"])
                    samples[name].append(sample)
        for name in checkouts:
            row(shape, f"surgery --target {target}{name}", calls[name], samples[name], written[name])
    clean(base)


def clean(base: Path) -> None:
    """Remove what an export added."""
    for name in ("model.onnx", "prefill.onnx", "genai_config.json"):
        (base / name).unlink(missing_ok=True)


def peer(shape: str, label: str, command: list[str], out: Path, options: argparse.Namespace) -> None:
    calls, samples, written = [], [], 0
    for _ in range(options.peer_rounds):
        samples.append(run(command, out.with_suffix(".log")))
        said = out.with_suffix(".log").read_text().split("\n")
        calls.append(float(next(line for line in reversed(said) if line.startswith("call ")).split()[1]))
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        for folder in (out, Path(f"{out}-cache")):
            shutil.rmtree(folder, ignore_errors=True)
    row(shape, label, calls, samples, written)


CHECK = """
import sys
import numpy as np, onnxruntime as ort, torch
from surgery.reference import forward, open_reference
from surgery_formats.models.checkpoint import open_checkpoint
base = sys.argv[1]
ids = np.array([[5, 17, 3, 88, 42, 9]])
options = ort.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
session = ort.InferenceSession(base + "/model.onnx", options, providers=["CPUExecutionProvider"])
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
for one in session.get_inputs():
    if one.name.startswith("past"):
        feed[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
found = session.run(["logits"], feed)[0]
expected = forward(open_reference(open_checkpoint(base).main), torch.from_numpy(ids)).logits.numpy()
assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max()), np.abs(found - expected).max()
"""


def check(base: Path) -> None:
    """The graph computes what the reference computes."""
    export = [sys.executable, "-m", "surgery_cli", "-q", "export-onnx", str(base), "-o", str(base)]
    for command in (export, [sys.executable, "-c", CHECK, str(base)]):
        subprocess.run(command, env=environment(), check=True)
    clean(base)


if __name__ == "__main__":
    main()
