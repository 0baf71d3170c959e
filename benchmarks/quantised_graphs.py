# SPDX-License-Identifier: Apache-2.0
"""Graphs of codes: bits per byte of the example by bits, rounding and budget, beside onnxruntime-genai's builder and quantiser.

    python benchmarks/quantised_graphs.py [--part quality merged peers] [--peers PYTHON] [--shapes 150M] [--folder DIR]

The example's texts are cut in halves: inputs for calibrations are recorded on the first, the second is scored as
`examples/evaluate.py` does. Every graph is run by onnxruntime; every order that the tables claim is asserted. PYTHON is the
interpreter of an environment with onnxruntime-genai, torch, transformers and onnx-ir; its graphs of 4 bits are made of the same
checkpoints, and their logits compared with those of the checkpoint's own values.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from measure import ROOT, Sample, run, versions
from safetensors.torch import save_file
from shapes import LARGE, Shape, write_base

sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]
import calibrate
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"
SHAPES = {"150M": Shape(1024, 8, 16, 4, 2816, 64128), "1.24B": LARGE}
INT4: dict[str, Any] = {"weights_type": "int4"}
SCHEMES: dict[str, dict[str, Any]] = {
    "as stored": {},  # bfloat16, computed in float32
    "int8": {"weights_type": "int8"},
    "int4, nearest": INT4,
    "int4, nearest, asymmetric": {**INT4, "symmetric": False},
    "int4, scales searched": {**INT4, "scales": "search"},
    "int4, feedback": {**INT4, "calibration": "inputs"},
    "int4, feedback, scales searched": {**INT4, "calibration": "inputs", "scales": "search"},
    "int4, feedback, searched, asymmetric": {**INT4, "calibration": "inputs", "scales": "search", "symmetric": False},
    "int4, head of 8 bits": {**INT4, "head": "int8"},
    "mixed, nearest": {"weights_type": "mixed"},
    "mixed, feedback, scales searched": {"weights_type": "mixed", "calibration": "inputs", "scales": "search"},
}
BUILDER = """
import runpy, sys
base, out = sys.argv[1:]
sys.argv[1:] = ["-i", base, "-o", out, "-p", "int4", "-e", "cpu", "-c", out + "-cache"]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""
QUANTISER = """
import onnx, sys
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
quantiser = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), block_size=32, is_symmetric=True)
quantiser.process()
onnx.save(quantiser.model.model, sys.argv[2], save_as_external_data=True, location="quantised.data")
"""


