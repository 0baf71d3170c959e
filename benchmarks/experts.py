# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on a CPU: all experts of a layer in one operator beside each by itself.

    python benchmarks/experts.py [--weights-type int4|stored] [--rounds 15] [--threads 1] [--folder DIR]

Random models in bfloat16, of 64 and of 8 experts, as graphs of codes of 4 bits, or of weights as stored. Both graphs run in turn
in one process, so that what else the machine does slows both alike; medians and their ratio are printed. Their logits are
asserted to be equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from measure import ROOT, median, versions

sys.path[:0] = [str(ROOT)]
import surgery
from tests.oracles import recipes

_SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 4, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024},
}
STEPS = {"a token behind 64": (1, 64), "a prompt of 128": (128, 0)}
WAYS = ("fused", "apart")


def session(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession, float]:
    """A graph, and the seconds that it took to load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    start = time.perf_counter()
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return opened, time.perf_counter() - start


def feed(graph: onnxruntime.InferenceSession, new: int, past: int) -> dict[str, Any]:
    """Inputs of one row; the past is of zeros."""
    ids = np.random.default_rng(1).integers(0, _SIZES["vocab_size"], (1, new))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones((1, new + past), np.int64)}
    empty = np.zeros((1, _SIZES["num_key_value_heads"], past, _SIZES["head_dim"]), np.float32)
    return inputs | {one.name: empty for one in graph.get_inputs() if one.name.startswith("past")}


def compare(name: str, folder: Path, kind: str, rounds: int, threads: int) -> None:
    """Print both graphs' figures of one model."""
    base = recipes.build(name, folder / name, dtype=torch.bfloat16, **_SIZES, **MODELS[name])
    graphs, loaded = {}, {}
    for way in WAYS:
        surgery.export_onnx(base, output=folder / f"{name}-{way}", weights_type=kind, experts=way)
        graphs[way], loaded[way] = session(folder / f"{name}-{way}" / "model.onnx", threads)
    print(f"| {name} | loading | " + " | ".join(f"{loaded[way] * 1e3:.0f}" for way in WAYS) + " | |")
    for label, (new, past) in STEPS.items():
        inputs = feed(graphs["fused"], new, past)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        logits = {}
        for _ in range(rounds):
            for way in WAYS:
                start = time.perf_counter()
                logits[way] = graphs[way].run(["logits"], inputs)[0]
                seconds[way].append(time.perf_counter() - start)
        assert np.abs(logits["fused"] - logits["apart"]).max() <= 1e-4 * np.abs(logits["apart"]).max()
        one, each = (median(seconds[way]) * 1e3 for way in WAYS)
        print(f"| {name} | {label} | {one:.2f} | {each:.2f} | {one / each:.2f} |")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-type", choices=["int4", "stored"], default="int4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}, {versions('numpy')}")
    print("| model | | one operator, ms | each by itself, ms | ratio |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        for name in MODELS:
            compare(name, Path(work), options.weights_type, options.rounds, options.threads)


if __name__ == "__main__":
    main()
