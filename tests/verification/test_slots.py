# SPDX-License-Identifier: Apache-2.0
"""``surgery verify`` fills the slots of a graph: a wrong weight, scale or name is found without an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import ProofError
from tests.oracles import recipes
from tests.support import trained

TIED = {"tie_word_embeddings": True}
CASES = {
    "llama": ("llama", {"hidden_size": 64}, trained.ALL, "cpu", "fp32", torch.float32),
    "llama for cuda": ("llama", {"hidden_size": 64}, trained.ALL, "cuda", "bf16", torch.bfloat16),
    "gpt2, transposed": ("gpt2", {}, ["c_attn", "c_proj"], "cpu", "fp32", torch.float32),
    "gpt-neox, by head": ("gpt_neox", {}, ["query_key_value", "dense"], "portable", "fp32", torch.float32),
    "gemma2, a scaled table": ("gemma2", {}, ["q_proj", "embed_tokens"], "cpu", "fp32", torch.float32),
    "gemma2 in bf16": ("gemma2", {}, ["q_proj", "embed_tokens"], "cuda", "bf16", torch.bfloat16),
    "opt": ("opt", {}, ["fc1", "q_proj"], "portable", "fp16", torch.float16),
    "a tied head": ("qwen2", TIED, ["lm_head"], "cpu", "fp32", torch.float32),
    "a tied table and head": ("qwen2", TIED, ["embed_tokens", "lm_head", "q_proj"], "cpu", "fp32", torch.float32),
    "bert": ("bert_sequence", {}, ["query", "value"], "cpu", "fp32", torch.float32),
}


def export(case: str, folder: Path) -> Path:
    name, fields, modules, target, dtype, stored = CASES[case]
    base = recipes.build(name, folder / "base", dtype=stored, **fields)
    kind, options = trained._lora(target_modules=modules)
    task = "FEATURE_EXTRACTION" if "bert" in name else "CAUSAL_LM"  # a trained classifier would go into no slot
    adapter = trained.train(name, base, (kind, options), folder / "adapter", task=task)
    export_onnx(base, swap=[adapter], output=folder / "out", target=target, dtype=dtype)
    (folder / "out" / "surgery_manifest.json").unlink()
    return folder / "out"


@pytest.mark.parametrize("case", CASES)
def test_filled_slots_equal_merged_weights(case: str, tmp_path: Path) -> None:
    out = export(case, tmp_path)
    assert any("slots filled" in check.name for check in surgery.verify(out).checks)


def scaled(model: onnx.ModelProto, slots: list[dict[str, str]]) -> None:
    node = next(node for node in model.graph.node if slots[3]["B"] in node.input)
    two = onnx.numpy_helper.from_array(np.array(1.02, np.float32), "two")
    model.graph.initializer.append(two)
    place = list(model.graph.node).index(node)
    made = onnx.helper.make_node("Mul", [slots[3]["B"], "two"], ["twice"])
    model.graph.node.insert(place, made)
    node = next(node for node in model.graph.node if slots[3]["B"] in node.input and node.op_type != "Mul")
    node.input[list(node.input).index(slots[3]["B"])] = "twice"


def crossed(model: onnx.ModelProto, slots: list[dict[str, str]]) -> None:
    """The factors of k where v's belong."""
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = {slots[1]["A"]: slots[2]["A"], slots[2]["A"]: slots[1]["A"]}.get(name, name)


def unnamed(model: onnx.ModelProto, slots: list[dict[str, str]]) -> None:
    del slots[5]


def renamed(model: onnx.ModelProto, slots: list[dict[str, str]]) -> None:
    slots[1]["weight"], slots[2]["weight"] = slots[2]["weight"], slots[1]["weight"]


@pytest.mark.parametrize("fault", [scaled, crossed, unnamed, renamed])
def test_a_wrong_slot_is_caught(fault: Any, tmp_path: Path) -> None:
    out = export("llama", tmp_path)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    entry = next(one for one in model.metadata_props if one.key == "surgery.contract")
    contract = json.loads(entry.value)
    fault(model, contract["slots"])
    entry.value = json.dumps(contract)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ProofError):
        surgery.verify(out)


@pytest.mark.parametrize(
    "change",
    [{"vocabulary": 98}, {"layers": 2}, {"kv_heads": 4}, {"head_dim": 8}, {"rope_switch": 3}, {"dtype": "bf16"}],
    ids=str,
)
def test_a_contract_with_other_sizes_than_the_model_is_caught(change: dict[str, Any], tmp_path: Path) -> None:
    base = recipes.build("llama", tmp_path / "base", hidden_size=64)
    export_onnx(base, output=base)
    model = onnx.load(base / "model.onnx", load_external_data=False)
    entry = next(one for one in model.metadata_props if one.key == "surgery.contract")
    entry.value = json.dumps(json.loads(entry.value) | change)
    (base / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ProofError, match="the contract has"):
        surgery.verify(base)