class GraphModel:
    """A graph as `evaluate.nats` takes a model."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._adapter = onnxruntime.LoraAdapter() if adapter else None
        if self._adapter is not None:
            self._adapter.Load(str(adapter))
        config = path.with_name("genai_config.json")
        decoder = json.loads(config.read_text())["model"]["decoder"] if config.exists() else {}
        # a graph of the builder names these axes, and only its configuration has their sizes
        self._sizes = {1: decoder.get("num_key_value_heads"), 3: decoder.get("head_size")}
        self._past = {p.name: p.shape for p in self._session.get_inputs() if p.name.startswith("past_key_values")}

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(1)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        rows = input_ids.numpy()
        feed = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
        for name, shape in self._past.items():
            heads, width = (
                size if isinstance(size, int) else self._sizes[at] for at, size in ((1, shape[1]), (3, shape[3]))
            )
            feed[name] = np.zeros((len(rows), heads, 0, width), np.float32)
        run_options = onnxruntime.RunOptions()
        if self._adapter is not None:
            run_options.add_active_adapter(self._adapter)
        return SimpleNamespace(logits=torch.from_numpy(self._session.run(["logits"], feed, run_options)[0]))


class Text:
    """One of the example's texts: the first half to calibrate on, the second to score."""

    def __init__(self, kind: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        text = (ROOT / "examples" / "heldout" / f"{kind}.txt").read_text(encoding="utf-8")
        middle = text.index("\n", len(text) // 2)
        halves = text[:middle], text[middle:]
        self.first, self.second = (tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in halves)
        self._nbytes, self._bos = len(text[middle:].encode()), tokenizer.bos_token_id

    def bits(self, model: Any) -> float:
        return evaluate.nats(model, self.second, self._bos) / math.log(2) / self._nbytes

    def calibrate(self, model: Path, path: Path) -> None:
        save_file(
            calibrate.record(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), self.first), path
        )


def size(folder: Path) -> int:
    """Bytes of weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".data"))


def export(out: Path, adapters: list[Path], options: Mapping[str, Any], inputs: Path) -> float:
    """Export, and return the error of all weights of codes together."""
    shutil.rmtree(out, ignore_errors=True)
    given = {name: inputs if value == "inputs" else value for name, value in options.items()}
    ledger = surgery.export_onnx(BASE, adapters, output=out, **given).ledger
    coded = [error for _, error in ledger.coded] if ledger else []
    return sum(coded[1:], start=coded[0]).relative if coded else 0.0


def quality(work: Path) -> None:
    """Bits per byte of the base by bits, rounding and scales."""
    text, found = Text("source"), {}
    text.calibrate(BASE, work / "inputs.safetensors")
    print(
        "| weights | MB | error of weights | bits per byte | more than as stored |\n| --- | ---: | ---: | ---: | ---: |"
    )
    sizes: dict[str, int] = {}
    for name, options in SCHEMES.items():
        if options.get("weights_type") == "mixed":
            options = {**options, "budget": (sizes["int4, nearest"] + sizes["int8"]) // 2}
        error = export(work / "out", [], options, work / "inputs.safetensors")
        sizes[name], found[name] = size(work / "out"), text.bits(GraphModel(work / "out" / "prefill.onnx"))
        more = found[name] - found["as stored"]
        print(f"| {name} | {sizes[name] / 1e6:.2f} | {error:.4f} | {found[name]:.4f} | {more:+.4f} |", flush=True)
    assert abs(found["int8"] - found["as stored"]) < 0.002, found
    assert found["int4, feedback"] < found["int4, nearest"], found
    assert found["int4, feedback, scales searched"] < found["int4, scales searched"], found
    assert found["mixed, nearest"] < found["int4, nearest"], found
    assert sizes["mixed, nearest"] <= (sizes["int4, nearest"] + sizes["int8"]) // 2


def merged(work: Path) -> None:
    """The example's LoRA: merged and then quantised, and in slots over a quantised base."""
    text, found = Text("target"), {}
    surgery.merge(BASE, LORA, output=work / "merged")
    text.calibrate(work / "merged", work / "inputs.safetensors")
    ways: dict[str, tuple[list[Path], dict[str, Any]]] = {
        "merged, as stored": ([LORA], {}),
        "merged, int8": ([LORA], {"weights_type": "int8"}),
        "merged, int4 nearest": ([LORA], INT4),
        "merged, int4 along the LoRA's inputs": ([LORA], {**INT4, "rounding": "feedback"}),
        "merged, int4 along a calibration's too": ([LORA], {**INT4, "calibration": "inputs", "scales": "search"}),
        "int4 nearest, then slots": ([], {**INT4, "swap": [LORA]}),
        "int4 along a calibration, then slots": (
            [],
            {**INT4, "swap": [LORA], "calibration": "inputs", "scales": "search"},
        ),
    }
    print("| graph | MB | bits per byte | more than merged as stored |\n| --- | ---: | ---: | ---: |")
    for name, (adapters, options) in ways.items():
        export(work / "out", adapters, options, work / "inputs.safetensors")
        slot = work / "out" / "adapters" / f"{LORA.name}.onnx_adapter" if "swap" in options else None
        found[name] = text.bits(GraphModel(work / "out" / "prefill.onnx", slot))
        more = found[name] - found["merged, as stored"]
        print(f"| {name} | {size(work / 'out') / 1e6:.2f} | {found[name]:.4f} | {more:+.4f} |", flush=True)
    assert found["merged, int4 along a calibration's too"] < found["merged, int4 nearest"], found


def logit_error(path: Path, ids: Any, expected: Any) -> float:
    """Relative to the logits, in the norm of Frobenius."""
    found = GraphModel(path)(torch.from_numpy(ids)).logits.numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def print_peer(name: str, label: str, sample: Sample, folder: Path, error: float) -> None:
    """A line of the table of `peers`; MB are of weights and graphs."""
    nbytes = size(folder) + sum(path.stat().st_size for path in folder.glob("*.onnx"))
    print(
        f"| {name} | {label} | {sample.wall:.2f} | {sample.cpu:.2f} | {sample.peak / 1e6:.0f} | {nbytes / 1e6:.2f} "
        f"| {error:.4f} |",
        flush=True,
    )


def peers(work: Path, python: str, shapes: list[str]) -> None:
    """onnxruntime-genai's builder, and onnxruntime's quantiser of our graph of MatMul, of the same models."""
    print(
        "| model | graph | s | CPU s | peak MB | MB | error of logits |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    ids = np.random.default_rng(3).integers(3, 1500, (2, 48))
    for name in ("example", *shapes):
        base, tiny = (BASE, True) if name == "example" else (work / name, False)
        if not tiny:
            write_base(SHAPES[name], base, shards=1)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(BASE / file, base)
        surgery.export_onnx(base, output=work / "plain")
        expected = GraphModel(work / "plain" / "prefill.onnx")(torch.from_numpy(ids)).logits.numpy()
        shutil.rmtree(work / "plain")
        command = [sys.executable, "-P", "-m", "surgery_cli", "-q", "export-onnx", str(base), "-o", str(work / "out")]
        rows: dict[str, list[str]] = {
            "surgery": [*command, "--weights-type", "int4"],
            "surgery, scales searched": [*command, "--weights-type", "int4", "--scales", "search"],
            "surgery, table of 4 bits": [*command, "--weights-type", "int4", "--embeddings", "int4"],
            "onnxruntime-genai builder": [python, "-c", BUILDER, str(base), str(work / "out")],
        }
        errors, seconds = {}, {}
        for label, words in rows.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            sample = run(words, work / "log.txt")
            graph = work / "out" / ("prefill.onnx" if (work / "out" / "prefill.onnx").exists() else "model.onnx")
            errors[label], seconds[label] = logit_error(graph, ids, expected), sample.wall
            print_peer(name, label, sample, work / "out", errors[label])
        shutil.rmtree(work / "out", ignore_errors=True)
        surgery.export_onnx(base, output=work / "out", linear="matmul", target="portable")
        (work / "nbits").mkdir()
        sample = run(
            [python, "-c", QUANTISER, str(work / "out/model.onnx"), str(work / "nbits/model.onnx")], work / "log.txt"
        )
        error = logit_error(work / "nbits" / "model.onnx", ids, expected)
        print_peer(name, "MatMulNBitsQuantizer of --linear matmul", sample, work / "nbits", error)
        for folder in ("out", "nbits", "out-cache", *([] if tiny else [name])):
            shutil.rmtree(work / folder, ignore_errors=True)
        assert errors["surgery, scales searched"] < errors["onnxruntime-genai builder"], errors
        assert seconds["onnxruntime-genai builder"] > 3 * seconds["surgery"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", default=["quality", "merged", "peers"])
    parser.add_argument("--peers", help="interpreter of an environment with the peers")
    parser.add_argument("--shapes", default="150M")
    parser.add_argument("--folder", type=Path, help="where to work")
    options = parser.parse_args()
    print(versions("onnxruntime-gpu", "numpy"))
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    try:
        if "quality" in options.part:
            quality(work)
        if "merged" in options.part:
            merged(work)
        if "peers" in options.part and options.peers:
            peers(work, options.peers, [name for name in options.shapes.split(",") if name])
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
