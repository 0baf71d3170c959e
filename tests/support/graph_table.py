# SPDX-License-Identifier: Apache-2.0
"""What locate, merge, slots and fold make of every golden graph, compared with PEFT: the rows of docs/exporters.md.

Answers are onnxruntime's, bytes are compared by what onnx reads of both files, and expected values are PEFT's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats import FitError
from tests.support.graph_pairs import Pair, answer, difference, feed

__all__ = [
    "BUILT_IN", "Measured", "Slotted", "bytes_elsewhere", "main_adapter", "measured", "merged_by_peft", "other_base", "slotted",
]  # fmt: skip

BUILT_IN = {"genai-llama-slots": "lora"}
"""Graphs that have an adapter in them, as constants: no merge into them is PEFT's answer, but what is folded is."""


@dataclass(frozen=True)
class Measured:
    """A graph with an adapter merged into it.

    Attributes:
        weights: Weights that the adapter changes.
        located: Of these, those found wholly.
        steps: The farthest that codes are from the base, in steps of their quantiser.
        before: The graph's own distance from its base's answer.
        after: The merged graph's distance from PEFT's answer.
        steps_after: The farthest that codes are from PEFT's merged weights.
        elsewhere: Bytes that changed outside the tensors of those weights.
    """

    weights: int
    located: int
    steps: float
    before: float
    after: float
    steps_after: float
    elsewhere: int


@dataclass(frozen=True)
class Slotted:
    """A graph with slots; where one has no place, the reason is all.

    Attributes:
        refused: Why there are none, or empty.
        silent: Whether the answer without an adapter is the graph's, bit for bit, with nodes as they are.
        fused: How far it is when onnxruntime fuses nodes.
        active: Distance from PEFT's answer with the adapter; None if it is in the graph.
        folded: The same after the slots were folded into the weights; None if they cannot be.
    """

    refused: str = ""
    silent: bool = False
    fused: float = 0.0
    active: float | None = None
    folded: float | None = None


def main_adapter(pair: Pair) -> str:
    """The adapter of the first table."""
    return "light" if pair.name == "qdq-vit" else "lora"  # the other leaves the ranges of its activations


def merged_by_peft(pair: Pair, adapter: str, folder: Path) -> Path:
    """The base with the weights of PEFT's merge."""
    folder.mkdir(parents=True)
    source = next(path for path in pair.base.iterdir() if path.suffix == ".safetensors")
    changed = {key[8:]: value for key, value in pair.expected(adapter).items() if key.startswith("weights.")}
    save_file(load_file(source) | changed, folder / source.name)
    (folder / "config.json").write_bytes((pair.base / "config.json").read_bytes())
    return folder


def other_base(pair: Pair, folder: Path) -> Path:
    """Another model with the same names and sizes."""
    folder.mkdir(parents=True)
    source = next(path for path in pair.base.iterdir() if path.suffix == ".safetensors")
    rng = np.random.default_rng(9)
    values = {name: rng.normal(0, 0.15, value.shape).astype(value.dtype) for name, value in load_file(source).items()}
    save_file(values, folder / source.name)
    (folder / "config.json").write_bytes((pair.base / "config.json").read_bytes())
    return folder


def measured(pair: Pair, adapter: str) -> Measured:
    """Locate and merge, and compare."""
    expected = pair.expected(adapter)
    names = [key[8:] for key in expected if key.startswith("weights.")]
    before = surgery.locate(pair.graph, pair.base)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "merged"
        surgery.merge(pair.graph, pair.adapter(adapter), graph_of=pair.base, output=out)
        steps_after = 0.0
        if pair.dtype.startswith("int"):
            after = surgery.locate(out / "model.onnx", merged_by_peft(pair, adapter, Path(place) / "peft"))
            codes = [name for name in names if any(one.error for one in before.located.of_weight[name])]
            assert all(after.located.covered[name] == 1 for name in codes)
            steps_after = farthest(after, codes)
        run = pair.run()
        return Measured(
            len(names),
            sum(before.located.covered[name] == 1 for name in names),
            farthest(before, names),
            difference(answer(pair.graph, run), run["outputs"]),
            difference(answer(out / "model.onnx", run), expected["outputs"]),
            steps_after,
            bytes_elsewhere(pair.graph, out / "model.onnx", tensors_of(before, names)),
        )


