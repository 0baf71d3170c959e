# SPDX-License-Identifier: Apache-2.0
"""Slots in every exporter's graph: nothing changes without an adapter, PEFT's answer with one, and the same once folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import surgery
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery_formats import FitError, NothingChangedError
from tests.support.graph_pairs import PAIRS, Pair, difference, feed

REFUSED = {
    "fused-bert": "read by the Attention",
    "fused-bert-fp16": "read by the Attention",
}
CODED = ("genai-llama-int4", "genai-qwen2-int4", "q4-llama", "q4-zeros-llama", "quantized-bert", "quantized-llama")
CASES = [(name, "lora") for name in PAIRS if not name.endswith("-slots") and name not in (*REFUSED, *CODED, "qdq-vit")]
CASES += [(name, "head") for name in ("genai-llama", "dynamo-llama", "mobius-llama")]
WITHIN = {"float32": 1e-4, "float16": 2e-2}


def answered(graph: Path, pair: Pair, adapter: Path | None = None, more: dict[str, Any] | None = None) -> Any:
    """The first output, of the nodes as they are: onnxruntime fuses a graph without slots into other kernels."""
    options, run = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {key.removeprefix("inputs."): value for key, value in pair.run().items() if key.startswith("inputs.")}
    feeds = {one.name: feed(one, given) for one in session.get_inputs() if one.name not in (more or {})} | (more or {})
    if adapter is not None:
        lora = onnxruntime.LoraAdapter()
        lora.Load(str(adapter))
        run.add_active_adapter(lora)
    return session.run([session.get_outputs()[0].name], feeds, run)[0]


def operators(graph: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_slots_are_silent_until_filled_and_leave_no_trace_once_folded(name: str, adapter: str, tmp_path: Path):
    pair = PAIRS[name]
    surgery.insert(pair.graph, pair.adapter(adapter), base=pair.base, output=tmp_path / "slots")
    graph, file = tmp_path / "slots" / "model.onnx", tmp_path / "slots" / "adapters" / f"{adapter}.onnx_adapter"

    assert answered(graph, pair).tobytes() == answered(pair.graph, pair).tobytes()
    expected = pair.expected(adapter)["outputs"]
    assert difference(answered(graph, pair, file), expected) <= WITHIN[pair.dtype]

    surgery.fold(graph, file, output=tmp_path / "folded")
    folded = tmp_path / "folded" / "model.onnx"
    assert difference(answered(folded, pair), expected) <= WITHIN[pair.dtype]
    parted = {"FusedGemm": ["Gemm", "Tanh"]}  # which stays parted
    before = [part for op in operators(pair.graph) for part in parted.get(op, [op])]
    assert operators(folded) == sorted(before)
    inputs = {one.name for one in onnx.load(folded, load_external_data=False).graph.input}
    assert inputs == {one.name for one in onnx.load(pair.graph, load_external_data=False).graph.input}


@pytest.mark.parametrize("name", CODED)
def test_slots_beside_codes_add_to_what_the_codes_give(name: str, tmp_path: Path):
    pair = PAIRS[name]
    surgery.insert(pair.graph, pair.adapter("lora"), base=pair.base, output=tmp_path / "slots")
    graph, file = tmp_path / "slots" / "model.onnx", tmp_path / "slots" / "adapters" / "lora.onnx_adapter"
    before = answered(pair.graph, pair)
    assert answered(graph, pair).tobytes() == before.tobytes()
    of_codes = difference(before, pair.run()["outputs"])
    expected = pair.expected("lora")["outputs"]
    assert difference(answered(graph, pair, file), expected) <= 3 * of_codes < difference(before, expected)
    with pytest.raises(FitError, match="into which nothing can be folded"):
        surgery.fold(graph, file, output=tmp_path / "folded")


def test_ranges_of_quantised_activations_are_warned_of(tmp_path: Path):
    pair = PAIRS["qdq-vit"]
    result = surgery.insert(pair.graph, pair.adapter("lora"), base=pair.base, output=tmp_path / "slots")
    assert "cut off" in result.warnings[0]
    assert answered(tmp_path / "slots" / "model.onnx", pair).tobytes() == answered(pair.graph, pair).tobytes()


@pytest.mark.parametrize("name", REFUSED)
def test_where_no_slot_can_be_is_told(name: str, tmp_path: Path):
    pair = PAIRS[name]
    with pytest.raises(FitError, match=REFUSED[name]):
        surgery.insert(pair.graph, pair.adapter("lora"), base=pair.base, output=tmp_path / "slots")
    assert not (tmp_path / "slots").exists()


def test_what_the_genai_builder_made_of_an_adapter_is_folded(tmp_path: Path):
    pair = PAIRS["genai-llama-slots"]
    result = surgery.fold(pair.graph, output=tmp_path / "folded")
    expected = pair.expected("lora")["outputs"]
    assert {rank for _, _, rank in result.folded} == {4}
    assert difference(answered(tmp_path / "folded" / "model.onnx", pair), expected) <= 1e-4
    assert not any("lora" in one.name for one in onnx.load(tmp_path / "folded" / "model.onnx").graph.initializer)


def test_olives_slots_are_folded_empty_or_with_what_fills_them(tmp_path: Path):
    pair = PAIRS["olive-llama-slots"]
    surgery.fold(pair.graph, output=tmp_path / "empty")
    assert answered(tmp_path / "empty" / "model.onnx", pair).tobytes() == answered(pair.graph, pair).tobytes()
    file = pair.graph.with_name("adapter_weights.onnx_adapter")
    surgery.fold(pair.graph, file, output=tmp_path / "full")
    expected = pair.expected("lora")["outputs"]
    assert difference(answered(tmp_path / "full" / "model.onnx", pair), expected) <= 1e-4
    half = surgery.fold(pair.graph, [(file, 0.5)], output=tmp_path / "half")
    arrays = {k: v * np.float32(0.5 if ".lora_B" in k else 1) for k, v in read_adapter_file(file).items()}
    got = answered(half.output / "model.onnx", pair)
    assert difference(got, answered(pair.graph, pair, more=arrays)) <= 1e-5


def test_a_graph_without_branches_is_not_written_again(tmp_path: Path):
    with pytest.raises(NothingChangedError, match="no branch of a LoRA"):
        surgery.fold(PAIRS["genai-llama"].graph, output=tmp_path / "out")
