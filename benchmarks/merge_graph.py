# SPDX-License-Identifier: Apache-2.0
"""Locating and merging a rank-16 LoRA on all linear layers into somebody else's 1.24 B fp16 graph, beside copying the graph.

    python benchmarks/merge_graph.py [--rounds 5] [--pause 5] [--layout turned|straight] [--base bf16] [--folder DIR]

The graph is made on the spot: every matrix transposed as exporters store it (or as it is), under names that say nothing, in one
file of external data. Every round runs the copy (``cp`` and ``sync -f``) and the merge in turn, on warm files, as whole
processes; the merge searches, compares, computes, writes, reads back and syncs. Correctness is asserted inside: sampled
tensors against float64, and every byte outside the located weights against the graph that was given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from measure import Sample, median, run, versions
from onnx import TensorProto, helper
from safetensors.numpy import load_file
from shapes import LARGE, LINEAR, Shape, write_adapter

from surgery_formats.containers.safetensors import layout
from surgery_formats.dtypes import DType

PAGE = 4096
BLOCK = 1 << 16


def drawn(shape: Shape, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight of the model: rows of random numbers, none of which begins like another."""
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 24) * 0.02).astype(np.float32).astype(dtype)
    for name, sizes in shape.tensors():
        values = np.empty(int(np.prod(sizes)), dtype)
        for at in range(0, values.size, BLOCK):
            part = values[at : at + BLOCK]
            start = int(rng.integers(pool.size - BLOCK))
            part[:] = pool[start : start + part.size]
        yield name, values.reshape(sizes)