def farthest(found: Any, names: list[str]) -> float:
    """In steps of the quantiser, the worst of some weights."""
    return max((piece.error for name in names for piece in found.located.of_weight[name]), default=0.0)


def tensors_of(found: Any, names: list[str]) -> set[str]:
    """The tensors of a graph that some weights lie in, and the scales of codes."""
    pieces = {piece.place.name for name in names for piece in found.located.of_weight[name]}
    codes = [coded for name, coded in found.located.coded.items() if name in pieces]
    return pieces | {coded.scales.name for coded in codes if coded.scales is not None}


def bytes_elsewhere(first: Path, second: Path, allowed: set[str]) -> int:
    """How many bytes differ that are not those of some tensors, in the graphs' files and in those beside them."""
    total = 0
    models = [onnx.load(path, load_external_data=False) for path in (first, second)]
    spans: dict[str, list[tuple[int, int]]] = {}
    for model in models:
        for tensor in tensors_in(model):
            places = {entry.key: entry.value for entry in tensor.external_data}
            if places:
                start = int(places.get("offset", 0))
                kept = spans.setdefault(places["location"], [])
                if tensor.name in allowed:
                    kept.append((start, start + int(places["length"])))
            elif tensor.name in allowed:
                tensor.raw_data = bytes(len(tensor.raw_data))
                tensor.ClearField("float_data")
    texts = [model.SerializeToString(deterministic=True) for model in models]
    total += differing(texts[0], texts[1])
    for name, ranges in spans.items():
        contents = [bytearray((path.parent / name).read_bytes()) for path in (first, second)]
        for content in contents:
            for start, stop in ranges:
                content[start:stop] = bytes(stop - start)
        total += differing(*contents)
    return total


def differing(first: bytes | bytearray, second: bytes | bytearray) -> int:
    if len(first) != len(second):
        return max(len(first), len(second))
    return int((np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)).sum())


def tensors_in(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constants, as `surgery` names them."""
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            node.attribute[0].t.name = node.output[0]
            yield node.attribute[0].t


def slotted(pair: Pair, adapter: str) -> Slotted:
    """Insert slots, run with and without the adapter, and fold them."""
    expected, run = pair.expected(adapter)["outputs"], pair.run()
    with tempfile.TemporaryDirectory() as place:
        if pair.name in BUILT_IN:
            surgery.fold(pair.graph, output=Path(place) / "folded")
            return Slotted(silent=True, folded=difference(answer(Path(place) / "folded" / "model.onnx", run), expected))
        out = Path(place) / "slots"
        try:
            surgery.insert(pair.graph, pair.adapter(adapter), base=pair.base, output=out)
        except FitError as error:
            words = re.search("is read by the ([A-Za-z]+)", str(error))
            if words is None:
                raise
            return Slotted(f"no place for slots in {words[1]}")
        graph, file = out / "model.onnx", out / "adapters" / f"{adapter}.onnx_adapter"
        silent = plain(graph, run).tobytes() == plain(pair.graph, run).tobytes()
        folded: float | None = None
        try:
            surgery.fold(graph, file, output=Path(place) / "folded")
            folded = difference(answer(Path(place) / "folded" / "model.onnx", run), expected)
        except FitError:
            assert pair.dtype.startswith("int")
        fused = difference(answer(graph, run), answer(pair.graph, run))
        return Slotted("", silent, fused, difference(plain(graph, run, file), expected), folded)


def plain(graph: Path, run: dict[str, Any], adapter: Path | None = None) -> Any:
    """The first output, of the nodes as they are."""
    options, settings = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {key.removeprefix("inputs."): value for key, value in run.items() if key.startswith("inputs.")}
    if adapter is not None:
        lora = onnxruntime.LoraAdapter()
        lora.Load(str(adapter))
        settings.add_active_adapter(lora)
    feeds = {one.name: feed(one, given) for one in session.get_inputs()}
    return session.run([session.get_outputs()[0].name], feeds, settings)[0]