def write_pair(shape: Shape, folder: Path, dtype: DType, turned: bool) -> None:
    """A checkpoint, and a graph of it."""
    (folder / "base").mkdir(parents=True)
    (folder / "graph").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({**shape.config(), "dtype": dtype.torch_name}))
    header, ranges = layout([(name, dtype, sizes) for name, sizes in shape.tensors()], {})
    tensors, at = [], 0
    with (
        open(folder / "base" / "model.safetensors", "wb") as base,
        open(folder / "graph" / "weights.bin", "wb") as data,
    ):
        base.write(header)
        for number, (name, values) in enumerate(drawn(shape, dtype.numpy)):
            base.seek(ranges[name][0])
            base.write(values.tobytes())
            half = values.astype(np.float32).astype(np.float16)
            half = half.T if turned and name.startswith("model.layers") and half.ndim == 2 else half
            at = -(-at // PAGE) * PAGE
            data.seek(at)
            data.write(np.ascontiguousarray(half).tobytes())
            tensor = TensorProto(
                name=f"val_{number}", data_type=TensorProto.FLOAT16, dims=half.shape, data_location=TensorProto.EXTERNAL
            )
            for key, value in (("location", "weights.bin"), ("offset", at), ("length", half.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            at += half.nbytes
    nodes = [helper.make_node("Identity", [one.name], [f"out_{one.name}"]) for one in tensors]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), folder / "graph" / "model.onnx")


def check(shape: Shape, work: Path, out: Path, turned: bool) -> None:
    """Sampled tensors within 0.51 ulp of float64; everything else to the byte."""
    factors = load_file(work / "adapter" / "adapter_model.safetensors")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert (out / "model.onnx").read_bytes() == (work / "graph" / "model.onnx").read_bytes()
    before, after = (np.memmap(folder / "weights.bin", np.uint8, "r") for folder in (work / "graph", out))
    assert before.size == after.size
    sampled = {f"model.layers.{layer}.{module}" for layer, module in ((0, LINEAR[0]), (7, LINEAR[4]), (15, LINEAR[6]))}
    end = 0
    for (name, sizes), tensor in zip(shape.tensors(), model.graph.initializer, strict=True):
        entry = {one.key: one.value for one in tensor.external_data}
        first, stop = int(entry["offset"]), int(entry["offset"]) + int(entry["length"])
        assert np.array_equal(before[end:first], after[end:first])
        end = stop
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR):
            assert np.array_equal(before[first:stop], after[first:stop]), name
        elif module in sampled:
            old, new = (side[first:stop].view(np.float16).reshape(tuple(tensor.dims)) for side in (before, after))
            old, new = (side.T if turned else side for side in (old, new))
            assert old.shape == sizes
            a, b = (factors[f"base_model.model.{module}.lora_{k}.weight"].astype(np.float64) for k in "AB")
            exact = old.astype(np.float64) + 2.0 * (b @ a)
            spacing = np.spacing(np.maximum(np.abs(exact), np.abs(old)).astype(np.float16)).astype(np.float64)
            worst = float((np.abs(new - exact) / spacing).max())
            assert worst <= 0.51, (name, worst)
            assert not np.array_equal(old, new)
    assert np.array_equal(before[end:], after[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--layout", choices=("turned", "straight"), default="turned")
    parser.add_argument(
        "--base", choices=("fp16", "bf16"), default="fp16", help="type of the checkpoint; the graph is fp16"
    )
    parser.add_argument("--folder", type=Path, help="where to work; needs 10 GB")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    try:
        bench(work, options)
    finally:
        shutil.rmtree(work)


def bench(work: Path, options: argparse.Namespace) -> None:
    turned = options.layout == "turned"
    assert ml_dtypes  # numpy has no bfloat16 of its own
    write_pair(LARGE, work, DType.parse(options.base), turned)
    write_adapter(LARGE, work / "adapter")
    copied, out = work / "copied", work / "out"
    copy = ["sh", "-c", f"cp -r {work}/graph {copied} && sync -f {copied}"]
    merge = [sys.executable, "-P", "-m", "surgery_cli", "-q", "merge", str(work / "graph" / "model.onnx")]
    merge += [str(work / "adapter"), "--base", str(work / "base"), "-o", str(out)]
    locate = [
        sys.executable,
        "-P",
        "-m",
        "surgery_cli",
        "-q",
        "locate",
        str(work / "graph"),
        "--base",
        str(work / "base"),
    ]
    plain = [
        sys.executable,
        "-P",
        "-m",
        "surgery_cli",
        "-q",
        "merge",
        str(work / "base"),
        str(work / "adapter"),
        "-o",
        str(out),
    ]
    commands = (("copy", copy, copied), ("merge", merge, out), ("locate", locate, None), ("plain", plain, out))
    samples: dict[str, list[Sample]] = {name: [] for name, _, _ in commands}
    run(copy, work / "log")
    shutil.rmtree(copied)
    run(merge, work / "log")
    check(LARGE, work, out, turned)
    shutil.rmtree(out)
    for _ in range(options.rounds):
        for name, command, written in commands:
            time.sleep(options.pause)
            samples[name].append(run(command, work / "log"))
            if written is not None:
                shutil.rmtree(written)
    base = median([sample.wall for sample in samples["copy"]])
    print(
        f"{LARGE.parameters / 1e9:.2f} B parameters, fp16 graph, {options.layout}, {options.base} checkpoint, rank 16\n"
    )
    print("| | wall, s (median, min-max) | against copy | processor, s | peak memory, MB |")
    print("|---|---|---|---|---|")
    titles = {"copy": "`cp` + `sync -f`", "merge": "locate and merge", "locate": "`surgery locate`, all compared"}
    titles["plain"] = "the same merge of the checkpoint"
    for name, found in samples.items():
        walls = [sample.wall for sample in found]
        span = f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        cpu, peak = median([sample.cpu for sample in found]), max(sample.peak for sample in found) / 1e6
        print(f"| {titles[name]} | {span} | {median(walls) / base:.2f}x | {cpu:.1f} | {peak:.0f} |")
    print(f"\n{versions('numpy', 'onnx')}")


if __name__ == "__main__":
    main()
